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
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.tokenizer import (
    continues_word,
    special_ids,
    tokenizer_from_state,
    tokenizer_state,
    word_ids,
)
from ..errors import nearest
from ..losses import check_loss
from ..masking.core import Masking
from .attention import class_attention, key_mask
from .decoder import Encoded, MultimodalDecoder, Wanted
from .layers import bert_states, dropouts, has_hook, own_layers, vit_layers
from .patches import patchify, pick_tokens, resize_positions
from .pretrained import (
    check_towers,
    checkpoint_config,
    hub_options,
    load_tokenizer,
    load_tower,
    pixel_statistics,
)
from .sharing import Exportable

# picture side and patch in pixels; width, depth, heads of each tower; text length; common space
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(image=64, patch=8, vit=(192, 6, 3), bert=(192, 4, 3), length=32, embed_dim=192),
    "small": dict(
        image=224, patch=16, vit=(384, 12, 6), bert=(384, 6, 6), length=64, embed_dim=256
    ),
    "base": dict(
        image=224, patch=16, vit=(768, 12, 12), bert=(768, 12, 12), length=77, embed_dim=512
    ),
}
MAX_LOGIT_SCALE = math.log(
    100
)  # CLIP's clamp: a smaller temperature than 0.01 makes training unstable


@dataclass
class EncoderOutput:
    """What a forward pass gives: unit-length features, token states after each tower, the scale.

    What was not asked for (see `Wanted`) is None; by default features and tokens are there.
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
    continues_word: Tensor  # (V,) bool, True = a piece that goes on with the word before it
    # (V,) of each token among the captions it was trained on, for the text masker "frequency": a
    # caption is masked the same in whichever data set it is met.
    token_frequency: Tensor | None = None
    trained_steps = 0  # optimizer steps that have been applied to these weights, as far as known

    def __init__(
        self,
        vit_config,
        bert_config,
        tokenizer,
        embed_dim: int = 192,
        dropout: float = 0.0,
        temperature: float = 0.07,
        pooling: str = "mean",
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
        if len(image_mean) != 3 or len(image_std) != 3 or not min(image_std) > 0:
            raise ValueError(
                f"image_mean={image_mean} and image_std={image_std} must have three numbers each, "
                "one per channel, and those of image_std be above 0"
            )
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
        stats = torch.tensor([image_mean, image_std], dtype=torch.float32)
        self.register_buffer("pixel_stats", stats.reshape(2, 3, 1, 1))
        self.register_buffer("special_ids", special_ids(tokenizer), persistent=False)
        self.register_buffer("word_ids", word_ids(tokenizer), persistent=False)
        self.register_buffer("continues_word", continues_word(tokenizer), persistent=False)

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
        from transformers import BertConfig

        if name not in PRESETS:
            raise ValueError(f"preset {name!r} is not known; {nearest(name, PRESETS)}")
        size, drop = PRESETS[name], _drop(dropout)
        vit = _preset_vit(name, dropout)
        vocab = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        bert = BertConfig(
            max_position_embeddings=size["length"], **vocab, **_tower(*size["bert"]), **drop
        )
        model = cls(vit, bert, tokenizer, size["embed_dim"], dropout, temperature, pooling)
        parts = model.bert.embeddings
        with torch.no_grad():  # what all captions share must not drown what tells them apart
            for part in (parts.position_embeddings, parts.token_type_embeddings):
                part.weight.mul_(0.25)
        return model

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
        as by `resize`. options: dropout (of the projections and of a
        preset's new ViT; a checkpoint keeps its towers' own), temperature, pooling (take the one
        that the BERT was trained with: "mean" for sentence-transformers). Reads safetensors or
        weights-only files, never code. Raises FileNotFoundError, and soon, where there is no such
        folder and no network, ValueError for a BERT without its tokenizer's vocabulary.
        """
        from transformers import BertModel, ViTModel

        hub = hub_options(text_backbone)
        text_config = checkpoint_config(text_backbone, "bert", hub)
        new = _new_vit(image_backbone, options.get("dropout", 0.0))
        image_hub = {} if new else hub_options(image_backbone)
        image_config = new or checkpoint_config(image_backbone, "vit", image_hub)
        if new is None:
            options = pixel_statistics(image_backbone, image_hub) | options
        tokenizer = load_tokenizer(text_backbone, hub)
        model = cls(image_config, text_config, tokenizer, embed_dim, **options)
        if new is None:
            model.vit = load_tower(ViTModel, image_backbone, image_config, image_hub)
        model.bert = load_tower(BertModel, text_backbone, text_config, hub)
        return model if image_size is None else model.resize(image_size)

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
        p = self.patch_size
        if image_size < p or image_size % p:
            raise ValueError(
                f"image_size={image_size} is not a multiple of patch_size {p}; try "
                f"{image_size - image_size % p or p}"
            )
        side, parts = image_size // p, self.vit.embeddings
        first, rest = parts.position_embeddings.detach().split([1, self.num_patches], 1)
        moved = torch.cat([first, resize_positions(rest, side)], 1)
        learns = parts.position_embeddings.requires_grad
        parts.position_embeddings = nn.Parameter(moved, requires_grad=learns)
        parts.image_size = parts.patch_embeddings.image_size = (image_size, image_size)
        parts.patch_embeddings.num_patches = self.num_patches = side**2
        self.image_size = self.vit.config.image_size = image_size
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
        x = _projected(patches, embeddings.patch_embeddings.projection)
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

    def encode_image(
        self, pixel_values: Tensor, masking: Masking | None = None, mode: str = "drop"
    ):
        """Unit-length features (B, D) of pictures (B, 3, H, W), uint8 or normalised float.

        masking hides patches: mode "drop" leaves them out, "replace" puts the mask token.
        """
        tokens = self.image_tokens(pixel_values, masking, mode)
        return self._image_features(tokens, _kept(masking, mode))

    def _image_features(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        if self.pooling == "cls":
            pooled = tokens[:, 0]
        else:
            pooled = tokens[:, 1:].mean(1) if real is None else _mean(tokens[:, 1:], real)
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
        wanted: Wanted | None = None,
    ) -> EncoderOutput:
        """Features and token states of a batch; a masking that is None hides nothing.

        wanted: what else is asked for, or not at all; each tower runs once per view that this
        needs. Its "unmasked" view gives features of the whole pair, token states of the masked one.
        """
        wanted = wanted or Wanted()
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
        return EncoderOutput(
            image_features,
            text_features,
            None if image is None else image.states,
            None if text is None else text.states,
            scale,
            bias,
            **back,
        )

    def _views(self, batch: Batch, masked: tuple, wanted: Wanted) -> tuple:
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

    def architecture(self) -> dict:
        """What `from_architecture` needs to build the same encoder: plain values only."""
        frequency = self.token_frequency
        return {
            "vit": _plain(self.vit.config),
            "bert": _plain(self.bert.config),
            "embed_dim": self.embed_dim,
            "dropout": self.dropout,
            "pooling": self.pooling,
            "tokenizer": tokenizer_state(self.tokenizer),
            **({} if self.loss == "info_nce" else {"loss": self.loss}),
            **({} if frequency is None else {"token_frequency": frequency.tolist()}),
            **({} if self.decoder is None else {"decoder": self.decoder.spec}),
        }

    def settings(self) -> dict[str, Any]:
        """What `TrainingConfig` has of a model: preset ("own" where it is none), dropout (the
        largest), temperature (as learned)."""

        def tower(config) -> tuple[int, int, int]:
            return config.hidden_size, config.num_hidden_layers, config.num_attention_heads

        sizes = dict(image=self.image_size, patch=self.patch_size, vit=tower(self.vit.config))
        sizes |= dict(bert=tower(self.bert.config), length=self.max_length)
        sizes |= dict(embed_dim=self.embed_dim)
        scale = self.logit_scale.item()
        return {
            "preset": next((name for name, size in PRESETS.items() if size == sizes), "own"),
            "dropout": max(dropouts(self)),
            "temperature": round(math.exp(-scale), 6) if math.isfinite(scale) else None,
        }

    @classmethod
    def from_architecture(cls, spec: dict) -> "MultimodalEncoder":
        """An encoder of that architecture, its weights still to be loaded."""
        from transformers import BertConfig, ViTConfig

        spec = dict(spec)
        heads, frequency = spec.pop("decoder", None), spec.pop("token_frequency", None)
        vit = ViTConfig(**_settings(ViTConfig, spec.pop("vit")))
        bert = BertConfig(**_settings(BertConfig, spec.pop("bert")))
        with torch.random.fork_rng(devices=[]):  # weights to be replaced use up no draws
            model = cls(vit, bert, tokenizer_from_state(spec.pop("tokenizer")), **spec)
            model.token_frequency = None if frequency is None else torch.tensor(frequency)
            return model if heads is None else model.add_decoder(**heads)


def _projected(patches: Tensor, projection: nn.Module) -> Tensor:
    """Patches (B, K, 3 * p * p) by a ViT's patch projection: (B, K, D)."""
    weight = cast(Tensor, projection.weight)
    patches = patches.to(weight.dtype)
    if type(projection) is nn.Conv2d and not has_hook(projection):  # a product serves for it
        return F.linear(patches, weight.flatten(1), projection.bias)
    single = patches.flatten(0, 1).unflatten(1, weight.shape[1:])
    return projection(single).flatten(1).unflatten(0, patches.shape[:2])


def _kept(masking: Masking | None, mode: str) -> Tensor | None:
    """(B, K) bool, which of the kept tokens are no filler; None where there is none."""
    return masking.keep_valid if masking is not None and mode == "drop" else None


def _with_class_token(real: Tensor | None) -> Tensor | None:
    """(B, 1 + K) of (B, K): the class token is always there."""
    return None if real is None else F.pad(real, (1, 0), value=True)


def _mean(tokens: Tensor, real: Tensor) -> Tensor:
    """Mean (B, D) of the real ones among tokens (B, K, D)."""
    weight = real[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def _check_mode(mode: str, known: tuple[str, ...]):
    if mode not in known:
        raise ValueError(f"mode={mode!r} is not known; {nearest(mode, known)}")


def _tower(width: int, depth: int, heads: int) -> dict:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, (width, depth, heads, 4 * width), strict=True))


def _drop(dropout: float) -> dict:
    return dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def _preset_vit(name: str, dropout: float):
    """The ViTConfig of a preset."""
    from transformers import ViTConfig

    size = PRESETS[name]
    sides = dict(image_size=size["image"], patch_size=size["patch"])
    tower = _tower(*size["vit"])
    # The usual 0.02 is that of width 768: narrower towers would hardly add to their input at first.
    start = dict(initializer_range=tower["hidden_size"] ** -0.5)
    return ViTConfig(**sides, **tower, **start, **_drop(dropout))


def _new_vit(backbone, dropout: float):
    """The config of a ViT without weights: a preset's, or one that is given; None = a checkpoint's.

    A folder that is called like a preset is meant by "./tiny".
    """
    from transformers import ViTConfig

    if isinstance(backbone, ViTConfig):
        return backbone
    return _preset_vit(backbone, dropout) if backbone in PRESETS else None


def _plain(config) -> dict:
    """A transformers config as plain values that differ from the defaults."""
    import json

    return json.loads(json.dumps({k: v for k, v in config.to_diff_dict().items() if v is not None}))


def _settings(config_class, values: dict) -> dict:
    """Those of the class itself, and no others that a file may name.

    transformers would fetch and run an attention kernel, say.
    """
    known = config_class().to_dict()
    return {k: v for k, v in values.items() if k in known and "implementation" not in k}
