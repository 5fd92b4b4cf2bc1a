"""Decoder heads: masked pixels, masked tokens, and whether image and caption belong together.

A head reads the encoder's states. It has layers of its own if tokens were dropped, because mask
tokens enter only here (He et al. 2022, MAE, arXiv:2111.06377), or if it attends to the other
modality (Geng et al. 2022, M3AE, arXiv:2205.14204); else it is linear (Xie et al. 2022, SimMIM,
arXiv:2111.09886; Devlin et al. 2019, BERT, arXiv:1810.04805). `mask` True = MASKED, `valid` False =
padding. Shapes: B batch, N patches, T tokens, W width of the decoder, V vocabulary, M masked
tokens, P pairs. Walk-through: notebooks/07_reconstruction.ipynb.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import in_float64
from ..errors import nearest
from ..losses import similarity
from ..masking.core import Masking
from .attention import key_mask

_NONE = -1  # in `ForwardSpec.context`: the decoder does not attend to the other modality


@dataclass
class ForwardSpec:
    """What a forward pass computes."""

    contrast: bool = True  # unit-length features with a gradient
    view: str = "masked"  # contrast on the "masked" view, or on a second, "unmasked" one
    pixels: bool = False
    tokens: bool = False
    matching: Tensor | None = None  # noise (B, 2) in [0, 1) that draws the wrong partners
    # (B,) int64: the row whose other modality a row's decoder attends to, -1 = none; None = its own
    context: Tensor | None = None

    def __post_init__(self):
        if self.view not in (views := ("masked", "unmasked")):
            raise ValueError(f"view={self.view!r} is not known; {nearest(self.view, views)}")

    @property
    def reconstructs(self) -> bool:
        """Whether anything needs the decoder."""
        return self.pixels or self.tokens or self.matching is not None


@dataclass
class Encoded:
    """One modality of a masked view, after its tower."""

    states: Tensor  # (B, T, D), the class token first
    valid: Tensor | None  # (B, T) bool, False = padding; None = all are valid
    masking: Masking | None
    mode: str  # what was done with the masked tokens: "drop", "replace" or "80/10/10"

    def pick(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """States and `valid` of these rows."""
        return _rows(self.states, rows), None if self.valid is None else self.valid[rows]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], but the backward pass adds in the order of the rows, not in that of the threads."""
    return x.index_select(0, rows)


def sin_cos(positions: Tensor, width: int) -> Tensor:
    """Fixed embeddings (T, width) of positions (T,): sines, then cosines (Vaswani et al. 2017)."""
    rates = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sin_cos_2d(height: int, width: int, channels: int) -> Tensor:
    """Fixed embeddings (height * width, channels), as MAE: half for columns, half for rows."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    return torch.cat([sin_cos(columns, channels // 2), sin_cos(rows, channels // 2)], 1)


def _patch_positions(side: int, width: int) -> Tensor:
    """(1 + side * side, width): zeros for the class token, then the embeddings of the patches."""
    return torch.cat([torch.zeros(1, width), sin_cos_2d(side, side, width)])


class TokenDecoder(nn.Module):
    """Transformer layers over the tokens of one modality with mask tokens, and those of the other.

    The other modality, if it is used, follows the own tokens in one sequence, so that both attend
    and are attended to alike (M3AE); for a row without it, it counts as padding.
    """

    places: Tensor  # (T, W), fixed

    def __init__(
        self,
        own_width: int,
        other_width: int | None,
        width: int,
        depth: int,
        positions: Tensor,
        dropout: float,
    ):
        from transformers import ViTConfig
        from transformers.models.vit.modeling_vit import ViTLayer

        super().__init__()
        drop = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
        heads = max(1, width // 32)  # MAE's decoder: 16 heads at width 512
        sizes = dict(num_attention_heads=heads, intermediate_size=4 * width)
        self.config = ViTConfig(hidden_size=width, **sizes, **drop)
        self.config._attn_implementation = "sdpa"
        self.embed = nn.Linear(own_width, width)
        self.other = None if other_width is None else nn.Linear(other_width, width)
        self.mask_token = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(ViTLayer(self.config) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=self.config.layer_norm_eps)
        self.register_buffer("places", positions, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        own: Encoded,
        first: int,
        other: tuple[Tensor, Tensor | None] | None,
        valid: Tensor | None,
    ) -> Tensor:
        """States (B, T, W) of all tokens of a modality, including the masked ones.

        first: number of leading tokens that the masking leaves out (a class token). other: states
        and `valid` of the other modality. valid (B, T): own tokens that count.
        """
        x = self.embed(own.states)
        if own.masking is not None and own.mode == "drop":
            x = torch.cat([x[:, :first], self._restored(x[:, first:], own.masking)], 1)
        x = x + self.places[: x.shape[1]]
        length, keys = x.shape[1], valid
        if self.other is not None and other is not None:
            states, attended = other
            x = torch.cat([x, self.other(states)], 1)
            if keys is not None or attended is not None:
                keys = torch.cat([_all_valid(keys, x[:, :length]), _all_valid(attended, states)], 1)
        mask = key_mask(keys, self.config._attn_implementation, x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x[:, :length])

    def _restored(self, x: Tensor, masking: Masking) -> Tensor:
        """Kept tokens (B, K, W) at their positions, the mask token at all others: (B, T, W)."""
        ids = masking.ids_restore.clamp(max=x.shape[1] - 1)
        x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))
        absent = masking.ids_restore >= masking.ids_keep.shape[1]  # masked, or padding
        return torch.where((absent | masking.mask)[..., None], self.mask_token.to(x.dtype), x)


def _all_valid(valid: Tensor | None, states: Tensor) -> Tensor:
    if valid is not None:
        return valid
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


class WordHead(nn.Module):
    """BERT's head: a dense layer, GELU, a norm, then the word embeddings (tied)."""

    def __init__(self, own_width: int, bert_config):
        super().__init__()
        width = bert_config.hidden_size
        self.dense = nn.Linear(own_width, width)
        self.norm = nn.LayerNorm(width, eps=bert_config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(bert_config.vocab_size))

    def forward(self, states: Tensor, embedding: Tensor) -> Tensor:
        """Logits (M, V) of states (M, width); embedding (V, D)."""
        return F.linear(self.norm(F.gelu(self.dense(states))), embedding, self.bias)


class MultimodalDecoder(nn.Module):
    """The decoder heads of a `MultimodalEncoder`; `model.add_decoder` builds it.

    Args:
        vit_config: transformers' ViTConfig of the image tower.
        bert_config: transformers' BertConfig of the text tower.
        pixels: give it a head for masked patches.
        words: give it a head for masked tokens.
        matching: give it a head that tells true pairs from wrong ones; needs across.
        across: let the heads attend to the other modality.
        width: width of the heads' layers, a multiple of 32.
        pixel_depth: layers of the pixel head; 0 = a linear head.
        word_depth: layers of the token and matching heads; 0 = linear heads.
        norm_pix_loss: the pixel head predicts patches of mean 0 and deviation 1.
        dropout: dropout of the heads' layers, in [0, 1).

    Raises:
        ValueError: no head is asked for, width or depths are out of range, or matching or a linear
            head contradicts across.
    """

    def __init__(  # noqa: PLR0913 (by name)
        self,
        vit_config,
        bert_config,
        *,
        pixels: bool = True,
        words: bool = True,
        matching: bool = False,
        across: bool = False,
        width: int = 128,
        pixel_depth: int = 2,
        word_depth: int = 2,
        norm_pix_loss: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.spec: dict[str, Any] = dict(
            pixels=pixels, words=words, matching=matching, across=across, width=width,
            pixel_depth=pixel_depth, word_depth=word_depth, norm_pix_loss=norm_pix_loss,
            dropout=dropout,
        )  # fmt: skip
        _check(self.spec)
        image, text, p = vit_config.hidden_size, bert_config.hidden_size, vit_config.patch_size
        side = vit_config.image_size // p
        self.norm_pix_loss, self.across = norm_pix_loss, across
        self.pixel_layers = self.pixel_head = self.word_layers = None
        self.word_head = self.matching_head = None
        if pixels:
            if pixel_depth:
                positions = _patch_positions(side, width)
                self.pixel_layers = TokenDecoder(
                    image, text if across else None, width, pixel_depth, positions, dropout
                )
            self.pixel_head = nn.Linear(width if pixel_depth else image, 3 * p * p)
        if words or matching:
            if word_depth:
                positions = sin_cos(torch.arange(bert_config.max_position_embeddings), width)
                self.word_layers = TokenDecoder(
                    text, image if across else None, width, word_depth, positions, dropout
                )
            out = width if word_depth else text
            self.word_head = WordHead(out, bert_config) if words else None
            self.matching_head = nn.Linear(out, 1) if matching else None

    def set_grid(self, side: int):
        """Reconstruct a grid of side x side patches; their position embeddings are not learned."""
        if self.pixel_layers is not None:
            positions = _patch_positions(side, self.spec["width"])
            self.pixel_layers.places = positions.to(self.pixel_layers.places.device)

    def set_attention(self, kind: str):
        """Use the attention ("eager" or "sdpa") that is fast on the device."""
        for part in (self.pixel_layers, self.word_layers):
            if part is not None:
                part.config._attn_implementation = kind

    def put_pixels(self, image: Encoded, text: Encoded | None, context: Tensor | None) -> Tensor:
        """The prediction for every patch, (B, N, 3 * p * p); `context`: see `ForwardSpec`."""
        if self.pixel_head is None:
            raise ValueError(
                "this model reconstructs no pixels; call model.add_decoder(pixels=True)"
            )
        if self.pixel_layers is None:
            if image.masking is not None and image.mode == "drop":
                raise ValueError(
                    "a pixel head without layers cannot reconstruct dropped patches; use "
                    "image mode 'replace', or model.add_decoder(pixel_depth=2)"
                )
            return self.pixel_head(image.states[:, 1:]).float()
        states = self.pixel_layers(image, 1, self._attended(text, context), None)
        return self.pixel_head(states[:, 1:]).float()

    def _attended(self, other: Encoded | None, rows: Tensor | None):
        """States and `valid` of the other modality that each row's decoder attends to."""
        if not self.across:
            return None
        if other is None:
            raise ValueError("this decoder is cross-modal: it needs images and captions")
        if rows is None:
            return other.states, other.valid
        states, valid = other.pick(rows.clamp(min=0))
        none = (rows == _NONE)[:, None]
        return states, _all_valid(valid, states) & ~none

    def fused(
        self, text: Encoded, image: Encoded | None, captions: Tensor | None, images: Tensor | None
    ) -> Tensor:
        """States (R, L, W) of captions that attend to images, both given as rows of the batch.

        captions, images: (R,) int64; None = each row's own, and -1 = no image.
        """
        if self.word_layers is None:
            if text.masking is not None and text.mode == "drop":
                raise ValueError(
                    "a token head without layers cannot reconstruct dropped tokens; use text mode "
                    "'replace' or '80/10/10', or model.add_decoder(word_depth=2)"
                )
            return text.states if captions is None else _rows(text.states, captions)
        if captions is not None:
            states, valid = text.pick(captions)
            masking = None if text.masking is None else text.masking[captions]
            text = Encoded(states, valid, masking, text.mode)
        return self.word_layers(text, 0, self._attended(image, images), self._own_valid(text))

    @staticmethod
    def _own_valid(text: Encoded) -> Tensor | None:
        """(B, L) bool: tokens that count once mask tokens replace the dropped ones."""
        if text.masking is None or text.mode != "drop" or text.valid is None:
            return text.valid
        kept = text.valid.sum(1, keepdim=True)
        return text.masking.mask | (text.masking.ids_restore < kept)

    def forward(
        self,
        image: Encoded | None,
        text: Encoded | None,
        wanted: ForwardSpec,
        embedding: Tensor,
        features: tuple[Tensor, Tensor, Tensor] | None = None,
        correct: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What `wanted` asks for, as keys of a dict.

        "pixels" (B, N, 3 * p * p); "token_logits" (M, V) of the masked tokens, in the order of
        `text.masking.mask.nonzero()`; "matching" (P,) logits, and "match" (P,), 1.0 = a true pair.
        embedding (V, D): the word embeddings. features and correct are for matching: (image, text,
        scale), and (B, B) bool, caption j is correct for image i.
        """
        out: dict[str, Tensor] = {}
        if wanted.pixels:
            assert image is not None
            out["pixels"] = self.put_pixels(image, text, wanted.context)
        if not wanted.tokens and wanted.matching is None:
            return out
        assert text is not None
        if self.word_head is None and wanted.tokens:
            raise ValueError(
                "this model reconstructs no tokens; call model.add_decoder(words=True)"
            )
        captions, images = None, wanted.context
        if wanted.matching is not None:
            captions, images, paired = self._pairs(wanted, features, correct)
        states = self.fused(text, image, captions, images)
        if wanted.tokens and self.word_head is not None and text.masking is not None:
            masked = states[: len(text.states)][text.masking.mask]  # (M, W)
            out["token_logits"] = self.word_head(masked, embedding)
        if wanted.matching is not None:
            assert self.matching_head is not None
            rows = torch.cat([paired, torch.arange(len(text.states), len(states)).to(paired)])
            out["matching"] = self.matching_head(_rows(states, rows)[:, 0])[:, 0].float()
            out["match"] = (torch.arange(len(rows), device=rows.device) < len(paired)).float()
        return out

    def _pairs(self, wanted: ForwardSpec, features, correct) -> tuple[Tensor, Tensor, Tensor]:
        """(captions, images, paired): rows of the pairs to fuse, true ones first; rows of those."""
        assert wanted.matching is not None
        if self.matching_head is None:
            raise ValueError(
                "this model has no matching head; model.add_decoder(matching=True) adds one"
            )
        own = torch.arange(len(correct), device=correct.device)
        context = own if wanted.context is None else wanted.context
        image, text, scale = features
        other_caption, other_image, has_one = hard_negatives(
            image, text, scale, correct, wanted.matching
        )
        paired = own[context == own]
        wrong = paired[has_one[paired]]
        captions = torch.cat([own, wrong, other_caption[wrong]])
        images = torch.cat([context, other_image[wrong], wrong])
        return captions, images, paired


@torch.no_grad()
def hard_negatives(
    image_features: Tensor, text_features: Tensor, scale: Tensor, correct: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a wrong caption and a wrong image for each row, similar ones with higher probability.

    They are drawn by noise (B, 2) in [0, 1) from the softmax of the micro-batch's similarities
    without what is correct for the row (Li et al. 2021, ALBEF, arXiv:2107.07651). correct (B, B)
    bool: caption j is correct for image i. The candidates are those of ONE micro-batch on one
    process: other micro-batches have other negatives. Returns caption (B,), image (B,) and has_one
    (B,) bool, False where all captions or all images are correct for the row.
    """
    logits = scale * similarity(image_features, text_features)
    picked, columns = [], torch.arange(len(correct), device=correct.device)
    for score, allowed, draw in (
        (logits, ~correct, noise[:, :1]),
        (logits.T, ~correct.T, noise[:, 1:]),
    ):
        score = in_float64(score.masked_fill(~allowed, -math.inf))
        chance = score.softmax(1).nan_to_num().cumsum(1)
        rank = (chance <= draw.to(chance.device) * chance[:, -1:]).sum(1).to(allowed.device)
        last = (allowed * columns).amax(1)
        picked.append(torch.minimum(rank, last))  # rounding may end one beyond the last
    return picked[0], picked[1], ~correct.all(1) & ~correct.all(0)


def _check(spec: dict):
    if not (spec["pixels"] or spec["words"] or spec["matching"]):
        raise ValueError("a decoder needs a head: at least one of pixels, words and matching")
    if spec["width"] < 32 or spec["width"] % 32:
        raise ValueError(
            f"width={spec['width']} must be a multiple of 32, at least 32 (the width of an "
            "attention head)"
        )
    for name in ("pixel_depth", "word_depth"):
        if spec[name] < 0:
            raise ValueError(f"{name}={spec[name]} must be 0 (a linear head) or more")
    linear = [
        f"{name}_depth"
        for name, used in (("pixel", spec["pixels"]), ("word", spec["words"] or spec["matching"]))
        if used and not spec[f"{name}_depth"]
    ]
    if spec["across"] and linear:
        raise ValueError(
            f"across=True needs {' and '.join(linear)} of at least 1: a linear head has one token"
        )
    if spec["matching"] and not spec["across"]:
        raise ValueError("matching=True needs across=True: it compares a caption with an image")
