"""Folders of shared models: what is in them, how to change it, and which models are the same."""

import copy
import json
from pathlib import Path

import torch

import mmkit as mm
from mmkit.data.tokenizer import encode_texts

FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
TEXTS = ["old red cat", "dog", "small blue boat and a zebra"]

# What is known of a training run.
METADATA = {
    "config": mm.TrainingConfig(
        image_mask="block", image_mask_ratio=0.4, text_mask_ratio=0.15, output_dir="/home/me/runs"
    ).to_dict(),
    "data": {"name": "openmoji-compose-train", "fingerprint": "f00"},
    "epoch": 12,
    "best": {"image_to_text_R@1": 0.8712, "loss": 1.5, "split": "val"},
    "model_state_dict": {"never": torch.zeros(2)},
}


def names(folder):
    return {path.name for path in Path(folder).iterdir()}


def edit(folder, change, file="config.json"):
    """Change the values of a JSON file in place."""
    path = Path(folder) / file
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def features(model):
    side = model.image_size
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=generator)
    texts = encode_texts(model.tokenizer, TEXTS, model.max_length)
    with torch.no_grad():
        return model.encode_image(pixels), model.encode_text(*texts)


def same_model(one, other):
    """Check everything by which a user could tell them apart."""
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    for (name, x), (other_name, y) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        assert name == other_name and x.dtype == y.dtype and torch.equal(x, y), name
    assert one.architecture() == other.architecture()
    dropouts = [[m.p for m in x.modules() if isinstance(m, torch.nn.Dropout)] for x in (one, other)]
    assert dropouts[0] == dropouts[1]
    assert one.tokenizer(TEXTS)["input_ids"] == other.tokenizer(TEXTS)["input_ids"]
    one = copy.deepcopy(one).to_device("cpu").eval()
    assert all(map(torch.equal, features(one), features(other)))
    assert not other.training


def unlike_new(model):
    """Change every parameter and buffer, so that none can be right by chance."""
    torch.manual_seed(5)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 0.1 * torch.rand_like(tensor)
    return model


def save_towers(model, folder):
    """Checkpoints of both towers as transformers saves them."""
    model.vit.save_pretrained(folder / "vit")
    statistics = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    kind = {"image_processor_type": "ViTImageProcessor"}
    (folder / "vit/preprocessor_config.json").write_text(json.dumps(statistics | kind))
    model.bert.save_pretrained(folder / "bert")
    model.tokenizer.save_pretrained(folder / "bert")
    return str(folder / "vit"), str(folder / "bert")
