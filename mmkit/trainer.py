"""Train the encoder: one loop for one process or many.

Order, masks and choice of caption are pure functions of (seed, epoch, sample id), and where a run
stands is one number, its step; so a run that was killed goes on as if it had not been.
Walk-through: notebooks/03_training.ipynb.
"""

import contextlib
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import (
    load_weights,
    random_state,
    read_checkpoint,
    set_random_state,
    write_atomically,
)
from .config import TrainingConfig
from .data import Batch, MultimodalDataset, load_batches
from .describe import describe
from .distributed import my_share, sum_over_processes, world
from .encoder import MAX_LOGIT_SCALE, EncoderOutput, MultimodalEncoder
from .mask_plan import MaskPlan, check_maskers
from .masking import mask_noise
from .optim import build_optimizers, set_learning_rate
from .precision import autocast_for, pick_precision
from .retrieval import embed, score
from .run import Run, RunWriter, newest_run
from .step import backward, naive_backward
from .text_maskers import maskable_words

# on resume
_MAY_DIFFER = {"output_dir", "run_name", "num_workers", "log_every", "checkpoint_every"}
# in last/state.pth
_NEEDED = (
    "model_state_dict optimizer_state_dict scaler random config data "
    "epoch_loss best_loss step skipped seconds"
).split()
_MAX_SKIPPED = 20  # steps in a row without a finite gradient before a run stops


class MaskedMultimodalTrainer:
    """Everything of one run: data, model, optimizers, the step, validation, files.

    model None builds `config.preset` with the training set's tokenizer. val None: "best" is judged
    on the training loss, and the run says so. resume: go on from last/state.pth of the same run.
    """

    def __init__(
        self,
        config: TrainingConfig,
        train: MultimodalDataset,
        val: MultimodalDataset | None = None,
        model: MultimodalEncoder | None = None,
        resume: bool = False,
    ):
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.config, self.train, self.val = config, train, val
        self._check()
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        # Without a GPU every rank must be told so, or it trains an independent copy of its own.
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
        self.rank, self.processes = world()
        self.device = self.accelerator.device
        self.precision = pick_precision(config.mixed_precision, self.device)
        if config.deterministic:  # what cuBLAS asks for, read when CUDA starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        torch.manual_seed(config.seed)
        if model is None:
            model = MultimodalEncoder.preset(
                config.preset,
                tokenizer=train.tokenizer,
                dropout=config.dropout,
                temperature=config.temperature,
            )
        self.model = model.to_device(self.device)
        self._share_tokenizer()
        self.optimizers = build_optimizers(self.model, config)
        self.net = self.accelerator.prepare_model(self.model)  # DDP where there are several
        fp16 = self.precision == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)

        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        smallest = len(train) // self.steps_per_epoch
        if smallest < self.processes * config.gradient_accumulation_steps:
            raise ValueError(
                f"batches of {smallest} pairs cannot be cut for {self.processes} processes and "
                f"{config.gradient_accumulation_steps} micro-batches; take a larger batch_size"
            )
        self.total_steps = config.max_steps or config.num_epochs * self.steps_per_epoch
        self.num_epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self._seed_own_draws()
        self.best_loss, self.seconds, self._mark = math.inf, 0.0, time.perf_counter()
        self.epoch_loss = torch.zeros((), device=self.device)
        self.plan = MaskPlan(config, self.model, train, self.num_epochs)
        self.drawn: list = []  # the (image, text) maskings of the step's micro-batches
        self.path = Path(config.output_dir) / self._run_name(resume)
        self.resumed = resume and self._resume(self.path / "last" / "state.pth")
        self.writer: RunWriter | None = None  # a trainer that is only looked at writes nothing

    def _seed_own_draws(self):
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
        check_maskers(config, self.train)

    def _share_tokenizer(self):
        """All data is encoded as the model reads it; a foreign tokenizer gives silent nonsense."""
        for name, data in (("train", self.train), ("val", self.val)):
            if data is None:
                continue
            if data.given_tokenizer and not _same(data.tokenizer, self.model.tokenizer):
                raise ValueError(
                    f"the {name} set was given another tokenizer than the model has; build both "
                    "with the same one (tokenizer=model.tokenizer)"
                )
            data.use_tokenizer(self.model.tokenizer, self.model.max_length)

    def _run_name(self, resume: bool) -> str:
        name = self.config.run_name
        if not name and resume:
            name = newest_run(Path(self.config.output_dir))
        if not name:
            name, number = time.strftime("%Y%m%d-%H%M%S"), 1
            while (Path(self.config.output_dir) / name).exists():
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
        ids, seed = self.train.sample_ids, self.config.seed
        order = mask_noise(seed, epoch, ids, 1, "order")[:, 0].argsort(stable=True)
        captions = mask_noise(seed, epoch, ids, 1, "caption")[:, 0]
        shares = [my_share(rows)[0] for rows in order.tensor_split(self.steps_per_epoch)]
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

    def encode(self, batch: Batch, maskings) -> EncoderOutput:
        """The masked forward pass of a micro-batch, in this run's precision."""
        modes = (self.config.image_mask_mode, self.config.text_mask_mode)
        with autocast_for(self.config.mixed_precision, self.device):
            return self.net(batch, *maskings, *modes)

    def gradients(self, batch: Batch, epoch: int) -> Tensor:
        """Add the gradient of a batch to the parameters; returns its share of the loss."""
        config = self.config
        accumulate = backward if config.accumulation == "exact" else naive_backward
        micro_batches = self.plan.augmented(batch, epoch).split(config.gradient_accumulation_steps)
        # Drawn once: the replay of a micro-batch must hide the same, and attention costs a look.
        drawn = {id(micro): self.plan.draw(micro, epoch) for micro in micro_batches}
        self.drawn = list(drawn.values())
        return accumulate(
            lambda micro: self.encode(micro, drawn[id(micro)]),
            micro_batches,
            (self.model.logit_scale, self.model.logit_bias),
            config.loss,
            grad_scale=self.scaler.scale,
            no_sync=lambda: self.accelerator.no_sync(self.net),
        )

    def train_step(self, batch: Batch, epoch: int) -> tuple[Tensor, float]:
        """One optimizer step: (this process's part of the loss, gradient norm before clipping)."""
        config = self.config
        set_learning_rate(self.optimizers, config.lr_fraction(self.step, self.total_steps))
        loss = self.gradients(batch, epoch)
        for optimizer in self.optimizers:
            self.scaler.unscale_(
                optimizer
            )  # before clipping, or the norm is 65,536 times too large
        limit = config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self._count_skipped(norm)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if math.isfinite(norm):  # a skipped step leaves the running mean where it is, too
            self.plan.after_step()
        with torch.no_grad():  # in the parameter, after the step, so that its gradient stays alive
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return loss, norm

    def _count_skipped(self, norm: float):
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row == _MAX_SKIPPED:
            raise RuntimeError(
                f"{_MAX_SKIPPED} steps in a row had no finite gradient (step {self.step}): likely "
                "the learning rate is too high or a picture is not finite; lower learning_rate, "
                "raise warmup_steps, or try mixed_precision='no'"
            )

    # -- the loop ----------------------------------------------------------------------------

    def fit(self) -> Run:
        """Train to the end; returns the `Run`."""
        self._say(describe(self))
        if self.rank == 0:
            settings = self.config.to_dict() | {"run_name": self.path.name}
            self.writer = RunWriter(self.path, settings, self.step if self.resumed else None)
        self.accelerator.wait_for_everyone()
        self._mark = time.perf_counter()
        with self._progress() as bar:
            while self.step < self.total_steps:
                self._run_epoch(self.step // self.steps_per_epoch, bar)
        if self.writer:
            self.writer.close()
        self.accelerator.wait_for_everyone()
        return Run.load(self.path)

    def _run_epoch(self, epoch: int, bar):
        config, done = self.config, self.step % self.steps_per_epoch
        keys = self.epoch_batches(epoch)[done:][: self.total_steps - self.step]
        self.net.train()
        waited, since = 0.0, self.step
        before = started = time.perf_counter()
        for batch in load_batches(self.train, keys, config.num_workers, self.device.type == "cuda"):
            waited += time.perf_counter() - before
            batch = batch.to(self.device)
            loss, norm = self.train_step(batch, epoch)
            self.epoch_loss += loss
            self.step += 1
            bar.update(1)
            if self.step % config.log_every == 0 or self.step == self.total_steps:
                passed = time.perf_counter() - started
                self._record_step(
                    epoch, batch, loss, norm, (self.step - since) / passed, waited / passed
                )
                waited, since, started = 0.0, self.step, time.perf_counter()
            inside = self.step % self.steps_per_epoch != 0
            if inside and config.checkpoint_every and self.step % config.checkpoint_every == 0:
                self._save_last()
            before = time.perf_counter()
        self._end_epoch(epoch, len(keys) + done)

    def _clock(self):
        """Bring `self.seconds` up to now; it goes on where a resumed run was saved."""
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def _write(self, split: str, epoch: int, record: dict):
        if self.writer:
            head = {"split": split, "step": self.step, "epoch": epoch}
            self.writer.write(head | {"seconds": round(self.seconds, 3)} | record)

    def _record_step(
        self, epoch, batch: Batch, loss: Tensor, norm: float, pace: float, waiting: float
    ):
        images = [image.mask.float().mean(1) for image, _ in self.drawn if image is not None]
        words = maskable_words(batch.input_ids, batch.valid, self.model.special_ids).sum()
        hidden_words = sum(float(text.mask.sum()) for _, text in self.drawn if text is not None)
        total = float(sum_over_processes(loss))
        self._clock()
        record = {
            "loss": total,
            "learning_rate": self.optimizers[-1].param_groups[0]["lr"],
            "logit_scale": self.model.logit_scale.item(),
            "image_mask_ratio": torch.cat(images).mean().item() if images else 0.0,
            "text_mask_ratio": hidden_words / max(1, int(words)),
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped_steps": self.skipped,
            "samples_per_second": pace * len(self.train) / self.steps_per_epoch,
            "waiting_for_data": waiting,
        }
        self._write("train", epoch, record)

    def _end_epoch(self, epoch: int, steps: int):
        """Validate, keep the best, write last/."""
        config = self.config
        train_loss = float(sum_over_processes(self.epoch_loss)) / steps
        self.epoch_loss.zero_()
        if (epoch + 1) % config.eval_every == 0 or self.step == self.total_steps:
            record = {"loss": train_loss, "train_loss": train_loss}
            if self.val is not None:
                features = embed(self.model, self.val, mixed_precision=config.mixed_precision)
                record |= _flat(score(self.model, features, config.loss))
            better = record["loss"] < self.best_loss
            if better:
                self.best_loss = record["loss"]
                self._save_best(epoch)
            self._clock()
            self._write("val", epoch, record | {"best": better})
            self._say_epoch(epoch, record, better)
        self._save_last()

    # -- files -------------------------------------------------------------------------------

    def _weights(self) -> dict:
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": [optimizer.state_dict() for optimizer in self.optimizers],
            "best_loss": self.best_loss,
            "config": self.config.to_dict(),
            "data": self._data(),
        }

    def _data(self) -> dict:
        return {"name": self.train.name, "fingerprint": self.train.fingerprint()}

    def _save_best(self, epoch: int):
        if self.rank == 0:
            extra = {"epoch": epoch, "architecture": self.model.architecture()}
            write_atomically(self._weights() | extra, self.path / "best_model.pth")

    def _save_last(self):
        states = [random_state()]
        if self.processes > 1:
            from accelerate.utils import gather_object

            states = gather_object(states)
        # An equal part to each, here and after a resume, so that both sum up the same numbers.
        total = sum_over_processes(self.epoch_loss)
        self.epoch_loss = total / self.processes
        self._clock()
        if self.rank == 0:
            names = ("step", "skipped", "skipped_in_a_row", "seconds")
            standing = {name: getattr(self, name) for name in names}
            extra = {
                "scaler": self.scaler.state_dict(),
                "ema": self.plan.state_dict(),
                "random": states,
                "epoch_loss": total,
            }
            write_atomically(self._weights() | standing | extra, self.path / "last" / "state.pth")

    def _resume(self, path: Path) -> bool:
        """Put everything back as `_save_last` left it; False where there is nothing."""
        if not path.is_file():
            self._say(f"nothing to resume in {self.path}: starting anew")
            return False
        state = read_checkpoint(path, _NEEDED)
        if state["data"] != self._data():
            raise ValueError(
                f"cannot resume {self.path}: it was trained on other pictures or captions "
                f"({state['data']['name'] or 'unnamed'}); give the same ones, or another run_name"
            )
        ours, theirs = self.config.to_dict(), state["config"]
        theirs = TrainingConfig().to_dict() | theirs  # a field it does not have yet did not matter
        differing = [k for k in ours if ours[k] != theirs[k] and k not in _MAY_DIFFER]
        if differing:
            words = ", ".join(f"{k}: {theirs.get(k)!r} -> {ours[k]!r}" for k in differing)
            raise ValueError(
                f"cannot resume {self.path}, its configuration differs ({words}); use the same "
                "values, or another run_name to start a run of its own. May differ: "
                f"{', '.join(sorted(_MAY_DIFFER))}"
            )
        load_weights(self.model, state["model_state_dict"], path)
        for optimizer, saved in zip(self.optimizers, state["optimizer_state_dict"], strict=True):
            optimizer.load_state_dict(saved)
        if state["scaler"]:  # empty where "auto" took another type, on another machine
            self.scaler.load_state_dict(state["scaler"])
        self.plan.load_state_dict(state.get("ema"))
        for name in ("step", "skipped", "seconds", "best_loss"):
            setattr(self, name, state[name])
        self.skipped_in_a_row = state.get("skipped_in_a_row", 0)
        self.epoch_loss = state["epoch_loss"].to(self.device) / self.processes
        states = state["random"]
        if self.rank < len(states):
            set_random_state(states[self.rank])
        else:  # a rank more than before draws its own dropout, not what another one draws
            self._seed_own_draws()
        self._say(f"resuming {self.path} at step {self.step} of {self.total_steps}")
        return True

    # -- words -------------------------------------------------------------------------------

    def _say(self, words: str):
        if self.rank == 0:
            print(words, flush=True)

    def _say_epoch(self, epoch: int, record: dict, better: bool):
        words = f"epoch {epoch + 1:3d}/{self.num_epochs}  train loss {record['train_loss']:.3f}"
        if self.val is not None:
            recalls = [record[f"{way}_R@1"] for way in ("image_to_text", "text_to_image")]
            words += f"  val loss {record['loss']:.3f}  R@1 {50 * sum(recalls):5.1f} %"
        self._say(f"{words}  {self.seconds:6.1f} s{'  best' if better else ''}")

    def _progress(self):
        """A progress bar in a terminal or a notebook, on rank 0; nothing of it stays at the end."""
        from tqdm import tqdm

        if self.rank or not (sys.stderr.isatty() or "ipykernel" in sys.modules):
            return contextlib.nullcontext(tqdm(disable=True))
        return tqdm(total=self.total_steps, initial=self.step, leave=False, unit="step")


def _same(one, other) -> bool:
    """Two tokenizers that give the same pieces."""
    return one is other or one.get_vocab() == other.get_vocab()


def _flat(result: dict) -> dict:
    """{"image_to_text": {1: x}} -> {"image_to_text_R@1": x}."""
    flat = {"loss": result["loss"]}
    for way in ("image_to_text", "text_to_image"):
        flat |= {f"{way}_R@{k}": value for k, value in result[way].items()}
    return flat


def train_model(
    config: TrainingConfig,
    train: MultimodalDataset,
    val: MultimodalDataset | None = None,
    model: MultimodalEncoder | None = None,
    resume: bool = False,
) -> Run:
    """Train a masked multimodal encoder and return the `Run`.

    model None builds `config.preset`. The training set's tokenizer is given to the validation set.
    resume=True goes on from the last checkpoint of the same run; with nothing to resume it starts
    anew and says so. Runs inside `mm.launch` or torchrun with as many processes as there are.
    """
    return MaskedMultimodalTrainer(config, train, val, model, resume).fit()
