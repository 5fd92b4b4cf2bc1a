"""What a model can do: retrieval, zero-shot classes, reconstruction, probes."""

from .reconstruction import evaluate_reconstruction, put_back
from .retrieval import embed, embed_texts, evaluate, mean_recall, recall_at_k
from .search import Index

__all__ = [
    "Index",
    "embed",
    "embed_texts",
    "evaluate",
    "evaluate_reconstruction",
    "mean_recall",
    "put_back",
    "recall_at_k",
]
