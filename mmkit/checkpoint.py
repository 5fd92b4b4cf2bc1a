"""Files that survive: best_model.pth, last/state.pth, and reading them back.

Every file is written to a temporary name in the same folder, synced and renamed, so that a kill or
a full disk leaves the previous one whole. Reading never runs code from a file
(`weights_only=True`). Walk-through: notebooks/05_checkpoints.ipynb.
"""

import os
import random
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .encoder import MultimodalEncoder


def write_atomically(state: dict, path: str | os.PathLike) -> None:
    """`torch.save` that leaves either the old file or the whole new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the rename itself
        os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint file, on the CPU; never runs code.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds anything but tensors
    and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train first, or check the path")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise ValueError(
            f"{path} is refused: it is damaged, or holds more than tensors and plain values "
            f"({_reason(error)}); nothing in it was run. Use a file that mmkit wrote, or an "
            "earlier one"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__}, no checkpoint; use a file mmkit wrote"
        )
    return state


def _reason(error: Exception) -> str:
    """What torch says about a file, without its advice to read it unsafely."""
    if wanted := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {wanted[1]}"
    first = (str(error).splitlines() or [""])[0].split(". ")[0]
    return first or type(error).__name__


def load_weights(model: nn.Module, weights: dict, path="the checkpoint") -> None:
    """Load weights of the same architecture; ValueError naming the first difference otherwise."""
    own = model.state_dict()
    for name in own | weights:  # in the model's order, so that the same fault gives the same words
        if name not in weights or name not in own:
            where = "the model" if name not in own else "the file"
            raise ValueError(f"{path} is of another architecture: {where} has no {name!r}")
        if own[name].shape != weights[name].shape:
            raise ValueError(
                f"{path} is of another architecture: {name!r} is {tuple(weights[name].shape)} in "
                f"the file, {tuple(own[name].shape)} in the model; use mm.load(path) instead"
            )
    model.load_state_dict(weights)


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> MultimodalEncoder:
    """The model of a `best_model.pth`, ready to encode: evaluation mode, its tokenizer with it.

    path may also be a folder that `save_pretrained` wrote.
    """
    if os.path.isdir(path):
        return MultimodalEncoder.from_pretrained(path, device=device)
    state = read_checkpoint(path)
    if "architecture" not in state or "model_state_dict" not in state:
        known = ", ".join(sorted(map(str, state))[:6])
        raise ValueError(f"{path} is no mmkit model (it has {known}); give a best_model.pth")
    model = MultimodalEncoder.from_architecture(state["architecture"])
    load_weights(model, state["model_state_dict"], path)
    return model.to_device(device).eval()


def random_state() -> dict:
    """The state of every generator that a step may draw from, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Put back what `random_state` saved."""
    torch.set_rng_state(state["torch"].cpu())
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
