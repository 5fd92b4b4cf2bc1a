"""Where a run stands: best_model.pth and last/state.pth, and going on from them.

A run's standing is its step, its weights, the optimizers' memory, the scaler, the running means and
the state of every generator; order, masks and captions are pure functions and need no storing.
Walk-through: notebooks/05_checkpoints.ipynb.
"""

import contextlib
import os
import shutil
from pathlib import Path

from .checkpoint import (
    load_weights,
    random_state,
    read_checkpoint,
    set_random_state,
    write_atomically,
)
from .config import TrainingConfig
from .distributed import sum_over_processes
from .optim import Muon

# On resume these may differ freely: they change what is written, not what is learned …
_FREE = {
    "output_dir",
    "run_name",
    "num_workers",
    "log_every",
    "checkpoint_every",
    "keep_last",
    "max_skipped_steps",
    "term_gradients_every",
}
# … and these give the same gradient up to float summation (and other dropout draws).
_SUMMATION = {"gradient_accumulation_steps", "exchange", "gradient_checkpointing", "compile"}
_NEEDED = (  # entries of last/state.pth without which nothing can go on
    "model_state_dict optimizer_state_dict scaler random config data "
    "epoch_loss best_loss step skipped seconds"
).split()
_STANDING = {
    "step": 0,
    "skipped": 0,
    "skipped_in_a_row": 0,
    "epoch_steps": None,
    "seconds": 0.0,
    "best_loss": float("inf"),
}


def _data(trainer) -> dict:
    return {"name": trainer.train.name, "fingerprint": trainer.train.fingerprint()}


def _weights(trainer, model) -> dict:
    return {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "best_loss": trainer.best_loss,
        "config": trainer.recorded_config(),
        "trained_steps": trainer.model.trained_steps,
        "data": _data(trainer),
    }


def _share_memory(trainer):
    """Bring what an optimizer keeps in other processes to this one."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, Muon):
            optimizer.share_memory()


def save_best(trainer, epoch: int):
    """Write best_model.pth: the model that was validated (the running mean, where there is one)."""
    _share_memory(trainer)
    if trainer.rank == 0:
        model = trainer.validated
        extra = {"epoch": epoch, "architecture": model.architecture()}
        write_atomically(_weights(trainer, model) | extra, trainer.path / "best_model.pth")


def save_last(trainer):
    """Write last/state.pth, and keep as many as `keep_last` says."""
    _share_memory(trainer)
    states = [random_state()]
    if trainer.processes > 1:
        from accelerate.utils import gather_object

        states = gather_object(states)
    # An equal part to each, here and after a resume, so that both sum up the same numbers.
    total = sum_over_processes(trainer.epoch_loss)
    trainer.epoch_loss = total / trainer.processes
    trainer.clock()
    if trainer.rank:
        return
    extra = {name: getattr(trainer, name) for name in _STANDING} | {
        "scaler": trainer.scaler.state_dict(),
        "ema": trainer.plan.state_dict(),
        "weights_ema": None if trainer.ema is None else trainer.ema.state_dict(),
        "random": states,
        "epoch_loss": total,
    }
    path = trainer.path / "last" / "state.pth"
    write_atomically(_weights(trainer, trainer.model) | extra, path)
    _keep(path, trainer.step, trainer.config.keep_last)


def _keep(path: Path, step: int, count: int):
    """A second name, state-STEP.pth, for the file just written; the newest `count` stay."""
    named = path.with_name(f"state-{step:08d}.pth")
    if count > 1:
        named.unlink(missing_ok=True)
        try:
            os.link(path, named)  # the same bytes on the disk, until state.pth is replaced
        except OSError:  # a file system without links
            shutil.copyfile(path, named)
    # Later ones are of a future that a resume has left.
    numbers = {old: int(old.stem[6:]) for old in path.parent.glob("state-*.pth")}
    kept = sorted(old for old, number in numbers.items() if number <= step)[-count:]
    for old in numbers:
        if count == 1 or old not in kept:
            old.unlink()


def max_restarts() -> int:
    """How often torchrun may restart its workers (--max-restarts); 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def check_restarts(config: TrainingConfig):
    """ValueError where restarted workers could not go on."""
    if max_restarts() and not config.run_name:
        raise ValueError(
            "run_name='' is the time of the start, which workers that torchrun restarts cannot "
            "know; give a run_name, or no --max-restarts"
        )
    # They would find what the dead ones have left in the store, and wait for them
    # (https://github.com/pytorch/pytorch/issues/135712).
    if max_restarts() and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            f"--max-restarts={max_restarts()} with the store that torchrun keeps over restarts: "
            "restarted workers would hang in it; export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "before torchrun (docs/cluster.md), or give no --max-restarts"
        )


def seen_by(trainer, path: Path) -> int:
    """How many processes see this file.

    A network file system may repeat for half a minute that a name does not exist; opening the
    folders above it makes it ask the server again.
    """
    for folder in reversed(path.absolute().parents):
        with contextlib.suppress(OSError):
            os.close(os.open(folder, os.O_RDONLY))
    return int(sum_over_processes(trainer.epoch_loss.new_tensor(float(path.is_file()))))


def resume(trainer, path: Path) -> bool:
    """Put everything back as `save_last` left it; False where there is nothing."""
    found = seen_by(trainer, path)
    if not found:
        trainer.say(f"nothing to resume in {trainer.path}: starting anew")
        return False
    if found < trainer.processes:
        raise RuntimeError(
            f"{path} is seen by {found} of {trainer.processes} processes; output_dir must be a "
            "folder that all machines share"
        )
    state = read_checkpoint(path, _NEEDED)
    _check_data(trainer, state, path)
    differing = _differing(trainer, state["config"])
    if hard := {k: v for k, v in differing.items() if not _keeps_the_gradient(trainer.config, k)}:
        raise ValueError(
            f"cannot resume {trainer.path}, its configuration differs ({_in_words(hard)}); use the "
            "same values, or fork it, which starts a run of its own from where this one stands: "
            f"another run_name, and resume={str(trainer.path)!r} (command line: --fork "
            f"{trainer.path}). May differ: {', '.join(sorted(_FREE))}; and, up to float "
            f"summation: {', '.join(sorted(_SUMMATION))} and the number of processes"
        )
    _put_back(trainer, state, path, forked=False)
    trainer.say(f"resuming {trainer.path} at step {trainer.step} of {trainer.total_steps}")
    if differing:
        trainer.say(f"other than before, up to float summation the same: {_in_words(differing)}")
    if (saved := len(state["random"])) != trainer.processes:
        trainer.say(
            f"saved by {saved} processes, now {trainer.processes}: the same up to float summation"
            + (", but for dropout" if trainer.config.dropout else "")
            + (", but for the wrong pairs of matching" if trainer.config.matching_weight else "")
        )
    return True


def fork(trainer, source: Path):
    """Start a run of its own from where another one stands (its folder, or a state.pth in it).

    Anything but `batch_size` may differ: with another one "the batches still to come" has no
    meaning. Where other terms need other heads, the decoder starts anew (or is gone).
    """
    path = source if source.is_file() else source / "last" / "state.pth"
    if path.resolve().is_relative_to(trainer.path.resolve()):
        raise ValueError(
            f"{source} cannot be forked into itself; to go on with it take resume=True, to fork it "
            "give another run_name"
        )
    state = read_checkpoint(path, _NEEDED)
    _check_data(trainer, state, path)
    differing = _differing(trainer, state["config"])
    if "batch_size" in differing:
        raise ValueError(
            f"cannot fork {source} with another batch_size ({differing['batch_size'][0]} -> "
            f"{trainer.config.batch_size}): its epoch is cut into other batches. Keep it, or start "
            "from the weights alone: model=mm.load('…/best_model.pth')"
        )
    _put_back(trainer, state, path, forked=True)
    if trainer.step >= trainer.total_steps:
        raise ValueError(
            f"{source} stands at step {trainer.step} and this run ends at {trainer.total_steps}: "
            "nothing is left to do; raise num_epochs (or max_steps)"
        )
    trainer.best_loss = float("inf")  # of another recipe, perhaps on another scale
    trainer.say(
        f"{trainer.path} starts as a fork of {source} at step {trainer.step} of "
        f"{trainer.total_steps}; other than there: {_in_words(differing) or 'nothing'}"
    )


def _check_data(trainer, state: dict, path: Path):
    if state["data"] != _data(trainer):
        raise ValueError(
            f"cannot resume {path.parent.parent}: it was trained on other pictures or captions "
            f"({state['data']['name'] or 'unnamed'}); give the same ones, or another run_name"
        )


def _differing(trainer, theirs: dict) -> dict[str, tuple]:
    """{field: (then, now)} of the settings that differ, but for those that may freely."""
    ours = trainer.config.to_dict()
    # What a model that was given is, it is by itself, whatever the configuration says.
    free = _FREE | trainer.model_settings.keys()
    theirs = TrainingConfig().to_dict() | theirs  # a field it does not have yet did not matter
    return {k: (theirs[k], v) for k, v in ours.items() if theirs[k] != v and k not in free}


def _keeps_the_gradient(config: TrainingConfig, name: str) -> bool:
    if name == "gradient_accumulation_steps" and config.matching_weight:
        return False  # the wrong pairs are drawn from a micro-batch
    return name in _SUMMATION and config.accumulation == "exact"


def _in_words(differing: dict[str, tuple]) -> str:
    return ", ".join(f"{k}: {then!r} -> {now!r}" for k, (then, now) in differing.items())


def _other_heads(weights: dict, module) -> dict:
    """Weights for `module` whose decoder is its own where the file has none, or another one."""
    own = {k: v for k, v in module.state_dict().items() if k.startswith("decoder.")}
    theirs = {k: v for k, v in weights.items() if k.startswith("decoder.")}
    same = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in theirs.items()}
    return weights if same else {k: v for k, v in weights.items() if k not in theirs} | own


def _put_back(trainer, state: dict, path: Path, forked: bool):
    weights = _other_heads(state["model_state_dict"], trainer.model) if forked else None
    other_heads = weights is not None and weights is not state["model_state_dict"]
    if other_heads:
        trainer.say("the decoder is not taken over: other heads are wanted here")
    load_weights(trainer.model, weights or state["model_state_dict"], path)
    saved = state["optimizer_state_dict"]
    same = not other_heads
    same &= [_shape(m) for m in saved] == [_shape(o.state_dict()) for o in trainer.optimizers]
    if not same and not forked:
        raise ValueError(
            f"cannot resume {path.parent.parent} with another optimizer than it was saved with; "
            "give the same one, or fork the run"
        )
    if same:
        for optimizer, memory in zip(trainer.optimizers, saved, strict=True):
            _load_optimizer(optimizer, memory, forked)
    else:  # a fork may have another optimizer, or other groups
        trainer.say("the optimizer starts without memory: it was another one")
    if state["scaler"]:  # empty where "auto" took another type, on another machine
        trainer.scaler.load_state_dict(state["scaler"])
    for mean, name, module in (
        (trainer.plan.ema, "ema", trainer.model.vit),
        (trainer.ema, "weights_ema", trainer.model),
    ):
        if mean is not None and forked and not state.get(name):  # begins with these weights
            state[name] = mean.start(module)
    trainer.plan.load_state_dict(state.get("ema"))
    if trainer.ema is not None:
        mean = state["weights_ema"]
        if forked:
            mean |= {"weights": _other_heads(mean["weights"], trainer.model)}
        trainer.ema.load_state_dict(mean)
    for name, default in _STANDING.items():
        setattr(trainer, name, state.get(name, default))
    if trainer.epoch_steps is None:  # a state that an older version wrote
        trainer.epoch_steps = trainer.step % trainer.steps_per_epoch
    trainer.epoch_loss = state["epoch_loss"].to(trainer.device) / trainer.processes
    trainer.model.trained_steps = state.get("trained_steps", trainer.step)
    trainer.trained_before = 0  # it goes on from what was saved
    states = state["random"]
    if trainer.rank < len(states):
        set_random_state(states[trainer.rank])
    else:  # a rank more than before draws its own dropout, not what another one draws
        trainer.seed_own_draws()


def _shape(memory: dict) -> list[tuple]:
    """What tells one kind of optimizer from another: settings and number of weights by group."""
    return [(sorted(group), len(group["params"])) for group in memory["param_groups"]]


def _load_optimizer(optimizer, memory: dict, forked: bool):
    """The optimizer's memory; a fork keeps the rates and decays of its own configuration."""
    names = ("lr", "peak_lr", "weight_decay")
    mine = [{k: group[k] for k in names if k in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(memory)
    if forked:
        for group, settings in zip(optimizer.param_groups, mine, strict=True):
            group.update(settings)
