"""What a run writes, and reading it back.

runs/<name>/ holds best_model.pth, last/state.pth, config.json, metrics.jsonl and TensorBoard's
event files, and while it is written .lock. metrics.jsonl has one record a line: "split" is "train"
(every `log_every` steps), "val" (every `eval_every` epochs) or "terms" (every
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

from ..files import lock, shown, write_atomically, writing
from ..models.checkpoint import load, read_checkpoint
from ..models.encoder import MultimodalEncoder
from ..models.model_card import training_facts


@dataclass
class Run:
    """What a training left behind, read from its folder."""

    path: Path
    history: list[dict]  # the records of metrics.jsonl, in order
    best: dict  # the validation record that best_model.pth was saved at

    @classmethod
    def load(cls, path) -> "Run":
        """The run in a folder; FileNotFoundError where there is none."""
        path = Path(path).absolute()
        if not (path / "metrics.jsonl").is_file():
            raise FileNotFoundError(
                f"no run in {shown(path)}: it has no metrics.jsonl; check the folder"
            )
        history = read_records(path / "metrics.jsonl")
        best = [record for record in history if record.get("best")]
        return cls(path, history, best[-1] if best else {})

    def curve(self, key: str, split: str = "train") -> tuple[list[int], list[float]]:
        """Steps and values of one quantity, for a plot."""
        records = [r for r in self.history if r["split"] == split and key in r]
        return [r["step"] for r in records], [r[key] for r in records]

    @property
    def model(self) -> MultimodalEncoder:
        """The best model, loaded from `best_model.pth`."""
        return load(self.best_file)

    @property
    def best_file(self) -> Path:
        """best_model.pth; FileNotFoundError where there is none, or it is an earlier run's."""
        path = self.path / "best_model.pth"
        if not path.is_file() and not self.best:
            raise FileNotFoundError(
                f"{shown(self.path)} has no best model: the run ended before its first validation, "
                f"or without an applied step; go on with resume=True, run_name={path.parent.name!r}"
            )
        if path.is_file() and not self.best and not Run.load(self.path).best:
            raise FileNotFoundError(
                f"{shown(path)} is of an earlier run of that name, this one has no best model yet; "
                "go on with resume=True, or take the earlier one: mm.load(…)"
            )
        return path

    @property
    def facts(self) -> dict:
        """What is known of the training of the best model, for `model.save_pretrained`."""
        return training_facts(read_checkpoint(self.path / "best_model.pth") | {"best": self.best})


def read_records(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut off by a kill is left out."""
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines) - 1:
                raise ValueError(
                    f"{path}, line {number + 1} is no JSON; the file is damaged"
                ) from None
    return records


def newest_run(root: Path) -> str:
    """Name of the run under a folder that was written last, "" where there is none."""
    states = sorted(root.glob("*/last/state.pth"), key=lambda p: p.stat().st_mtime)
    return states[-1].parent.parent.name if states else ""


# ---- the folder ----------------------------------------------------------------------------------


class InUse(RuntimeError):
    """A run's folder that another process is writing."""


_held: dict[Path, int] = {}  # folders that this process writes -> open lock files


def _let_go():
    """A forked process (a worker that decodes) has no part in its parent's locks."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def run_folder(output_dir: str | os.PathLike, name: str) -> Path:
    """The absolute folder of a run; ValueError for a name that leads out of output_dir."""
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or "\0" in name:
        raise ValueError(
            f"run_name={name!r} must be the name of a folder in output_dir; to write elsewhere, "
            "set output_dir"
        )
    return Path(output_dir).expanduser().absolute() / name


@contextlib.contextmanager
def held(path: Path, new: bool = False) -> Iterator[Path]:
    """A run's folder, made if need be, for this process alone; `InUse` where another has it.

    It stays ours while this process lives. An empty folder that was made for it goes again. new:
    where it is there already, the next one ("name-2") that is not is taken.
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
            if path in _held:  # else forked meanwhile
                with contextlib.suppress(OSError):
                    (path / ".lock").unlink()
                os.close(_held.pop(path))
    finally:
        if made:
            with contextlib.suppress(OSError):  # something was written
                path.rmdir()


def _hold(path: Path) -> int:
    """A descriptor of the lock file, locked and with this process's name in it."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            owner = os.read(number, 1000).decode(errors="replace").split("\n")
            locked = lock(number, wait=False)
            if locked is None:  # no locks here: then by the process that is named
                locked = not _lives(owner)
            if not locked:
                pid, host, since = [*owner, "?", "?", "?"][:3]
                raise InUse(
                    f"{shown(path.parent)} is being written by process {pid} on {host} since "
                    f"{since}, and two runs in one folder would mix; wait for it, or give another "
                    "run_name"
                )
            if os.fstat(number).st_nlink:  # else its owner has just removed it
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
    """Whether a lock's owner is another living process of this machine."""
    import psutil

    here = len(owner) > 1 and owner[0].isdigit() and owner[1] == socket.gethostname()
    return here and int(owner[0]) != os.getpid() and psutil.pid_exists(int(owner[0]))


# What the kit writes into a run's folder and an earlier run has left: all that is ever removed.
_OURS = {
    "last": r"state(-\d{8,})?\.pth|\.state\.pth\.\w+\.tmp",
    "put_back": r"\d{8,}\.(png|tmp)|\.\d{8,}\.png\.\w+\.tmp",
    "": r"config\.json|events\.out\.tfevents\..*\.mmkit",
}


def _earlier(path: Path) -> list[Path]:
    """Files of an earlier run that a new one removes; first what a resume would go on from."""
    found = [
        file
        for folder, names in _OURS.items()
        if (path / folder).is_dir()
        for file in sorted((path / folder).iterdir(), key=lambda file: file.name != "state.pth")
        if file.is_file() and re.fullmatch(names, file.name)
    ]
    return found


def check_folder(path: Path, anew: bool, needed: int) -> None:
    """Raise where a run could not be written there, before anything of an earlier one is removed.

    needed: bytes that best_model.pth and last/ will take at least, earlier ones replaced. Raises
    OSError for missing room or rights, FileExistsError for files of something else.
    """
    for folder in (path, path / "last", path / "put_back"):
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
            f"one of them twice while it is written), {disk.free / 1e6:.1f} MB are free there; "
            "free some space, set output_dir to another disk, or keep fewer (keep_last)",
        )


def _check_strangers(path: Path) -> None:
    """FileExistsError where a new run would write over what no run of this kit has written."""
    config, metrics = path / "config.json", path / "metrics.jsonl"
    names = ["config.json", "best_model.pth", "last/state.pth"]
    strange = [name for name in names if (path / name).exists() and not metrics.is_file()]
    if config.is_file() and not strange:
        with contextlib.suppress(ValueError):  # cut off by a kill: it was ours
            if "batch_size" not in json.loads(config.read_text()):
                strange = ["config.json"]
    if strange:
        raise FileExistsError(
            f"{shown(path)} holds a {strange[0]} that is no run's, and a run would write over it; "
            "give another run_name"
        )


def _tag(name: str, split: str) -> str:
    """TensorBoard's name of a quantity; one that both splits have is told apart by the split."""
    if name == "loss" or name.endswith("_loss"):
        return f"{name}/{split}"
    return f"retrieval/{name}" if "R@" in name else name


class RunWriter:
    """Writes a run's folder: config.json, metrics.jsonl and event files.

    A new run replaces an earlier one of its name: only files that the kit wrote are removed, and
    the earlier best_model.pth stays until the new run has one. A resumed run (`step` given) drops
    the records that came after the state it goes on from; again: and the validation of its step.
    """

    def __init__(self, path: Path, config: dict, step: int | None = None, again: bool = False):
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = metrics = path / "metrics.jsonl"
        if step is None and metrics.is_file():
            stays = path / "best_model.pth"
            words = ", whose best_model.pth stays until this one has one" if stays.is_file() else ""
            print(f"replacing the earlier run in {shown(path)}{words}")
            for file in _earlier(path):
                with writing(file):
                    file.unlink()
            for name in ("last", "put_back"):
                with contextlib.suppress(OSError):  # not empty
                    (path / name).rmdir()
        kept = read_records(metrics) if step is not None and metrics.is_file() else []
        # What the terms do to each other is measured before a step: after a state of that number.
        late = {"terms", "val"} if again else {"terms"}
        kept = [r for r in kept if r["step"] < (step or 0) + (r["split"] not in late)]
        lines = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(lines.encode(), metrics)  # a kill in between loses nothing
        write_atomically((json.dumps(config, indent=2) + "\n").encode(), path / "config.json")
        with writing(path / "events.out.tfevents…"):
            purge = None if step is None else step + 1
            self._events = SummaryWriter(path, purge_step=purge, filename_suffix=".mmkit")

    def write(self, record: dict):
        """One record to metrics.jsonl, its numbers to TensorBoard.

        Scalars: loss/train, loss/val, learning_rate, retrieval/…, and the reading aids by name.
        """
        with writing(self._metrics), open(self._metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        split, step = record["split"], record["step"]
        with writing(self._metrics.with_name("events.out.tfevents…")):
            for name, value in record.items():
                if name in ("split", "step", "best", "train_loss") or value is None:
                    continue
                self._events.add_scalar(_tag(name, split), value, step)
            self._events.flush()

    def write_pictures(self, original, masked, put_back, step: int):
        """A strip of pictures (B, 3, H, W) uint8 each: put_back/STEP.png, and to TensorBoard."""
        from PIL import Image

        from ..plots.reconstruction import strip

        picture, encoded = strip(original, masked, put_back), io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(encoded, "PNG")
        write_atomically(encoded.getvalue(), self._metrics.parent / "put_back" / f"{step:08d}.png")
        self._events.add_image("original, masked, put back", picture, step)

    def close(self):
        with writing(self._metrics.with_name("events.out.tfevents…")):
            self._events.close()
