"""Noise becomes a `Masking`: which patches and tokens the encoder sees."""

from ..config import RATIO_SCHEDULES
from ..noise import mask_noise
from .core import Masking, hide_largest, keep_visible
from .draw import caption_of, draw_maskings, find_masker, mask_ratios
from .image import IMAGE_MASKERS, Scene, random_mask
from .text import TEXT_MASKERS, Caption, maskable_words, random_text_mask

__all__ = [
    "IMAGE_MASKERS",
    "RATIO_SCHEDULES",
    "TEXT_MASKERS",
    "Caption",
    "Masking",
    "Scene",
    "caption_of",
    "draw_maskings",
    "find_masker",
    "hide_largest",
    "keep_visible",
    "mask_noise",
    "mask_ratios",
    "maskable_words",
    "random_mask",
    "random_text_mask",
]
