"""Put back what is hidden: pixels, words, and whether picture and caption belong together.

A head reads the encoder's states. It has layers of its own where tokens were dropped, because mask
tokens enter only here (He et al. 2022, MAE, arXiv:2111.06377), or where it looks across at the
other modality (Geng et al. 2022, M3AE, arXiv:2205.14204); else it is linear (Xie et al. 2022,
SimMIM, arXiv:2111.09886; Devlin et al. 2019, BERT, arXiv:1810.04805). `mask` True = HIDDEN, `real`
True = a token that counts. Shapes: B batch, N patches, T tokens, W width of the decoder, V
vocabulary, M hidden words, P pairs. Walk-through: notebooks/07_reconstruction.ipynb.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import nearest
from ..losses import similarity
from ..masking.core import Masking
from .attention import key_mask

_NONE = -1  # in `ForwardSpec.sees`: the decoder does not look at the other modality


@dataclass
class ForwardSpec:
    """What a forward pass is asked for."""

    contrast: bool = True  # unit-length features with a gradient
    view: str = "masked"  # contrast on the "masked" view, or on an "unmasked" one beside it
    pixels: bool = False
    words: bool = False
    matching: Tensor | None = None  # noise (B, 2) in [0, 1) that draws the wrong partners
    sees: Tensor | None = None  # (B,) int64: the row whose other modality a row's decoder looks at,
    # -1 = at none; None = its own

    def __post_init__(self):
        if self.view not in (views := ("masked", "unmasked")):
            raise ValueError(f"view={self.view!r} is not known; {nearest(self.view, views)}")

    @property
    def put_back(self) -> bool:
        """Anything that needs the decoder."""
        return self.pixels or self.words or self.matching is not None


@dataclass
class Encoded:
    """One modality of a masked view, after its tower."""

    states: Tensor  # (B, T, D), the class token first
    real: Tensor | None  # (B, T) bool, False = filler or padding; None = all are real
    masking: Masking | None
    mode: str  # what was done with the hidden: "drop", "replace" or "80/10/10"

    def pick(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """States and `real` of these rows."""
        return _rows(self.states, rows), None if self.real is None else self.real[rows]


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows]; its backward adds in the order of the rows, that of x[rows] as the threads run."""
    return x.index_select(0, rows)


def sin_cos(places: Tensor, width: int) -> Tensor:
    """Fixed positions (T, width) of places (T,): sines, then cosines (Vaswani et al. 2017)."""
    rates = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = places.double()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def sin_cos_2d(height: int, width: int, channels: int) -> Tensor:
    """Fixed positions (height * width, channels), as MAE: half for the column, half for the row."""
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    return torch.cat([sin_cos(columns, channels // 2), sin_cos(rows, channels // 2)], 1)


def _places_of(side: int, width: int) -> Tensor:
    """(1 + side * side, width): none for the class token, then those of the patches."""
    return torch.cat([torch.zeros(1, width), sin_cos_2d(side, side, width)])


class TokenDecoder(nn.Module):
    """Transformer layers over one modality's tokens, mask tokens put in, and the other's if asked.

    The other modality stands behind the own tokens in one sequence: what attends and what is
    attended to is then the same for both (M3AE); a row that looks at none has it masked out.
    """

    places: Tensor  # (T, W), fixed

    def __init__(
        self,
        own_width: int,
        other_width: int | None,
        width: int,
        depth: int,
        places: Tensor,
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
        self.register_buffer("places", places, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        own: Encoded,
        first: int,
        other: tuple[Tensor, Tensor | None] | None,
        real: Tensor | None,
    ) -> Tensor:
        """States (B, T, W) of all tokens of a modality, hidden ones too.

        first: how many tokens in front are never hidden nor counted by the masking (a class token).
        other: states and `real` of what is looked at. real (B, T): which own tokens count.
        """
        x = self.embed(own.states)
        if own.masking is not None and own.mode == "drop":
            x = torch.cat([x[:, :first], self._restored(x[:, first:], own.masking)], 1)
        x = x + self.places[: x.shape[1]]
        length, keys = x.shape[1], real
        if self.other is not None and other is not None:
            states, seen = other
            x = torch.cat([x, self.other(states)], 1)
            if keys is not None or seen is not None:
                keys = torch.cat([_all_real(keys, x[:, :length]), _all_real(seen, states)], 1)
        mask = key_mask(keys, self.config._attn_implementation, x.dtype)
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x[:, :length])

    def _restored(self, x: Tensor, masking: Masking) -> Tensor:
        """Kept tokens (B, K, W) at their places, the mask token at all others: (B, T, W)."""
        places = masking.ids_restore.clamp(max=x.shape[1] - 1)
        x = x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
        absent = masking.ids_restore >= masking.ids_keep.shape[1]  # hidden, or padding
        return torch.where((absent | masking.mask)[..., None], self.mask_token.to(x.dtype), x)


def _all_real(real: Tensor | None, states: Tensor) -> Tensor:
    if real is not None:
        return real
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)


class WordHead(nn.Module):
    """BERT's head: a dense layer, GELU, a norm, then the word embeddings themselves (tied)."""

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
    """The heads of a `MultimodalEncoder`; build it by `model.add_decoder`.

    pixels, words, matching: which heads there are. across: they look at the other modality.
    pixel_depth, word_depth: layers of each (0 = a linear head). norm_pix_loss: the pixel head
    speaks of patches of mean 0 and deviation 1. Raises ValueError for a head that cannot be.
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
                places = _places_of(side, width)
                self.pixel_layers = TokenDecoder(
                    image, text if across else None, width, pixel_depth, places, dropout
                )
            self.pixel_head = nn.Linear(width if pixel_depth else image, 3 * p * p)
        if words or matching:
            if word_depth:
                places = sin_cos(torch.arange(bert_config.max_position_embeddings), width)
                self.word_layers = TokenDecoder(
                    text, image if across else None, width, word_depth, places, dropout
                )
            out = width if word_depth else text
            self.word_head = WordHead(out, bert_config) if words else None
            self.matching_head = nn.Linear(out, 1) if matching else None

    def set_grid(self, side: int):
        """Put back the patches of a grid of side x side; its positions are fixed, not learned."""
        if self.pixel_layers is not None:
            places = _places_of(side, self.spec["width"])
            self.pixel_layers.places = places.to(self.pixel_layers.places.device)

    def set_attention(self, kind: str):
        """Use the attention ("eager" or "sdpa") that is fast on the device."""
        for part in (self.pixel_layers, self.word_layers):
            if part is not None:
                part.config._attn_implementation = kind

    def put_pixels(self, image: Encoded, text: Encoded | None, sees: Tensor | None) -> Tensor:
        """Every patch as the head sees it, (B, N, 3 * p * p); `sees`: see `ForwardSpec`."""
        if self.pixel_head is None:
            raise ValueError("this model puts back no pixels; call model.add_decoder(pixels=True)")
        if self.pixel_layers is None:
            if image.masking is not None and image.mode == "drop":
                raise ValueError(
                    "a pixel head without layers has no place for dropped patches; use "
                    "image mode 'replace', or model.add_decoder(pixel_depth=2)"
                )
            return self.pixel_head(image.states[:, 1:]).float()
        states = self.pixel_layers(image, 1, self._looked_at(text, sees), None)
        return self.pixel_head(states[:, 1:]).float()

    def _looked_at(self, other: Encoded | None, rows: Tensor | None):
        """States and `real` of the other modality, as each row's decoder sees them."""
        if not self.across:
            return None
        if other is None:
            raise ValueError("this decoder looks across: it needs pictures and captions")
        if rows is None:
            return other.states, other.real
        states, real = other.pick(rows.clamp(min=0))
        none = (rows == _NONE)[:, None]
        return states, _all_real(real, states) & ~none

    def fused(
        self, text: Encoded, image: Encoded | None, captions: Tensor | None, pictures: Tensor | None
    ) -> Tensor:
        """States (R, L, W) of captions that look at pictures, given by rows; None = each its own.

        A picture -1 is none.
        """
        if self.word_layers is None:
            if text.masking is not None and text.mode == "drop":
                raise ValueError(
                    "a word head without layers has no place for dropped words; use text mode "
                    "'replace' or '80/10/10', or model.add_decoder(word_depth=2)"
                )
            return text.states if captions is None else _rows(text.states, captions)
        if captions is not None:
            states, real = text.pick(captions)
            masking = None if text.masking is None else text.masking[captions]
            text = Encoded(states, real, masking, text.mode)
        return self.word_layers(text, 0, self._looked_at(image, pictures), self._own_real(text))

    @staticmethod
    def _own_real(text: Encoded) -> Tensor | None:
        """(B, L) which words count once the dropped ones are back."""
        if text.masking is None or text.mode != "drop" or text.real is None:
            return text.real
        kept = text.real.sum(1, keepdim=True)
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
        """What is asked for: "pixels" (B, N, 3pp), "word_logits" (M, V), "matching" (P,), "match".

        embedding (V, D): the word embeddings. For matching, features: (image, text, scale), and
        correct (B, B) bool: caption j is correct for image i. word_logits: hidden words in the
        order of `text.masking.mask.nonzero()`. match (P,) is 1.0 for a true pair.
        """
        out: dict[str, Tensor] = {}
        if wanted.pixels:
            assert image is not None
            out["pixels"] = self.put_pixels(image, text, wanted.sees)
        if not wanted.words and wanted.matching is None:
            return out
        assert text is not None
        if self.word_head is None and wanted.words:
            raise ValueError("this model puts back no words; call model.add_decoder(words=True)")
        captions, pictures = None, wanted.sees
        if wanted.matching is not None:
            captions, pictures, looking = self._pairs(wanted, features, correct)
        states = self.fused(text, image, captions, pictures)
        if wanted.words and self.word_head is not None and text.masking is not None:
            hidden = states[: len(text.states)][text.masking.mask]  # (M, W)
            out["word_logits"] = self.word_head(hidden, embedding)
        if wanted.matching is not None:
            assert self.matching_head is not None
            rows = torch.cat([looking, torch.arange(len(text.states), len(states)).to(looking)])
            out["matching"] = self.matching_head(_rows(states, rows)[:, 0])[:, 0].float()
            out["match"] = (torch.arange(len(rows), device=rows.device) < len(looking)).float()
        return out

    def _pairs(self, wanted: ForwardSpec, features, correct) -> tuple[Tensor, Tensor, Tensor]:
        """(captions, pictures, looking): rows of each pair to be fused, true ones first."""
        assert wanted.matching is not None
        if self.matching_head is None:
            raise ValueError(
                "this model has no matching head; model.add_decoder(matching=True) adds one"
            )
        own = torch.arange(len(correct), device=correct.device)
        sees = own if wanted.sees is None else wanted.sees
        image, text, scale = features
        caption, picture, has_one = hard_negatives(image, text, scale, correct, wanted.matching)
        looking = own[sees == own]
        wrong = looking[has_one[looking]]
        captions = torch.cat([own, wrong, caption[wrong]])
        pictures = torch.cat([sees, picture[wrong], wrong])
        return captions, pictures, looking


@torch.no_grad()
def hard_negatives(
    image_features: Tensor, text_features: Tensor, scale: Tensor, correct: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A wrong caption and a wrong picture for each row, the more likely the more alike they are.

    Drawn from the softmax of this micro-batch's similarities without what is correct for the row,
    by noise (B, 2) in [0, 1) (Li et al. 2021, ALBEF, arXiv:2107.07651). correct (B, B) bool: is
    caption j correct for image i? The candidates are those of ONE micro-batch on one process: with
    other micro-batches the negatives are others, too. Returns caption (B,), picture (B,) and
    has_one (B,) bool, False where all captions or all pictures are correct for the row.
    """
    logits = scale * similarity(image_features, text_features)
    picked, columns = [], torch.arange(len(correct), device=correct.device)
    for score, allowed, draw in (
        (logits, ~correct, noise[:, :1]),
        (logits.T, ~correct.T, noise[:, 1:]),
    ):
        score = score.double().masked_fill(~allowed, -math.inf)
        chance = score.softmax(1).nan_to_num().cumsum(1)
        rank = (chance <= draw * chance[:, -1:]).sum(1)
        last = (allowed * columns).amax(1)
        picked.append(torch.minimum(rank, last))  # rounding may end one behind the last
    return picked[0], picked[1], ~correct.all(1) & ~correct.all(0)


def _check(spec: dict):
    if not (spec["pixels"] or spec["words"] or spec["matching"]):
        raise ValueError("a decoder that puts back nothing; ask for pixels, words or matching")
    if spec["width"] < 32 or spec["width"] % 32:
        raise ValueError(
            f"width={spec['width']} must be a multiple of 32, at least 32 (a head of the decoder "
            "is 32 wide)"
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
            f"across=True needs {' and '.join(linear)} of at least 1: a linear head sees one token"
        )
    if spec["matching"] and not spec["across"]:
        raise ValueError("matching=True needs across=True: it compares a caption with a picture")
