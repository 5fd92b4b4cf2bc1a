"""Noise becomes a `Masking`: which patches and tokens the encoder sees."""

from ..noise import mask_noise
from ..older_names import renamed
from ..schedules import RATIO_SCHEDULES
from .core import Masking, TokenInfo, hide_largest, keep_visible
from .image import IMAGE_MASKERS, Scene, random_mask
from .plan import (
    MaskPlan,
    caption_of,
    draw_image_masking,
    draw_maskings,
    draw_text_masking,
    find_masker,
    mask_ratios,
)
from .text import TEXT_MASKERS, Caption, maskable_tokens, random_text_mask

# the name of before
maskable_words = renamed(maskable_tokens, "mm.masking.maskable_words")

__all__ = [
    "IMAGE_MASKERS",
    "RATIO_SCHEDULES",
    "TEXT_MASKERS",
    "Caption",
    "MaskPlan",
    "Masking",
    "Scene",
    "TokenInfo",
    "caption_of",
    "draw_image_masking",
    "draw_maskings",
    "draw_text_masking",
    "find_masker",
    "hide_largest",
    "keep_visible",
    "mask_noise",
    "mask_ratios",
    "maskable_tokens",
    "maskable_words",
    "random_mask",
    "random_text_mask",
]
