"""The exact step, and the run around it: optimizers, files, resume, reports."""

from .run import Run
from .summary import describe
from .trainer import MaskedMultimodalTrainer, train_model

__all__ = ["MaskedMultimodalTrainer", "Run", "describe", "train_model"]
