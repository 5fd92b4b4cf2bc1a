"""Train the encoder: one loop for one process or many.

Order, masks and choice of caption are pure functions of (seed, epoch, sample id), and where a run
stands is one number, its step; so a run that was killed goes on as if it had not been.
Walk-through: notebooks/03_training.ipynb.
"""

import dataclasses
import functools
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..data.batch import Batch
from ..data.dataset import MultimodalDataset
from ..data.loader import as_dataset
from ..device import autocast_for, pick_precision
from ..distributed import rank_and_world_size, rank_slice
from ..masking.core import TokenInfo
from ..masking.plan import MaskPlan, looks
from ..models.attention import class_attention
from ..models.checkpoint import load_weights
from ..models.decoder import ForwardSpec
from ..models.ema import EMA
from ..models.encoder import EncoderOutput, MultimodalEncoder
from ..models.layers import draws_dropout
from ..noise import mask_noise
from ..objective import MicroBatch, Objective
from . import fingerprint, loop
from . import resume as resuming
from .optim import build_optimizers, set_learning_rate
from .random_state import OwnState, with_own_state
from .records import likely_cause
from .run import Run, RunWriter, run_folder
from .setup import (
    check_arguments,
    check_batches,
    check_sets,
    encoded_for,
    float32_model,
    max_restarts,
    prepare_layers,
    run_name,
)
from .step import Contrast, Mechanics, backward, naive_backward, update
from .term_gradients import measure_terms
from .threads import MOST_AT_ONCE

_STANDING = {  # plain values of a run's state, and those of a state that an older version wrote
    "step": 0,
    "skipped": 0,
    "skipped_in_a_row": 0,
    "epoch_steps": None,
    "seconds": 0.0,
    "best_loss": math.inf,
    "ending": None,
}
SMALLEST_PART = 16  # pairs: with fewer, to prepare the work takes longer than the work
Callback = Callable[["MaskedMultimodalTrainer", dict], None]


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
        self.callbacks, self.stopping, self.asked_to_stop = list(callbacks), False, False
        self.in_step = self.interrupted = False
        self.ending: int | None = None  # the epoch whose steps are done, but not its end
        self.frozen: dict[str, list] = {}  # what the run has frozen, by tower
        resume = resume or False
        check_sets(config, self.train, self.val)
        # Of a model that is given, when the run starts; what holds in place of the configuration.
        self.model_settings = {} if model is None else model.settings()
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
        with warnings.catch_warnings():  # it shares out the cores; the run says how many
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
            # Without a GPU every rank must be told so, or it trains an independent copy of its own.
            self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
        self.rank, self.processes = rank_and_world_size()
        self.device = self.accelerator.device
        self.precision = pick_precision(config.mixed_precision, self.device)
        self.own_state.cuda_has_started()
        torch.manual_seed(config.seed)
        model = float32_model(config, model, self.train.tokenizer)
        self.trained_before = model.trained_steps
        self.objective = Objective(config, model)
        self.objective.prepare_model()
        self.model = model.to_device(self.device)
        self.model.loss = config.loss  # by which `evaluate` then judges it
        for name in ("train", "val"):
            if (data := getattr(self, name)) is not None:
                setattr(self, name, encoded_for(self.model, data, name))
        if config.text_mask == "frequency":
            self.model.token_frequency = self.train.token_frequency()
        self.ema = EMA(self.model, config.ema_decay) if config.ema_decay else None
        self.attention_ema = EMA(self.model.vit, config.ema_momentum) if looks(config) else None
        prepare_layers(self.model, config, self.device)
        self.optimizers = build_optimizers(self.model, config)
        self.net = self.accelerator.prepare_model(self.model)  # DDP where there are several
        if self.processes > 1:
            self.net.broadcast_buffers = False  # they are constants; as an argument DDP warns of it
        fp16 = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self._count()
        self.path = run_folder(config.output_dir, run_name(config, resume is True, self.processes))
        self.forked = False
        self.resumed = self._go_on(resume)
        self.writer: RunWriter | None = None  # a trainer that is only looked at writes nothing

    def _count(self):
        """How many steps there are, what they mask, and where the run stands: at the first."""
        config = self.config
        self.steps_per_epoch = math.ceil(len(self.train) / config.batch_size)
        check_batches(config, len(self.train), self.processes)
        self.total_steps = config.max_steps or config.num_epochs * self.steps_per_epoch
        self.num_epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seed_own_draws()
        self.best_loss, self.seconds, self.mark = math.inf, 0.0, time.perf_counter()
        self.epoch_loss, self.epoch_steps = torch.zeros((), device=self.device), 0
        self.epoch_waited = 0.0  # share of this epoch's training that went by without a batch
        self.plan = MaskPlan(config, self._token_info(), self.num_epochs, self.train.layers)
        self.idle_terms = self.objective.check_steps(
            self.total_steps, self.steps_per_epoch, self.plan
        )
        self.terms: dict[str, Tensor] = {}  # this process's parts of the last step's terms
        self.drawn: list = []  # the (image, text) maskings of the step's micro-batches

    def seed_own_draws(self):
        """Seed torch (dropout), NumPy and Python, so that what is drawn differs between ranks."""
        from accelerate.utils import set_seed

        set_seed((self.config.seed + 1000003 * (self.rank + 1) + self.step) % 2**32)

    def _token_info(self) -> TokenInfo:
        """The model's; attentive maskers look with a running mean, at half the resolution."""
        tokens, ema = self.model.token_info, self.attention_ema
        if ema is not None:

            def attend(pixel_values: Tensor) -> Tensor:
                with autocast_for(self.config.mixed_precision, pixel_values.device):
                    pixels = self.model.normalize(pixel_values)
                    return class_attention(ema.module, pixels, half=True, of=self.model.pooling)

            tokens.attend = attend
        return tokens

    def recorded_config(self) -> dict:
        """The configuration as files record it: with what a given model is, not what was asked."""
        return self.config.to_dict() | self.model_settings

    def _go_on(self, resume: bool | str | os.PathLike) -> bool:
        """Resume this run or fork another, as asked; True where there was something to go on from.

        Workers that torchrun may restart resume whatever the command says, for it is the same one.
        They cannot know better: TORCHELASTIC_RESTART_COUNT stays 0 on a machine whose workers had
        to stop only because another's died, or because a machine joined.
        """
        own = self.path / "last" / "state.pth"
        restarts = max_restarts() > 0
        if resume is True or (restarts and (resume is False or resuming.seen_by(self, own))):
            return resuming.resume(self, own)
        if resume is not False:
            resuming.fork(self, Path(resume))
            self.forked = True
        return False

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, but for the loss of an unfinished epoch and what draws."""
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "ema": self.attention_ema and self.attention_ema.state_dict(),
            "weights_ema": self.ema and self.ema.state_dict(),
            "trained_steps": self.model.trained_steps,
            **{name: getattr(self, name) for name in _STANDING},
        }

    def load_state_dict(self, state: dict, path: str | os.PathLike = "the state") -> None:
        """Go on from what `state_dict` gave; path: of its file, for messages.

        An optimizer whose state is None starts without. Raises ValueError for another architecture.
        """
        load_weights(self.model, state["model_state_dict"], path)
        for optimizer, memory in zip(self.optimizers, state["optimizer_state_dict"], strict=True):
            if memory is not None:
                optimizer.load_state_dict(memory)
        if state["scaler"]:  # empty where "auto" took another type, on another machine
            self.scaler.load_state_dict(state["scaler"])
        for ema, name in ((self.attention_ema, "ema"), (self.ema, "weights_ema")):
            if ema is not None and not state.get(name):
                raise ValueError(
                    "the checkpoint has no running mean to resume from; start a new run"
                )
            if ema is not None:
                ema.load_state_dict(state[name])
        for name, default in _STANDING.items():
            setattr(self, name, state.get(name, default))
        self.model.trained_steps = state.get("trained_steps", self.step)

    # -- pure functions of (seed, epoch, sample) ---------------------------------------------

    def epoch_batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """This process's (rows, caption noise) of each batch of an epoch.

        Every picture once, in an order that depends on seed and epoch alone; batches of nearly
        equal size, so that no step sees only a handful of negatives.
        """
        seed, batches = self.config.seed, self.steps_per_epoch
        captions = mask_noise(seed, epoch, self.train.sample_ids, 1, "caption")[:, 0]
        shares = [rank_slice(rows)[0] for rows in self.train.epoch_rows(seed, epoch, batches)]
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

    def encode(self, batch: Batch, maskings, wanted: ForwardSpec | None = None) -> EncoderOutput:
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
        at_once = self.at_once(len(batch) // config.gradient_accumulation_steps)
        parts = self.plan.augmented(batch, epoch).split(
            config.gradient_accumulation_steps * at_once
        )
        # Drawn once: the replay of a micro-batch must hide the same, and attention costs a look.
        self.drawn = [self.plan.draw(part, epoch) for part in parts]
        micro_batches = [
            MicroBatch(part, drawn, objective.wanted(part, drawn, epoch, weights))
            for part, drawn in zip(parts, self.drawn, strict=True)
        ]
        counts = objective.counts(micro_batches)
        # What hides nothing in this step is not a term that costs nothing: it is none.
        active = [term for term in weights if counts.get(term, 1)]
        self.terms = {term: torch.zeros((), device=self.device) for term in active}

        def features(micro: MicroBatch) -> EncoderOutput:
            return self.encode(
                micro.batch, micro.maskings, ForwardSpec(view=config.contrastive_view)
            )

        def whole(micro: MicroBatch) -> tuple[EncoderOutput, Tensor | None]:
            out = self.encode(micro.batch, micro.maskings, micro.wanted)
            parts = objective.parts(out, micro.batch, micro.maskings, counts)
            micro.terms = {term: part.detach() for term, part in parts.items()}
            total = [weights[term] * part for term, part in parts.items()]
            return out, torch.stack(total).sum() if total else None

        accumulate = backward if config.accumulation == "exact" else naive_backward
        contrast = accumulate(
            features,
            micro_batches,
            (self.model.logit_scale, self.model.logit_bias),
            Contrast(config.loss, config.exchange, weights.get("contrastive", 0.0)),
            whole=whole,
            how=self._mechanics(at_once),
        )
        for micro in micro_batches:  # not as they came: sums of floats go by their order
            for term in micro.terms.keys() & self.terms.keys():
                self.terms[term] += micro.terms[term]
        if "contrastive" in weights:
            self.terms["contrastive"] = contrast
        total = [weights[term] * value for term, value in self.terms.items()]
        return torch.stack(total).sum() if total else torch.zeros((), device=self.device)

    def _mechanics(self, at_once: int) -> Mechanics:
        learning = [p for p in self.model.parameters() if p.requires_grad] if at_once > 1 else []
        no_sync = functools.partial(self.accelerator.no_sync, self.net)
        return Mechanics(self.scaler.scale, no_sync, at_once, learning)

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
        norm = update(self.model, self.optimizers, self.scaler, config.max_grad_norm)
        finite = math.isfinite(norm)
        if finite:
            for ema, module in ((self.attention_ema, self.model.vit), (self.ema, self.model)):
                if ema is not None:
                    ema.update(module)
            self.model.trained_steps += 1
            self.epoch_loss += loss
            self.epoch_steps += 1
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
                f"{self.step}); none of them was applied. Likely "
                f"{likely_cause(self.model, self.scaler, batch)}"
            )

    # -- the run -----------------------------------------------------------------------------

    @with_own_state
    def fit(self) -> Run:
        """Train to the end; returns the `Run`. See `loop.fit`."""
        return loop.fit(self)

    @functools.cached_property
    def identity(self) -> dict:
        """What the run's result depends on beside its configuration: see fingerprint.py."""
        return fingerprint.of_run(self)

    def stop(self):
        """End the run after this record, validated and saved; for callbacks, on any process."""
        self.asked_to_stop = True

    def clock(self):
        """Bring `self.seconds` up to now; it goes on where a resumed run was saved."""
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    @property
    def validated(self) -> MultimodalEncoder:
        """The model that is validated and kept as the best: the running mean, or the model."""
        return self.model if self.ema is None else self.ema.module

    @with_own_state
    def measure_terms(self, batch: Batch, epoch: int) -> dict[str, float]:
        """What the terms do to each other: see `term_gradients.measure_terms`."""
        return measure_terms(self, batch, epoch)

    # -- words -------------------------------------------------------------------------------

    def say(self, words: str):
        if self.rank == 0:
            print(words, flush=True)


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
