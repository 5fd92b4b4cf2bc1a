"""An architecture is plain values, and gives the same encoder again."""

import torch

from mmkit import MultimodalEncoder
from tests.models.images import images


def test_an_architecture_is_rebuilt_from_plain_values(model, texts):
    import json

    spec = json.loads(json.dumps(model.architecture()))
    other = MultimodalEncoder.from_architecture(spec).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.encode_image(images()), model.encode_image(images()))
    lines = ["old red cat", "small boat"]
    assert other.tokenizer(lines)["input_ids"] == model.tokenizer(lines)["input_ids"]
