"""Small real models, their trainers and artificial images that the unit tests share."""

import pytest
import torch

from mmkit import (
    MaskedMultimodalTrainer,
    MultimodalDataset,
    MultimodalEncoder,
    TrainingConfig,
    train_wordpiece,
)

WORDS = "red green blue old new small big cat dog house tree boat star moon bread shoe".split()


def captions(count: int) -> list[str]:
    """Different captions of 2 to 6 words."""
    texts = []
    for i in range(count):
        length = 2 + i % 5
        texts.append(" ".join(WORDS[(i * 7 + j * (3 + i // 16)) % 16] for j in range(length)))
    return texts


def shared(batch):
    """The batch with artificial partners.

    Rows 5 and 17 have the same caption, and every fourth image also has the caption of the third
    row after it, but not the other way round.
    """
    rows = torch.arange(len(batch))
    batch.caption_ids = torch.where(rows == 5, 17, rows)
    others = torch.where(rows % 4 == 0, rows + 3, -1)
    batch.image_captions = torch.stack([others, batch.caption_ids], 1)
    return batch


def centre_square(image, side: int) -> torch.Tensor:
    """(3, side, side) uint8: the centre of a PIL image, resized by torchvision."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    short = min(image.size)
    left, top = ((length - short) // 2 for length in image.size)
    pixels = F.pil_to_tensor(image.crop((left, top, left + short, top + short)))
    return F.resize(pixels, [side, side], InterpolationMode.BICUBIC, antialias=True)


@pytest.fixture(scope="session")
def tokenizer():
    return train_wordpiece(captions(64))


@pytest.fixture
def make_model(tokenizer):
    """A real but small encoder: 15-pixel images, 9 patches of 5 pixels, width 22, 2 layers."""
    from transformers import BertConfig, ViTConfig

    def make(dropout=0.0, seed=0, **options):
        tower = dict(
            hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=31
        )
        drop = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        torch.manual_seed(seed)
        return MultimodalEncoder(
            ViTConfig(image_size=15, patch_size=5, **tower, **drop),
            BertConfig(vocab_size=len(tokenizer), max_position_embeddings=17, **tower, **drop),
            tokenizer,
            embed_dim=13,
            dropout=dropout,
            **options,
        )

    return make


@pytest.fixture
def make_decoding(make_model):
    """The small encoder with a decoder, every parameter moved away from its initial value."""

    def make(dropout=0.0, **heads):
        small = dict(pixels=True, words=True, width=32, pixel_depth=1, word_depth=1)
        model = make_model(dropout=dropout).add_decoder(**small | heads)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        return model.to_device("cpu").eval()

    return make


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    """A folder of its own for all that is cached."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def trainer_of(make_model, make_data, tmp_path):
    """A trainer whose only batch has 23 pairs (or as given), with a small encoder."""

    def make(count=23, **settings):
        config = TrainingConfig(
            **dict(batch_size=count, mixed_precision="no", output_dir=str(tmp_path)) | settings
        )
        return MaskedMultimodalTrainer(config, make_data(count), None, make_model())

    return make


@pytest.fixture
def make_data(tokenizer):
    """Random images with captions, for arithmetic, not for learning."""

    def make(count=23, size=15, seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randint(
            0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8
        )
        options = {"tokenizer": tokenizer} | options
        return MultimodalDataset.from_pixels(pixels, captions(count), **options)

    return make


@pytest.fixture
def make_config(tmp_path):
    """f(...) is the configuration of a short run, two epochs, named "run"."""
    from tests.train_small import QUICK  # which takes captions from here

    def make(**values):
        return TrainingConfig(**QUICK | dict(output_dir=str(tmp_path), run_name="run") | values)

    return make


@pytest.fixture
def make_trainer(make_config, make_model, make_data):
    """f(...) builds a trainer of a short run: 53 pairs, five steps an epoch."""

    def make(model=None, resume=False, callbacks=(), data=None, val=None, **values):
        model = model or make_model(dropout=values.get("dropout", 0.0))
        data = data or make_data(53)
        return MaskedMultimodalTrainer(make_config(**values), data, val, model, resume, callbacks)

    return make


@pytest.fixture
def make_terms_trainer(make_config, make_model, make_data):
    """f(...) builds a trainer with 23 pairs a step, two of which share a caption."""

    def make(val=None, resume=False, callbacks=(), model=None, **values):
        config = make_config(**dict(batch_size=23) | values)
        train = make_data(23)
        train.texts[5].append(train.texts[17][0])  # correct for image 5, not the other way round
        model = model or make_model(dropout=config.dropout)
        trainer = MaskedMultimodalTrainer(config, train, val, model, resume, callbacks)
        trainer.net.train()
        return trainer

    return make
