"""How much is hidden when, and the masks of a batch.

A masker turns noise into a `Masking` (`mask` True = HIDDEN); core.py has the conventions, image.py
and text.py the strategies.
Walk-through: notebooks/02_masking.ipynb.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import RATIO_SCHEDULES
from ..data.batch import Batch
from ..errors import nearest
from ..noise import mask_noise
from .core import Masking, as_masking
from .image import IMAGE_MASKERS, Scene
from .text import TEXT_MASKERS, Caption, maskable_words

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


def caption_of(batch: Batch, model, frequency: Tensor | None = None) -> Caption:
    """What the text maskers look at. frequency (V,): None takes that of the model's training."""
    ids = batch.input_ids
    frequency = getattr(model, "token_frequency", None) if frequency is None else frequency
    return Caption(
        batch.valid,
        maskable_words(ids, batch.valid, model.special_ids),
        ~model.continues_word.to(ids.device)[ids],
        None if frequency is None else frequency.to(ids.device)[ids],
    )


def draw_maskings(
    batch: Batch,
    model,
    *,
    seed: int,
    epoch: int,
    image: tuple[str, Any] = ("random", 0.0),
    text: tuple[str, Any] = ("random", 0.0),
    text_mode: str = "replace",
    attend: Callable[[], Tensor] | None = None,
    layers=None,
    frequency: Tensor | None = None,
    predict_words: bool = False,
) -> tuple[Masking | None, Masking | None]:
    """The image and text `Masking` of a batch; None where the ratio is 0.

    model: a MultimodalEncoder (its grid, its special and continued pieces; its attention, unless
    `attend` says whose). image, text: (masker name, ratio in [0, 1), or (B,) one per sample);
    ("painted", array) takes the array (h, w) or (B, h, w) in place of a ratio. text_mode: with
    "80/10/10" at least one word is hidden, and what takes its place is drawn, too. layers,
    frequency: for the maskers of that name, the dataset's and (None: that of the captions that the
    model was trained on) the tokens'. predict_words: hide at least one word of each caption that
    has two, whatever the mode (15 % of four words is none).
    """
    if text_mode not in ("drop", "replace", "80/10/10"):
        known = nearest(text_mode, ("drop", "replace", "80/10/10"))
        raise ValueError(f"text_mode={text_mode!r} is not known; {known}")
    image_masking = text_masking = None
    ids, by_hand = batch.sample_ids, image[0] == "painted"
    masker, text_masker = find_masker(image[0], IMAGE_MASKERS), find_masker(text[0], TEXT_MASKERS)
    if by_hand or _any(image[1]):
        grid = (batch.pixel_values.shape[2] // model.patch_size,
                batch.pixel_values.shape[3] // model.patch_size)  # fmt: skip
        scene = Scene(grid, batch.pixel_values, painted=image[1] if by_hand else None)
        scene.attend = attend or (lambda: model.class_attention(batch.pixel_values))
        scene.regions = layers and (lambda: layers.regions(ids, grid))
        noise = mask_noise(seed, epoch, ids, grid[0] * grid[1], "image")
        image_masking = masker(noise, 0.0 if by_hand else image[1], scene)
        if masker not in _OURS:
            every = torch.ones_like(noise, dtype=torch.bool)
            image_masking = as_masking(image_masking, image[0], every, every)
    if _any(text[1]):
        caption = caption_of(batch, model, frequency)
        caption.least_hidden = int(predict_words or text_mode == "80/10/10")
        noise = mask_noise(seed, epoch, ids, batch.input_ids.shape[1], "text")
        text_masking = text_masker(noise, text[1], caption)
        if text_masker not in _OURS:
            text_masking = as_masking(text_masking, text[0], caption.maskable, caption.valid)
        if text_mode == "80/10/10":
            text_masking.substitute = _substitutes(batch, model.word_ids, seed, epoch)
    return image_masking, text_masking


def _any(ratio: float | Tensor) -> bool:
    return bool((torch.as_tensor(ratio) != 0).any())


def _substitutes(batch: Batch, word_ids: Tensor, seed: int, epoch: int) -> Tensor:
    """BERT's 80/10/10 (Devlin et al. 2019): -1 (the mask token), a random word, or the word itself.

    (B, L) int64, drawn for every place; only the hidden ones are looked at.
    """
    length = batch.input_ids.shape[1]
    what = mask_noise(seed, epoch, batch.sample_ids, length, "text 80/10/10")
    which = mask_noise(seed, epoch, batch.sample_ids, length, "text random word")
    words = word_ids.to(which.device)[(which * len(word_ids)).long()]
    words = torch.where(what < 0.9, words, batch.input_ids)
    return torch.where(what < 0.8, torch.full_like(words, -1), words)
