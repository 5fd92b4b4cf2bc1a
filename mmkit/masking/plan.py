"""What a run masks, and when: masks as a function of configuration, epoch and sample.

A masker turns noise into a `Masking` (`mask` True = MASKED); core.py has the conventions, image.py
and text.py the strategies. The masks of all but the attentive maskers can be replayed from the
configuration alone; these use a running mean (EMA) of the model, which the trainer keeps.
Walk-through: notebooks/02_masking.ipynb.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..data.batch import Batch
from ..data.images import shift_images
from ..errors import nearest
from ..noise import mask_noise
from ..older_names import older_arguments
from ..schedules import RATIO_SCHEDULES
from .core import Masking, TokenInfo, as_masking, check_ratio, patch_grid
from .image import ATTENTION_MASKERS, IMAGE_MASKERS, Scene
from .older_arguments import with_older_arguments
from .text import TEXT_MASKERS, Caption, maskable_tokens

_OURS = (*IMAGE_MASKERS.values(), *TEXT_MASKERS.values())  # what other maskers return is checked


def find_masker(name: str, maskers: dict[str, Callable]) -> Callable:
    """The masker of a name.

    Args:
        name: a key of maskers.
        maskers: IMAGE_MASKERS or TEXT_MASKERS.

    Returns:
        The masker, f(noise, mask_ratio, scene or caption) -> Masking.

    Raises:
        ValueError: there is no such masker; the message names the known ones.
    """
    if name not in maskers:
        raise ValueError(f"masker {name!r} is not known; {nearest(name, maskers)}")
    return maskers[name]


def mask_ratios(
    schedule: str,
    start: float,
    final: float,
    progress: float,
    sample_ids: Tensor,
    *,
    seed: int,
    epoch: int,
    stream: str = "image",
) -> float | Tensor:
    """The mask ratio in an epoch by a schedule.

    Args:
        schedule: a name in RATIO_SCHEDULES; "constant" ignores final, "uniform" draws a ratio
            between start and final for each sample and epoch.
        start: ratio at the start, in [0, 1).
        final: ratio at the end, in [0, 1).
        progress: fraction of the epochs done, in [0, 1].
        sample_ids: (B,) int64.
        seed: seed of the run.
        epoch: epoch, from 0.
        stream: "image" or "text", for draws that are independent of each other.

    Returns:
        One ratio for all samples, or (B,) one for each ("uniform").

    Raises:
        ValueError: the schedule is not known.
    """
    if schedule not in RATIO_SCHEDULES:
        raise ValueError(
            f"schedule {schedule!r} is not known; {nearest(schedule, RATIO_SCHEDULES)}"
        )
    noise = mask_noise(seed, epoch, sample_ids, 1, f"{stream} ratio")[:, 0]
    return RATIO_SCHEDULES[schedule](start, final, progress, noise)


def caption_of(input_ids: Tensor, valid: Tensor, tokens: TokenInfo) -> Caption:
    """What the text maskers use of a batch of captions.

    Args:
        input_ids: (B, L) int64.
        valid: (B, L) bool, False = padding.
        tokens: token info of the model that reads them, `model.token_info`.

    Returns:
        Caption of tensors (B, L).
    """
    frequency, device = tokens.frequency, input_ids.device
    return Caption(
        valid,
        maskable_tokens(input_ids, valid, tokens.special_ids),
        ~tokens.is_subword.to(device)[input_ids],
        None if frequency is None else frequency.to(device)[input_ids],
    )


def draw_image_masking(
    pixel_values: Tensor,
    sample_ids: Tensor,
    tokens: TokenInfo,
    mask: tuple[str, Any],
    *,
    seed: int,
    epoch: int,
    layers: Any = None,
) -> Masking | None:
    """Draw the `Masking` of images.

    Args:
        pixel_values: (B, 3, H, W) uint8, or float.
        sample_ids: (B,) int64.
        tokens: token info of the model that encodes them, `model.token_info`.
        mask: (masker name, ratio), as image in `draw_maskings`.
        seed: seed of the run.
        epoch: epoch, from 0.
        layers: layers of the data set's drawings, for the masker "layers".

    Returns:
        Masking, or None if the ratio is 0.

    Raises:
        ValueError: the masker is not known or lacks what it needs, or the ratio is out of range.
    """
    (name, ratio), attend = mask, tokens.attend
    masker, by_hand = find_masker(name, IMAGE_MASKERS), name == "painted"
    if not (by_hand or _any(ratio)):
        return None
    grid = patch_grid(pixel_values, tokens.patch_size)
    scene = Scene(grid, pixel_values, painted=ratio if by_hand else None)
    scene.attend = attend and (lambda: attend(pixel_values))
    scene.regions = layers and (lambda: layers.regions(sample_ids, grid))
    noise = mask_noise(seed, epoch, sample_ids, grid[0] * grid[1], "image")
    masking = masker(noise, 0.0 if by_hand else ratio, scene)
    if masker in _OURS:
        return masking
    every = torch.ones_like(noise, dtype=torch.bool)
    return as_masking(masking, name, every, every)


@older_arguments(predict_words="predict_tokens")
def draw_text_masking(  # noqa: PLR0913 (by name)
    input_ids: Tensor,
    valid: Tensor,
    sample_ids: Tensor,
    tokens: TokenInfo,
    mask: tuple[str, Any],
    *,
    seed: int,
    epoch: int,
    mode: str = "replace",
    predict_tokens: bool = False,
) -> Masking | None:
    """Draw the `Masking` of captions.

    Args:
        input_ids: (B, L) int64.
        valid: (B, L) bool, False = padding.
        sample_ids: (B,) int64.
        tokens: token info of the model that encodes them, `model.token_info`.
        mask: (masker name, ratio), as text in `draw_maskings`.
        seed: seed of the run.
        epoch: epoch, from 0.
        mode: "drop", "replace" or "80/10/10", as text_mode in `draw_maskings`.
        predict_tokens: as in `draw_maskings`.

    Returns:
        Masking, or None if the ratio is 0.

    Raises:
        ValueError: mode or masker is not known, the masker lacks what it needs, or the ratio is out
            of range.
    """
    if mode not in ("drop", "replace", "80/10/10"):
        known = nearest(mode, ("drop", "replace", "80/10/10"))
        raise ValueError(f"text_mode={mode!r} is not known; {known}")
    name, ratio = mask
    masker = find_masker(name, TEXT_MASKERS)
    if not _any(ratio):
        return None
    caption = caption_of(input_ids, valid, tokens)
    caption.min_masked = int(predict_tokens or mode == "80/10/10")
    noise = mask_noise(seed, epoch, sample_ids, input_ids.shape[1], "text")
    masking = masker(noise, ratio, caption)
    if masker not in _OURS:
        masking = as_masking(masking, name, caption.maskable, caption.valid)
    if mode == "80/10/10":
        masking.substitute = _substitutes(input_ids, sample_ids, tokens.maskable_ids, seed, epoch)
    return masking


@older_arguments(predict_words="predict_tokens")
@with_older_arguments
def draw_maskings(  # noqa: PLR0913 (by name)
    batch: Batch,
    tokens: TokenInfo,
    *,
    seed: int,
    epoch: int,
    image: tuple[str, Any] = ("random", 0.0),
    text: tuple[str, Any] = ("random", 0.0),
    text_mode: str = "replace",
    layers: Any = None,
    predict_tokens: bool = False,
) -> tuple[Masking | None, Masking | None]:
    """Draw the image and text `Masking` of a batch.

    Args:
        batch: the batch; its sample_ids make the masks replayable.
        tokens: token info of the model that encodes it, `model.token_info`.
        seed: seed of the run.
        epoch: epoch, from 0.
        image: (masker name, ratio in [0, 1) or (B,) one per sample); ("painted", array) takes an
            array (h, w) or (B, h, w), true = masked, instead of a ratio.
        text: (masker name, ratio in [0, 1) or (B,) one per sample).
        text_mode: "replace", "drop" or "80/10/10"; with "80/10/10" at least one token is masked,
            and its substitute is drawn, too.
        layers: layers of the data set's drawings, for the masker "layers".
        predict_tokens: mask at least one token of each caption that has two, whatever the mode
            (15 % of three tokens rounds to none).

    Returns:
        (image, text), each a Masking, or None if its ratio is 0.

    Raises:
        ValueError: a masker or the mode is not known, a masker lacks what it needs, or a ratio is
            out of range.

    Example:
        >>> batch = data.batch([0, 1, 2])
        >>> image, text = mm.masking.draw_maskings(
        ...     batch, model.token_info, seed=0, epoch=0, image=("block", 0.6), text=("random", 0)
        ... )
        >>> image.mask.shape, image.mask.sum(1).tolist(), text
        (torch.Size([3, 9]), [5, 5, 5], None)
    """
    ids, when = batch.sample_ids, dict(seed=seed, epoch=epoch)
    return (
        draw_image_masking(batch.pixel_values, ids, tokens, image, layers=layers, **when),
        draw_text_masking(
            batch.input_ids, batch.valid, ids, tokens, text,
            mode=text_mode, predict_tokens=predict_tokens, **when,
        ),
    )  # fmt: skip


def _any(ratio: float | Tensor) -> bool:
    return bool((torch.as_tensor(ratio) != 0).any())


def _substitutes(
    input_ids: Tensor, sample_ids: Tensor, maskable_ids: Tensor, seed: int, epoch: int
) -> Tensor:
    """BERT's 80/10/10 (Devlin et al. 2019): -1 = the mask token, a random token, or its own id.

    (B, L) int64, drawn for every position; only those of the masked positions are used.
    """
    length = input_ids.shape[1]
    what = mask_noise(seed, epoch, sample_ids, length, "text 80/10/10")
    which = mask_noise(seed, epoch, sample_ids, length, "text random word")
    ids = maskable_ids.to(which.device)[(which * len(maskable_ids)).long()]
    ids = torch.where(what < 0.9, ids, input_ids)
    return torch.where(what < 0.8, torch.full_like(ids, -1), ids)


def validation_masks(config: TrainingConfig) -> dict[str, tuple]:
    """What validation masks: {"image_mask": (masker, ratio), "text_mask": …}.

    Of a ratio that changes, the one at the start is taken, or the one at the end if it starts at 0.
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


def looks(config: TrainingConfig) -> bool:
    """Whether a run's masker uses a model's attention."""
    highest = max(config.image_mask_ratio, config.image_mask_final_ratio or 0)
    return config.image_mask in ATTENTION_MASKERS and highest > 0


class MaskPlan:
    """The masks and the augmentation of a training run.

    Args:
        config: the run's configuration.
        tokens: token info of the model that is trained; its `attend` may use another model.
        num_epochs: epochs of the whole run.
        layers: layers of the training set's drawings, where it has them.
    """

    def __init__(
        self, config: TrainingConfig, tokens: TokenInfo, num_epochs: int, layers: Any = None
    ):
        self.config, self.tokens, self.layers = config, tokens, layers
        self.masked_epochs = num_epochs - config.unmasked_epochs

    def augmented(self, batch: Batch, epoch: int) -> Batch:
        """The batch as the encoder gets it in an epoch, before masking."""
        if self.config.augment == "none":
            return batch
        noise = mask_noise(self.config.seed, epoch, batch.sample_ids, 2, "shift")
        return dataclasses.replace(batch, pixel_values=shift_images(batch.pixel_values, noise))

    def masks(self, kind: str, epoch: int) -> bool:
        """Whether anything of a kind, "image" or "text", is masked in an epoch."""
        config, progress = self.config, epoch / max(1, self.masked_epochs - 1)
        if epoch >= self.masked_epochs:
            return False
        if kind == "image" and config.painted_mask is not None:
            return True
        ratio = RATIO_SCHEDULES[getattr(config, f"{kind}_mask_schedule")]
        ends = (getattr(config, f"{kind}_mask_{which}") for which in ("ratio", "final_ratio"))
        return bool((torch.as_tensor(ratio(*ends, progress, torch.full((1,), 0.5))) > 0).any())

    def check_ratios(self):
        """ValueError if a schedule gives a ratio outside [0, 1) in any epoch of the run."""
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
        """(image, text) `Masking` of an augmented batch; None if nothing is masked."""
        if epoch >= self.masked_epochs:
            return None, None
        config, image = self.config, self._ratio("image", batch, epoch)
        painted = config.image_mask == "painted"
        return draw_maskings(
            batch,
            self.tokens,
            seed=config.seed,
            epoch=epoch,
            image=(config.image_mask, config.painted_mask if painted else image),
            text=(config.text_mask, self._ratio("text", batch, epoch)),
            text_mode=config.text_mask_mode,
            layers=self.layers,
            predict_tokens=config.mlm_weight > 0,
        )
