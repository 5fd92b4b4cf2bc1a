"""A ViT and a BERT that share one space for pictures and texts.

The towers are Hugging Face's own ViTModel and BertModel; what is ours is what masking needs: hidden
patches are left out BEFORE the patch projection, hidden words before the embedding sum, so that a
dropped token costs nothing. `mask` True = hidden, `valid` True = a real token.
Shapes: B batch, N patches, K kept, L text length, D width. Walk-through:
notebooks/03_training.ipynb.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.tokenizer import is_subword, special_ids, word_ids
from ..errors import nearest
from ..losses import check_loss
from ..masking.core import Masking, TokenInfo
from .architecture import architecture_of, build, settings_of
from .attention import class_attention, key_mask
from .decoder import Encoded, ForwardSpec, MultimodalDecoder
from .layers import bert_states, own_layers, projected, vit_layers
from .patches import patchify, pick_tokens
from .presets import build_preset
from .pretrained import check_towers, checked_stats, join_backbones, resize_vit
from .sharing import Exportable


@dataclass
class EncoderOutput:
    """What a forward pass gives: unit-length features, token states after each tower, the scale.

    What was not asked for (see `ForwardSpec`) is None; by default features and tokens are there.
    """

    image_features: Any  # (B, D) unit length, float32
    text_features: Any  # (B, D) unit length, float32
    image_tokens: Any  # (B, 1 + K, width): class token, then the visible patches
    text_tokens: Any  # (B, K, width)
    logit_scale: Tensor  # scalar, the LOG of the inverse temperature
    logit_bias: Tensor  # scalar, used by the sigmoid loss
    pixels: Tensor | None = None  # (B, N, 3 * p * p) every patch as the decoder sees it
    word_logits: Tensor | None = None  # (M, V) of the hidden words, row by row
    matching: Tensor | None = None  # (P,) logits of pairs
    match: Tensor | None = None  # (P,) 1.0 = a true pair, 0.0 = a wrong one


class Projection(nn.Sequential):
    """Layer norm, dropout and a linear map (no bias) into the common space."""

    def __init__(self, width: int, embed_dim: int, dropout: float):
        super().__init__(
            nn.LayerNorm(width), nn.Dropout(dropout), nn.Linear(width, embed_dim, bias=False)
        )
        nn.init.normal_(self.get_parameter("2.weight"), std=width**-0.5)


class MultimodalEncoder(nn.Module, Exportable):
    """ViT + BERT + projections + mask tokens + temperature.

    vit_config, bert_config: any transformers ViTConfig (square patches) and BertConfig. tokenizer:
    a Hugging Face fast tokenizer; its vocabulary must fit bert_config. embed_dim: width of the
    common space. Pooling is the mean over the visible patches / real tokens ("mean") or the first
    token ("cls"). loss: the contrastive one that it is trained by, and judged by unless another is
    asked for. Build one with `preset` or `from_backbones`. Raises ValueError for towers that do not
    fit images, tokenizer or each other.
    """

    pixel_stats: Tensor  # (2, 3, 1, 1): mean and deviation of each channel
    special_ids: Tensor  # ids of tokens that are never hidden
    word_ids: Tensor  # ids of all others
    is_subword: Tensor  # (V,) bool, True = a piece that goes on with the word before it
    # (V,) of each token among the captions it was trained on, for the text masker "frequency": a
    # caption is masked the same in whichever data set it is met.
    token_frequency: Tensor | None = None
    trained_steps = 0  # optimizer steps that have been applied to these weights, as far as known

    def __init__(  # noqa: PLR0913 (by name)
        self,
        vit_config,
        bert_config,
        tokenizer,
        embed_dim: int = 192,
        dropout: float = 0.0,
        temperature: float = 0.07,
        pooling: str = "mean",
        *,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        loss: str = "info_nce",
    ):
        from transformers import BertModel, ViTModel

        super().__init__()
        check_towers(vit_config, bert_config, tokenizer, pooling)
        check_loss(loss)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be above 0, such as 0.07")
        stats = checked_stats(image_mean, image_std)
        self.tokenizer, self.pooling = tokenizer, pooling
        self.image_size, self.patch_size = vit_config.image_size, vit_config.patch_size
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.max_length = bert_config.max_position_embeddings
        self.embed_dim, self.dropout, self.loss = embed_dim, dropout, loss
        self.vit = ViTModel(vit_config, add_pooling_layer=False)
        self.bert = BertModel(bert_config, add_pooling_layer=False)
        self.image_mask_token = nn.Parameter(torch.randn(vit_config.hidden_size) * 0.02)
        self.text_mask_token = nn.Parameter(torch.randn(bert_config.hidden_size) * 0.02)
        self.image_projection = Projection(vit_config.hidden_size, embed_dim, dropout)
        self.text_projection = Projection(bert_config.hidden_size, embed_dim, dropout)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))  # SigLIP's start; only its loss uses it
        self.decoder: MultimodalDecoder | None = None
        self.register_buffer("pixel_stats", stats)
        self.register_buffer("special_ids", special_ids(tokenizer), persistent=False)
        self.register_buffer("word_ids", word_ids(tokenizer), persistent=False)
        self.register_buffer("is_subword", is_subword(tokenizer), persistent=False)

    @classmethod
    def preset(
        cls,
        name: str = "tiny",
        *,
        tokenizer,
        dropout: float = 0.0,
        temperature: float = 0.07,
        pooling: str = "mean",
    ):
        """A new encoder of a tabled size: "tiny" (a laptop CPU), "small", "base" (ViT-B/16, BERT).

        Weights are drawn from torch's generator: `torch.manual_seed` before it makes them
        repeatable. They start where short trainings learn fastest: the ViT's with deviation width
        to the power of -1/2 instead of 0.02, positions of the BERT with 0.005 (on the built-in
        pictures a quarter fewer steps to R@1 45 %: python -m tests.benchmarks.start).
        """
        return build_preset(cls, name, tokenizer, dropout, temperature, pooling)

    @classmethod
    def from_backbones(
        cls,
        image_backbone,
        text_backbone: str,
        *,
        embed_dim: int = 256,
        image_size: int | None = None,
        **options,
    ):
        """Pretrained towers by hub name or local folder (a ViT and a BERT with its tokenizer).

        image_backbone may also be a preset's name or a ViTConfig: a new ViT of that size beside a
        pretrained BERT, such as the one of `mm.minilm()`, which needs no network. Pixel statistics
        come from the checkpoint's own preprocessor. image_size: None = that of the ViT, another one
        as by `resize`. options: dropout (of the projections and of a preset's new ViT; a checkpoint
        keeps its towers' own), temperature, pooling (take the one that the BERT was trained with:
        "mean" for sentence-transformers). Reads safetensors or weights-only files, never code.
        Raises FileNotFoundError, and soon, where there is no such folder and no network, ValueError
        for a BERT without its tokenizer's vocabulary.
        """
        return join_backbones(cls, image_backbone, text_backbone, embed_dim, image_size, options)

    @classmethod
    def from_architecture(cls, spec: dict) -> "MultimodalEncoder":
        """An encoder of that architecture, its weights still to be loaded."""
        return build(cls, spec)

    def architecture(self) -> dict:
        """What `from_architecture` needs to build the same encoder: plain values only."""
        return architecture_of(self)

    def settings(self) -> dict[str, Any]:
        """What `TrainingConfig` has of a model: preset ("own" where it is none), dropout (the
        largest), temperature (as learned)."""
        return settings_of(self)

    def to_device(self, device) -> "MultimodalEncoder":
        """Move to a device and pick the attention that is fast there (equal up to rounding).

        On a CPU plain matrix products beat PyTorch's fused kernel 1.4x per training step at 33
        tokens, because of its slow backward; on a GPU the fused kernels win.
        """
        kind = "eager" if torch.device(device).type == "cpu" else "sdpa"
        self.vit.set_attn_implementation(kind)
        self.bert.set_attn_implementation(kind)
        if self.decoder is not None:
            self.decoder.set_attention(kind)
        return self.to(device)

    def resize(self, image_size: int) -> "MultimodalEncoder":
        """Take square images of another size, patches keep theirs; position embeddings are
        interpolated (He et al. 2022, MAE, and most that fine-tune at another size).

        Call it before a trainer is built. Raises ValueError for no multiple of the patch.
        """
        side = resize_vit(self.vit, image_size)
        self.image_size, self.num_patches = image_size, side**2
        if self.decoder is not None:
            self.decoder.set_grid(side)
        return self

    def add_decoder(self, **heads) -> "MultimodalEncoder":
        """Give the model what puts back pixels and words; heads: see `MultimodalDecoder`.

        Replaces a decoder that is there. Weights are drawn from torch's generator.
        """
        decoder = MultimodalDecoder(self.vit.config, self.bert.config, **heads)
        decoder.set_attention(self.vit.config._attn_implementation)
        self.decoder = decoder.to(self.logit_scale.device)
        return self

    # -- pictures ----------------------------------------------------------------------------

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """uint8 pixels to normalised float32; float pictures pass as they are."""
        if pixel_values.is_floating_point():
            return pixel_values
        mean, std = self.pixel_stats.unbind()
        return (pixel_values.float() / 255 - mean) / std

    def _normalize_patches(self, patches: Tensor) -> Tensor:
        """`normalize` for patches (..., 3 * p * p)."""
        if patches.is_floating_point():
            return patches
        mean, std = self.pixel_stats.flatten(1).repeat_interleave(self.patch_size**2, 1)
        return (patches.float() / 255 - mean) / std

    def _patches(self, pixel_values: Tensor, masking: Masking | None, mode: str) -> Tensor:
        """Class token and the patches that are encoded, with their positions: (B, 1 + K, D)."""
        height, width = pixel_values.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            other = f", or call model.resize({height}) first" if height == width else ""
            raise ValueError(
                f"images are {height} x {width} pixels, the encoder takes {self.image_size} x "
                f"{self.image_size}; load them with image_size={self.image_size}{other}"
            )
        embeddings = self.vit.embeddings
        positions = embeddings.position_embeddings  # (1, 1 + N, D)
        patches = patchify(pixel_values, self.patch_size)  # (B, N, 3 * p * p), bytes yet
        place = positions[:, 1:]
        _check_mode(mode, ("drop", "replace"))
        if masking is not None and mode == "drop":  # the hidden ones never reach the projection
            patches = pick_tokens(patches, masking.ids_keep)
            # Not place[0][ids_keep]: on a CPU its backward adds in the order the threads run.
            place = F.embedding(masking.ids_keep, place[0])
        patches = self._normalize_patches(patches)
        if masking is not None and mode == "drop" and masking.keep_valid is not None:
            patches = patches.masked_fill(~masking.keep_valid[..., None], 0)  # nor does the filler
        x = projected(patches, embeddings.patch_embeddings.projection)
        if masking is not None and mode == "replace":
            x = torch.where(masking.mask[..., None], self.image_mask_token.to(x.dtype), x)
        first = (embeddings.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return embeddings.dropout(torch.cat([first, x + place], dim=1))

    def image_tokens(
        self, pixel_values: Tensor, masking: Masking | None = None, mode: str = "drop"
    ):
        """Class token and encoded patches after the last norm: (B, 1 + K, width).

        Where K differs between pictures, states of the filler (keep_valid False) mean nothing.
        """
        x = self._patches(pixel_values, masking, mode)
        real = _with_class_token(_kept(masking, mode))
        if own_layers(self.vit, x):
            return self.vit.layernorm(vit_layers(self.vit, x, real))
        attention_mask = key_mask(real, self.vit.config._attn_implementation, x.dtype)
        for block in self.vit.layers:
            x = block(x, attention_mask)
        return self.vit.layernorm(x)

    def class_attention(self, pixel_values: Tensor, half: bool = False) -> Tensor:
        """(B, N): how much the class token attends to each patch, mean over layers and heads.

        With pooling "mean" the patches' mean takes the class token's place here, too (see
        attention.py). No gradient; nothing is hidden. Rows add up to at most 1 (the rest goes to
        the class token itself). half: look at the picture at half its resolution, a quarter of the
        cost; 2 x 2 patches then share a value.
        """
        return class_attention(self.vit, self.normalize(pixel_values), half, of=self.pooling)

    @property
    def token_info(self) -> TokenInfo:
        """What maskers need to know of this model."""
        ids = (self.special_ids, self.word_ids, self.is_subword)
        return TokenInfo(self.patch_size, *ids, self.token_frequency, self.class_attention)

    def encode_image(
        self, pixel_values: Tensor, masking: Masking | None = None, mode: str = "drop"
    ):
        """Unit-length features (B, D) of pictures (B, 3, H, W), uint8 or normalised float.

        masking hides patches: mode "drop" leaves them out, "replace" puts the mask token.
        """
        tokens = self.image_tokens(pixel_values, masking, mode)
        return self._image_features(tokens, _kept(masking, mode))

    def _image_features(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        pooled = tokens[:, 0] if self.pooling == "cls" else _mean(tokens[:, 1:], real)
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    # -- texts -------------------------------------------------------------------------------

    def text_tokens(
        self, input_ids: Tensor, valid: Tensor, masking: Masking | None = None, mode: str = "drop"
    ) -> tuple[Tensor, Tensor]:
        """States of the encoded tokens (B, K, width) and which of them are real (B, K)."""
        length = input_ids.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"captions are {length} pieces long, the encoder takes {self.max_length}; "
                "take batches of dataset.encoded_by(model.tokenizer, model.max_length)"
            )
        words = self.bert.embeddings.word_embeddings(input_ids)  # (B, L, D)
        positions = torch.arange(length, device=words.device).expand(len(words), -1)
        _check_mode(mode, ("drop", "replace", "80/10/10"))
        if masking is not None and mode != "drop":
            words = self._replaced(words, masking)
        elif masking is not None:
            words, positions = pick_tokens(words, masking.ids_keep), masking.ids_keep
            valid = valid.gather(1, positions) if masking.keep_valid is None else masking.keep_valid
        return self._bert(words, positions, valid), valid

    def _replaced(self, words: Tensor, masking: Masking) -> Tensor:
        """Embedded words (B, L, D), hidden ones replaced by the mask token or what was drawn."""
        instead = self.text_mask_token.to(words.dtype)
        if masking.substitute is not None:  # 80/10/10: -1 is the mask token
            drawn = self.bert.embeddings.word_embeddings(masking.substitute.clamp(min=0))
            instead = torch.where((masking.substitute < 0)[..., None], instead, drawn)
        return torch.where(masking.mask[..., None], instead, words)

    def _bert(self, words: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """BERT's states (B, K, width) of embedded words."""
        if own_layers(self.bert, words):
            return bert_states(self.bert, words, positions, valid)
        seen = valid | ~valid.any(1, keepdim=True)  # of padding alone all, or its states are NaN
        out = self.bert(inputs_embeds=words, position_ids=positions, attention_mask=seen.long())
        return out.last_hidden_state

    def encode_text(
        self, input_ids: Tensor, valid: Tensor, masking: Masking | None = None, mode: str = "drop"
    ):
        """Unit-length features (B, D) of captions: input_ids (B, L), valid (B, L) True = real.

        Of a caption that is padding alone all are 0.
        """
        return self._text_features(*self.text_tokens(input_ids, valid, masking, mode))

    def _text_features(self, tokens: Tensor, valid: Tensor) -> Tensor:
        pooled = tokens[:, 0] if self.pooling == "cls" else _mean(tokens, valid)
        features = F.normalize(self.text_projection(pooled).float(), dim=-1)
        return features.masked_fill(~valid.any(1, keepdim=True), 0)  # nor does it learn

    # -- both --------------------------------------------------------------------------------

    def forward(
        self,
        batch: Batch,
        image_masking: Masking | None = None,
        text_masking: Masking | None = None,
        image_mode: str = "drop",
        text_mode: str = "drop",
        wanted: ForwardSpec | None = None,
    ) -> EncoderOutput:
        """Features and token states of a batch; a masking that is None hides nothing.

        wanted: what else is asked for, or not at all; each tower runs once per view that this
        needs. Its "unmasked" view gives features of the whole pair, token states of the masked one.
        """
        wanted = wanted or ForwardSpec()
        masked = (image_masking, text_masking, image_mode, text_mode)
        image, text, image_features, text_features = self._views(batch, masked, wanted)
        back = {}
        if wanted.put_back:
            if self.decoder is None:
                raise ValueError("the model has no decoder; call model.add_decoder(...) first")
            embedding = self.bert.embeddings.word_embeddings.weight
            pair = (image_features, text_features, self.logit_scale.exp())
            correct = None if wanted.matching is None else batch.correct()
            back = self.decoder(image, text, wanted, embedding, pair, correct)
        # Nodes of the graph: DDP takes a bare parameter for unused.
        scale, bias = self.logit_scale.clone(), self.logit_bias.clone()
        if not wanted.contrast:  # and what no loss uses it would wait for
            scale, bias = scale.detach(), bias.detach()
        image_tokens, text_tokens = (None if x is None else x.states for x in (image, text))
        features = (image_features, text_features)
        return EncoderOutput(*features, image_tokens, text_tokens, scale, bias, **back)

    def _views(self, batch: Batch, masked: tuple, wanted: ForwardSpec) -> tuple:
        """(image, text) `Encoded` of the masked view and (image, text) features; None = not needed.

        masked: what `forward` is given of masks and modes.
        """
        image_masking, text_masking, image_mode, text_mode = masked
        across = self.decoder is not None and self.decoder.across
        compared = wanted.contrast or wanted.matching is not None  # matching draws by the features
        beside = compared and wanted.view == "unmasked"
        features = compared and not beside
        both = features or (wanted.put_back and across)
        image = text = image_features = text_features = None
        if beside and wanted.contrast:  # first: for features alone the same dropout is drawn
            image_features = self.encode_image(batch.pixel_values)
            text_features = self.encode_text(batch.input_ids, batch.valid)
        kept = _kept(image_masking, image_mode)
        if both or wanted.pixels:
            states = self.image_tokens(batch.pixel_values, image_masking, image_mode)
            image = Encoded(states, _with_class_token(kept), image_masking, image_mode)
        if both or wanted.words or wanted.matching is not None:
            tokens = self.text_tokens(batch.input_ids, batch.valid, text_masking, text_mode)
            text = Encoded(*tokens, text_masking, text_mode)
        with contextlib.nullcontext() if wanted.contrast else torch.no_grad():
            if beside and not wanted.contrast:  # last: autocast keeps what it casts in here
                image_features = self.encode_image(batch.pixel_values)
                text_features = self.encode_text(batch.input_ids, batch.valid)
            elif features:
                assert image is not None and text is not None and text.real is not None
                image_features = self._image_features(image.states, kept)
                text_features = self._text_features(text.states, text.real)
        return image, text, image_features, text_features


def _kept(masking: Masking | None, mode: str) -> Tensor | None:
    """(B, K) bool, which of the kept tokens are no filler; None where there is none."""
    return masking.keep_valid if masking is not None and mode == "drop" else None


def _with_class_token(real: Tensor | None) -> Tensor | None:
    """(B, 1 + K) of (B, K): the class token is always there."""
    return None if real is None else F.pad(real, (1, 0), value=True)


def _mean(tokens: Tensor, real: Tensor | None) -> Tensor:
    """Mean (B, D) of the real ones among tokens (B, K, D); None = all are."""
    if real is None:
        return tokens.mean(1)
    weight = real[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def _check_mode(mode: str, known: tuple[str, ...]):
    if mode not in known:
        raise ValueError(f"mode={mode!r} is not known; {nearest(mode, known)}")
