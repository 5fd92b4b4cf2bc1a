"""The exact training step, and the run around it: optimizers, files, resuming, reports."""

from .run import Run
from .summary import describe
from .trainer import MaskedMultimodalTrainer, train_model

__all__ = ["MaskedMultimodalTrainer", "Run", "describe", "train_model"]
