"""The files of a run: written during training, read back as a `Run`.

runs/<name>/ holds best_model.pth, last/state.pth, config.json, metrics.jsonl, the event files of
TensorBoard and, while the run is written, .lock. metrics.jsonl has one record per line; its "split"
is "train" (every `log_every` steps), "val" (every `eval_every` epochs) or "terms" (every
`term_gradients_every` steps). Walk-through: notebooks/03_training.ipynb.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..files import WINDOWS, lock, shown, write_atomically, writing
from ..models.checkpoint import load, read_checkpoint
from ..models.encoder import MultimodalEncoder
from ..models.model_card import training_metadata
from ..older_names import current_keys, older_attributes


@older_attributes(facts="metadata")
@dataclass
class Run:
    """The results of a training run, read from its folder."""

    path: Path
    history: list[dict]  # the records of metrics.jsonl, in order
    best: dict  # the validation record of best_model.pth; {} where there is none

    @classmethod
    def load(cls, path) -> "Run":
        """Read the run in a folder; FileNotFoundError where there is none."""
        path = Path(path).absolute()
        if not (path / "metrics.jsonl").is_file():
            raise FileNotFoundError(
                f"no run in {shown(path)}: it has no metrics.jsonl; check the folder"
            )
        history = read_records(path / "metrics.jsonl")
        best = [record for record in history if record.get("best")]
        return cls(path, history, best[-1] if best else {})

    def curve(self, key: str, split: str = "train") -> tuple[list[int], list[float]]:
        """(steps, values) of one quantity, such as "loss", for a plot."""
        records = [r for r in self.history if r["split"] == split and key in r]
        return [r["step"] for r in records], [r[key] for r in records]

    @property
    def model(self) -> MultimodalEncoder:
        """The best model, loaded from `best_model.pth`."""
        return load(self.best_file)

    @property
    def best_file(self) -> Path:
        """Path of best_model.pth; FileNotFoundError where it is missing or of an earlier run."""
        path = self.path / "best_model.pth"
        if not path.is_file() and not self.best:
            raise FileNotFoundError(
                f"{shown(self.path)} has no best model: the run ended before its first validation, "
                f"or without an applied step; go on with resume=True, run_name={path.parent.name!r}"
            )
        if path.is_file() and not self.best and not Run.load(self.path).best:
            raise FileNotFoundError(
                f"{shown(path)} is of an earlier run of that name; this one has no best model yet; "
                "go on with resume=True, or take the earlier one: mm.load(…)"
            )
        return path

    @property
    def metadata(self) -> dict:
        """Metadata of the best model's training, for `model.save_pretrained`."""
        return training_metadata(
            read_checkpoint(self.path / "best_model.pth") | {"best": self.best}
        )


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, without a last line that a kill has cut off.

    Raises ValueError where any other line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(current_keys(json.loads(line)))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise ValueError(
                    f"{path}, line {number + 1} is not JSON; the file is damaged"
                ) from None
    return records


def newest_run(root: Path) -> str:
    """The name of the most recently written run in a folder; "" where there is none."""
    states = sorted(root.glob("*/last/state.pth"), key=lambda p: p.stat().st_mtime)
    return states[-1].parent.parent.name if states else ""


# ---- the folder ----------------------------------------------------------------------------------


class InUse(RuntimeError):
    """Raised where another process is writing a run's folder."""


_held: dict[Path, int] = {}  # folders that this process writes -> open lock files


def _let_go():
    """Close the parent's locks in a forked process, such as a worker that decodes."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


# Names of devices, characters with a meaning, and ends that Windows drops.
_NOT_ON_WINDOWS = re.compile(
    r'(con|prn|aux|nul|com\d|lpt\d)(\..*)?|.*[<>:"|?*].*|.*[. ]', re.IGNORECASE | re.DOTALL
)


def run_folder(output_dir: str | os.PathLike, name: str) -> Path:
    """The absolute folder of a run; ValueError for a name that leads out of output_dir."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).anchor or "\0" in name:
        raise ValueError(
            f"run_name={name!r} must be the name of a folder in output_dir; to write elsewhere, "
            "set output_dir"
        )
    if WINDOWS and (bad := next(filter(_NOT_ON_WINDOWS.fullmatch, parts), None)):
        raise ValueError(f"run_name={name!r}: Windows has no folder {bad!r}; give another name")
    return Path(output_dir).expanduser().absolute() / name


@contextlib.contextmanager
def held(path: Path, new: bool = False) -> Iterator[Path]:
    """Create a run's folder if needed and lock it for this process.

    The lock ends with the process at the latest. A folder that was created here and stays empty is
    removed again.

    Args:
        path: the folder.
        new: take the next free name ("name-2") where the folder exists already.
    Yields:
        The locked folder.
    Raises:
        InUse: another process has locked it.
    """
    first, number, made = path, 1, False
    while not made:
        try:
            with writing(path):
                path.mkdir(parents=True)
            made = True
        except FileExistsError:
            if not new and path.is_dir():
                break
            if not new:
                raise
            number += 1
            path = first.with_name(f"{first.name}-{number}")
    try:
        with writing(path / ".lock"):
            _held[path] = _hold(path / ".lock")
        try:
            yield path
        finally:
            if path in _held:  # not in a process that was forked meanwhile
                if WINDOWS:
                    os.close(_held.pop(path))
                with contextlib.suppress(OSError):
                    (path / ".lock").unlink()
                if path in _held:  # after the removal: nobody locks what is about to go
                    os.close(_held.pop(path))
    finally:
        if made:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


def _hold(path: Path) -> int:
    """Lock the lock file, write this process into it, and return its descriptor."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            owner = os.read(number, 1000).decode(errors="replace").split("\n")
            locked = lock(number, wait=False)
            if locked is None:  # a file system without locks: check the named process
                locked = not _lives(owner)
            if not locked:
                pid, host, since = [*owner, "?", "?", "?"][:3]
                raise InUse(
                    f"{shown(path.parent)} has been written by process {pid} on {host} since "
                    f"{since}, and two runs in one folder would mix; wait for it, or give another "
                    "run_name"
                )
            if os.fstat(number).st_nlink:  # 0 where its owner has just removed it
                os.ftruncate(number, 0)
                os.lseek(number, 0, os.SEEK_SET)
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                os.write(number, f"{os.getpid()}\n{socket.gethostname()}\n{now}\n".encode())
                return number
        except BaseException:
            os.close(number)
            raise
        os.close(number)


def _lives(owner: list[str]) -> bool:
    """Whether the owner of a lock is another living process on this machine."""
    import psutil

    here = len(owner) > 1 and owner[0].isdigit() and owner[1] == socket.gethostname()
    return here and int(owner[0]) != os.getpid() and psutil.pid_exists(int(owner[0]))


# Folders of the images that a validation reconstructs: the present one, and that of older releases.
STRIPS, OLDER_STRIPS = "reconstructions", "put_back"
_A_STRIP = r"\d{8,}\.(png|tmp)|\.\d{8,}\.png\.\w+\.tmp"
# Files that mmkit writes into a run's folder; of an earlier run only these are ever removed.
_OURS = {
    "last": r"state(-\d{8,})?\.pth|\.state\.pth\.\w+\.tmp",
    STRIPS: _A_STRIP,
    OLDER_STRIPS: _A_STRIP,
    "": r"config\.json|events\.out\.tfevents\..*\.mmkit",
}


def earlier_files(path: Path) -> list[Path]:
    """The files of an earlier run that a new one removes, last/state.pth first."""
    found = [
        file
        for folder, names in _OURS.items()
        if (path / folder).is_dir()
        for file in sorted((path / folder).iterdir(), key=lambda file: file.name != "state.pth")
        if file.is_file() and re.fullmatch(names, file.name)
    ]
    return found


def check_folder(path: Path, anew: bool, needed: int) -> None:
    """Check that a run can be written, before files of an earlier one are removed.

    Args:
        path: the run's folder, which exists.
        anew: whether a new run starts, which replaces an earlier one.
        needed: bytes that best_model.pth and last/ will take at least.
    Raises:
        OSError: the disk has too little room, or the permissions are missing.
        FileExistsError: the folder holds files that no run of mmkit has written.
    """
    for folder in (path, path / "last", path / STRIPS):
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"{shown(folder)} is a file; give another run_name")
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            with writing(folder):
                raise OSError(errno.EACCES, "")
    if anew:
        _check_strangers(path)
    there = {path / "best_model.pth", *(path / "last").glob("state*.pth")}
    sizes = {file.stat().st_ino: file.stat().st_size for file in there if file.is_file()}
    disk = shutil.disk_usage(path)
    if disk.total and disk.free + sum(sizes.values()) < needed:
        raise OSError(
            errno.ENOSPC,
            f"{shown(path)} will take {needed / 1e6:.1f} MB or more (best_model.pth, last/, and "
            f"one of them twice while it is written), but {disk.free / 1e6:.1f} MB are free there; "
            "free some space, set output_dir to another disk, or keep fewer (keep_last)",
        )


def _check_strangers(path: Path) -> None:
    """FileExistsError where a new run would overwrite a file that no run of mmkit has written."""
    config, metrics = path / "config.json", path / "metrics.jsonl"
    names = ["config.json", "best_model.pth", "last/state.pth"]
    strange = [name for name in names if (path / name).exists() and not metrics.is_file()]
    if config.is_file() and not strange:
        with contextlib.suppress(ValueError):  # cut off by a kill, so written by mmkit
            if "batch_size" not in json.loads(config.read_text(encoding="utf-8")):
                strange = ["config.json"]
    if strange:
        raise FileExistsError(
            f"{shown(path)} holds a {strange[0]} that is not from a run and would be overwritten; "
            "give another run_name"
        )


def _tag(name: str, split: str) -> str:
    """The tag of a quantity in TensorBoard; losses, which both splits have, name the split."""
    if name == "loss" or name.endswith("_loss"):
        return f"{name}/{split}"
    return f"retrieval/{name}" if "R@" in name else name


class RunWriter:
    """Writer of a run's folder: config.json, metrics.jsonl and event files.

    A new run replaces an earlier one of the same name: only files that mmkit wrote are removed, and
    the earlier best_model.pth stays until the new run has one.

    Args:
        path: the run's folder.
        config: the configuration to write to config.json.
        step: step at which a resumed run continues; its later records are dropped. None = new run.
        again: the validation at this step will be repeated; its record is dropped, too.
    """

    def __init__(self, path: Path, config: dict, step: int | None = None, again: bool = False):
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = metrics = path / "metrics.jsonl"
        if step is None and metrics.is_file():
            stays = path / "best_model.pth"
            kept = ", whose best_model.pth stays until this one has one" if stays.is_file() else ""
            print(f"replacing the earlier run in {shown(path)}{kept}")
            for file in earlier_files(path):
                with writing(file):
                    file.unlink()
            for name in ("last", STRIPS, OLDER_STRIPS):
                with contextlib.suppress(OSError):  # not empty
                    (path / name).rmdir()
        records = read_records(metrics) if step is not None and metrics.is_file() else []
        # "terms" are measured before a step: those of this number will be measured again.
        late = {"terms", "val"} if again else {"terms"}
        records = [r for r in records if r["step"] < (step or 0) + (r["split"] not in late)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        write_atomically(lines.encode(), metrics)  # a kill in between loses nothing
        write_atomically((json.dumps(config, indent=2) + "\n").encode(), path / "config.json")
        with writing(path / "events.out.tfevents…"):
            purge = None if step is None else step + 1
            self._events = SummaryWriter(path, purge_step=purge, filename_suffix=".mmkit")

    def write(self, record: dict):
        """Append a record to metrics.jsonl and write its numbers to TensorBoard.

        Tags: loss/train, loss/val, learning_rate, retrieval/…, and the others by their names.
        """
        with writing(self._metrics), open(self._metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        split, step = record["split"], record["step"]
        with writing(self._metrics.with_name("events.out.tfevents…")):
            for name, value in record.items():
                if name in ("split", "step", "best", "train_loss") or value is None:
                    continue
                self._events.add_scalar(_tag(name, split), value, step)
            self._events.flush()

    def write_images(self, original, masked, reconstructed, step: int):
        """Write a strip of images to reconstructions/STEP.png and to TensorBoard.

        original, masked, reconstructed: (B, 3, H, W) uint8.
        """
        from PIL import Image

        from ..plots.reconstruction import strip

        image, encoded = strip(original, masked, reconstructed), io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(encoded, "PNG")
        write_atomically(encoded.getvalue(), self._metrics.parent / STRIPS / f"{step:08d}.png")
        self._events.add_image("original, masked, reconstructed", image, step)

    def close(self):
        """Close the event files."""
        with writing(self._metrics.with_name("events.out.tfevents…")):
            self._events.close()
