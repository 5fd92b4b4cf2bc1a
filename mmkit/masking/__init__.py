"""From noise to a `Masking`: which patches and tokens the encoder sees."""

from ..noise import mask_noise
from ..older_names import older_functions
from ..schedules import RATIO_SCHEDULES
from .core import Masking, TokenInfo, keep_visible, mask_largest
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

__getattr__ = older_functions(
    __name__, "mm.masking", maskable_words="maskable_tokens", hide_largest="mask_largest"
)

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
    "keep_visible",
    "mask_largest",
    "mask_noise",
    "mask_ratios",
    "maskable_tokens",
    "random_mask",
    "random_text_mask",
]
