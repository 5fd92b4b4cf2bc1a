"""Train the encoder: one loop for one process or many.

Order, masks and choice of caption are pure functions of (seed, epoch, sample id), and where a run
stands is one number, its step; so a run that was killed goes on as if it had not been.
Walk-through: notebooks/03_training.ipynb.
"""

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..data.batch import Batch
from ..data.dataset import MultimodalDataset, as_dataset
from ..data.loader import load_batches
from ..data.splits import overlap
from ..device import autocast_for, pick_precision
from ..distributed import each_alone, joint, meet, my_share, sum_over_processes, world
from ..evaluation.reconstruction import example_pictures
from ..evaluation.retrieval import embed
from ..masking.plan import MaskPlan, check_maskers
from ..masking.text import maskable_words
from ..models.checkpoint import OwnState, random_state, set_random_state, shown
from ..models.decoder import Wanted
from ..models.ema import RunningMean
from ..models.encoder import MAX_LOGIT_SCALE, EncoderOutput, MultimodalEncoder
from ..models.layers import draws_dropout
from ..noise import mask_noise
from ..objective import Objective
from . import fingerprint
from . import state as run_state
from .checks import check_arguments, check_batches
from .optim import build_optimizers, freeze, set_learning_rate, thaw
from .run import Run, RunWriter, check_folder, held, newest_run, run_folder
from .step import backward, naive_backward, random_states, set_random_states
from .summary import describe
from .term_gradients import compare_terms, tower_gradients
from .threads import MOST_AT_ONCE
from .validation import validate

Method = TypeVar("Method", bound=Callable[..., Any])
SMALLEST_PART = 16  # pairs: with fewer, to prepare the work takes longer than the work
Callback = Callable[["MaskedMultimodalTrainer", dict], None]


def with_own_state(method: Method) -> Method:
    """A method that draws from the run's own generators and leaves the caller's as they were.

    All processes must call it.
    """

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with self.own_state.inside(), joint(f"the trainer's {method.__name__}"):
            return method(self, *args, **kwargs)

    return cast(Method, run)


class MaskedMultimodalTrainer:
    """Everything of one run: data, model, optimizers, the step, validation, files.

    model None builds `config.preset` with the training set's tokenizer. val None: "best" is judged
    on the training loss, and the run says so. resume: True goes on from last/state.pth of the same
    run; the folder of another run (or a state.pth) starts this one from where that one stands.
    callbacks: functions f(trainer, record), called in every process after each record of
    metrics.jsonl; `trainer.stop()` in one of them ends the run.
    """

    def __init__(
        self,
        config: TrainingConfig,
        train: MultimodalDataset,
        val: MultimodalDataset | None = None,
        model: MultimodalEncoder | None = None,
        resume: bool | str | os.PathLike = False,
        callbacks: Sequence[Callback] = (),
    ):
        check_arguments(config, model, callbacks, resume)
        self.own_state = OwnState(config.deterministic)
        self._set_up(config, train, val, model, resume, callbacks)

    @with_own_state
    def _set_up(self, config, train, val, model, resume, callbacks):
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.train = as_dataset(train, "train")
        self.val = None if val is None else as_dataset(val, "val")
        # A copy, its rules checked anew: what is set in the caller's later changes no running run.
        self.config = config = dataclasses.replace(config)
        self.callbacks, self.stopping, self._asked_to_stop = list(callbacks), False, False
        self.in_step = self.interrupted = False
        self.ending: int | None = None  # the epoch whose steps are done, but not its end
        self.frozen: dict[str, list] = {}  # what the run has frozen, by tower
        resume = resume or False
        self._check()
        # Of a model that is given, when the run starts; what holds in place of the configuration.
        self.model_settings = {} if model is None else model.settings()
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
        with warnings.catch_warnings():  # it shares out the cores; the run says how many
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
            # Without a GPU every rank must be told so, or it trains an independent copy of its own.
            self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
        self.rank, self.processes = world()
        self.device = self.accelerator.device
        self.precision = pick_precision(config.mixed_precision, self.device)
        self.own_state.cuda_has_started()
        torch.manual_seed(config.seed)
        if model is None:
            model = MultimodalEncoder.preset(
                config.preset,
                tokenizer=self.train.tokenizer,
                dropout=config.dropout,
                temperature=config.temperature,
            )
        if odd := {p.dtype for p in model.parameters()} - {torch.float32}:
            raise ValueError(
                f"the model has weights of type {', '.join(map(str, odd))}; training keeps float32 "
                "ones and computes by mixed_precision: call model.float()"
            )
        self.trained_before = model.trained_steps
        self.objective = Objective(config, model)
        self.objective.prepare_model()
        self.model = model.to_device(self.device)
        self.model.loss = config.loss  # by which `evaluate` then judges it
        self._share_tokenizer()
        if config.text_mask == "frequency":
            self.model.token_frequency = self.train.piece_frequency()
        self.ema = RunningMean(self.model, config.ema_decay) if config.ema_decay else None
        self._prepare_layers()
        self.optimizers = build_optimizers(self.model, config)
        self.net = self.accelerator.prepare_model(self.model)  # DDP where there are several
        if self.processes > 1:
            self.net.broadcast_buffers = False  # they are constants; as an argument DDP warns of it
        fp16 = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

        self.steps_per_epoch = math.ceil(len(self.train) / config.batch_size)
        check_batches(config, len(self.train), self.processes)
        self.total_steps = config.max_steps or config.num_epochs * self.steps_per_epoch
        self.num_epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seed_own_draws()
        self.best_loss, self.seconds, self._mark = math.inf, 0.0, time.perf_counter()
        self.epoch_loss, self.epoch_steps = torch.zeros((), device=self.device), 0
        self.epoch_waited = 0.0  # share of this epoch's training that went by without a batch
        self.plan = MaskPlan(config, self.model, self.train, self.num_epochs)
        self.idle_terms = self.objective.check_steps(
            self.total_steps, self.steps_per_epoch, self.plan
        )
        self.terms: dict[str, Tensor] = {}  # this process's parts of the last step's terms
        self.drawn: list = []  # the (image, text) maskings of the step's micro-batches
        self.path = run_folder(config.output_dir, self._run_name(resume is True))
        self.forked = False
        self.resumed = self._go_on(resume)
        self.writer: RunWriter | None = None  # a trainer that is only looked at writes nothing

    def seed_own_draws(self):
        """Seed torch (dropout), NumPy and Python, so that what is drawn differs between ranks."""
        from accelerate.utils import set_seed

        set_seed((self.config.seed + 1000003 * (self.rank + 1) + self.step) % 2**32)

    def _check(self):
        config, size = self.config, len(self.train)
        if config.batch_size > size:
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the training set ({size} "
                f"pictures); take at most {size}"
            )
        check_maskers(config, self.train, self.val)
        run_state.check_restarts(config)

    def recorded_config(self) -> dict:
        """The configuration as files record it: with what a given model is, not what was asked."""
        return self.config.to_dict() | self.model_settings

    def _prepare_layers(self):
        """What was asked of the transformer layers: to keep less, to be compiled."""
        towers = (self.model.vit, self.model.bert)
        if self.config.gradient_checkpointing:
            for tower in towers:
                tower.config.use_cache = False  # else transformers says so
                # The older name, about which newer versions of transformers warn.
                older = tower.gradient_checkpointing_enable
                enable = getattr(tower, "activation_checkpointing_enable", older)
                enable({"use_reentrant": False})
        if self.config.compile:
            compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
            if self.device.type == "cpu" and not any(map(shutil.which, compilers)):
                raise RuntimeError(
                    "compile=True needs a C++ compiler on a CPU and there is none; install g++, or "
                    "train with compile=False"
                )
            for block in (*self.model.vit.layers, *self.model.bert.encoder.layer):
                block.compile()

    def _go_on(self, resume: bool | str | os.PathLike) -> bool:
        """Resume this run or fork another, as asked; True where there was something to go on from.

        Workers that torchrun may restart resume whatever the command says, for it is the same one.
        They cannot know better: TORCHELASTIC_RESTART_COUNT stays 0 on a machine whose workers had
        to stop only because another's died, or because a machine joined.
        """
        own = self.path / "last" / "state.pth"
        restarts = run_state.max_restarts() > 0
        if resume is True or (restarts and (resume is False or run_state.seen_by(self, own))):
            return run_state.resume(self, own)
        if resume is not False:
            run_state.fork(self, Path(resume))
            self.forked = True
        return False

    def _share_tokenizer(self):
        """All data is encoded as the model reads it; a foreign tokenizer gives silent nonsense."""
        for name in ("train", "val"):
            data = getattr(self, name)
            if data is None:
                continue
            if data.given_tokenizer and not _same(data.tokenizer, self.model.tokenizer):
                raise ValueError(
                    f"the {name} set was given another tokenizer than the model has; build both "
                    "with the same one (tokenizer=model.tokenizer)"
                )
            setattr(self, name, data.encoded_by(self.model.tokenizer, self.model.max_length))

    def _run_name(self, resume: bool) -> str:
        name, root = self.config.run_name, Path(self.config.output_dir).expanduser()
        if not name and resume:
            name = newest_run(root)
        if not name:
            name, number = time.strftime("%Y%m%d-%H%M%S"), 1
            while (root / name).exists():
                number += 1
                name = f"{time.strftime('%Y%m%d-%H%M%S')}-{number}"
        if self.processes > 1:  # the clocks of two processes differ
            from accelerate.utils import broadcast_object_list

            name = broadcast_object_list([name])[0]
        return name

    # -- pure functions of (seed, epoch, sample) ---------------------------------------------

    def epoch_batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """This process's (rows, caption noise) of each batch of an epoch.

        Every picture once, in an order that depends on seed and epoch alone; batches of nearly
        equal size, so that no step sees only a handful of negatives.
        """
        seed, batches = self.config.seed, self.steps_per_epoch
        captions = mask_noise(seed, epoch, self.train.sample_ids, 1, "caption")[:, 0]
        shares = [my_share(rows)[0] for rows in self.train.epoch_rows(seed, epoch, batches)]
        return [(rows, captions[rows]) for rows in shares]

    def first_batch(self) -> Batch:
        """This process's part of the very first batch, on the device."""
        return self.train.batch(*self.epoch_batches(0)[0]).to(self.device)

    def maskings(self, batch: Batch, epoch: int):
        """(image, text) `Masking` of a batch in an epoch; None where nothing is hidden.

        batch: as it comes from the data set. "attentive" also depends on the running mean.
        """
        return self.plan.draw(self.plan.augmented(batch, epoch), epoch)

    # -- the step ----------------------------------------------------------------------------

    def encode(self, batch: Batch, maskings, wanted: Wanted | None = None) -> EncoderOutput:
        """The masked forward pass of a micro-batch, in this run's precision."""
        modes = (self.config.image_mask_mode, self.config.text_mask_mode)
        with autocast_for(self.config.mixed_precision, self.device):
            return self.net(batch, *maskings, *modes, wanted)

    def gradients(
        self, batch: Batch, epoch: int, weights: dict[str, float] | None = None
    ) -> Tensor:
        """Add the gradient of a batch to the parameters; returns its share of the loss.

        Dropout draws from torch's generator as it stands: the run's own within `train_step`.
        weights: of the terms; None = what the schedules say. `self.terms` then holds each term's
        share, not weighted.
        """
        config, objective = self.config, self.objective
        if weights is None:
            weights = objective.weights(self.step, self.total_steps)
        accumulate = backward if config.accumulation == "exact" else naive_backward
        at_once = self.at_once(len(batch) // config.gradient_accumulation_steps)
        parts = config.gradient_accumulation_steps * at_once
        micro_batches = self.plan.augmented(batch, epoch).split(parts)
        # Drawn once: the replay of a micro-batch must hide the same, and attention costs a look.
        self.drawn = [self.plan.draw(micro, epoch) for micro in micro_batches]
        wanted = [
            objective.wanted(micro, drawn, epoch, weights)
            for micro, drawn in zip(micro_batches, self.drawn, strict=True)
        ]
        number = {id(micro): i for i, micro in enumerate(micro_batches)}
        counts = objective.counts(micro_batches, self.drawn, wanted)
        # What hides nothing in this step is not a term that costs nothing: it is none.
        active = [term for term in weights if counts.get(term, 1)]
        self.terms = {term: torch.zeros((), device=self.device) for term in active}
        found: dict[int, dict[str, Tensor]] = {}  # micro-batch -> its parts of the terms

        def features(micro: Batch) -> EncoderOutput:
            return self.encode(
                micro, self.drawn[number[id(micro)]], Wanted(view=config.contrastive_view)
            )

        def whole(micro: Batch) -> tuple[EncoderOutput, Tensor | None]:
            i = number[id(micro)]
            out = self.encode(micro, self.drawn[i], wanted[i])
            parts = objective.parts(out, micro, self.drawn[i], counts)
            found[i] = {term: part.detach() for term, part in parts.items()}
            total = [weights[term] * part for term, part in parts.items()]
            return out, torch.stack(total).sum() if total else None

        side: dict = {}
        if at_once > 1:
            learning = [p for p in self.model.parameters() if p.requires_grad]
            side = dict(at_once=at_once, parameters=learning)
        contrast = accumulate(
            features,
            micro_batches,
            (self.model.logit_scale, self.model.logit_bias),
            config.loss,
            whole=whole,
            contrastive_weight=weights.get("contrastive", 0.0),
            exchange=config.exchange,
            grad_scale=self.scaler.scale,
            no_sync=lambda: self.accelerator.no_sync(self.net),
            **side,
        )
        for i in sorted(found):  # not as they came: sums of floats go by their order
            for term in found[i].keys() & self.terms.keys():
                self.terms[term] += found[i][term]
        if "contrastive" in weights:
            self.terms["contrastive"] = contrast
        total = [weights[term] * value for term, value in self.terms.items()]
        return torch.stack(total).sum() if total else torch.zeros((), device=self.device)

    def at_once(self, size: int) -> int:
        """Into how many parts, computed side by side, a micro-batch of so many pairs is cut.

        One, unless a CPU has several threads for one process and nothing is drawn on the way; what
        is compiled or compared within a micro-batch needs it whole.
        """
        config = self.config
        if (
            self.device.type != "cpu"
            or self.net is not self.model  # DDP counts on one backward pass, whatever the world
            or config.compile
            or config.accumulation != "exact"
            or "matching" in config.terms
            or draws_dropout(self.model)
        ):
            return 1
        return max(1, min(MOST_AT_ONCE, torch.get_num_threads(), size // SMALLEST_PART))

    @with_own_state
    def train_step(self, batch: Batch, epoch: int) -> tuple[Tensor, float]:
        """One optimizer step: (this process's part of the loss, gradient norm before clipping)."""
        config = self.config
        self.model.zero_grad(set_to_none=True)  # of a step that was interrupted, too
        set_learning_rate(self.optimizers, config.lr_fraction(self.step, self.total_steps))
        loss = self.gradients(batch, epoch)
        active = [o for o in self.optimizers if _has_gradients(o)]  # a frozen part has none
        for optimizer in active:  # before clipping, or the norm is 65,536 times too large
            self.scaler.unscale_(optimizer)
        limit = config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        finite = math.isfinite(norm)  # the same in all processes: their gradients were summed
        if finite:
            for optimizer in active:
                self.scaler.step(optimizer)
            with torch.no_grad():  # in the parameter, after the step: its gradient stays alive
                self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            self.plan.after_step()
            if self.ema is not None:
                self.ema.update(self.model)
            self.model.trained_steps += 1
            self.epoch_loss += loss
            self.epoch_steps += 1
        self.scaler.update()
        self.model.zero_grad(set_to_none=True)
        self._count_skipped(finite, batch)
        return loss, norm

    def _count_skipped(self, finite: bool, batch: Batch):
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.config.max_skipped_steps:
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row had no finite gradient (step "
                f"{self.step}); none of them was applied. Likely {self._likely_cause(batch)}"
            )

    def _likely_cause(self, batch: Batch) -> str:
        """Why no gradient is finite, and what to do, in words."""
        pixels = batch.pixel_values.flatten(1)
        bad = ~torch.isfinite(pixels).all(1) if pixels.is_floating_point() else None
        if bad is not None and bad.any():
            ids = ", ".join(str(int(i)) for i in batch.sample_ids[bad][:5])
            return f"a picture is not finite (sample ids {ids}): check the transform"
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the weights were not finite to begin with ({name}): take another model"
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            return (
                f"fp16 overflows even at a loss scale of {self.scaler.get_scale():.0e}: take "
                "mixed_precision='bf16' or 'no'"
            )
        return (
            "the learning rate is too high: lower learning_rate, raise warmup_steps, or try "
            "mixed_precision='no'"
        )

    # -- the loop ----------------------------------------------------------------------------

    @with_own_state
    def fit(self) -> Run:
        """Train to the end; returns the `Run`.

        What can be checked is, before anything of an earlier run is removed. `InUse` where another
        process writes the run's folder. An interrupt ends the run after its step and saves
        it; a second one ends it at once.
        """
        with contextlib.ExitStack() as stack:
            self.path = self.path.with_name(run_state.on_rank_0(lambda: self._hold_folder(stack)))
            for data in (self.train, self.val):
                if data is not None and (done := data.prepare(self.config.num_workers)):
                    self.say(done)
            self.say(describe(self))
            self._warn_of_overlap()
            self._try_out()
            run_state.on_rank_0(self._start_writing)
            self.resumed = True  # whoever calls `fit` once more goes on
            seen = run_state.seen_by(self, self.path / "config.json")
            if seen < self.processes:
                raise RuntimeError(
                    f"{shown(self.path)}, which process 0 has made, is seen by {seen} of "
                    f"{self.processes} processes; output_dir must be a folder that all machines "
                    "share"
                )
            if self.forked:  # killed before its first epoch, it can go on, too
                run_state.save_last(self)
            stack.enter_context(run_state.interrupts_wait(self))
            self._train()
            if self.writer:
                self.writer.close()
        self.accelerator.wait_for_everyone()
        return Run.load(self.path)

    @functools.cached_property
    def identity(self) -> dict:
        """What the run's result depends on beside its configuration: see fingerprint.py."""
        return fingerprint.of_run(self)

    def _hold_folder(self, stack: contextlib.ExitStack) -> str:
        """The name of the run's folder, which from now on is ours alone."""
        unnamed = not (self.resumed or self.config.run_name)
        path = stack.enter_context(held(self.path, new=unnamed))
        check_folder(path, not self.resumed, run_state.needed_bytes(self))
        return path.name

    def _try_out(self):
        """A few pairs of each set through what will read them: what does not fit says so now."""
        before = random_state()  # a transform of one's own may draw
        eager = torch.compiler.set_stance("force_eager") if self.config.compile else None
        with eager or contextlib.nullcontext():
            few = self.train.subset(range(min(len(self.train), 16)))
            embed(self.validated, few, mixed_precision=self.config.mixed_precision)
            if self.val is not None:
                few = self.val.subset(range(min(len(self.val), 16)))
                validate(self.validated, few, self.config)
        set_random_state(before)

    def _start_writing(self):
        settings = self.recorded_config() | {"run_name": self.path.name}
        fingerprint.add_contents(self.identity, self)
        again, step = self.ending is not None, self.step if self.resumed else None
        self.writer = RunWriter(self.path, settings, step, again)

    def _train(self):
        """All epochs that are left; what ends them early is saved, where that can be."""
        self._mark, self.stopping, self._asked_to_stop = time.perf_counter(), False, False
        self.in_step = self.interrupted = False
        modes = {part: part.training for part in self.net.modules()}
        try:
            with self._progress() as bar:
                if self.ending is not None:
                    self._end_epoch(self.ending)
                while self.step < self.total_steps and not self.stopping:
                    self._run_epoch(self.step // self.steps_per_epoch, bar)
        except BaseException:
            run_state.save_what_is_done(self)
            raise
        finally:  # the model may go on to another training
            for tower in [*self.frozen]:
                thaw(self.frozen.pop(tower))
            for part, mode in modes.items():
                part.training = mode

    def stop(self):
        """End the run after this record, validated and saved; for callbacks, on any process."""
        self._asked_to_stop = True

    def _run_epoch(self, epoch: int, bar):
        config, done = self.config, self.step % self.steps_per_epoch
        keys = self.epoch_batches(epoch)[done:][: self.total_steps - self.step]
        self.net.train()
        for tower in ("image", "text"):
            if epoch < getattr(config, f"frozen_{tower}_epochs"):
                self.frozen[tower] = self.frozen.get(tower, []) + freeze(self.model, tower)
            else:
                thaw(self.frozen.pop(tower, []))
        waited, since = 0.0, self.step
        before = started = epoch_started = time.perf_counter()
        self.epoch_waited = 0.0
        for batch in load_batches(self.train, keys, config.num_workers, self.device.type == "cuda"):
            waiting = time.perf_counter() - before
            waited, self.epoch_waited = waited + waiting, self.epoch_waited + waiting
            batch = batch.to(self.device)
            self.in_step = True
            if config.term_gradients_every and self.step % config.term_gradients_every == 0:
                compared, self.in_step = self.measure_terms(batch, epoch), False
                self._write("terms", epoch, compared)
                self.in_step = True
            loss, norm = self.train_step(batch, epoch)
            self.step, self.in_step = self.step + 1, False
            inside = self.step % self.steps_per_epoch != 0
            if not inside or self.step == self.total_steps:
                self.ending = epoch
            bar.update(1)
            if self.step % config.log_every == 0 or self.step == self.total_steps:
                passed = time.perf_counter() - started
                self._record_step(
                    epoch, batch, loss, norm, (self.step - since) / passed, waited / passed
                )
                waited, since, started = 0.0, self.step, time.perf_counter()
            if self.interrupted:
                raise KeyboardInterrupt
            if inside and config.checkpoint_every and self.step % config.checkpoint_every == 0:
                run_state.save_last(self)
            if self.stopping:
                break
            before = time.perf_counter()
        self.epoch_waited /= max(1e-9, time.perf_counter() - epoch_started)
        self._end_epoch(epoch)

    def clock(self):
        """Bring `self.seconds` up to now; it goes on where a resumed run was saved."""
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def _write(self, split: str, epoch: int, record: dict):
        head = {"split": split, "step": self.step, "epoch": epoch}
        record = head | {"seconds": round(self.seconds, 3)} | record
        record = {k: _finite(v) if isinstance(v, float) else v for k, v in record.items()}
        if self.writer:
            self.writer.write(record)
        for callback in self.callbacks:
            with self.own_state.outside(), each_alone():  # the run goes on as if it had not been
                callback(self, record)
        meet("training, after the callbacks")
        # All processes stop where one asks for it, whether or not the others have callbacks.
        asked = self.epoch_loss.new_tensor(float(self._asked_to_stop))
        self.stopping = bool(sum_over_processes(asked))

    def _record_step(
        self, epoch, batch: Batch, loss: Tensor, norm: float, pace: float, waiting: float
    ):
        words = maskable_words(batch.input_ids, batch.valid, self.model.special_ids).sum()
        hidden = [
            sum(float(drawn[i].mask.sum()) for drawn in self.drawn if drawn[i] is not None)
            for i in (0, 1)
        ]
        sums = [float(loss), *hidden, len(batch) * self.model.num_patches, float(words)]
        total, patches_hidden, words_hidden, patches, words = sum_over_processes(
            torch.tensor(sums, dtype=torch.float64).to(self.device)
        ).tolist()
        self.clock()
        record = {
            "loss": total,
            **self._terms_in_all(),
            "learning_rate": self.optimizers[-1].param_groups[0]["lr"],
            "logit_scale": self.model.logit_scale.item(),
            "image_mask_ratio": patches_hidden / patches,
            "text_mask_ratio": words_hidden / max(1, words),
            "grad_norm": norm,
            "skipped_steps": self.skipped,
            "samples_per_second": pace * len(self.train) / self.steps_per_epoch,
            "waiting_for_data": waiting,
        }
        self._write("train", epoch, record)

    def _terms_in_all(self) -> dict[str, float]:
        """Each term of the last step, not weighted, over all processes; {} for contrast alone."""
        terms = sorted(self.terms)
        if self.config.terms == ["contrastive"] or not terms:
            return {}
        total = sum_over_processes(torch.stack([self.terms[term].double() for term in terms]))
        return {f"{term}_loss": x for term, x in zip(terms, total.tolist(), strict=True)}

    @property
    def validated(self) -> MultimodalEncoder:
        """The model that is validated and kept as the best: the running mean, or the model."""
        return self.model if self.ema is None else self.ema.module

    def _end_epoch(self, epoch: int):
        """Write last/, validate, keep the best, write last/ anew."""
        config = self.config
        last = self.stopping or self.step == self.total_steps
        validated = (epoch + 1) % config.eval_every == 0 or last
        if validated and self.val is not None:  # whatever goes wrong in it, no step is lost
            run_state.save_last(self)
        # No step of the epoch may have been applied: then there is no loss to speak of.
        total = float(sum_over_processes(self.epoch_loss))
        train_loss = total / self.epoch_steps if self.epoch_steps else None
        if validated:
            record: dict[str, Any] = {"loss": train_loss, "train_loss": train_loss}
            record["waiting_for_data"] = self.epoch_waited  # share of the epoch's training time
            if self.val is not None:
                record |= validate(self.validated, self.val, config)
                self._keep_pictures()
            better = self._keep_best(epoch, record)
            self.clock()
        self.epoch_loss, self.epoch_steps = torch.zeros_like(self.epoch_loss), 0
        self.ending = None
        if validated:
            self._write("val", epoch, record | {"best": better})
            self._say_epoch(epoch, record, better)
        run_state.save_last(self)

    def _keep_best(self, epoch: int, record: dict) -> bool:
        """Write best_model.pth, where this record is the best one yet."""
        before, loss = self.best_loss, record["loss"]
        # Until there is a finite loss the newest model is kept: better than none.
        better = loss is not None and (loss < before or not math.isfinite(before))
        if self.val is None and self.config.terms_change and record["train_loss"] is not None:
            better = True  # its sums are of other terms than before: the last one is kept
        # Process 0 decides: on another kind of CPU the last bit of the loss may be another.
        better = bool(sum_over_processes(self.epoch_loss.new_tensor(better * (not self.rank))))
        if better:
            self.best_loss = loss if math.isfinite(loss) else math.inf
            try:
                run_state.save_best(self, epoch)
            except BaseException:
                self.best_loss = before
                raise
        return better

    def _keep_pictures(self):
        """Original, masked and put back, of the same few pictures each time."""
        if self.writer and self.val is not None and "pixels" in self.config.terms:
            pictures = example_pictures(self.validated, self.val, self.config)
            self.writer.write_pictures(*pictures, step=self.step)

    @with_own_state
    def measure_terms(self, batch: Batch, epoch: int) -> dict[str, float]:
        """What the terms do to each other: see `term_gradients.compare_terms`.

        The gradient of each term alone, weighted as in the loss, on the towers that they share. The
        training goes on as if this had not been: no draw is used up, nothing is updated.
        """
        weights = self.objective.weights(self.step, self.total_steps)
        states, gradients = random_states(self.device), {}
        for term, weight in weights.items():
            self.model.zero_grad(set_to_none=True)
            set_random_states(states, self.device)
            self.gradients(batch, epoch, {term: weight})
            scale = self.scaler.get_scale() if self.scaler.is_enabled() else 1.0
            gradients[term] = tower_gradients(self.model, scale)
        set_random_states(states, self.device)
        self.model.zero_grad(set_to_none=True)
        return compare_terms(gradients)

    # -- words -------------------------------------------------------------------------------

    def say(self, words: str):
        if self.rank == 0:
            print(words, flush=True)

    def _say_epoch(self, epoch: int, record: dict, better: bool):
        words, train_loss = f"epoch {epoch + 1:3d}/{self.num_epochs}  ", record["train_loss"]
        words += "no step applied" if train_loss is None else f"train loss {train_loss:.3f}"
        if self.val is not None:
            words += f"  val loss {record['loss']:.3f}"
        if "image_to_text_R@1" in record:
            recalls = [record[f"{way}_R@1"] for way in ("image_to_text", "text_to_image")]
            words += f"  R@1 {50 * sum(recalls):5.1f} %"
        if "pixel_error" in record:
            words += f"  pixel error {record['pixel_error']:.4f}"
        for term in ("words", "matching"):
            if f"{term}_accuracy" in record:
                words += f"  {term} {100 * record[f'{term}_accuracy']:4.1f} %"
        waited = f"  waited for data {100 * self.epoch_waited:.1f} %"
        self.say(f"{words}  {self.seconds:6.1f} s{waited}{'  best' if better else ''}")

    def _warn_of_overlap(self):
        """Say what training and validation set share: scores on it flatter."""
        if self.val is None or self.rank or any(data.expensive for data in (self.train, self.val)):
            return
        if found := overlap(self.train, self.val, near=False, names=("training", "validation")):
            self.say(f"beware      {found}")

    def _progress(self):
        """A progress bar in a terminal or a notebook, on rank 0; nothing of it stays at the end."""
        from tqdm import tqdm

        if self.rank or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
            return contextlib.nullcontext(tqdm(disable=True))
        return tqdm(total=self.total_steps, initial=self.step, leave=False, unit="step")


def _same(one, other) -> bool:
    """Two tokenizers that give the same pieces."""
    return one is other or one.get_vocab() == other.get_vocab()


def _has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def train_model(
    config: TrainingConfig,
    train: MultimodalDataset,
    val: MultimodalDataset | None = None,
    model: MultimodalEncoder | None = None,
    resume: bool | str | os.PathLike = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train a masked multimodal encoder and return the `Run`.

    train, val: data sets of ours, or `torch.utils.data.Subset`s of them. model None builds
    `config.preset`; of one that is given the config's preset, dropout and temperature are not
    asked. The training set's tokenizer is given to the validation set.
    resume=True goes on from the last checkpoint of the same run; with nothing to resume it starts
    anew and says so. resume="runs/other" starts this run from where that one stands, under another
    configuration. callbacks: functions f(trainer, record), called after each record that is
    written (record["split"] is "train", "val", or "terms": their gradients); `trainer.stop()` in
    one ends the run. Runs inside `mm.launch` or torchrun with as many processes as there are.
    """
    return MaskedMultimodalTrainer(config, train, val, model, resume, callbacks).fit()
