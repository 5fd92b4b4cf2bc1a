"""The encoder and the decoder, their layers, and how they are saved and shared."""

from .checkpoint import load
from .decoder import MultimodalDecoder
from .encoder import EncoderOutput, MultimodalEncoder
from .pretrained import minilm

__all__ = ["EncoderOutput", "MultimodalDecoder", "MultimodalEncoder", "load", "minilm"]
