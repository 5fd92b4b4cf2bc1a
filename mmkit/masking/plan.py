"""What a run hides, and when: masks as a function of configuration, epoch and sample.

All but the attentive maskers could be replayed from the configuration alone; these look through a
running mean of the model, which therefore belongs to a run's state. `mask` True = HIDDEN.
Walk-through: notebooks/02_masking.ipynb.
"""

import dataclasses

import torch
from torch import Tensor

from ..config import RATIO_SCHEDULES, TrainingConfig
from ..data.batch import Batch
from ..data.dataset import MultimodalDataset
from ..data.images import shift_pictures
from ..device import autocast_for
from ..models.attention import class_attention
from ..models.ema import RunningMean
from ..models.encoder import MultimodalEncoder
from ..noise import mask_noise
from .core import Masking, check_ratio
from .draw import draw_maskings, mask_ratios
from .image import ATTENTION_MASKERS, IMAGE_MASKERS


def check_maskers(
    config: TrainingConfig, train: MultimodalDataset, val: MultimodalDataset | None = None
):
    """ValueError for a masker that these pictures cannot serve."""
    seen = [train] if val is None or "pixels" not in config.terms else [train, val]
    if config.image_mask == "layers" and any(data.layers is None for data in seen):
        raise ValueError(
            "image_mask='layers' needs drawings that know their layers, and these pictures do not; "
            "use the built-in ones (mm.openmoji), or another of "
            f"{', '.join(name for name in IMAGE_MASKERS if name != 'layers')}"
        )


def validation_masks(config: TrainingConfig) -> dict[str, tuple]:
    """What a validation hides: {"image_mask": (masker, ratio), "text_mask": …}.

    A ratio that changes is taken at its start; one that starts at 0, at its end.
    """
    ratios = {
        kind: getattr(config, f"{kind}_mask_ratio") or getattr(config, f"{kind}_mask_final_ratio")
        for kind in ("image", "text")
    }
    painted = config.image_mask == "painted"
    return {
        "image_mask": (config.image_mask, config.painted_mask if painted else ratios["image"] or 0),
        "text_mask": (config.text_mask, ratios["text"] or 0),
    }


class MaskPlan:
    """The masks and the augmentation of a training run.

    ema: the running mean that "attentive" and "inattentive" look with; None for other maskers.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: MultimodalEncoder,
        train: MultimodalDataset,
        num_epochs: int,
    ):
        self.config, self.model, self.layers = config, model, train.layers
        self.masked_epochs = num_epochs - config.unmasked_epochs
        highest = max(config.image_mask_ratio, config.image_mask_final_ratio or 0)
        looks = config.image_mask in ATTENTION_MASKERS and highest > 0
        self.ema = RunningMean(model.vit, config.ema_momentum) if looks else None

    def augmented(self, batch: Batch, epoch: int) -> Batch:
        """The batch as the encoder gets it in that epoch, before masking."""
        if self.config.augment == "none":
            return batch
        noise = mask_noise(self.config.seed, epoch, batch.sample_ids, 2, "shift")
        return dataclasses.replace(batch, pixel_values=shift_pictures(batch.pixel_values, noise))

    def hides(self, kind: str, epoch: int) -> bool:
        """Whether anything of "image" or "text" is hidden in an epoch."""
        config, progress = self.config, epoch / max(1, self.masked_epochs - 1)
        if epoch >= self.masked_epochs:
            return False
        if kind == "image" and config.painted_mask is not None:
            return True
        ratio = RATIO_SCHEDULES[getattr(config, f"{kind}_mask_schedule")]
        ends = (getattr(config, f"{kind}_mask_{which}") for which in ("ratio", "final_ratio"))
        return bool((torch.as_tensor(ratio(*ends, progress, torch.full((1,), 0.5))) > 0).any())

    def check_ratios(self):
        """ValueError where a schedule gives a ratio outside [0, 1) in any epoch of the run."""
        noise = torch.linspace(0, 1 - 2**-24, 5)
        for kind in ("image", "text"):
            name = getattr(self.config, f"{kind}_mask_schedule")
            start = getattr(self.config, f"{kind}_mask_ratio")
            final = getattr(self.config, f"{kind}_mask_final_ratio")
            for epoch in range(self.masked_epochs):
                progress = epoch / max(1, self.masked_epochs - 1)
                ratio = RATIO_SCHEDULES[name](start, final, progress, noise)
                try:
                    check_ratio(torch.as_tensor(ratio), len(noise))
                except (ValueError, TypeError, RuntimeError) as error:
                    where = f"{kind}_mask_schedule={name!r} in epoch {epoch + 1}"
                    raise ValueError(f"{where}: {error}") from None

    def _ratio(self, kind: str, batch: Batch, epoch: int) -> float | Tensor:
        config = self.config
        return mask_ratios(
            getattr(config, f"{kind}_mask_schedule"),
            getattr(config, f"{kind}_mask_ratio"),
            getattr(config, f"{kind}_mask_final_ratio"),
            epoch / max(1, self.masked_epochs - 1),
            batch.sample_ids,
            seed=config.seed,
            epoch=epoch,
            stream=kind,
        )

    def draw(self, batch: Batch, epoch: int) -> tuple[Masking | None, Masking | None]:
        """(image, text) `Masking` of an augmented batch; None where nothing is hidden."""
        if epoch >= self.masked_epochs:
            return None, None
        config, image = self.config, self._ratio("image", batch, epoch)
        painted = config.image_mask == "painted"
        return draw_maskings(
            batch,
            self.model,
            seed=config.seed,
            epoch=epoch,
            image=(config.image_mask, config.painted_mask if painted else image),
            text=(config.text_mask, self._ratio("text", batch, epoch)),
            text_mode=config.text_mask_mode,
            attend=None if self.ema is None else lambda: self.attention(batch),
            layers=self.layers,
            predict_words=config.words_weight > 0,
        )

    def attention(self, batch: Batch) -> Tensor:
        """(B, N): what the running mean attends to, at half the resolution (see attention.py)."""
        assert self.ema is not None
        with autocast_for(self.config.mixed_precision, batch.pixel_values.device):
            pixels = self.model.normalize(batch.pixel_values)
            return class_attention(self.ema.module, pixels, half=True, of=self.model.pooling)

    @torch.no_grad()
    def after_step(self):
        """Let the running mean follow the model."""
        if self.ema is not None:
            self.ema.update(self.model.vit)

    def state_dict(self) -> dict | None:
        """The running mean, for a checkpoint; None where there is none."""
        return None if self.ema is None else self.ema.state_dict()

    def load_state_dict(self, state: dict | None):
        """Go on from a saved state."""
        if self.ema is None:
            return
        if state is None:
            raise ValueError("the checkpoint has no running mean to resume from; start a new run")
        self.ema.load_state_dict(state)
