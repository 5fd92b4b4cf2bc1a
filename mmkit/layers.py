"""The layers of both towers as few, large matrix products, for a CPU.

The weights stay where transformers' ViTModel and BertModel keep them, and the numbers are theirs up
to rounding; what differs is how they are computed: queries, keys and values by one product, weights
cast once, captions end to end without padding between them. On a GPU, where fused attention wins,
and when they are compiled, transformers' own layers run.
Shapes: B batch, N tokens, L text length, T real tokens of a batch, D width, H heads.
Walk-through: notebooks/09_speed.ipynb.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

ROWS = 64  # numbers of rows that products are made for are multiples of it


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
    exact_gelu: bool
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
        act == "gelu",
        config.hidden_dropout_prob * layer.training,
        config.attention_probs_dropout_prob * layer.training,
    )


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype):
    """(norm of x in dtype, mean, 1 / deviation); x itself in dtype without a weight."""
    if weight is None:
        return x.to(dtype), None, None
    out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
    return out.to(dtype), mean, rstd


def _back_through_norm(ctx: Any, grad: Tensor, x: Tensor, mean, rstd, weight, bias):
    """Gradients of (x, weight, bias) from that of the normed x."""
    grad = grad.to(x.dtype)
    if weight is None:
        return grad, None, None
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[-1:], mean, rstd, weight, bias, wanted
    )


def _of_map(grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]):
    """Gradients of (x, weight, bias) of a linear map of rows."""
    return (
        grad @ weight if wanted[0] else None,
        grad.mT @ x if wanted[1] else None,
        grad.sum(0) if wanted[2] else None,
    )


class Mlp(torch.autograd.Function):
    """down(gelu(up(norm(x)))) of rows x (R, D), in the type of the weights `up` and `down`.

    With a backward pass of its own: what goes into the GELU is kept, what comes out of it and the
    normed x are computed again, which spares memory at next to no time. (The same for the attention
    cost time, and is not done.)
    """

    @staticmethod
    def forward(ctx: Any, x, norm_weight, norm_bias, up, up_bias, down, down_bias, eps):
        h, mean, rstd = _normed(x, norm_weight, norm_bias, eps, up.dtype)
        before = F.linear(h, up, up_bias)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, before, up, down)
        ctx.eps = eps
        return F.linear(F.gelu(before), down, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        """Gradients in the order of forward's arguments; None for what needs none."""
        x, mean, rstd, norm_weight, norm_bias, before, up, down = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad = grad.to(up.dtype)
        inner = F.gelu(before) if need[5] else before
        back, grad_down, grad_down_bias = _of_map(grad, inner, down, (True, need[5], need[6]))
        del inner
        back = torch.ops.aten.gelu_backward(back, before)
        h, _, _ = _normed(x, norm_weight, norm_bias, ctx.eps, up.dtype)
        back, grad_up, grad_up_bias = _of_map(back, h, up, (True, need[3], need[4]))
        of_norm = _back_through_norm(ctx, back, x, mean, rstd, norm_weight, norm_bias)
        return *of_norm, grad_up, grad_up_bias, grad_down, grad_down_bias, None


def own_layers(tower: nn.Module, x: Tensor) -> bool:
    """Whether the layers of a ViTModel or BertModel are computed here: see the top of this file.

    Not where somebody has hung a hook on one of their parts, which would never be called.
    """
    if x.device.type != "cpu" or any(_has_hook(part) for part in tower.modules()):
        return False
    layer = next(m for m in tower.modules() if type(m).__name__ in ("ViTLayer", "BertLayer"))
    return layer._compiled_call_impl is None


def _has_hook(part: nn.Module) -> bool:
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    own = "transformers."  # which leaves hooks of its own behind, for states that are asked for
    return bool(part._backward_hooks) or any(
        not getattr(hook, "__module__", "").startswith(own) for hook in hooks
    )


def draws_dropout(model: nn.Module) -> bool:
    """Whether a training step of this model draws random numbers."""
    return any(p > 0 for p in dropouts(model))


def dropouts(model: nn.Module) -> set[float]:
    """Every dropout probability in a model: of its modules, and of its towers' configurations."""
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    found = {getattr(config, name, 0.0) for config in configs for name in names}
    return found | {m.p for m in model.modules() if isinstance(m, nn.Dropout)}


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


def _attention(
    w: Weights, x: Tensor, norm: nn.LayerNorm | None, shape: tuple[int, int],
    place: Tensor | None, hidden_keys: Tensor | None,
) -> Tensor:  # fmt: skip
    """What the attention of a layer adds to rows x (R, D).

    shape: (B, N). place (R,) int64: where the rows stand among B * N; None = everywhere.
    """
    (mix, mix_bias), (batch, tokens) = w.attention, shape
    mixed = F.linear((x if norm is None else _norm(x, norm)).to(mix.dtype), mix, mix_bias)
    if place is not None:
        mixed = mixed.new_zeros(batch * tokens, mixed.shape[1]).index_copy(0, place, mixed)
    seen = attend(mixed.view(batch, tokens, -1), w.heads, hidden_keys, w.attention_dropout)
    seen = seen.flatten(0, 1)
    return F.linear(seen if place is None else seen.index_select(0, place), *w.out)


def _mlp(w: Weights, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """What the MLP of a layer adds to rows x (R, D)."""
    (up, up_bias), (down, down_bias) = w.up, w.down
    if w.exact_gelu:
        weight, bias, eps = (None, None, 0.0) if norm is None else _of_norm(norm)
        return Mlp.apply(x, weight, bias, up, up_bias, down, down_bias, eps)
    inner = F.linear((x if norm is None else _norm(x, norm)).to(up.dtype), up, up_bias)
    return F.linear(w.activation(inner), down, down_bias)


def _of_norm(norm: nn.LayerNorm) -> tuple[Tensor, Tensor, float]:
    return norm.weight, norm.bias, norm.eps


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _drop(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


def vit_layers(vit: Any, x: Tensor, real: Tensor | None = None) -> Tensor:
    """States (B, N, D) after all layers of a ViTModel, before its last norm.

    real (B, N) bool: False = filler, at which nobody looks.
    """
    dtype, filler = computing_type(x), None if real is None else ~real
    batch, tokens, width = x.shape
    x = x.reshape(batch * tokens, width)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        w = weights_of(layer, vit.config, dtype)
        x = x + _drop(_attention(w, x, w.norms[0], (batch, tokens), None, filler), w.dropout)
        return x + _drop(_mlp(w, x, w.norms[1]), w.dropout)

    for layer in vit.layers:
        x = _kept_or_not(run, layer, x)
    return x.view(batch, tokens, width)


def _kept_or_not(run: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, x: Tensor) -> Tensor:
    """run(layer, x); with gradient checkpointing only x of it is kept for the way back."""
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return checkpoint(run, layer, x, use_reentrant=False)
    return run(layer, x)


def bert_states(bert: Any, words: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """States (B, L, D) of a BertModel; zeros where a token is not real.

    words (B, L, D) embedded, positions (B, L) int64, valid (B, L) bool. Only in the attention do
    captions lie side by side with padding between them.
    """
    batch, length, width = words.shape
    real, place = _places(valid)  # (T,), (R,)
    parts, dtype = bert.embeddings, computing_type(words)
    x = words.flatten(0, 1).index_select(0, real)
    x = x + parts.token_type_embeddings.weight[0]
    x = x + parts.position_embeddings(positions.flatten().index_select(0, real))
    x = F.pad(x, (0, 0, 0, len(place) - len(real)))
    x = _norm(x, parts.LayerNorm)
    x = _drop(x, bert.config.hidden_dropout_prob * bert.training)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        w = weights_of(layer, bert.config, dtype)
        seen = _attention(w, x, None, (batch, length), place, ~valid)
        x = _norm(x + _drop(seen, w.dropout), w.norms[0])
        return _norm(x + _drop(_mlp(w, x, None), w.dropout), w.norms[1])

    for layer in bert.encoder.layer:
        x = _kept_or_not(run, layer, x)
    states = x.new_zeros(batch * length, width).index_copy(0, real, x[: len(real)])
    return states.view(batch, length, width)


def _places(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Where the real tokens of a batch (B, L) stand among B * L, and the rows that are computed.

    Those are some more, of padding, up to a multiple of `ROWS`: the library of products prepares
    and keeps code for each number of rows that it meets, and captions add up to another each time.
    """
    flat = valid.flatten()
    real = flat.nonzero()[:, 0]
    if len(real) < 4 * ROWS:
        return real, real
    return real, torch.cat([real, (~flat).nonzero()[: -len(real) % ROWS, 0]])
