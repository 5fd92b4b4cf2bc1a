"""What a run writes, and reading it back.

runs/<name>/ holds best_model.pth, last/state.pth, config.json, metrics.jsonl and TensorBoard's
event files. metrics.jsonl has one record a line: "split" is "train" (every `log_every` steps),
"val" (every `eval_every` epochs) or "terms" (every `term_gradients_every` steps).
Walk-through: notebooks/03_training.ipynb.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import load, read_checkpoint
from .encoder import MultimodalEncoder
from .model_card import training_facts


@dataclass
class Run:
    """What a training left behind, read from its folder."""

    path: Path
    history: list[dict]  # the records of metrics.jsonl, in order
    best: dict  # the validation record that best_model.pth was saved at

    @classmethod
    def load(cls, path) -> "Run":
        """The run in a folder; FileNotFoundError where there is none."""
        path = Path(path)
        if not (path / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"no run in {path}: it has no metrics.jsonl; check the folder")
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
        return load(self.path / "best_model.pth")

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


def _remove_run(path: Path) -> None:
    """Remove a run, so that a kill in between neither brings it back nor leaves a part for good.

    First what a resume would go on from; last what tells that there is a run to remove.
    """
    shutil.rmtree(path / "last", ignore_errors=True)
    metrics = path / "metrics.jsonl"
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != metrics:
            entry.unlink()
    metrics.unlink()


def _tag(name: str, split: str) -> str:
    """TensorBoard's name of a quantity; one that both splits have is told apart by the split."""
    if name == "loss" or name.endswith("_loss"):
        return f"{name}/{split}"
    return f"retrieval/{name}" if "R@" in name else name


class RunWriter:
    """Writes a run's folder: config.json, metrics.jsonl and event files.

    A new run replaces an earlier one of its name; a resumed one (`step` given) drops the records
    that came after the state it goes on from.
    """

    def __init__(self, path: Path, config: dict, step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        metrics = path / "metrics.jsonl"
        if step is None and metrics.is_file():
            print(f"replacing the earlier run in {path}")
            _remove_run(path)
        path.mkdir(parents=True, exist_ok=True)
        kept = read_records(metrics) if step is not None and metrics.is_file() else []
        # What the terms do to each other is measured before a step: after a state of that number.
        kept = [r for r in kept if r["step"] < step + (r["split"] != "terms")]
        unfinished = metrics.with_suffix(".tmp")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept))
        unfinished.replace(metrics)  # a kill in between loses nothing
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self._metrics = metrics
        self._events = SummaryWriter(path, purge_step=None if step is None else step + 1)

    def write(self, record: dict):
        """One record to metrics.jsonl, its numbers to TensorBoard.

        Scalars: loss/train, loss/val, learning_rate, retrieval/…, and the reading aids by name.
        """
        with open(self._metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        split, step = record["split"], record["step"]
        for name, value in record.items():
            if name in ("split", "step", "best", "train_loss") or value is None:
                continue
            self._events.add_scalar(_tag(name, split), value, step)
        self._events.flush()

    def write_pictures(self, original, masked, put_back, step: int):
        """A strip of pictures (B, 3, H, W) uint8 each: put_back/STEP.png, and to TensorBoard."""
        from PIL import Image

        from .reconstruction_plots import strip

        picture = strip(original, masked, put_back)
        folder = self._metrics.parent / "put_back"
        folder.mkdir(exist_ok=True)
        path = folder / f"{step:08d}.png"
        unfinished = path.with_suffix(".tmp")
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(unfinished, "PNG")
        unfinished.replace(path)  # a kill in between leaves no half of a picture
        self._events.add_image("original, masked, put back", picture, step)

    def close(self):
        self._events.close()
