"""The small encoder, captions for it, and the folder that shares it."""

import pytest

from mmkit.data.tokenizer import encode_texts


@pytest.fixture
def model(make_model):
    return make_model().eval()


@pytest.fixture
def texts(tokenizer):
    return encode_texts(tokenizer, ["old red cat", "dog", "small blue boat and big green tree"], 17)


@pytest.fixture
def shared(make_model, tmp_path):
    """The folder of a small model."""
    make_model().save_pretrained(tmp_path / "shared")
    return tmp_path / "shared"
