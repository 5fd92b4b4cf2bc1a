"""Images and their captions: read, checked, encoded, and given out as batches."""

from .batch import Batch
from .dataset import MultimodalDataset
from .folders import from_class_folders, from_folder
from .hub import from_hub
from .image_headers import Reading
from .inspection import inspect
from .loader import load_batches
from .published import from_coco, from_flickr30k
from .shards import write_shards
from .sources import from_lists, from_shards, from_table, load_data
from .splits import overlap, split
from .tokenizer import train_wordpiece, unk_rate

__all__ = [
    "Batch",
    "MultimodalDataset",
    "Reading",
    "from_class_folders",
    "from_coco",
    "from_flickr30k",
    "from_folder",
    "from_hub",
    "from_lists",
    "from_shards",
    "from_table",
    "inspect",
    "load_batches",
    "load_data",
    "overlap",
    "split",
    "train_wordpiece",
    "unk_rate",
    "write_shards",
]
