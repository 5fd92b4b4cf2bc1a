"""Train the encoder: one loop for one process or many.

The gradient of a step is the gradient of the whole batch, whatever `gradient_accumulation_steps` and
the number of processes (Gao et al. 2021, arXiv:2101.06983): features first, then the loss over all of
them, then each micro-batch again with its own masks and dropout. Order, masks and choice of caption
are pure functions of (seed, epoch, sample id). Walk-through: notebooks/03_training.ipynb.
"""

import contextlib
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import (
    load,
    load_weights,
    random_state,
    read_checkpoint,
    set_random_state,
    write_atomically,
)
from .config import TrainingConfig
from .cost import step_flops
from .data import Batch, MultimodalDataset, load_batches, shift_pictures
from .distributed import gather_rows, my_share, row_counts, sum_over_processes, world
from .encoder import MAX_LOGIT_SCALE, EncoderOutput, MultimodalEncoder, autocast_for, pick_precision
from .losses import info_nce_rows, sigmoid_rows
from .masking import IMAGE_MASKERS, TEXT_MASKERS, draw_maskings, find_masker, mask_noise
from .optim import build_optimizers, set_learning_rate
from .retrieval import embed, score

_MAY_DIFFER = {
    "output_dir",
    "run_name",
    "num_workers",
    "log_every",
    "checkpoint_every",
}  # on resume
_MAX_SKIPPED = 20  # steps in a row without a finite gradient before a run stops


@dataclass
class Run:
    """What a training left behind, read from its folder."""

    path: Path  # runs/<name>/: best_model.pth, last/, config.json, metrics.jsonl, event files
    history: list[dict]  # the records of metrics.jsonl, in order; "split" is "train" or "val"
    best: dict  # the record that best_model.pth was saved at

    @classmethod
    def load(cls, path) -> "Run":
        """The run in a folder; FileNotFoundError where there is none."""
        path = Path(path)
        if not (path / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"no run in {path}: it has no metrics.jsonl; check the folder")
        history = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
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


class MaskedMultimodalTrainer:
    """Everything of one run: data, model, optimizers, the step, validation, files.

    model None builds `config.preset` with the training set's tokenizer. val None: "best" is judged on
    the training loss, and the run says so. resume: go on from last/state.pth of the same run.
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
        self._check_data()
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
        # On a machine without a GPU every rank must be told so, or it trains a copy of its own.
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])
        self.rank, self.processes = world()
        self.device = self.accelerator.device
        self.precision = pick_precision(config.mixed_precision, self.device)
        torch.use_deterministic_algorithms(config.deterministic, warn_only=True)
        torch.manual_seed(config.seed)
        if model is None:
            options = dict(dropout=config.dropout, temperature=config.temperature)
            model = MultimodalEncoder.preset(config.preset, tokenizer=train.tokenizer, **options)
        self.model = model.to_device(self.device)
        self._share_tokenizer()
        self.optimizers = build_optimizers(self.model, config)
        self.net = self.accelerator.prepare_model(
            self.model
        )  # DDP where there are several processes
        self.scaler = torch.amp.GradScaler(
            self.device.type, enabled=self.precision == torch.float16
        )
        torch.manual_seed(config.seed + 1000003 * (self.rank + 1))  # dropout differs between ranks
        self.steps_per_epoch = math.ceil(len(train) / config.batch_size)
        self.total_steps = config.max_steps or config.num_epochs * self.steps_per_epoch
        self.step, self.skipped, self.skipped_in_a_row = 0, 0, 0
        self.best_loss, self.seconds = math.inf, 0.0
        self.epoch_loss = torch.zeros((), device=self.device)
        self._open_run(resume)

    # -- set-up ------------------------------------------------------------------------------

    def _check_data(self):
        config, size = self.config, len(self.train)
        if config.batch_size > size:
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the training set ({size} pictures); "
                f"take at most {size}"
            )
        find_masker(config.image_mask, IMAGE_MASKERS)
        find_masker(config.text_mask, TEXT_MASKERS)

    def _share_tokenizer(self):
        """All data is encoded as the model reads it; a foreign tokenizer would be silent nonsense."""
        for name, data in (("train", self.train), ("val", self.val)):
            if data is None:
                continue
            own = data._tokenizer
            if data.given_tokenizer and own.get_vocab() != self.model.tokenizer.get_vocab():
                raise ValueError(
                    f"the {name} set was given another tokenizer than the model has; build both with "
                    "the same one (tokenizer=model.tokenizer)"
                )
            data.use_tokenizer(self.model.tokenizer, self.model.max_length)

    def _open_run(self, resume: bool):
        config = self.config
        root = Path(config.output_dir)
        name = (
            config.run_name
            or (newest_run(root) if resume else "")
            or time.strftime("%Y%m%d-%H%M%S")
        )
        if self.processes > 1:  # the clocks of two processes differ
            from accelerate.utils import broadcast_object_list

            name = broadcast_object_list([name])[0]
        self.path = root / name
        state = self.path / "last" / "state.pth"
        resume = self._resume(state) if resume else False
        if self.rank == 0:
            self._prepare_folder(resume)
        self.accelerator.wait_for_everyone()

    def _resume(self, path: Path) -> bool:
        if not path.is_file():
            self._say(f"nothing to resume in {self.path}: starting anew")
            return False
        state = read_checkpoint(path, self.device)
        ours, theirs = self.config.to_dict(), state["config"]
        differing = [k for k in ours if ours[k] != theirs.get(k) and k not in _MAY_DIFFER]
        if differing:
            words = ", ".join(f"{k}: {theirs.get(k)!r} -> {ours[k]!r}" for k in differing)
            raise ValueError(
                f"cannot resume {self.path}, its configuration differs ({words}); use the same values, "
                f"or another run_name to start a run of its own. May differ: {', '.join(_MAY_DIFFER)}"
            )
        load_weights(self.model, state["model_state_dict"], path)
        for optimizer, saved in zip(self.optimizers, state["optimizer_state_dict"], strict=True):
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        for name in ("step", "skipped", "best_loss", "seconds"):
            setattr(self, name, state[name])
        self.epoch_loss = state["epoch_loss"].to(self.device)
        states = state["random"]
        set_random_state(states[self.rank] if self.rank < len(states) else states[0])
        self._say(f"resuming {self.path} at step {self.step} of {self.total_steps}")
        return True

    def _prepare_folder(self, resumed: bool):
        """A new run replaces an earlier one of its name; a resumed one drops what came after its state."""
        from torch.utils.tensorboard import SummaryWriter

        metrics = self.path / "metrics.jsonl"
        if not resumed and metrics.is_file():
            self._say(f"replacing the earlier run in {self.path}")
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        kept = []
        if resumed and metrics.is_file():
            kept = [
                r
                for r in map(json.loads, metrics.read_text().splitlines())
                if r["step"] <= self.step
            ]
        metrics.write_text("".join(json.dumps(r) + "\n" for r in kept))
        config = self.config.to_dict() | {"run_name": self.path.name}
        (self.path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        self.writer = SummaryWriter(self.path, purge_step=self.step + 1 if resumed else None)

    # -- pure functions of (seed, epoch, sample) ---------------------------------------------

    def epoch_batches(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """(rows, caption noise) of each global batch of an epoch.

        Every picture once, in an order that is a pure function of seed and epoch; batches of nearly
        equal size, so that no step sees only a handful of negatives.
        """
        ids, seed = self.train.sample_ids, self.config.seed
        order = mask_noise(seed, epoch, ids, 1, "order")[:, 0].argsort(stable=True)
        captions = mask_noise(seed, epoch, ids, 1, "caption")[:, 0]
        return [(rows, captions[rows]) for rows in order.tensor_split(self.steps_per_epoch)]

    def maskings(self, batch: Batch, epoch: int):
        """(image, text) `Masking` of a batch in an epoch; None where nothing is hidden."""
        c = self.config
        unmasked = epoch >= self.num_epochs - c.unmasked_epochs
        image, text = (0.0, 0.0) if unmasked else (c.image_mask_ratio, c.text_mask_ratio)
        return draw_maskings(
            batch,
            self.model.num_patches,
            self.model.special_ids,
            seed=c.seed,
            epoch=epoch,
            image=(c.image_mask, image),
            text=(c.text_mask, text),
        )

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    def _prepare(self, batch: Batch, epoch: int) -> Batch:
        batch = batch.to(self.device)
        if self.config.augment == "shift":
            noise = mask_noise(self.config.seed, epoch, batch.sample_ids, 2, "shift")
            batch.pixel_values = shift_pictures(batch.pixel_values, noise)
        return batch

    # -- the step ----------------------------------------------------------------------------

    def encode(self, batch: Batch, epoch: int) -> EncoderOutput:
        """The masked forward pass of a micro-batch."""
        modes = (self.config.image_mask_mode, self.config.text_mask_mode)
        with autocast_for(self.config.mixed_precision, self.device):
            return self.net(batch, *self.maskings(batch, epoch), *modes)

    def loss(
        self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, groups: Tensor
    ):
        """This process's rows against the candidates of all: its part of the global mean."""
        counts = row_counts(len(image), image.device)
        offset, total = sum(counts[: self.rank]), sum(counts)
        groups, all_text = gather_rows(groups, counts), gather_rows(text, counts)
        if self.config.loss == "sigmoid":
            rows = sigmoid_rows(image, all_text, logit_scale.exp(), logit_bias, offset, groups)
        else:
            all_image = gather_rows(image, counts)
            scale = logit_scale.exp()
            rows = info_nce_rows(image, text, all_image, all_text, scale, offset, groups)
        return rows / total

    def backward(
        self, micro_batches: list[Batch], epoch: int, weight: float = 1.0, last: bool = True
    ):
        """Add the gradient of one loss over all these micro-batches together; returns the loss.

        With several, features come first without a graph; each micro-batch then runs again, its
        dropout replayed, with the gradient of its features. So memory grows with the micro-batch.
        """
        replay = len(micro_batches) > 1
        outputs, generators = [], []
        for batch in micro_batches:
            generators.append(self._generator_state())
            with torch.set_grad_enabled(not replay):
                outputs.append(self.encode(batch, epoch))
        names = ("image_features", "text_features")
        leaves = [torch.cat([getattr(o, n) for o in outputs]).detach() for n in names]
        leaves += [self.model.logit_scale.detach(), self.model.logit_bias.detach()]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        groups = torch.cat([batch.group_ids for batch in micro_batches])
        loss = self.loss(*leaves, groups)
        # DDP averages over processes; each holds its part of a sum, hence the factor.
        scale = weight * self.processes
        grads = torch.autograd.grad(loss * scale, leaves, allow_unused=True)
        image_grads, text_grads = (g.split([len(b) for b in micro_batches]) for g in grads[:2])
        for i, batch in enumerate(micro_batches):
            final = last and i == len(micro_batches) - 1
            with contextlib.nullcontext() if final else self.accelerator.no_sync(self.net):
                if replay:
                    self._set_generator_state(generators[i])
                    outputs[i] = self.encode(batch, epoch)
                out = outputs[i]
                surrogate = (out.image_features * image_grads[i]).sum()
                surrogate = surrogate + (out.text_features * text_grads[i]).sum()
                share = (
                    1.0 if i == len(micro_batches) - 1 else 0.0
                )  # the scale's gradient counts ONCE
                for parameter, grad in zip(
                    (out.logit_scale, out.logit_bias), grads[2:], strict=True
                ):
                    surrogate = surrogate + parameter * (share * grad if grad is not None else 0.0)
                self.scaler.scale(surrogate).backward()
        return loss.detach()

    def train_step(self, batch: Batch, epoch: int) -> tuple[Tensor, float]:
        """One optimizer step on this process's part of a batch: (its part of the loss, gradient norm)."""
        config = self.config
        set_learning_rate(self.optimizers, config.lr_fraction(self.step, self.total_steps))
        micro_batches = batch.split(config.gradient_accumulation_steps)
        if config.accumulation == "exact":
            loss = self.backward(micro_batches, epoch)
        else:  # what plain accumulation does: each micro-batch sees only its own negatives
            parts, last = [], len(micro_batches) - 1
            for i, micro in enumerate(micro_batches):
                parts.append(self.backward([micro], epoch, len(micro) / len(batch), i == last))
            loss = sum(p * len(m) / len(batch) for p, m in zip(parts, micro_batches, strict=True))
        for optimizer in self.optimizers:
            self.scaler.unscale_(
                optimizer
            )  # before clipping, or the norm is 65,536 times too large
        limit = config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        if math.isfinite(norm) or self.scaler.is_enabled():  # a scaler skips by itself, and adapts
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self._count_skipped(norm)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():  # in the parameter, after the step: its gradient stays alive
            self.model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return loss, norm

    def _count_skipped(self, norm: float):
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        if self.skipped_in_a_row == _MAX_SKIPPED:
            raise RuntimeError(
                f"{_MAX_SKIPPED} steps in a row had no finite gradient (step {self.step}); likely the "
                "learning rate is too high or a picture is not finite: lower learning_rate, raise "
                "warmup_steps, or try mixed_precision='no'"
            )

    def _generator_state(self):
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        return torch.get_rng_state(), cuda

    def _set_generator_state(self, state):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1])

    # -- the loop ----------------------------------------------------------------------------

    def fit(self) -> Run:
        """Train to the end; returns the `Run`."""
        self._say(self.describe())
        if self.val is None:
            self._say("no validation set: best_model.pth is judged on the training loss")
        self._mark = time.perf_counter()
        with self._progress() as bar:
            while self.step < self.total_steps:
                self._run_epoch(self.step // self.steps_per_epoch, bar)
        if self.rank == 0:
            self.writer.close()
        self.accelerator.wait_for_everyone()
        return Run.load(self.path)

    def _run_epoch(self, epoch: int, bar):
        config = self.config
        start = self.step % self.steps_per_epoch
        keys = [self._local(key) for key in self.epoch_batches(epoch)[start:]]
        keys = keys[: self.total_steps - self.step]
        self.net.train()
        waited, since = 0.0, self.step
        before = time.perf_counter()
        for batch in load_batches(self.train, keys, config.num_workers, self.device.type == "cuda"):
            waited += time.perf_counter() - before
            batch = self._prepare(batch, epoch)
            loss, norm = self.train_step(batch, epoch)
            self.epoch_loss += loss
            self.step += 1
            bar.update(1)
            if self.step % config.log_every == 0 or self.step == self.total_steps:
                self._record_train(epoch, loss, norm, batch, self.step - since, waited)
                waited, since = 0.0, self.step
            in_epoch = self.step % self.steps_per_epoch != 0
            if config.checkpoint_every and self.step % config.checkpoint_every == 0 and in_epoch:
                self._save_last()
            before = time.perf_counter()
        self._end_epoch(epoch, len(keys) + start)

    def _local(self, key):
        """This process's part of a global batch's key."""
        return tuple(my_share(part)[0] for part in key)

    def _clock(self) -> float:
        """Seconds of training so far, those before a resume counted in."""
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now
        return self.seconds

    def _record_train(
        self, epoch: int, loss: Tensor, norm: float, batch: Batch, steps: int, waited: float
    ):
        masking = self.maskings(batch, epoch)[0]
        before = self.seconds
        elapsed = max(1e-9, self._clock() - before)
        record = {
            "loss": float(sum_over_processes(loss)),
            "learning_rate": self.optimizers[-1].param_groups[0]["lr"],
            "logit_scale": self.model.logit_scale.item(),
            "image_mask_ratio": 0.0 if masking is None else masking.mask.float().mean().item(),
            "grad_norm": norm if math.isfinite(norm) else None,
            "skipped_steps": self.skipped,
            "samples_per_second": steps * len(self.train) / self.steps_per_epoch / elapsed,
            "waiting_for_data": waited / elapsed,
        }
        self._write("train", epoch, record)

    def _end_epoch(self, epoch: int, steps: int):
        """Validate, keep the best, write last/."""
        config, done = self.config, epoch + 1
        mean_loss = float(sum_over_processes(self.epoch_loss)) / steps
        self.epoch_loss.zero_()
        if done % config.eval_every == 0 or self.step == self.total_steps:
            record = {"loss": mean_loss, "train_loss": mean_loss}
            if self.val is not None:
                features = embed(self.model, self.val, mixed_precision=config.mixed_precision)
                record |= _flat(score(self.model, features, config.loss))
            better = record["loss"] < self.best_loss
            self.best_loss = min(self.best_loss, record["loss"])
            if better:
                self._save_best(epoch)
            self._write("val", epoch, record | {"best": better})
            self._say_epoch(done, record, better)
        self._save_last()

    # -- files and words ---------------------------------------------------------------------

    def _save_best(self, epoch: int):
        if self.rank == 0:
            write_atomically(
                {
                    "model_state_dict": self.model.state_dict(),
                    "optimizer_state_dict": [o.state_dict() for o in self.optimizers],
                    "epoch": epoch,
                    "best_loss": self.best_loss,
                    "config": self.config.to_dict(),
                    "architecture": self.model.architecture(),
                },
                self.path / "best_model.pth",
            )

    def _save_last(self):
        from accelerate.utils import gather_object

        states = gather_object([random_state()]) if self.processes > 1 else [random_state()]
        epoch_loss = (
            sum_over_processes(self.epoch_loss) / self.processes
        )  # each keeps an equal part
        self.epoch_loss = epoch_loss
        self._clock()
        if self.rank == 0:
            write_atomically(
                {
                    "model_state_dict": self.model.state_dict(),
                    "optimizer_state_dict": [o.state_dict() for o in self.optimizers],
                    "scaler": self.scaler.state_dict(),
                    "step": self.step,
                    "skipped": self.skipped,
                    "best_loss": self.best_loss,
                    "seconds": self.seconds,
                    "epoch_loss": epoch_loss,
                    "random": states,
                    "config": self.config.to_dict(),
                },
                self.path / "last" / "state.pth",
            )

    def _write(self, split: str, epoch: int, record: dict):
        """One record to metrics.jsonl and its numbers to TensorBoard."""
        if self.rank:
            return
        if split == "val":
            self._clock()
        head = {
            "split": split,
            "step": self.step,
            "epoch": epoch,
            "seconds": round(self.seconds, 3),
        }
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(head | record) + "\n")
        for name, value in record.items():
            if isinstance(value, bool) or value is None:
                continue
            if name == "loss":
                if split == "train" or self.val is not None:
                    self.writer.add_scalar(f"loss/{split}", value, self.step)
            elif name != "train_loss":
                tag = name if split == "train" else f"retrieval/{name}"
                self.writer.add_scalar(tag, value, self.step)
        self.writer.flush()

    def _say(self, words: str):
        if self.rank == 0:
            print(words, flush=True)

    def _say_epoch(self, done: int, record: dict, better: bool):
        words = f"epoch {done:3d}/{self.num_epochs}  train loss {record['train_loss']:.3f}"
        if self.val is not None:
            recalls = [record[f"{way}_R@1"] for way in ("image_to_text", "text_to_image")]
            words += f"  val loss {record['loss']:.3f}  R@1 {100 * sum(recalls) / 2:5.1f} %"
        self._say(f"{words}  {self.seconds:6.1f} s{'  best' if better else ''}")

    def _progress(self):
        from tqdm import tqdm

        shown = self.rank == 0 and (sys.stderr.isatty() or "ipykernel" in sys.modules)
        left = dict(total=self.total_steps, initial=self.step)
        return tqdm(**left, disable=not shown, leave=False, unit="step", dynamic_ncols=True)

    def effective_configuration(self) -> dict:
        """What this run really does, read from the model and its first batch, not from the settings."""
        config, epoch = self.config, 0
        batch = self.train.batch(*self._local(self.epoch_batches(epoch)[0])).to(self.device)
        image, text = self.maskings(batch, epoch)
        words = batch.valid.sum(1).float().mean().item()
        patches = self.model.num_patches
        encoded_patches = patches if image is None or config.image_mask_mode == "replace" else 0
        encoded_words = words
        if text is not None and config.text_mask_mode == "drop":
            encoded_words = text.keep_valid.sum(1).float().mean().item()
        encoded_patches = encoded_patches or image.ids_keep.shape[1]
        replay = config.gradient_accumulation_steps > 1 and config.accumulation == "exact"
        flops = step_flops(self.model, encoded_patches, encoded_words, replay)
        step = len(self.train) / self.steps_per_epoch
        kept_negatives = (
            step
            if config.accumulation == "exact"
            else (self.processes * len(batch.split(config.gradient_accumulation_steps)[0]))
        )
        dtype = str(self.precision or torch.float32).removeprefix("torch.")
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "pictures": len(self.train),
            "captions": sum(map(len, self.train.texts)),
            "steps": self.total_steps,
            "pairs_per_step": step,
            "patches": patches,
            "patches_encoded": encoded_patches,
            "image_mask_ratio": 0.0 if image is None else image.mask.float().mean().item(),
            "words": words,
            "words_encoded": encoded_words,
            "text_mask_ratio": 0.0
            if text is None
            else (text.mask.sum() / batch.valid.sum()).item(),
            "negatives": kept_negatives - 1,
            "gflops_per_pair": flops / 1e9,
            "precision": dtype,
            "device": str(self.device),
            "processes": self.processes,
            "threads": torch.get_num_threads(),
            "optimizer": "+".join(type(o).__name__ for o in self.optimizers),
        }

    def describe(self) -> str:
        """The effective configuration in words."""
        e = self.effective_configuration()
        pool = (
            ""
            if self.val is None
            else f"; validation pool {len(self.val):,}: ln = {math.log(len(self.val)):.2f}"
        )
        return "\n".join(
            [
                f"run         {self.path}",
                f"model       {e['parameters'] / 1e6:.2f} M parameters, {e['optimizer']}",
                f"data        {e['pictures']:,} pictures, {e['captions']:,} captions; "
                f"{e['steps']:,} steps of {e['pairs_per_step']:.1f} pairs",
                f"image mask  {100 * e['image_mask_ratio']:.1f} % hidden ({self.config.image_mask_mode}): "
                f"{e['patches_encoded']} of {e['patches']} patches encoded",
                f"text mask   {100 * e['text_mask_ratio']:.1f} % hidden ({self.config.text_mask_mode}): "
                f"{e['words_encoded']:.1f} of {e['words']:.1f} tokens encoded",
                f"negatives   {e['negatives']:.0f} per pair; loss at chance ln({e['negatives'] + 1:.0f}) = "
                f"{math.log(e['negatives'] + 1):.2f}{pool}",
                f"cost        {e['gflops_per_pair']:.3f} GFLOP per pair and step",
                f"machine     {e['device']}, {e['precision']}, {e['processes']} process(es), "
                f"{e['threads']} threads",
            ]
        )


def _flat(result: dict) -> dict:
    """{"image_to_text": {1: x}} -> {"image_to_text_R@1": x}."""
    flat = {"loss": result["loss"]}
    for way in ("image_to_text", "text_to_image"):
        flat |= {f"{way}_R@{k}": value for k, value in result[way].items()}
    return flat


def newest_run(root: Path) -> str:
    """Name of the run written last under a folder, "" where there is none."""
    states = sorted(root.glob("*/last/state.pth"), key=lambda p: p.stat().st_mtime)
    return states[-1].parent.parent.name if states else ""


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
