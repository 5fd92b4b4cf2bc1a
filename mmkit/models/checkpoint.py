"""Reading best_model.pth and last/state.pth, and the model in them.

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
    damaged, holds anything but tensors and plain values, or lacks a needed entry.
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
    """Raise if a byte of the file has changed since it was written: torch.load does not check."""
    if zipfile.is_zipfile(path):  # as all files of mmkit are; those from before torch 1.6 are not
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
    """Load weights of the same architecture; else ValueError naming the first difference.

    The prefixes of names that DDP and torch.compile add ("module.", "_orig_mod.") do not matter.
    """
    own, path = model.state_dict(), shown(path)
    names = {_plain_name(name): name for name in own}
    weights = {names.get(_plain_name(name), name): value for name, value in weights.items()}
    for name in (
        own | weights
    ):  # in the model's order, so that the same fault gives the same message
        if name not in weights or name not in own:
            where = "the model" if name not in own else "the file"
            raise ValueError(f"{path} is of another architecture: {where} has no {name!r}")
        if own[name].shape != weights[name].shape:
            raise ValueError(
                f"{path} is of another architecture: {name!r} is {tuple(weights[name].shape)} in "
                f"the file, {tuple(own[name].shape)} in the model; use mm.load(path) instead "
                "(with image_size=… for another image size)"
            )
    model.load_state_dict(weights)


def load(
    path: str | os.PathLike, device: str | torch.device = "cpu", image_size: int | None = None
) -> MultimodalEncoder:
    """Load a trained model with its tokenizer, in evaluation mode, ready to encode.

    Args:
        path: a `best_model.pth`, or a folder that `save_pretrained` wrote.
        device: where to put the model.
        image_size: side of the images in pixels, as `MultimodalEncoder.resize` changes it;
            None = the size that it was trained at.

    Returns:
        The model, a `MultimodalEncoder`.

    Raises:
        FileNotFoundError: there is no such file, or a file is missing in the folder.
        ValueError: the file or folder is damaged, holds anything but tensors and plain values, or
            is no mmkit model; or image_size is not a multiple of the patch size.

    Example:
        >>> model.save_pretrained("shared")
        >>> again = mm.load("shared")
        >>> again.training, again.image_size
        (False, 15)
        >>> pixels = data.batch([0, 1]).pixel_values
        >>> torch.allclose(again.encode_image(pixels), model.encode_image(pixels), atol=1e-5)
        True
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
            f"{shown(path)} describes no model that can be built ({error!r}); use a file that "
            "mmkit wrote"
        ) from None
    load_weights(model, state["model_state_dict"], path)
    model.trained_steps = state.get("trained_steps", 0)
    if image_size is not None:
        model.resize(image_size)
    return model.to_device(device).eval()
