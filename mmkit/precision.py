"""Which number type a device computes in.

Walk-through: notebooks/03_training.ipynb.
"""

import torch


def pick_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for a device; None is plain float32.

    "auto": bf16 where the hardware multiplies it, fp16 on older GPUs, float32 elsewhere. fp16 on a
    CPU works (gradients scaled as on a GPU) but is slow, so that "auto" never takes it there.
    """
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # Emulated bf16 is slower than float32, so ask for the instructions themselves.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return torch.bfloat16 if device.type == "cpu" and fast else None


def autocast_for(wanted: str, device: torch.device) -> torch.autocast:
    """The autocast context of a `mixed_precision` setting on a device; may be entered again."""
    dtype = pick_precision(wanted, device)
    return torch.autocast(device.type, dtype or torch.float32, enabled=dtype is not None)
