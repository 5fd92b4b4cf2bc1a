"""mmkit: teach and research masked image+text training, in Jupyter.

A ViT and a BERT learn one space for pictures and texts while most patches and some words are
hidden. Importing this never touches CUDA, nor transformers' model code.
"""

from . import cost, losses, masking, optim, plots, probe, retrieval, widgets
from .backbones import minilm
from .checkpoint import load
from .config import TrainingConfig
from .data import Batch, MultimodalDataset
from .describe import describe
from .encoder import EncoderOutput, MultimodalEncoder
from .inspection import inspect
from .launch import launch
from .losses import info_nce, sigmoid_loss
from .masking import Masking, mask_noise
from .openmoji import openmoji
from .pictures import Reading
from .reconstruct import evaluate_reconstruction, put_back
from .retrieval import Index, embed, embed_texts, evaluate, mean_recall, recall_at_k, zero_shot
from .run import Run
from .shards import write_shards
from .sources import (
    from_class_folders,
    from_coco,
    from_flickr30k,
    from_folder,
    from_hub,
    from_lists,
    from_shards,
    from_table,
    load_data,
)
from .splits import overlap, split
from .tokenizer import train_wordpiece, unknown_share
from .trainer import MaskedMultimodalTrainer, train_model

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "EncoderOutput",
    "Index",
    "MaskedMultimodalTrainer",
    "Masking",
    "MultimodalDataset",
    "MultimodalEncoder",
    "Reading",
    "Run",
    "TrainingConfig",
    "cost",
    "describe",
    "embed",
    "embed_texts",
    "evaluate",
    "evaluate_reconstruction",
    "from_class_folders",
    "from_coco",
    "from_flickr30k",
    "from_folder",
    "from_hub",
    "from_lists",
    "from_shards",
    "from_table",
    "info_nce",
    "inspect",
    "launch",
    "load",
    "load_data",
    "losses",
    "mask_noise",
    "masking",
    "mean_recall",
    "minilm",
    "openmoji",
    "optim",
    "overlap",
    "plots",
    "probe",
    "put_back",
    "recall_at_k",
    "retrieval",
    "sigmoid_loss",
    "split",
    "train_model",
    "train_wordpiece",
    "unknown_share",
    "widgets",
    "write_shards",
    "zero_shot",
]
