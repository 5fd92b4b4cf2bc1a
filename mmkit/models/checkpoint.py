"""Files that survive: best_model.pth, last/state.pth, and reading them back.

Every file is written to a temporary name in the same folder, synced and renamed, so that a kill or
a full disk leaves the previous one whole. Reading never runs code from a file
(`weights_only=True`). Walk-through: notebooks/05_checkpoints.ipynb.
"""

import contextlib
import errno
import os
import random
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import nn

from ..files import as_path, lock
from .encoder import MultimodalEncoder

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # disk, quota, or the process's own limit
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}


def shown(path: str | os.PathLike) -> str:
    """A path as messages give it: from the working folder on, where it lies below that."""
    with contextlib.suppress(ValueError, OSError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return os.fspath(path)


def write_atomically(state: dict | bytes, path: str | os.PathLike) -> None:
    """`torch.save` that leaves either the old file or the whole new one, never a part.

    Bytes are written as they are. Returns when file and name are on the disk. Raises OSError, with
    the system's errno, that says which file could not be written, how much room it wants, and what
    to do.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        with _temporary(path) as file:
            file.write(state) if isinstance(state, bytes) else torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        if (reason := _disk_error(error)) is None:
            raise
        kept = f"the earlier {path.name} is whole" if path.is_file() else "there is no earlier one"
        kept += ", and nothing half-written stays"
        raise _in_words(reason, path, f"It takes {_size(state) / 1e6:.1f} MB, ", kept) from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, open and locked; gone afterwards, unless it was renamed.

    The system takes the lock away with the process, however that ends: a temporary file without
    one is stale. A name by process number could not tell, as numbers are used again.
    """
    file, temporary = _locked(path)
    try:
        with file:
            yield file
    finally:
        temporary.unlink(missing_ok=True)


def _locked(path: Path) -> tuple[BinaryIO, Path]:
    """A new file that is ours: locked, and not removed as stale just before it was."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        file = open(temporary, "xb")
        lock(file)
        if os.fstat(file.fileno()).st_nlink:
            return file, temporary
        file.close()


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left half-written; files still being written are locked."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError), open(left, "rb") as file:
            if lock(file, wait=False):
                left.unlink()


def _disk_error(error: OSError | RuntimeError) -> OSError | None:
    """The OSError behind what `torch.save` raised; None where the disk is not at fault.

    Its zip writer, when a write fails, raises a RuntimeError of its own on top of the OSError.
    """
    if isinstance(error, OSError):
        return error
    if not re.search("inline_container|PytorchStreamWriter|iostream", str(error)):
        return None
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__context__
    return below or OSError(errno.EIO, "")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError while a file of a run is written says which file it was, and what to do."""
    try:
        yield
    except OSError as error:
        raise _in_words(error, path) from error


def _in_words(reason: OSError, path: Path, wanted: str = "", kept: str = "") -> OSError:
    """The same error, saying what is lost (nothing) and what to do."""
    remedy, number = "check that folder and its disk", reason.errno or errno.EIO
    if number in _NO_ROOM:
        remedy = "free some space, set output_dir to another disk, or keep fewer (keep_last)"
    elif number in _NOT_ALLOWED:
        remedy = "set output_dir to a folder that you may write to, or give it the right to be"
    free = shutil.disk_usage(_existing(path.parent)).free / 1e6
    return OSError(
        number,
        f"cannot write {shown(path)}: {os.strerror(number)}. {wanted}{free:.1f} MB are free "
        f"there{f'; {kept}' if kept else ''}. To go on: {remedy}",
    )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.is_dir())


def _size(state) -> int:
    """Bytes of the tensors in nested dicts and lists, memory that several share counted once."""
    if isinstance(state, bytes):
        return len(state)
    storages, rest = {}, [state]
    while rest:
        value = rest.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list | tuple):
            rest.extend(value)
    return sum(storages.values())


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


def random_state() -> dict:
    """The state of every generator that a step may draw from, as plain values and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_initialized():  # asking would start it, on the first GPU
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


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever is drawn in here, the generators stand afterwards where they stood before."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


class OwnState:
    """Generators and global flags of a training run, apart from those of whoever calls it.

    `inside()` puts the run's in their place, `outside()` (for callbacks) the caller's again; both
    put back what they found, and do nothing where that is there already.
    """

    def __init__(self, deterministic: bool):
        self._deterministic = deterministic
        self._inside = False
        self._other: dict | None = None  # of the generators: what is not in place now

    def inside(self) -> contextlib.AbstractContextManager:
        """A context in which the run's own state is in place."""
        return contextlib.nullcontext() if self._inside else self._swapped()

    def outside(self) -> contextlib.AbstractContextManager:
        """A context in which the caller's state is in place."""
        return self._swapped() if self._inside else contextlib.nullcontext()

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def cuda_has_started(self) -> None:
        """Its generators, too, are the caller's until the run seeds them."""
        if self._other is not None and "every cuda" not in self._other:
            self._other |= self._cuda()

    @staticmethod
    def _cuda() -> dict:
        return {"every cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_initialized() else {}

    def _swap(self) -> None:
        now = random_state() | self._cuda()
        if self._other is not None:
            set_random_state(self._other)
            if "every cuda" in self._other:
                torch.cuda.set_rng_state_all(self._other["every cuda"])
        self._other, self._inside = now, not self._inside
        if not self._deterministic:  # what the caller has asked for holds in the run, too
            return
        if self._inside:
            self._asked = torch.are_deterministic_algorithms_enabled()
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        if not self._asked:
            torch.use_deterministic_algorithms(self._inside, warn_only=self._inside)
