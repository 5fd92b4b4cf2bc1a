"""The device that a run trains on, and the number type it computes in, found out by asking it.

Walk-through: notebooks/03_training.ipynb.
"""

import functools
import os

import torch
from torch import Tensor

from .errors import nearest
from .noise import mask_noise


def trains_on_gpu() -> bool:
    """Whether a run of this process uses a GPU: CUDA, or Apple's where it is the only process."""
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "1")
    return torch.cuda.is_available() or (alone and mps_computes())


@functools.cache
def mps_computes() -> bool:
    """Whether Apple's GPU (MPS) is there and gives what a step relies on, found out by asking it.

    That is noise with the bits of the CPU, stable sorting, and gradients. In a virtual machine the
    GPU is listed, but has no memory.
    """
    if not torch.backends.mps.is_available():
        return False
    noise = mask_noise(0, 0, torch.arange(7), 5)
    try:
        there = mask_noise(0, 0, torch.arange(7).to("mps"), 5)
        order = there.argsort(dim=1, stable=True).cpu()
        x = torch.ones(3, 5).to("mps").requires_grad_()
        (x @ x.mT).sum().backward()
        same = torch.equal(there.cpu(), noise)
        same &= torch.equal(order, noise.argsort(dim=1, stable=True))
        return same and x.grad is not None and bool((x.grad == 6).all())
    except (RuntimeError, TypeError):
        return False


def in_float64(x: Tensor) -> Tensor:
    """The same numbers in float64; on the CPU where the device has no such type (MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has computed what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


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
    if device.type == "mps":
        return "auto: on Apple's GPUs"
    units = "units" if multiplies_bfloat16(device) else "no units"
    return f"auto: this {'GPU' if device.type == 'cuda' else 'CPU'} has {units} for bfloat16"


def autocast_for(wanted: str, device: torch.device) -> torch.autocast:
    """The autocast context of a `mixed_precision` setting on a device; it can be entered again."""
    dtype = pick_precision(wanted, device)
    return torch.autocast(device.type, dtype or torch.float32, enabled=dtype is not None)
