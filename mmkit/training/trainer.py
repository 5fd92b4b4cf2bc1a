"""Train the encoder: one loop for one process or many.

Order, masks and choice of captions are pure functions of (seed, epoch, sample id), and a run's
position is one number, its step; so a run that was killed resumes exactly.
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
from ..device import autocast_for, pick_precision, trains_on_gpu
from ..distributed import rank_and_world_size, rank_slice
from ..masking.core import TokenInfo
from ..masking.plan import MaskPlan, looks
from ..models.attention import class_attention
from ..models.checkpoint import load_weights
from ..models.decoder import ForwardSpec
from ..models.ema import EMA
from ..models.encoder import EncoderOutput, MultimodalEncoder
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
from .terms import check_steps, prepare_heads

_STANDING = {  # plain values in a run's state, with defaults for states of older versions
    "step": 0,
    "skipped": 0,
    "skipped_in_a_row": 0,
    "epoch_steps": None,
    "seconds": 0.0,
    "best_loss": math.inf,
    "ending": None,
}
Callback = Callable[["MaskedMultimodalTrainer", dict], None]


class MaskedMultimodalTrainer:
    """One training run: data, model, optimizers, step, validation, files (none before `fit`).

    Args:
        config, train, val, model, resume, callbacks: as in `train_model`.
    Raises:
        ValueError, RuntimeError: data, model, config, state and machine do not fit together.
    Example:
        >>> config = mm.TrainingConfig(batch_size=8, max_steps=1)
        >>> trainer = mm.MaskedMultimodalTrainer(config, data, model=model)
        >>> loss, norm = trainer.train_step(trainer.first_batch(), epoch=0)
        >>> trainer.steps_per_epoch, bool(loss > 0), norm > 0
        (3, True, True)
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
        # A copy, checked again: later changes to the caller's object do not affect the run.
        self.config = config = dataclasses.replace(config)
        self.callbacks, self.stopping, self.asked_to_stop = list(callbacks), False, False
        self.in_step = self.interrupted = False
        self.ending: int | None = None  # epoch whose steps are done, but not its validation
        self.frozen: dict[str, list] = {}  # parameters that the run has frozen, by tower
        resume = resume or False
        check_sets(config, self.train, self.val)
        # Settings of a given model at the start; they replace those of the configuration.
        self.model_settings = {} if model is None else model.settings()
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
        with warnings.catch_warnings():  # it divides the cores; the run prints how many
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")
            # Without a GPU every rank must be told so, or it trains an independent copy.
            self.accelerator = Accelerator(cpu=not trains_on_gpu(), kwargs_handlers=[ddp])
        self.rank, self.processes = rank_and_world_size()
        self.device = self.accelerator.device
        self.precision = pick_precision(config.mixed_precision, self.device)
        self.own_state.cuda_has_started()
        torch.manual_seed(config.seed)
        model = float32_model(config, model, self.train.tokenizer)
        self.trained_before = model.trained_steps
        self.objective = Objective(config, model)
        prepare_heads(model, config)
        self.model = model.to_device(self.device)
        self.model.loss = config.loss  # `evaluate` uses this loss
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
            self.net.broadcast_buffers = False  # constants; DDP warns of it as an argument
        fp16 = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self._count()
        self.path = run_folder(config.output_dir, run_name(config, resume is True, self.processes))
        self.forked = False
        self.resumed = self._go_on(resume)
        self.writer: RunWriter | None = None  # made by `fit`; until then nothing is written

    def _count(self):
        """Count the steps, plan their masks, and set the run to its first step."""
        config = self.config
        self.steps_per_epoch = math.ceil(len(self.train) / config.batch_size)
        check_batches(config, len(self.train), self.processes)
        self.total_steps = config.max_steps or config.num_epochs * self.steps_per_epoch
        self.num_epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seed_own_draws()
        self.best_loss, self.seconds, self.mark = math.inf, 0.0, time.perf_counter()
        self.epoch_loss, self.epoch_steps = torch.zeros((), device=self.device), 0
        self.epoch_waited = 0.0  # fraction of this epoch's time spent waiting for data
        self.plan = MaskPlan(config, self._token_info(), self.num_epochs, self.train.layers)
        self.idle_terms = check_steps(config, self.total_steps, self.steps_per_epoch, self.plan)
        self.terms: dict[str, Tensor] = {}  # this process's part of each term of the last step
        self.drawn: list = []  # the (image, text) maskings of the step's micro-batches

    def seed_own_draws(self):
        """Seed torch (dropout), NumPy and Python, differently on every rank."""
        from accelerate.utils import set_seed

        set_seed((self.config.seed + 1000003 * (self.rank + 1) + self.step) % 2**32)

    def _token_info(self) -> TokenInfo:
        """The model's token info; attentive maskers use the EMA, at half the resolution."""
        tokens, ema = self.model.token_info, self.attention_ema
        if ema is not None:

            def attend(pixel_values: Tensor) -> Tensor:
                with autocast_for(self.config.mixed_precision, pixel_values.device):
                    pixels = self.model.normalize(pixel_values)
                    return class_attention(ema.module, pixels, half=True, of=self.model.pooling)

            tokens.attend = attend
        return tokens

    def recorded_config(self) -> dict:
        """The configuration as files record it, with the settings of a given model."""
        return self.config.to_dict() | self.model_settings

    def _go_on(self, resume: bool | str | os.PathLike) -> bool:
        """Resume this run or fork another, as asked; True if a state was resumed.

        Workers that torchrun may restart always resume: they cannot tell a restart from a start,
        as TORCHELASTIC_RESTART_COUNT stays 0 where only those of another machine have died.
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
        """The state of the run, without the loss of an unfinished epoch and the generators."""
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
        """Restore what `state_dict` returned.

        path: its file, for messages. An optimizer whose state is None starts without one. Raises
        ValueError for another architecture, or where the run needs an EMA that the state lacks.
        """
        load_weights(self.model, state["model_state_dict"], path)
        for optimizer, saved in zip(self.optimizers, state["optimizer_state_dict"], strict=True):
            if saved is not None:
                optimizer.load_state_dict(saved)
        if state["scaler"]:  # empty where "auto" chose another type on another machine
            self.scaler.load_state_dict(state["scaler"])
        for ema, name in ((self.attention_ema, "ema"), (self.ema, "weights_ema")):
            if ema is not None and not state.get(name):
                raise ValueError("the checkpoint has no EMA to resume from; start a new run")
            if ema is not None:
                ema.load_state_dict(state[name])
        for name, default in _STANDING.items():
            setattr(self, name, state.get(name, default))
        self.model.trained_steps = state.get("trained_steps", self.step)

    # -- pure functions of (seed, epoch, sample) ---------------------------------------------

    def epoch_batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """This process's (rows, caption noise) of each batch of an epoch, (R,) each.

        Every image occurs once, in an order that depends on seed and epoch alone. The batches are
        of nearly equal size, so that no step has only a handful of negatives.
        """
        seed, batches = self.config.seed, self.steps_per_epoch
        captions = mask_noise(seed, epoch, self.train.sample_ids, 1, "caption")[:, 0]
        own = [rank_slice(rows)[0] for rows in self.train.epoch_rows(seed, epoch, batches)]
        return [(rows, captions[rows]) for rows in own]

    def first_batch(self) -> Batch:
        """This process's part of the first batch of the run, on the device."""
        return self.train.batch(*self.epoch_batches(0)[0]).to(self.device)

    def maskings(self, batch: Batch, epoch: int):
        """(image, text) `Masking` of a data set's batch; None where nothing is masked."""
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
        """Add the gradient of a batch to the parameters.

        Dropout draws from torch's current generator, which is the run's own within `train_step`.
        weights: of the terms; None = as the schedules say. Returns this process's part of the
        loss; `self.terms` then holds its part of each term, unweighted.
        """
        config, objective = self.config, self.objective
        if weights is None:
            weights = objective.weights(self.step, self.total_steps)
        parts = self.plan.augmented(batch, epoch).split(config.gradient_accumulation_steps)
        # Drawn once: the second pass must mask the same, and attentive masks cost a forward pass.
        self.drawn = [self.plan.draw(part, epoch) for part in parts]
        micro_batches = [
            MicroBatch(part, drawn, objective.wanted(part, drawn, epoch, weights))
            for part, drawn in zip(parts, self.drawn, strict=True)
        ]
        counts = objective.counts(micro_batches)
        # A term without any masked token in this step is absent, which is not a loss of 0.
        active = [term for term in weights if counts.get(term, 1)]
        self.terms = {term: torch.zeros((), device=self.device) for term in active}

        def features(micro: MicroBatch) -> EncoderOutput:
            spec = ForwardSpec(view=config.contrastive_view)
            return self.encode(micro.batch, micro.maskings, spec)

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
            how=Mechanics(self.scaler.scale, functools.partial(self.accelerator.no_sync, self.net)),
        )
        for micro in micro_batches:  # in a fixed order: a sum of floats depends on it
            for term in micro.terms.keys() & self.terms.keys():
                self.terms[term] += micro.terms[term]
        if "contrastive" in weights:
            self.terms["contrastive"] = contrast
        total = [weights[term] * value for term, value in self.terms.items()]
        return torch.stack(total).sum() if total else torch.zeros((), device=self.device)

    @with_own_state
    def train_step(self, batch: Batch, epoch: int) -> tuple[Tensor, float]:
        """One optimizer step: (this process's part of the loss, gradient norm before clipping)."""
        config = self.config
        self.model.zero_grad(set_to_none=True)  # also after an interrupted step
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
                f"{self.skipped_in_a_row} steps in a row had no finite gradient (at step "
                f"{self.step}). Likely cause: {likely_cause(self.model, self.scaler, batch)}"
            )

    # -- the run -----------------------------------------------------------------------------

    @with_own_state
    def fit(self) -> Run:
        """Train to the end and return the `Run`; see `loop.fit`."""
        return loop.fit(self)

    @functools.cached_property
    def identity(self) -> dict:
        """What the run's result depends on besides its configuration: see fingerprint.py."""
        return fingerprint.of_run(self)

    def stop(self):
        """End the run after this record, validated and saved; for callbacks, in any process."""
        self.asked_to_stop = True

    def clock(self):
        """Bring `self.seconds` up to date; a resumed run counts on from the saved value."""
        now = time.perf_counter()
        self.seconds, self.mark = self.seconds + now - self.mark, now

    @property
    def validated(self) -> MultimodalEncoder:
        """The model that is validated and saved as the best: the EMA if there is one."""
        return self.model if self.ema is None else self.ema.module

    @with_own_state
    def measure_terms(self, batch: Batch, epoch: int) -> dict[str, float]:
        """Norms and cosines of the terms' gradients: see `term_gradients.measure_terms`."""
        return measure_terms(self, batch, epoch)

    def say(self, message: str):
        """Print a message, on rank 0 only."""
        if self.rank == 0:
            print(message, flush=True)


def train_model(
    config: TrainingConfig,
    train: MultimodalDataset,
    val: MultimodalDataset | None = None,
    model: MultimodalEncoder | None = None,
    resume: bool | str | os.PathLike = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train a masked multimodal encoder; within `mm.launch` or torchrun in all processes together.

    Args:
        config: every choice of the run.
        train: training set, a data set of mmkit or a `torch.utils.data.Subset` of one.
        val: validation set, which gets the tokenizer of train; None = the best model is chosen by
            the training loss.
        model: encoder to train, for which the config's preset, dropout and temperature are unused;
            None = a new one of `config.preset`, with the training set's tokenizer.
        resume: True resumes the run of this name from its last/state.pth, if there is one;
            "runs/other", or a state.pth, forks that run: it is continued under this config.
        callbacks: functions f(trainer, record), called in every process after each record of
            metrics.jsonl (record["split"] is "train", "val", or "terms", the gradients of the
            terms); `trainer.stop()` in one of them ends the run.
    Returns:
        The `Run`, read from its folder.
    Raises:
        ValueError: data, model, config and the state to resume or fork do not fit together.
        RuntimeError: many steps in a row without a finite gradient; another run in the folder.
        OSError: the folder cannot be written, or the disk has too little room.
    Example:
        >>> config = mm.TrainingConfig(batch_size=8, max_steps=2, run_name="first")
        >>> run = mm.train_model(config, data, model=model)
        run         runs/first
        ...
        >>> run.best["step"], run.best_file.name
        (2, 'best_model.pth')
    """
    return MaskedMultimodalTrainer(config, train, val, model, resume, callbacks).fit()
