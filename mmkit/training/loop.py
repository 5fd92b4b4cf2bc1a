"""The training loop around the steps: epochs, validations, records, files.

Walk-through: notebooks/03_training.ipynb.
"""

import contextlib
import math
import sys
import time
from typing import Any

import torch

from ..data.loader import load_batches
from ..data.splits import overlap
from ..distributed import all_reduce_sum
from ..evaluation.features import embed
from ..evaluation.reconstruction import example_images
from ..files import shown
from ..joint_calls import each_alone, meet
from . import fingerprint
from . import resume as resuming
from .optim import freeze, unfreeze
from .random_state import random_state, set_random_state
from .records import as_json, epoch_text, step_record
from .run import Run, RunWriter, check_folder, held
from .summary import describe
from .validation import validate


def fit(trainer) -> Run:
    """Train to the end and return the `Run`.

    All checks are made before files of an earlier run are removed. An interrupt ends the run after
    the present step and saves it; a second one ends it at once.

    Args:
        trainer: a MaskedMultimodalTrainer.
    Returns:
        The `Run`, read from its folder.
    Raises:
        InUse: another process writes the run's folder.
        RuntimeError: not all processes see that folder.
    """
    with contextlib.ExitStack() as stack:
        trainer.path = trainer.path.with_name(
            resuming.on_rank_0(lambda: _hold_folder(trainer, stack))
        )
        for data in (trainer.train, trainer.val):
            if data is not None and (done := data.prepare(trainer.config.num_workers)):
                trainer.say(done)
        trainer.say(describe(trainer))
        _warn_of_overlap(trainer)
        try_out(trainer)
        resuming.on_rank_0(lambda: _start_writing(trainer))
        trainer.resumed = True  # another call of `fit` continues this run
        seen = resuming.seen_by(trainer, trainer.path / "config.json")
        if seen < trainer.processes:
            raise RuntimeError(
                f"{shown(trainer.path)}, which process 0 has created, is seen by {seen} of "
                f"{trainer.processes} processes; output_dir must be a folder that all machines "
                "share"
            )
        if trainer.forked:  # so that it can be resumed even from before its first epoch
            resuming.save_last(trainer)
        stack.enter_context(resuming.interrupts_wait(trainer))
        _train(trainer)
        if trainer.writer:
            trainer.writer.close()
    trainer.accelerator.wait_for_everyone()
    return Run.load(trainer.path)


def _hold_folder(trainer, stack: contextlib.ExitStack) -> str:
    """Lock the run's folder for this process and return its name."""
    unnamed = not (trainer.resumed or trainer.config.run_name)
    path = stack.enter_context(held(trainer.path, new=unnamed))
    check_folder(path, not trainer.resumed, resuming.needed_bytes(trainer))
    return path.name


def try_out(trainer):
    """Embed and validate a few pairs of each set, so that errors show before training."""
    before = random_state()  # a user's transform may draw
    eager = torch.compiler.set_stance("force_eager") if trainer.config.compile else None
    with eager or contextlib.nullcontext():
        few = trainer.train.subset(range(min(len(trainer.train), 16)))
        embed(trainer.validated, few, mixed_precision=trainer.config.mixed_precision)
        if trainer.val is not None:
            few = trainer.val.subset(range(min(len(trainer.val), 16)))
            validate(trainer.validated, few, trainer.config)
    set_random_state(before)


def _start_writing(trainer):
    settings = trainer.recorded_config() | {"run_name": trainer.path.name}
    fingerprint.add_contents(trainer.identity, trainer)
    again, step = trainer.ending is not None, trainer.step if trainer.resumed else None
    trainer.writer = RunWriter(trainer.path, settings, step, again)


def _train(trainer):
    """Run all remaining epochs; where they end early, the state is saved if possible."""
    trainer.mark, trainer.stopping, trainer.asked_to_stop = time.perf_counter(), False, False
    trainer.in_step = trainer.interrupted = False
    modes = {part: part.training for part in trainer.net.modules()}
    try:
        with _progress(trainer) as bar:
            if trainer.ending is not None:
                _end_epoch(trainer, trainer.ending)
            while trainer.step < trainer.total_steps and not trainer.stopping:
                _run_epoch(trainer, trainer.step // trainer.steps_per_epoch, bar)
    except BaseException:
        resuming.save_what_is_done(trainer)
        raise
    finally:  # the model may be used in another training run
        for tower in [*trainer.frozen]:
            unfreeze(trainer.frozen.pop(tower))
        for part, mode in modes.items():
            part.training = mode


def _run_epoch(trainer, epoch: int, bar):
    config, done = trainer.config, trainer.step % trainer.steps_per_epoch
    keys = trainer.epoch_batches(epoch)[done:][: trainer.total_steps - trainer.step]
    trainer.net.train()
    for tower in ("image", "text"):
        if epoch < getattr(config, f"frozen_{tower}_epochs"):
            trainer.frozen[tower] = trainer.frozen.get(tower, []) + freeze(trainer.model, tower)
        else:
            unfreeze(trainer.frozen.pop(tower, []))
    waited, since = 0.0, trainer.step
    before = started = epoch_started = time.perf_counter()
    trainer.epoch_waited = 0.0
    for batch in load_batches(
        trainer.train, keys, config.num_workers, trainer.device.type == "cuda"
    ):
        waiting = time.perf_counter() - before
        waited, trainer.epoch_waited = waited + waiting, trainer.epoch_waited + waiting
        batch = batch.to(trainer.device)
        trainer.in_step = True
        if config.term_gradients_every and trainer.step % config.term_gradients_every == 0:
            compared, trainer.in_step = trainer.measure_terms(batch, epoch), False
            write_record(trainer, "terms", epoch, compared)
            trainer.in_step = True
        loss, norm = trainer.train_step(batch, epoch)
        trainer.step, trainer.in_step = trainer.step + 1, False
        inside = trainer.step % trainer.steps_per_epoch != 0
        if not inside or trainer.step == trainer.total_steps:
            trainer.ending = epoch
        bar.update(1)
        if trainer.step % config.log_every == 0 or trainer.step == trainer.total_steps:
            passed = time.perf_counter() - started
            pace = {"steps_per_second": (trainer.step - since) / passed, "waited": waited / passed}
            record = step_record(trainer, batch, loss, norm, **pace)
            trainer.clock()
            write_record(trainer, "train", epoch, record)
            waited, since, started = 0.0, trainer.step, time.perf_counter()
        if trainer.interrupted:
            raise KeyboardInterrupt
        if inside and config.checkpoint_every and trainer.step % config.checkpoint_every == 0:
            resuming.save_last(trainer)
        if trainer.stopping:
            break
        before = time.perf_counter()
    trainer.epoch_waited /= max(1e-9, time.perf_counter() - epoch_started)
    _end_epoch(trainer, epoch)


def write_record(trainer, split: str, epoch: int, record: dict):
    """Write a record to the run's files and call the callbacks with it."""
    head = {"split": split, "step": trainer.step, "epoch": epoch}
    record = head | {"seconds": round(trainer.seconds, 3)} | record
    record = {k: as_json(v) for k, v in record.items()}
    if trainer.writer:
        trainer.writer.write(record)
    for callback in trainer.callbacks:
        with trainer.own_state.outside(), each_alone():  # callbacks do not change the run
            callback(trainer, record)
    meet("training, after the callbacks")
    # All processes stop when one asks for it, whether or not the others have callbacks.
    asked = trainer.epoch_loss.new_tensor(float(trainer.asked_to_stop))
    trainer.stopping = bool(all_reduce_sum(asked))


def _end_epoch(trainer, epoch: int):
    """Write last/, validate, save the best model, and write last/ again."""
    config = trainer.config
    last = trainer.stopping or trainer.step == trainer.total_steps
    validated = (epoch + 1) % config.eval_every == 0 or last
    if validated and trainer.val is not None:  # a failing validation then loses no step
        resuming.save_last(trainer)
    # Where no step of the epoch was applied, there is no training loss.
    total = float(all_reduce_sum(trainer.epoch_loss))
    train_loss = total / trainer.epoch_steps if trainer.epoch_steps else None
    if validated:
        record: dict[str, Any] = {"loss": train_loss, "train_loss": train_loss}
        record["waiting_for_data"] = trainer.epoch_waited  # fraction of the training time
        if trainer.val is not None:
            record |= validate(trainer.validated, trainer.val, config)
            _keep_images(trainer)
        better = _keep_best(trainer, epoch, record)
        trainer.clock()
    trainer.epoch_loss, trainer.epoch_steps = torch.zeros_like(trainer.epoch_loss), 0
    trainer.ending = None
    if validated:
        write_record(trainer, "val", epoch, record | {"best": better})
        trainer.say(epoch_text(trainer, epoch, record, better))
    resuming.save_last(trainer)


def _keep_best(trainer, epoch: int, record: dict) -> bool:
    """Write best_model.pth if this record is the best one so far; True where it is."""
    before, loss = trainer.best_loss, record["loss"]
    # Until there is a finite loss, the newest model is saved rather than none.
    better = loss is not None and (loss < before or not math.isfinite(before))
    if trainer.val is None and trainer.config.terms_change and record["train_loss"] is not None:
        better = True  # losses of changing terms are not comparable: the last model is saved
    # Process 0 decides: on another type of CPU the last bit of the loss may differ.
    better = bool(all_reduce_sum(trainer.epoch_loss.new_tensor(better * (not trainer.rank))))
    if better:
        trainer.best_loss = loss if math.isfinite(loss) else math.inf
        try:
            resuming.save_best(trainer, epoch)
        except BaseException:
            trainer.best_loss = before
            raise
    return better


def _keep_images(trainer):
    """Save the same few images each time: original, masked, reconstructed."""
    if trainer.writer and trainer.val is not None and "mim" in trainer.config.terms:
        images = example_images(trainer.validated, trainer.val, trainer.config)
        trainer.writer.write_images(*images, step=trainer.step)


def _warn_of_overlap(trainer):
    """Warn of what training and validation set share, since it makes scores too good."""
    if (
        trainer.val is None
        or trainer.rank
        or any(data.expensive for data in (trainer.train, trainer.val))
    ):
        return
    if found := overlap(trainer.train, trainer.val, near=False, names=("training", "validation")):
        trainer.say(f"beware      {found}")


def _progress(trainer):
    """A progress bar in a terminal or a notebook, on rank 0; it disappears at the end."""
    from tqdm import tqdm

    if trainer.rank or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
        return contextlib.nullcontext(tqdm(disable=True))
    return tqdm(total=trainer.total_steps, initial=trainer.step, leave=False, unit="step")
