"""The layers of both towers as few, large matrix products, for a CPU.

The weights stay where transformers' ViTModel and BertModel keep them, and the numbers are theirs up
to rounding; what differs is how they are computed: queries, keys and values by one product, weights
cast once, captions end to end without padding between them. On a GPU, where fused attention wins,
with gradient checkpointing and when compiled, transformers' own layers run.
Shapes: B batch, N tokens, L text length, T real tokens of a batch, D width, H heads.
Walk-through: notebooks/09_speed.ipynb.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Weights:
    """What one layer computes with, in the type it computes in."""

    attention: tuple[Tensor, Tensor | None]  # (3D, D), (3D,): queries (scaled), keys, values
    out: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    norms: tuple[nn.LayerNorm, nn.LayerNorm]  # in the order of their use
    heads: int
    activation: Callable[[Tensor], Tensor]
    dropout: float  # of what is added to the states; 0 in evaluation
    attention_dropout: float


def computing_type(x: Tensor) -> torch.dtype:
    """What matrix products compute in: autocast's type, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def weights_of(layer: nn.Module, config, dtype: torch.dtype) -> Weights:
    """The weights of a transformers ViTLayer or BertLayer, whatever its version calls them.

    In each of them the linear maps stand in the order of their use: query, key, value, output, up,
    down; so do the norms.
    """
    from transformers.activations import ACT2FN

    query, key, value, out, up, down = (m for m in layer.modules() if isinstance(m, nn.Linear))
    first, second = (m for m in layer.modules() if isinstance(m, nn.LayerNorm))
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5
    weight = torch.cat([query.weight * scale, key.weight, value.weight]).to(dtype)
    bias = None
    if query.bias is not None:
        bias = torch.cat([query.bias * scale, key.bias, value.bias]).to(dtype)

    def cast(linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
        return linear.weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)

    act = config.hidden_act
    return Weights(
        (weight, bias),
        cast(out),
        cast(up),
        cast(down),
        (first, second),
        config.num_attention_heads,
        ACT2FN[act] if isinstance(act, str) else act,
        config.hidden_dropout_prob * layer.training,
        config.attention_probs_dropout_prob * layer.training,
    )


def own_layers(tower: nn.Module, x: Tensor) -> bool:
    """Whether the layers of a ViTModel or BertModel are computed here: see the top of this file."""
    if x.device.type != "cpu":
        return False
    layer = next(m for m in tower.modules() if type(m).__name__ in ("ViTLayer", "BertLayer"))
    checkpointing = layer.training and getattr(layer, "gradient_checkpointing", False)
    return not checkpointing and layer._compiled_call_impl is None


def draws_dropout(model: nn.Module) -> bool:
    """Whether a training step of this model draws random numbers."""
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    return any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout)) or any(
        getattr(config, name, 0) > 0
        for config in configs
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
    )


def attend(mixed: Tensor, heads: int, hidden_keys: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention (B, N, D) of queries, keys and values that stand side by side in (B, N, 3D).

    hidden_keys (B, N) bool: nobody looks at these. The queries are scaled already.
    """
    batch, tokens, width = mixed.shape[0], mixed.shape[1], mixed.shape[2] // 3
    split = mixed.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    query, key, value = split.reshape(3, batch * heads, tokens, width // heads).unbind(0)
    scores = torch.bmm(query, key.transpose(1, 2))  # (B * H, N, N)
    if hidden_keys is not None:
        scores = scores.view(batch, heads, tokens, tokens)
        scores = scores.masked_fill(hidden_keys[:, None, None, :], float("-inf"))
        scores = scores.view(batch * heads, tokens, tokens)
    share = _drop(scores.softmax(-1), dropout)
    seen = torch.bmm(share, value).view(batch, heads, tokens, width // heads)
    return seen.transpose(1, 2).reshape(batch, tokens, width)


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _drop(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


def vit_layers(vit: Any, x: Tensor, real: Tensor | None = None) -> Tensor:
    """States (B, N, D) after all layers of a ViTModel, before its last norm.

    real (B, N) bool: False = filler, at which nobody looks.
    """
    dtype, filler = computing_type(x), None if real is None else ~real
    for layer in vit.layers:
        w = weights_of(layer, vit.config, dtype)
        mixed = F.linear(_norm(x, w.norms[0]).to(dtype), *w.attention)
        seen = attend(mixed, w.heads, filler, w.attention_dropout)
        x = x + _drop(F.linear(seen, *w.out), w.dropout)
        inner = w.activation(F.linear(_norm(x, w.norms[1]).to(dtype), *w.up))
        x = x + _drop(F.linear(inner, *w.down), w.dropout)
    return x


def bert_states(bert: Any, words: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """States (B, L, D) of a BertModel; zeros where a token is not real.

    words (B, L, D) embedded, positions (B, L) int64, valid (B, L) bool. Only in the attention do
    captions lie side by side with padding between them.
    """
    batch, length, width = words.shape
    place = valid.flatten().nonzero()[:, 0]  # (T,)
    parts, dtype = bert.embeddings, computing_type(words)
    x = words.flatten(0, 1).index_select(0, place)
    x = x + parts.token_type_embeddings.weight[0]
    x = x + parts.position_embeddings(positions.flatten().index_select(0, place))
    x = _norm(x, parts.LayerNorm)
    for layer in bert.encoder.layer:
        w = weights_of(layer, bert.config, dtype)
        x = _drop(x, w.dropout) if layer is bert.encoder.layer[0] else x
        mixed = F.linear(x.to(dtype), *w.attention)  # (T, 3D)
        padded = mixed.new_zeros(batch * length, 3 * width).index_copy(0, place, mixed)
        seen = attend(padded.view(batch, length, -1), w.heads, ~valid, w.attention_dropout)
        seen = seen.flatten(0, 1).index_select(0, place)
        x = _norm(x + _drop(F.linear(seen, *w.out), w.dropout), w.norms[0])
        inner = w.activation(F.linear(x.to(dtype), *w.up))
        x = _norm(x + _drop(F.linear(inner, *w.down), w.dropout), w.norms[1])
    return x.new_zeros(batch * length, width).index_copy(0, place, x).view(batch, length, width)
