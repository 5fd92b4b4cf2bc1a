"""The number type that a device computes in, found out by asking the device.

Walk-through: notebooks/03_training.ipynb.
"""

import torch

from .errors import nearest


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has units for bfloat16, so that its matrix products are fast in it.

    Without such units they work, but slowly: on a CPU with AVX2 alone torch multiplies in a plain
    loop, and older GPUs emulate them. A CPU must have the instructions, and oneDNN must use them
    (the variable ONEDNN_MAX_CPU_ISA can forbid it).
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    units = any(getattr(torch.cpu, check, lambda: False)() for check in checks)
    return units and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pick_precision(wanted: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for a device; None is plain float32.

    "auto" takes bf16 where the device has units for it, fp16 on older GPUs, float32 elsewhere. fp16
    works on a CPU, too (gradients are scaled as on a GPU), but it is slow: "auto" never takes it
    there. Raises ValueError for an unknown name.
    """
    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}
    if wanted not in (*known, "auto"):
        hint = nearest(wanted, (*known, "auto"))
        raise ValueError(f"mixed_precision={wanted!r} is not known; {hint}")
    if wanted in known:
        return known[wanted]
    if multiplies_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else None


def why_precision(wanted: str, device: torch.device) -> str:
    """Why `pick_precision` chose its type, as text."""
    if wanted != "auto":
        return "as asked"
    units = "units" if multiplies_bfloat16(device) else "no units"
    return f"auto: this {'GPU' if device.type == 'cuda' else 'CPU'} has {units} for bfloat16"


def autocast_for(wanted: str, device: torch.device) -> torch.autocast:
    """The autocast context of a `mixed_precision` setting on a device; it can be entered again."""
    dtype = pick_precision(wanted, device)
    return torch.autocast(device.type, dtype or torch.float32, enabled=dtype is not None)
