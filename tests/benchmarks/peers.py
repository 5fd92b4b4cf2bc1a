"""The same towers, images and captions in mmkit and in the libraries that people use instead.

Each peer is a class whose `step()` is one whole training step: forward, loss, backward, clipping,
optimizer, clamp. All have towers of equal width and depth, the same tokens, batch and autocast
precision, and torch's fused AdamW. Each runs as its own users would run it, at its best:

- mmkit: `MaskedMultimodalTrainer.train_step`, patches dropped before the projection.
- open_clip: `CLIP` with patch dropout, its `ClipLoss`, the step of `open_clip_train`; its context
  is as long as the longest caption of the training set (its default is 77).
- transformers: `VisionTextDualEncoderModel` with its own loss, as in the contrastive-image-text
  example; captions padded to the same length. It cannot drop patches.
"""

import math
from typing import Any

import torch
from torch import Tensor

import mmkit as mm
from mmkit.data.batch import Batch
from mmkit.device import autocast_for
from mmkit.models.presets import PRESETS
from mmkit.training.trainer import MaskedMultimodalTrainer

LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
ADAMW: dict[str, Any] = dict(betas=(0.9, 0.98), eps=1e-6, fused=True)


class Mmkit:
    """`MaskedMultimodalTrainer` as it is. options: fields of `TrainingConfig`."""

    def __init__(self, size: str, ratio: float, data, batch_size: int, precision: str, **options):
        config = mm.TrainingConfig(
            preset=size, batch_size=batch_size, image_mask_ratio=ratio, mixed_precision=precision,
            **dict(optimizer="adamw", learning_rate=LEARNING_RATE) | options,
        )  # fmt: skip
        self.trainer = MaskedMultimodalTrainer(config, data)
        self.model, self.device = self.trainer.model, self.trainer.device
        self.batches = [self.trainer.train.batch(rows) for rows in rows_of(data, batch_size)]
        self.number = 0

    def step(self) -> float:
        batch = self.batches[self.number % len(self.batches)].to(self.device)
        self.number += 1
        return float(self.trainer.train_step(batch, epoch=0)[0])


class Peer:
    """What the other two share: images as normalised floats, captions of one length."""

    model: torch.nn.Module

    def __init__(self, size: str, ratio: float, data, batch_size: int, precision: str):
        self.size, self.ratio, self.precision = PRESETS[size], ratio, precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data = data = data.encoded_by(data.tokenizer, self.size["length"])
        self.length = int(data.encoded_captions()[1].max())
        self.vocab_size = len(data.tokenizer)
        self.end = data.tokenizer.sep_token_id
        batches = [data.batch(rows) for rows in rows_of(data, batch_size)]
        self.batches = [self.prepare(batch) for batch in batches]
        self.number = 0
        torch.manual_seed(0)
        self.build()
        self.model.to(self.device).train()
        self.optimizer = torch.optim.AdamW(groups(self.model), lr=LEARNING_RATE, **ADAMW)

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised floats (B, 3, H, W), tokens (B, L) padded with 0, and which are valid."""
        pixels = (batch.pixel_values.float() / 255 - 0.5) / 0.5
        room = self.length - batch.input_ids.shape[1]
        ids = torch.nn.functional.pad(batch.input_ids, (0, room))
        return pixels, ids, torch.nn.functional.pad(batch.valid, (0, room))

    def build(self) -> None:
        raise NotImplementedError

    def loss(self, pixels: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self) -> float:
        batch = [x.to(self.device) for x in self.batches[self.number % len(self.batches)]]
        self.number += 1
        return self.train_step(*batch)

    def train_step(self, pixels: Tensor, ids: Tensor, valid: Tensor) -> float:
        self.optimizer.zero_grad()
        with autocast_for(self.precision, self.device):
            loss = self.loss(pixels, ids, valid)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
        return float(loss.detach())


class OpenClip(Peer):
    def build(self) -> None:
        import open_clip

        (width, depth, _), (text_width, text_depth, text_heads) = (
            self.size["vit"],
            self.size["bert"],
        )
        vision = open_clip.CLIPVisionCfg(
            layers=depth, width=width, head_width=64, patch_size=self.size["patch"],
            image_size=self.size["image"], patch_dropout=self.ratio,
        )  # fmt: skip
        text = open_clip.CLIPTextCfg(
            context_length=self.length, vocab_size=self.vocab_size + 1, width=text_width,
            heads=text_heads, layers=text_depth,
        )  # fmt: skip
        self.model = open_clip.CLIP(self.size["embed_dim"], vision, text, output_dict=True)
        self.clip_loss = open_clip.ClipLoss()

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        pixels, ids, valid = super().prepare(batch)
        # It takes the text's features at the token of the highest id, which marks the end.
        return pixels, ids.masked_fill(ids == self.end, self.vocab_size), valid

    def loss(self, pixels: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        return self.clip_loss(**self.model(pixels, ids))


class Transformers(Peer):
    def build(self) -> None:
        from transformers import (
            BertConfig,
            VisionTextDualEncoderConfig,
            VisionTextDualEncoderModel,
            ViTConfig,
        )

        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        vit, bert = (
            dict(zip(names, (*self.size[kind], 4 * self.size[kind][0]), strict=True))
            for kind in ("vit", "bert")
        )
        none = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        vision = ViTConfig(
            image_size=self.size["image"], patch_size=self.size["patch"], **vit, **none
        )
        text = BertConfig(
            vocab_size=self.vocab_size, max_position_embeddings=self.size["length"], **bert, **none
        )
        config = VisionTextDualEncoderConfig.from_vision_text_configs(
            vision, text, projection_dim=self.size["embed_dim"]
        )
        self.model = VisionTextDualEncoderModel(config)

    def loss(self, pixels: Tensor, ids: Tensor, valid: Tensor) -> Tensor:
        out = self.model(
            input_ids=ids, pixel_values=pixels, attention_mask=valid.long(), return_loss=True
        )
        return out.loss


class OpenClipCompiled(OpenClip):
    """With its whole forward pass compiled by torch.compile."""

    def build(self) -> None:
        super().build()
        self.model.compile()


PEERS: dict[str, Any] = {"mmkit": Mmkit, "open_clip": OpenClip, "transformers": Transformers}
COMPILED: dict[str, Any] = {"open_clip compiled": OpenClipCompiled}


def rows_of(data, batch_size: int, count: int = 4) -> list[list[int]]:
    """Rows of `count` batches, spread over the data set."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    order = order * (1 + count * batch_size // len(order))
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(count)]


def groups(model: torch.nn.Module) -> list[dict]:
    """Weight decay for matrices; none for biases, norms and the temperature."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in learning if p.ndim < 2], "weight_decay": 0.0},
    ]
