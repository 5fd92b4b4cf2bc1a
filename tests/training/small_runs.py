"""What tests of runs share: runs in processes of their own, interrupts, what a run has left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import mmkit as mm


def train_small(folder, name, *flags, **values):
    command = [
        sys.executable,
        "-m",
        "tests.train_small",
        str(folder),
        name,
        json.dumps(values),
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def losses(folder, name):
    return [(r["split"], r["step"], r["loss"]) for r in mm.Run.load(folder / name).history]


def same_weights(folder, one, other, file="last/state.pth"):
    states = [torch.load(folder / name / file, weights_only=True) for name in (one, other)]
    weights = [s["model_state_dict"] for s in states]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])
    slots = [torch.cat([v.flatten().float() for o in s["optimizer_state_dict"] for slot in
    o["state"].values()
                        for v in slot.values()]) for s in states]  # fmt: skip
    assert torch.equal(*slots)


def recorded_masks(folder, name):
    """{(epoch, sample): (masked patches, masked tokens)} over all processes, each exactly once."""
    lines = [
        json.loads(line)
        for file in sorted((folder / name).glob("masks-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    keys = [(epoch, sample) for epoch, sample, *_ in lines]
    assert len(keys) == len(set(keys))
    return {(epoch, sample): masked for epoch, sample, *masked in lines}


CLOCKS = {"seconds", "samples_per_second", "waiting_for_data"}
MAY_DIFFER = CLOCKS | {"run_name", "num_workers"}


def differences(one, other, where="") -> list[str]:
    """Where two states differ in a single bit; times, the name and `num_workers` may."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            d
            for key in keys
            if key not in MAY_DIFFER
            for d in differences(one.get(key), other.get(key), f"{where}/{key}")
        ]
    elif isinstance(one, list | tuple):
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, pair in pairs for d in differences(*pair, f"{where}/{i}")]
    else:
        same = type(one) is type(other) and one == other
    return [] if same else [where]


def set_scale(trainer, scale: float, **more):
    trainer.scaler.load_state_dict(trainer.scaler.state_dict() | dict(scale=scale) | more)
    trainer.scaler.scale(torch.zeros(()))  # from now on it is a tensor


def at(step: int, what):
    """A callback that calls `what()` at a step's record."""
    return lambda trainer, record: what() if record["step"] == step else None


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)


def everything(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def states_of(trainer, monkeypatch) -> list[tuple[int | None, bytes]]:
    """Every state.pth that a trainer writes: (the epoch that is about to end, its bytes)."""
    real, kept = mm.training.resume.save_last, []

    def keeping(trainer):
        real(trainer)
        kept.append((trainer.ending, (trainer.path / "last/state.pth").read_bytes()))

    monkeypatch.setattr(mm.training.resume, "save_last", keeping)
    return kept


def weights_of(model) -> dict:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(before: dict, model) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
