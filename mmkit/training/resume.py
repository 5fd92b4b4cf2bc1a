"""Save the state of a run (best_model.pth, last/state.pth), and resume or fork a run.

The state holds the step, the weights, the optimizer state, the scaler, the running means (EMA) and
every generator; order, masks and captions are pure functions and need no storing.
Walk-through: notebooks/05_checkpoints.ipynb.
"""

import contextlib
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..config import TrainingConfig
from ..distributed import all_reduce_sum, rank_and_world_size
from ..files import shown, write_atomically
from ..models.checkpoint import load_weights, read_checkpoint
from ..models.layers import draws_dropout
from ..older_names import current_keys
from . import fingerprint
from .optim import Muon
from .random_state import random_state, set_random_state

# Fields that may differ freely on resume: they change what is written, not what is learned.
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
# Fields that keep the gradient up to float summation, unless dropout is drawn.
_SUMMATION = {"gradient_accumulation_steps", "exchange", "gradient_checkpointing", "compile"}
# Fields that change the order in which dropout is drawn.
_DRAWN_OTHERWISE = {"gradient_accumulation_steps", "compile"}
_NEEDED = (  # entries of last/state.pth that resuming needs
    "model_state_dict optimizer_state_dict scaler random config data "
    "epoch_loss best_loss step skipped seconds"
).split()


def on_rank_0(work: Callable):
    """Call `work()` in process 0; its result, or its error, reaches all processes."""
    from accelerate.utils import broadcast_object_list

    answer: list = [None, None]
    rank, processes = rank_and_world_size()
    if rank == 0:
        try:
            answer[0] = work()
        except Exception as error:
            answer[1] = error
    if processes > 1:
        answer = broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def _of_run(trainer) -> dict:
    """The entries about the run that both files hold besides its state."""
    return {"config": trainer.recorded_config(), "data": trainer.identity["train"]}


def _share_memory(trainer):
    """Copy the optimizer state that other processes hold to this one."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, Muon):
            optimizer.share_memory()


def save_best(trainer, epoch: int):
    """Write best_model.pth: the validated model, which is the EMA where there is one."""
    _share_memory(trainer)
    if trainer.rank == 0:
        model = trainer.validated
        state = {
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "epoch": epoch,
            "best_loss": trainer.best_loss,
            "architecture": model.architecture(),
            "trained_steps": trainer.model.trained_steps,
        }
        write_atomically(state | _of_run(trainer), trainer.path / "best_model.pth")


def save_last(trainer):
    """Write last/state.pth, and keep the `keep_last` newest states."""
    _share_memory(trainer)
    states = [random_state()]
    if trainer.processes > 1:
        from accelerate.utils import gather_object

        states = gather_object(states)
    # Each process gets an equal part, here and after resuming, so that the sums are the same.
    total = all_reduce_sum(trainer.epoch_loss)
    trainer.epoch_loss = total / trainer.processes
    trainer.clock()
    if trainer.rank:
        return
    extra = {"random": states, "epoch_loss": total, "identity": trainer.identity}
    path = trainer.path / "last" / "state.pth"
    write_atomically(trainer.state_dict() | _of_run(trainer) | extra, path)
    _keep(path, trainer.step, trainer.config.keep_last)


@contextlib.contextmanager
def interrupts_wait(trainer) -> Iterator[None]:
    """Delay a first interrupt until the end of the step (`trainer.in_step`).

    Only for a single process: several are ended together, by whoever started them.
    """
    usual = signal.default_int_handler

    def interrupt(number, frame):
        if trainer.in_step and not trainer.interrupted:
            trainer.interrupted = True
        else:
            usual(number, frame)

    ours = threading.current_thread() is threading.main_thread() and trainer.processes == 1
    if not ours or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def save_what_is_done(trainer):
    """After an error between two steps: write last/, and print how to resume."""
    if trainer.processes > 1:  # the others may be at any point
        return
    where = "within a step, which is lost" if trainer.in_step else "between two steps"
    with contextlib.suppress(OSError):  # the disk itself may be at fault
        if not trainer.in_step:
            save_last(trainer)
    state = trainer.path / "last" / "state.pth"
    if state.is_file():
        trainer.say(
            f"ended at step {trainer.step} of {trainer.total_steps}, {where}; {shown(state)} is "
            "saved: continue with resume=True"
        )


def _keep(path: Path, step: int, count: int):
    """Link the file just written as state-STEP.pth, and remove all but the newest `count`."""
    named = path.with_name(f"state-{step:08d}.pth")
    if count > 1:
        named.unlink(missing_ok=True)
        try:
            os.link(path, named)  # the same bytes on the disk, until state.pth is replaced
        except OSError:  # the file system has no links
            shutil.copyfile(path, named)
    # Later ones were written before the run was resumed from an earlier state.
    names = {old: re.fullmatch(r"state-(\d{8,})\.pth", old.name) for old in path.parent.iterdir()}
    numbers = {old: int(found[1]) for old, found in names.items() if found}
    kept = sorted(old for old, number in numbers.items() if number <= step)[-count:]
    for old in numbers:
        if count == 1 or old not in kept:
            old.unlink()


def seen_by(trainer, path: Path) -> int:
    """The number of processes that see this file.

    A network file system may report for half a minute that a new file does not exist; opening the
    folders above it makes it ask the server again.
    """
    for folder in reversed(path.absolute().parents):
        with contextlib.suppress(OSError):
            os.close(os.open(folder, os.O_RDONLY))
    return int(all_reduce_sum(trainer.epoch_loss.new_tensor(float(path.is_file()))))


def needed_bytes(trainer) -> int:
    """Least bytes on the disk for best_model.pth, last/, and a second copy of one while writing."""

    def size(module) -> int:
        return sum(x.nbytes for x in module.state_dict().values())

    state = 0
    for optimizer in trainer.optimizers:
        values = {Muon: 1, torch.optim.AdamW: 2}.get(type(optimizer), 0)  # per weight
        state += values * sum(p.nbytes for g in optimizer.param_groups for p in g["params"])
    best = size(trainer.model) + state
    means = [ema.module for ema in (trainer.ema, trainer.attention_ema) if ema is not None]
    last = best + sum(map(size, means))
    return best + trainer.config.keep_last * last + max(best, last)


def resume(trainer, path: Path) -> bool:
    """Restore a run from the state that `save_last` wrote.

    Args:
        trainer: a MaskedMultimodalTrainer that has not trained.
        path: of last/state.pth.
    Returns:
        False where there is no state.
    Raises:
        ValueError: the state is of another experiment.
        RuntimeError: not all processes see the file.
    """
    found, folder = seen_by(trainer, path), shown(trainer.path)
    if not found:
        trainer.say(f"nothing to resume in {folder}: starting a new run")
        return False
    if found < trainer.processes:
        raise RuntimeError(
            f"{shown(path)} is seen by {found} of {trainer.processes} processes; output_dir must "
            "be a folder that all machines share"
        )
    state = read_checkpoint(path, _NEEDED)
    notes = on_rank_0(lambda: _check_same(trainer, state))
    _restore(trainer, state, path, forked=False)
    resuming = f"resuming {folder} at step {trainer.step} of {trainer.total_steps}"
    trainer.say("\n".join([resuming, *notes]))
    return True


def _check_same(trainer, state: dict) -> list[str]:
    """ValueError where a state is of another experiment; else notes on how the rest may differ."""
    differing, folder = _differing(trainer, state), shown(trainer.path)
    soft = {k: v for k, v in differing.items() if _keeps_the_gradient(trainer.config, k)}
    hard = {k: v for k, v in differing.items() if k not in soft}
    others, unsure = _others(trainer, state)
    if not hard and not others:
        return [f"beware      {note}" for note in unsure] + _moved(trainer, state, soft)
    data = [difference for difference in others if difference.startswith("training ")]
    rest = [difference for difference in others if difference not in data]
    parts = [f"its configuration differs ({_listed(hard)})"] if hard else []
    parts += [f"it was trained on other images or captions ({'; '.join(data)})"] if data else []
    parts += [f"this differs: {'; '.join(rest)}"] if rest else []
    remedy = (
        "or fork it, which starts another run from its state: give another run_name "
        f"and resume={folder!r} (command line: --fork {folder})"
    )
    if why := _no_fork(trainer, state):
        remedy = f"or give another run_name (a fork cannot have {why})"
    up_to = "float summation" + (" and dropout" if draws_dropout(trainer.model) else "")
    raise ValueError(
        f"cannot resume {folder}: {', and '.join(parts)}; use the same ones, {remedy}. These may "
        f"differ: {', '.join(sorted(_FREE))}; and, up to {up_to}: {', '.join(sorted(_SUMMATION))} "
        "and the number of processes"
    )


def _others(trainer, state: dict) -> fingerprint.Differences:
    """Messages on what differs besides the configuration, and on what could not be compared."""
    now = trainer.identity
    if "identity" in state:
        return fingerprint.compare(state["identity"], now, trainer)
    differs, unsure = fingerprint.compare_data(state["data"], now["train"], trainer.train)
    unsure = [f"training {note}" for note in unsure]
    if not differs:
        unsure.append("nor were the validation set, the model, its tokenizer and functions")
    return [f"training {difference}" for difference in differs], unsure


def _no_fork(trainer, state: dict) -> str:
    """A message on why no run may start from this state; "" where one may."""
    size, ours = state["config"]["batch_size"], trainer.config.batch_size
    if size != ours:
        return f"another batch_size ({size} -> {ours}): its epoch is divided into other batches"
    then, now = state.get("identity"), trainer.identity
    old = state["data"].get("count")
    if old is None and state["data"]["fingerprint"] != now["train"]["fingerprint"]:
        return "other images or captions"
    if old not in (None, count := now["train"]["count"]):
        return f"{count:,} images instead of {old:,}: its epoch is divided into other batches"
    if then and fingerprint.other_tokens(then, now):
        return "another tokenizer, for which its weights mean nothing"
    shapes = [  # the decoder may differ: it then starts untrained
        {name: x.shape for name, x in weights.items() if not name.startswith("decoder.")}
        for weights in (state["model_state_dict"], trainer.model.state_dict())
    ]
    return "" if shapes[0] == shapes[1] else "a model of other shapes, which its weights do not fit"


def _moved(trainer, state: dict, soft: dict) -> list[str]:
    """Messages on what will differ from the run so far, or be equal only up to float summation."""
    config, notes = trainer.config, []
    draws = ["dropout"] if draws_dropout(trainer.model) else []
    drawn = {k: v for k, v in soft.items() if draws and k in _DRAWN_OTHERWISE}
    if same := {k: v for k, v in soft.items() if k not in drawn}:
        notes.append(f"changed, the same up to float summation: {_listed(same)}")
    if drawn:
        notes.append(f"changed, with other dropout from here on: {_listed(drawn)}")
    if (saved := len(state["random"])) != trainer.processes:
        draws += ["the mismatched pairs"] if config.itm_weight else []
        if config.accumulation == "naive" and config.gradient_accumulation_steps > 1:
            draws.append("each micro-batch's negatives")
        how = "the same up to float summation"
        how = f"other draws of {' and '.join(draws)} from here on" if draws else how
        notes.append(f"saved by {saved} processes, now {trainer.processes}: {how}")
    then, now = state.get("identity", {}).get("computed"), trainer.identity["computed"]
    if then not in (None, now):
        other = "rounding and dropout" if draws_dropout(trainer.model) else "rounding"
        notes.append(f"computed in {then} before, now in {now}: other {other} from here on")
    return notes


def fork(trainer, source: Path):
    """Start a new run from the state of another one.

    Anything may differ except the tokenizer, `batch_size` and the number of images (with other
    numbers "the remaining batches" of an epoch are undefined). Where other terms need other heads,
    the decoder starts untrained (or is dropped).

    Args:
        trainer: a MaskedMultimodalTrainer that has not trained.
        source: the other run's folder, or a state.pth in it.
    Raises:
        ValueError: the source is this run itself, differs in one of these, or is at or after this
            run's last step.
    """
    source = source.expanduser()
    path = source if source.is_file() else source / "last" / "state.pth"
    if path.resolve().is_relative_to(trainer.path.resolve()):
        raise ValueError(
            f"{shown(source)} cannot be forked into itself; to continue it take resume=True, to "
            "fork it give another run_name"
        )
    state = read_checkpoint(path, _NEEDED)
    if why := on_rank_0(lambda: _no_fork(trainer, state)):
        raise ValueError(
            f"cannot fork {shown(source)} with {why}. Keep it, or start from the weights alone: "
            "model=mm.load('…/best_model.pth')"
        )
    others, unsure = on_rank_0(lambda: _others(trainer, state))
    differing = _listed(_differing(trainer, state))
    _restore(trainer, state, path, forked=True)
    if trainer.step >= trainer.total_steps:
        raise ValueError(
            f"{shown(source)} is at step {trainer.step} and this run ends at "
            f"{trainer.total_steps}: nothing is left to do; raise num_epochs (or max_steps)"
        )
    trainer.best_loss = float("inf")  # the other run's loss may be on another scale
    if trainer.ending is not None:  # the epoch that ends is the other run's
        trainer.ending, trainer.epoch_steps = None, 0
        trainer.epoch_loss = torch.zeros_like(trainer.epoch_loss)
    trainer.say(
        f"{shown(trainer.path)} starts as a fork of {shown(source)} at step {trainer.step} of "
        f"{trainer.total_steps}; differences: "
        f"{'; '.join(filter(None, [differing, *others])) or 'none'}"
    )
    for note in unsure:
        trainer.say(f"beware      {note}")


def _differing(trainer, state: dict) -> dict[str, tuple]:
    """{field: (then, now)} of the settings that differ, except those that may differ freely."""
    ours = trainer.config.to_dict()
    # The settings of a given model are its own, whatever the configuration says.
    free = _FREE | trainer.model_settings.keys()
    if "identity" in state:  # functions are compared by what they compute
        free |= {name for name in fingerprint.FUNCTIONS if "mask" not in name}
    # A field that an older version did not have is at its default.
    theirs = TrainingConfig().to_dict() | current_keys(state["config"])
    return {k: (theirs[k], v) for k, v in ours.items() if theirs[k] != v and k not in free}


def _keeps_the_gradient(config: TrainingConfig, name: str) -> bool:
    if name == "gradient_accumulation_steps" and config.itm_weight:
        return False  # mismatched pairs are drawn within a micro-batch
    return name in _SUMMATION and config.accumulation == "exact"


def _listed(differing: dict[str, tuple]) -> str:
    return ", ".join(f"{k}: {then!r} -> {now!r}" for k, (then, now) in differing.items())


def _other_heads(weights: dict, module) -> dict:
    """Weights for `module`, with its own decoder where the file has none or another one."""
    own = {k: v for k, v in module.state_dict().items() if k.startswith("decoder.")}
    theirs = {k: v for k, v in weights.items() if k.startswith("decoder.")}
    same = {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in theirs.items()}
    return weights if same else {k: v for k, v in weights.items() if k not in theirs} | own


def _restore(trainer, state: dict, path: Path, forked: bool):
    optimizers, saved = trainer.optimizers, state["optimizer_state_dict"]
    other_heads = forked and _take_own_heads(trainer, state)
    same = not other_heads
    same &= [_shape(s) for s in saved] == [_shape(o.state_dict()) for o in optimizers]
    if not same and not forked:
        raise ValueError(
            f"cannot resume {shown(path.parent.parent)} with another optimizer than it was saved "
            "with; give the same one, or fork the run"
        )
    if not same:  # a fork may have another optimizer, or other groups
        trainer.say("the optimizer starts without state: the saved one is of another optimizer")
        state["optimizer_state_dict"] = [None] * len(optimizers)
    elif forked:
        for optimizer, saved_state in zip(optimizers, saved, strict=True):
            _take_own_rates(optimizer, saved_state)
    trainer.load_state_dict(state, path)
    if trainer.epoch_steps is None:  # a state that an older version wrote
        trainer.epoch_steps = trainer.step % trainer.steps_per_epoch
    trainer.epoch_loss = state["epoch_loss"].to(trainer.device) / trainer.processes
    trainer.trained_before = 0  # the saved run is continued
    states = state["random"]
    if trainer.rank < len(states):
        set_random_state(states[trainer.rank])
    else:  # an additional rank draws dropout of its own
        trainer.seed_own_draws()


def _take_own_heads(trainer, state: dict) -> bool:
    """Add the decoder and running means that a fork's state lacks; True where the decoder differs.

    Both are then those of the trainer's own model.
    """
    own, theirs = trainer.model, state["model_state_dict"]
    weights = _other_heads(theirs, own)
    if weights is not theirs:
        trainer.say("the decoder is not taken over: this run needs other heads")
    # Running means start with the weights that are loaded now.
    load_weights(own, weights)
    state["model_state_dict"] = weights
    if trainer.attention_ema is not None and not state.get("ema"):
        state["ema"] = trainer.attention_ema.start(own.vit)
    if trainer.ema is not None:
        mean = state.get("weights_ema") or trainer.ema.start(own)
        state["weights_ema"] = mean | {"weights": _other_heads(mean["weights"], own)}
    return weights is not theirs


def _shape(state: dict) -> list[tuple]:
    """Settings and number of weights of each group, by which kinds of optimizers are compared."""
    return [(sorted(group), len(group["params"])) for group in state["param_groups"]]


def _take_own_rates(optimizer, state: dict):
    """Keep the rates and decays of a fork's own configuration."""
    for own, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
        group |= {k: own[k] for k in ("lr", "peak_lr", "weight_decay") if k in own}
