"""Evaluation of a model: retrieval, zero-shot classification, reconstruction, probes."""

from ..older_names import older_functions
from .features import embed, embed_texts
from .reconstruction import evaluate_reconstruction, reconstruct
from .retrieval import evaluate, mean_recall, recall_at_k
from .search import Index

__getattr__ = older_functions(__name__, "mm.evaluation", put_back="reconstruct")

__all__ = [
    "Index",
    "embed",
    "embed_texts",
    "evaluate",
    "evaluate_reconstruction",
    "mean_recall",
    "recall_at_k",
    "reconstruct",
]
