"""Widgets for notebooks: the masking lab."""

from .mask_lab import MaskLab

__all__ = ["MaskLab"]
