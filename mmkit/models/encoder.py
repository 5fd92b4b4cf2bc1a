"""A ViT and a BERT that share one space for images and texts.

The towers are Hugging Face's ViTModel and BertModel; the rest is what masking needs: masked patches
are left out BEFORE the patch projection, masked tokens before the embeddings are added, so that a
dropped token costs nothing. `mask` True = masked, `valid` False = padding. Shapes: B batch,
N patches, K kept, L text length, D width. Walk-through: notebooks/03_training.ipynb.
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
from ..older_names import older_attributes
from .architecture import architecture_of, build, settings_of
from .attention import class_attention, kept_valid, key_mask, mean_of_valid, with_class_token
from .decoder import Encoded, ForwardSpec, MultimodalDecoder
from .layers import bert_states, own_layers, projected, vit_layers
from .patches import patchify, pick_tokens
from .presets import build_preset
from .pretrained import check_towers, checked_stats, join_backbones, resize_vit
from .sharing import Exportable


@older_attributes(word_logits="token_logits")
@dataclass
class EncoderOutput:
    """What a forward pass returns; what its `ForwardSpec` does not ask for is None."""

    image_features: Any  # (B, D) unit length, float32
    text_features: Any  # (B, D) unit length, float32
    image_tokens: Any  # (B, 1 + K, width): class token, then the visible patches
    text_tokens: Any  # (B, K, width)
    logit_scale: Tensor  # scalar, the LOG of the inverse temperature
    logit_bias: Tensor  # scalar, used by the sigmoid loss
    pixels: Tensor | None = None  # (B, N, 3 * p * p) the prediction for every patch
    token_logits: Tensor | None = None  # (M, V) for the masked tokens, row by row
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
    """ViT, BERT, projections, mask tokens and temperature; see `preset` and `from_backbones`.

    Args:
        vit_config, bert_config: transformers ViTConfig (square images and patches), BertConfig.
        tokenizer: a Hugging Face fast tokenizer; its vocabulary must fit bert_config.
        embed_dim: width of the common space.
        dropout, temperature: dropout of the projections; initial temperature, above 0.
        pooling: "mean" (over visible patches, valid tokens) or "cls" (the first token).
        image_mean, image_std: mean and deviation of each channel, of pixels in [0, 1].
        loss: contrastive loss that it is trained with, and evaluated with by default.

    Raises:
        ValueError: the towers do not fit images, tokenizer or pooling, or a value is out of range.

    Example:
        >>> out = model(data.batch([0, 1, 2]))
        >>> out.image_features.shape, out.text_features.shape, out.image_tokens.shape
        (torch.Size([3, 13]), torch.Size([3, 13]), torch.Size([3, 10, 22]))
    """

    pixel_stats: Tensor  # (2, 3, 1, 1): mean and deviation of each channel
    special_ids: Tensor  # ids of tokens that are never masked
    word_ids: Tensor  # ids of all others
    is_subword: Tensor  # (V,) bool, True = a token that continues the previous word
    # (V,) frequency of each token in training, for the masker "frequency" on whatever data set
    token_frequency: Tensor | None = None
    trained_steps = 0  # optimizer steps applied to these weights, as far as known

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
        """A new encoder: "tiny" (for a laptop CPU), "small" or "base" (ViT-B/16, BERT).

        Weights come from torch's generator (see `torch.manual_seed`) and start where short runs
        learn fastest: the ViT's with deviation width**-0.5, not 0.02, the BERT's positions with
        0.005 (on the built-in images a quarter fewer steps to R@1 45 %: tests.benchmarks.start).

        Example:
            >>> tiny = mm.MultimodalEncoder.preset("tiny", tokenizer=data.tokenizer)
            >>> tiny.image_size, tiny.num_patches, tiny.embed_dim
            (64, 64, 192)
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
        """An encoder of pretrained towers, each by hub name or local folder.

        Never runs code from a file; pixel statistics are those of the ViT's preprocessor. Raises
        FileNotFoundError, within seconds; ValueError, also for a BERT without a vocabulary.

        Args:
            image_backbone: a ViT; or, for a new one, a preset's name or a ViTConfig.
            text_backbone: a BERT with its tokenizer; `mm.minilm()` needs no network.
            embed_dim: width of the common space.
            image_size: side of the images in pixels, as by `resize`; None = that of the ViT.
            options: temperature, pooling (sentence-transformers: "mean"), dropout of projections
                and of a preset's ViT (checkpoints keep theirs).

        Example:
            >>> encoder = mm.MultimodalEncoder.from_backbones("tiny", mm.minilm())
            >>> encoder.bert.config.hidden_size, encoder.embed_dim
            (384, 256)
        """
        return join_backbones(cls, image_backbone, text_backbone, embed_dim, image_size, options)

    @classmethod
    def from_architecture(cls, spec: dict) -> "MultimodalEncoder":
        """An encoder of an architecture; its weights are loaded later."""
        return build(cls, spec)

    def architecture(self) -> dict:
        """What `from_architecture` needs to build the same encoder: plain values only."""
        return architecture_of(self)

    def settings(self) -> dict[str, Any]:
        """Preset (or "own"), largest dropout and present temperature, as in `TrainingConfig`."""
        return settings_of(self)

    def to_device(self, device) -> "MultimodalEncoder":
        """Move to a device and use the attention that is fast there (equal up to rounding).

        On a CPU plain matrix products beat PyTorch's fused kernel, with its slow backward pass, by
        1.4x per training step at 33 tokens; on a GPU the fused kernels win.
        """
        kind = "eager" if torch.device(device).type == "cpu" else "sdpa"
        self.vit.set_attn_implementation(kind)
        self.bert.set_attn_implementation(kind)
        if self.decoder is not None:
            self.decoder.set_attention(kind)
        return self.to(device)

    def resize(self, image_size: int) -> "MultimodalEncoder":
        """Take square images of another size: same patches, interpolated positions (as in MAE).

        Call it before a trainer is built. Raises ValueError for no multiple of the patch size.
        """
        side = resize_vit(self.vit, image_size)
        self.image_size, self.num_patches = image_size, side**2
        if self.decoder is not None:
            self.decoder.set_grid(side)
        return self

    def add_decoder(self, **heads) -> "MultimodalEncoder":
        """Add a decoder with new weights, replacing any present one; see `MultimodalDecoder`."""
        decoder = MultimodalDecoder(self.vit.config, self.bert.config, **heads)
        decoder.set_attention(self.vit.config._attn_implementation)
        self.decoder = decoder.to(self.logit_scale.device)
        return self

    # -- images ----------------------------------------------------------------------------

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """Normalised float32 of uint8 pixels; float images stay as they are."""
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
        """Embedded class token and encoded patches, with their positions: (B, 1 + K, D)."""
        height, width = pixel_values.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            other = f", or call model.resize({height}) first" if height == width else ""
            raise ValueError(
                f"images are {height} x {width} pixels, the encoder takes {self.image_size} x "
                f"{self.image_size}; load them with image_size={self.image_size}{other}"
            )
        embeddings = self.vit.embeddings
        positions = embeddings.position_embeddings  # (1, 1 + N, D)
        patches = patchify(pixel_values, self.patch_size)  # (B, N, 3 * p * p), still bytes
        position = positions[:, 1:]
        _check_mode(mode, ("drop", "replace"))
        if masking is not None and mode == "drop":  # the masked ones never reach the projection
            patches = pick_tokens(patches, masking.ids_keep)
            # Not position[0][ids_keep]: on a CPU its backward adds in the order of the threads.
            position = F.embedding(masking.ids_keep, position[0])
        patches = self._normalize_patches(patches)
        if masking is not None and mode == "drop" and masking.keep_valid is not None:
            patches = patches.masked_fill(~masking.keep_valid[..., None], 0)  # nor does the padding
        x = projected(patches, embeddings.patch_embeddings.projection)
        if masking is not None and mode == "replace":
            x = torch.where(masking.mask[..., None], self.image_mask_token.to(x.dtype), x)
        first = (embeddings.cls_token + positions[:, :1]).expand(len(x), -1, -1)
        return embeddings.dropout(torch.cat([first, x + position], dim=1))

    def image_tokens(
        self, pixel_values: Tensor, masking: Masking | None = None, mode: str = "drop"
    ):
        """Class token and encoded patches after the last norm: (B, 1 + K, width).

        Where K differs between images, states of the padding (keep_valid False) are meaningless.
        """
        x = self._patches(pixel_values, masking, mode)
        valid = with_class_token(kept_valid(masking, mode))
        if own_layers(self.vit, x):
            return self.vit.layernorm(vit_layers(self.vit, x, valid))
        attention_mask = key_mask(valid, self.vit.config._attn_implementation, x.dtype)
        for block in self.vit.layers:
            x = block(x, attention_mask)
        return self.vit.layernorm(x)

    def class_attention(self, pixel_values: Tensor, half: bool = False) -> Tensor:
        """(B, N): attention of the class token to each patch, mean over layers and heads.

        With pooling "mean", that of the patches instead (see attention.py). No gradient, no masks;
        rows add up to at most 1 (the rest goes to the class token). half: at half the resolution,
        for a quarter of the cost; 2 x 2 patches then have the same value.
        """
        return class_attention(self.vit, self.normalize(pixel_values), half, of=self.pooling)

    @property
    def token_info(self) -> TokenInfo:
        """What maskers need to know about this model."""
        ids = (self.special_ids, self.word_ids, self.is_subword)
        return TokenInfo(self.patch_size, *ids, self.token_frequency, self.class_attention)

    def encode_image(
        self, pixel_values: Tensor, masking: Masking | None = None, mode: str = "drop"
    ):
        """Unit-length features (B, D) of images (B, 3, H, W), uint8 or normalised float.

        mode: "drop" leaves masked patches out, "replace" puts the mask token there.
        """
        tokens = self.image_tokens(pixel_values, masking, mode)
        return self._image_features(tokens, kept_valid(masking, mode))

    def _image_features(self, tokens: Tensor, valid: Tensor | None) -> Tensor:
        pooled = tokens[:, 0] if self.pooling == "cls" else mean_of_valid(tokens[:, 1:], valid)
        return F.normalize(self.image_projection(pooled).float(), dim=-1)

    # -- texts -------------------------------------------------------------------------------

    def text_tokens(
        self, input_ids: Tensor, valid: Tensor, masking: Masking | None = None, mode: str = "drop"
    ) -> tuple[Tensor, Tensor]:
        """States of the encoded tokens (B, K, width), and (B, K) bool, False = padding."""
        length = input_ids.shape[1]
        if length > self.max_length:
            raise ValueError(
                f"captions are {length} tokens long, the encoder takes {self.max_length}; "
                "take batches of dataset.encoded_by(model.tokenizer, model.max_length)"
            )
        embedded = self.bert.embeddings.word_embeddings(input_ids)  # (B, L, D)
        positions = torch.arange(length, device=embedded.device).expand(len(embedded), -1)
        _check_mode(mode, ("drop", "replace", "80/10/10"))
        if masking is not None and mode != "drop":
            embedded = self._replaced(embedded, masking)
        elif masking is not None:
            embedded, positions = pick_tokens(embedded, masking.ids_keep), masking.ids_keep
            valid = valid.gather(1, positions) if masking.keep_valid is None else masking.keep_valid
        return self._bert(embedded, positions, valid), valid

    def _replaced(self, embedded: Tensor, masking: Masking) -> Tensor:
        """Embedded tokens (B, L, D), masked ones replaced by the mask token or a drawn token."""
        instead = self.text_mask_token.to(embedded.dtype)
        if masking.substitute is not None:  # 80/10/10: -1 is the mask token
            drawn = self.bert.embeddings.word_embeddings(masking.substitute.clamp(min=0))
            instead = torch.where((masking.substitute < 0)[..., None], instead, drawn)
        return torch.where(masking.mask[..., None], instead, embedded)

    def _bert(self, embedded: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """BERT's states (B, K, width) of embedded tokens."""
        if own_layers(self.bert, embedded):
            return bert_states(self.bert, embedded, positions, valid)
        keys = valid | ~valid.any(1, keepdim=True)  # all if all are padding, or states are NaN
        out = self.bert(inputs_embeds=embedded, position_ids=positions, attention_mask=keys.long())
        return out.last_hidden_state

    def encode_text(
        self, input_ids: Tensor, valid: Tensor, masking: Masking | None = None, mode: str = "drop"
    ):
        """Unit-length features (B, D) of captions (B, L); zeros for a caption of padding only."""
        return self._text_features(*self.text_tokens(input_ids, valid, masking, mode))

    def _text_features(self, tokens: Tensor, valid: Tensor) -> Tensor:
        pooled = tokens[:, 0] if self.pooling == "cls" else mean_of_valid(tokens, valid)
        features = F.normalize(self.text_projection(pooled).float(), dim=-1)
        return features.masked_fill(~valid.any(1, keepdim=True), 0)  # without a gradient, too

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
        """Features and token states of a batch; a masking of None masks nothing.

        wanted: what to compute; each tower runs once per view that this needs. With the "unmasked"
        view, features are those of the whole pair, token states those of the masked one.
        """
        wanted = wanted or ForwardSpec()
        masked = (image_masking, text_masking, image_mode, text_mode)
        image, text, image_features, text_features = self._views(batch, masked, wanted)
        decoded = {}
        if wanted.reconstructs:
            if self.decoder is None:
                raise ValueError("the model has no decoder; call model.add_decoder(...) first")
            embedding = self.bert.embeddings.word_embeddings.weight
            pair = (image_features, text_features, self.logit_scale.exp())
            correct = None if wanted.matching is None else batch.correct()
            decoded = self.decoder(image, text, wanted, embedding, pair, correct)
        # Nodes of the graph: DDP would take a bare parameter for unused.
        scale, bias = self.logit_scale.clone(), self.logit_bias.clone()
        if not wanted.contrast:  # and would wait for a node that no loss uses
            scale, bias = scale.detach(), bias.detach()
        image_tokens, text_tokens = (None if x is None else x.states for x in (image, text))
        features = (image_features, text_features)
        return EncoderOutput(*features, image_tokens, text_tokens, scale, bias, **decoded)

    def _views(self, batch: Batch, masked: tuple, wanted: ForwardSpec) -> tuple:
        """(image, text) `Encoded` of the masked view, (image, text) features; None = not needed."""
        image_masking, text_masking, image_mode, text_mode = masked
        across = self.decoder is not None and self.decoder.across
        compared = wanted.contrast or wanted.matching is not None  # matching draws by similarity
        second = compared and wanted.view == "unmasked"
        features = compared and not second
        both = features or (wanted.reconstructs and across)
        image = text = image_features = text_features = None
        if second and wanted.contrast:  # first, so that dropout draws as for features alone
            image_features = self.encode_image(batch.pixel_values)
            text_features = self.encode_text(batch.input_ids, batch.valid)
        kept = kept_valid(image_masking, image_mode)
        if both or wanted.pixels:
            states = self.image_tokens(batch.pixel_values, image_masking, image_mode)
            image = Encoded(states, with_class_token(kept), image_masking, image_mode)
        if both or wanted.tokens or wanted.matching is not None:
            tokens = self.text_tokens(batch.input_ids, batch.valid, text_masking, text_mode)
            text = Encoded(*tokens, text_masking, text_mode)
        with contextlib.nullcontext() if wanted.contrast else torch.no_grad():
            if second and not wanted.contrast:  # last: autocast caches what it casts in here
                image_features = self.encode_image(batch.pixel_values)
                text_features = self.encode_text(batch.input_ids, batch.valid)
            elif features:
                assert image is not None and text is not None and text.valid is not None
                image_features = self._image_features(image.states, kept)
                text_features = self._text_features(text.states, text.valid)
        return image, text, image_features, text_features


def _check_mode(mode: str, known: tuple[str, ...]):
    if mode not in known:
        raise ValueError(f"mode={mode!r} is not known; {nearest(mode, known)}")
