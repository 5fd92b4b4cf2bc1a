"""mmkit: teaching of and research on masked image+text training, in Jupyter.

A ViT and a BERT learn a common space for images and texts while most patches and some tokens are
masked. Importing the package initialises neither CUDA nor transformers' model code.
"""

import os as _os
from importlib import metadata as _metadata

# Threads that wait for each other soon give way to other programs: a step slows down less where
# another program keeps a core busy. It has an effect only if torch was not imported before.
_os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from . import cost, losses, masking, plots, results, widgets
from .config import TrainingConfig
from .data.batch import Batch
from .data.dataset import MultimodalDataset
from .data.folders import from_class_folders, from_folder
from .data.hub import from_hub
from .data.image_headers import Reading
from .data.inspection import inspect
from .data.openmoji.images import openmoji
from .data.published import from_coco, from_flickr30k
from .data.shards import write_shards
from .data.sources import from_lists, from_shards, from_table, load_data
from .data.splits import overlap, split
from .data.tokenizer import train_wordpiece, unk_rate
from .evaluation import probe, retrieval
from .evaluation.features import embed, embed_texts
from .evaluation.reconstruction import evaluate_reconstruction, reconstruct
from .evaluation.retrieval import evaluate, mean_recall, recall_at_k
from .evaluation.search import Index
from .evaluation.zero_shot import zero_shot
from .losses import info_nce, sigmoid_loss
from .masking.core import Masking
from .models.checkpoint import load
from .models.encoder import EncoderOutput, MultimodalEncoder
from .models.pretrained import minilm
from .noise import mask_noise
from .older_names import older_functions
from .training import optim
from .training.launch.notebook import launch
from .training.run import Run
from .training.summary import describe
from .training.trainer import MaskedMultimodalTrainer, train_model

__getattr__ = older_functions(__name__, "mm", unknown_share="unk_rate", put_back="reconstruct")

try:
    __version__ = _metadata.version("mmkit")  # that of pyproject.toml
except _metadata.PackageNotFoundError:
    __version__ = "0+not.installed"

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
    "recall_at_k",
    "reconstruct",
    "results",
    "retrieval",
    "sigmoid_loss",
    "split",
    "train_model",
    "train_wordpiece",
    "unk_rate",
    "widgets",
    "write_shards",
    "zero_shot",
]
