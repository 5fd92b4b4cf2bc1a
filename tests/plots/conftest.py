"""Images and a model for figures."""

import pytest
import torch

import mmkit as mm


@pytest.fixture(scope="package")
def emoji():
    """23 of the built-in images."""
    return mm.openmoji(64)[1].subset(range(23))


@pytest.fixture(scope="package")
def model(emoji):
    torch.manual_seed(0)
    return mm.MultimodalEncoder.preset("tiny", tokenizer=emoji.tokenizer)
