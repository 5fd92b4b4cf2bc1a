"""Reading best_model.pth and last/state.pth back, and the model in them.

Reading never runs code from a file (`weights_only=True`); `files.write_atomically` writes them.
Walk-through: notebooks/05_checkpoints.ipynb.
"""

import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ..files import as_path, shown
from .encoder import MultimodalEncoder


def read_checkpoint(path: str | os.PathLike, needed: Iterable[str] = ()) -> dict:
    """The content of a checkpoint file, on the CPU; never runs code.

    needed: entries that it must have. Raises FileNotFoundError, or ValueError for a file that is
    damaged, holds anything but tensors and plain values, or lacks one of them.
    """
    if not Path(as_path(path)).is_file():
        raise FileNotFoundError(f"no checkpoint at {shown(path)}; train first, or check the path")
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file raises anything from EOFError to RuntimeError
        raise ValueError(
            f"{shown(path)} is refused: it is damaged, or holds more than tensors and plain values "
            f"({_reason(error)}); nothing in it was run. Use a file that mmkit wrote, or an "
            "earlier one"
        ) from None
    if not isinstance(state, dict):
        raise ValueError(
            f"{shown(path)} holds a {type(state).__name__}, no checkpoint; use a file mmkit wrote"
        )
    if missing := [name for name in needed if name not in state]:
        names = ", ".join(missing)
        raise ValueError(f"{shown(path)} has no {names}; use a file that mmkit wrote there")
    return state


def _check_sums(path: str | os.PathLike) -> None:
    """Raise where a byte of the file is not as it was written: torch.load itself would not look."""
    if zipfile.is_zipfile(path):  # all that mmkit writes; a file of before torch 1.6 is not
        with zipfile.ZipFile(path) as file:
            if damaged := file.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _reason(error: Exception) -> str:
    """What torch says about a file, without its advice to read it unsafely."""
    if wanted := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {wanted[1]}"
    first = (str(error).splitlines() or [""])[0].split(". ")[0]
    return first or type(error).__name__


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def load_weights(model: nn.Module, weights: dict, path="the checkpoint") -> None:
    """Load weights of the same architecture; ValueError naming the first difference otherwise.

    What DDP and torch.compile put in front of names ("module.", "_orig_mod.") does not matter.
    """
    own, path = model.state_dict(), shown(path)
    names = {_plain_name(name): name for name in own}
    weights = {names.get(_plain_name(name), name): value for name, value in weights.items()}
    for name in own | weights:  # in the model's order, so that the same fault gives the same words
        if name not in weights or name not in own:
            where = "the model" if name not in own else "the file"
            raise ValueError(f"{path} is of another architecture: {where} has no {name!r}")
        if own[name].shape != weights[name].shape:
            raise ValueError(
                f"{path} is of another architecture: {name!r} is {tuple(weights[name].shape)} in "
                f"the file, {tuple(own[name].shape)} in the model; use mm.load(path) instead "
                "(with image_size=…, where only that is to be another one)"
            )
    model.load_state_dict(weights)


def load(
    path: str | os.PathLike, device: str | torch.device = "cpu", image_size: int | None = None
) -> MultimodalEncoder:
    """The model of a `best_model.pth`, ready to encode: evaluation mode, its tokenizer with it.

    path may also be a folder that `save_pretrained` wrote. image_size: None = the one it was
    trained at; another one as by `MultimodalEncoder.resize`.
    """
    if os.path.isdir(as_path(path)):
        model = MultimodalEncoder.from_pretrained(path, device=device)
        return model if image_size is None else model.resize(image_size)
    state = read_checkpoint(path)
    if "architecture" not in state or "model_state_dict" not in state:
        known = ", ".join(sorted(map(str, state))[:6])
        raise ValueError(f"{shown(path)} is no mmkit model (it has {known}); give a best_model.pth")
    try:
        trained_by = {"loss": state.get("config", {}).get("loss", "info_nce")}
        model = MultimodalEncoder.from_architecture(trained_by | state["architecture"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{shown(path)} has an architecture that cannot be built ({error!r}); use a file that "
            "mmkit wrote"
        ) from None
    load_weights(model, state["model_state_dict"], path)
    model.trained_steps = state.get("trained_steps", 0)
    if image_size is not None:
        model.resize(image_size)
    return model.to_device(device).eval()
