"""What a run masks, and when: masks as a function of configuration, epoch and sample.

A masker turns noise into a `Masking` (`mask` True = HIDDEN); core.py has the conventions, image.py
and text.py the strategies. All but the attentive maskers could be replayed from the configuration
alone; these look with a running mean of the model, which the trainer keeps.
Walk-through: notebooks/02_masking.ipynb.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import TrainingConfig
from ..data.batch import Batch
from ..data.images import shift_pictures
from ..errors import nearest
from ..noise import mask_noise
from ..schedules import RATIO_SCHEDULES
from .core import Masking, TokenInfo, as_masking, check_ratio, patch_grid
from .image import ATTENTION_MASKERS, IMAGE_MASKERS, Scene
from .text import TEXT_MASKERS, Caption, maskable_tokens

_OURS = (*IMAGE_MASKERS.values(), *TEXT_MASKERS.values())  # what others give is checked


def find_masker(name: str, maskers: dict[str, Callable]) -> Callable:
    """The masker of that name; ValueError with the known names otherwise."""
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
    """The ratio of an epoch by a schedule: one for all, or (B,) one per sample ("uniform").

    schedule: a name in RATIO_SCHEDULES; "constant" ignores `final`, "uniform" draws between the
    two for each sample and epoch. progress: share of the epochs that is over, in [0, 1].
    """
    if schedule not in RATIO_SCHEDULES:
        raise ValueError(
            f"schedule {schedule!r} is not known; {nearest(schedule, RATIO_SCHEDULES)}"
        )
    noise = mask_noise(seed, epoch, sample_ids, 1, f"{stream} ratio")[:, 0]
    return RATIO_SCHEDULES[schedule](start, final, progress, noise)


def caption_of(input_ids: Tensor, valid: Tensor, tokens: TokenInfo) -> Caption:
    """What the text maskers look at, of captions (B, L)."""
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
    """The `Masking` of images (B, 3, H, W); None where the ratio is 0. See `draw_maskings`."""
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
    predict_words: bool = False,
) -> Masking | None:
    """The `Masking` of captions (B, L); None where the ratio is 0. See `draw_maskings`."""
    if mode not in ("drop", "replace", "80/10/10"):
        known = nearest(mode, ("drop", "replace", "80/10/10"))
        raise ValueError(f"text_mode={mode!r} is not known; {known}")
    name, ratio = mask
    masker = find_masker(name, TEXT_MASKERS)
    if not _any(ratio):
        return None
    caption = caption_of(input_ids, valid, tokens)
    caption.least_hidden = int(predict_words or mode == "80/10/10")
    noise = mask_noise(seed, epoch, sample_ids, input_ids.shape[1], "text")
    masking = masker(noise, ratio, caption)
    if masker not in _OURS:
        masking = as_masking(masking, name, caption.maskable, caption.valid)
    if mode == "80/10/10":
        masking.substitute = _substitutes(input_ids, sample_ids, tokens.maskable_ids, seed, epoch)
    return masking


def _with_older_arguments(draw: Callable) -> Callable:
    """`draw_maskings` with the model, attend and frequency that it took before `TokenInfo`."""

    @functools.wraps(draw)
    def wrapped(batch, tokens=None, *, model=None, attend=None, frequency=None, **options):
        tokens = model if tokens is None else tokens
        changed = {"frequency": frequency, "attend": attend and (lambda _: attend())}
        changed = {name: value for name, value in changed.items() if value is not None}
        if changed or not isinstance(tokens, TokenInfo):
            warnings.warn(
                "draw_maskings takes a TokenInfo, with its frequency and attend: give "
                "model.token_info (dataclasses.replace makes another one); a model will not be "
                "taken for long",
                FutureWarning,
                stacklevel=2,
            )
            tokens = dataclasses.replace(getattr(tokens, "token_info", tokens), **changed)
        return draw(batch, tokens, **options)

    return wrapped


@_with_older_arguments
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
    predict_words: bool = False,
) -> tuple[Masking | None, Masking | None]:
    """The image and text `Masking` of a batch; None where the ratio is 0.

    tokens: of the model that is to read them, `model.token_info`. image, text: (masker name, ratio
    in [0, 1), or (B,) one per sample); ("painted", array) takes the array (h, w) or (B, h, w) in
    place of a ratio. text_mode: with "80/10/10" at least one word is hidden, and what takes its
    place is drawn, too. layers: the data set's, for the masker of that name. predict_words: hide at
    least one word of each caption that has two, whatever the mode (15 % of four words is none).
    """
    ids, when = batch.sample_ids, dict(seed=seed, epoch=epoch)
    return (
        draw_image_masking(batch.pixel_values, ids, tokens, image, layers=layers, **when),
        draw_text_masking(
            batch.input_ids, batch.valid, ids, tokens, text,
            mode=text_mode, predict_words=predict_words, **when,
        ),
    )  # fmt: skip


def _any(ratio: float | Tensor) -> bool:
    return bool((torch.as_tensor(ratio) != 0).any())


def _substitutes(
    input_ids: Tensor, sample_ids: Tensor, maskable_ids: Tensor, seed: int, epoch: int
) -> Tensor:
    """BERT's 80/10/10 (Devlin et al. 2019): -1 (the mask token), a random word, or the word itself.

    (B, L) int64, drawn for every place; only the hidden ones are looked at.
    """
    length = input_ids.shape[1]
    what = mask_noise(seed, epoch, sample_ids, length, "text 80/10/10")
    which = mask_noise(seed, epoch, sample_ids, length, "text random word")
    words = maskable_ids.to(which.device)[(which * len(maskable_ids)).long()]
    words = torch.where(what < 0.9, words, input_ids)
    return torch.where(what < 0.8, torch.full_like(words, -1), words)


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


def looks(config: TrainingConfig) -> bool:
    """Whether a run's masker looks at a model's attention."""
    highest = max(config.image_mask_ratio, config.image_mask_final_ratio or 0)
    return config.image_mask in ATTENTION_MASKERS and highest > 0


class MaskPlan:
    """The masks and the augmentation of a training run.

    tokens: of the model that is trained; its `attend` may look with another one. num_epochs: of
    the whole run. layers: of the training set's drawings, where it has them.
    """

    def __init__(
        self, config: TrainingConfig, tokens: TokenInfo, num_epochs: int, layers: Any = None
    ):
        self.config, self.tokens, self.layers = config, tokens, layers
        self.masked_epochs = num_epochs - config.unmasked_epochs

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
            self.tokens,
            seed=config.seed,
            epoch=epoch,
            image=(config.image_mask, config.painted_mask if painted else image),
            text=(config.text_mask, self._ratio("text", batch, epoch)),
            text_mode=config.text_mask_mode,
            layers=self.layers,
            predict_words=config.words_weight > 0,
        )
