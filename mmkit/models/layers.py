"""The layers of both towers as few, large matrix products, for a CPU.

The weights are those of transformers' ViTModel and BertModel, and so are the results, up to
rounding. The computation differs: one product for queries, keys and values, weights cast once,
captions joined without padding. On a GPU, where fused attention is faster, and under torch.compile,
transformers' own layers run.
Shapes: B batch, N tokens, L text length, T valid tokens of a batch, D width, H heads.
Walk-through: notebooks/09_speed.ipynb.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

ROWS = 64  # products have multiples of this number of rows


@dataclass
class Weights:
    """The weights of one layer, in the type that it computes in."""

    attention: tuple[Tensor, Tensor | None]  # (3D, D), (3D,): queries (scaled), keys, values
    out: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    norms: tuple[nn.LayerNorm, nn.LayerNorm]  # in the order of use
    heads: int
    activation: Callable[[Tensor], Tensor]
    exact_gelu: bool
    dropout: float  # of what is added to the states; 0 in evaluation
    attention_dropout: float


def computing_type(x: Tensor) -> torch.dtype:
    """The type that matrix products compute in: autocast's type, or that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def weights_of(layer: nn.Module, config, dtype: torch.dtype) -> Weights:
    """The weights of a transformers ViTLayer or BertLayer, whatever its version calls them.

    In every version the linear maps are in the order of use (query, key, value, output, up, down),
    and so are the norms.
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
    """(norm of x in dtype, mean, 1 / deviation); without a weight, x itself in dtype."""
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

    It has its own backward pass: the input of the GELU is kept, its output and the normed x are
    computed again, which saves memory and takes almost no time. (For the attention this would take
    time, so it is not done.)
    """

    @staticmethod
    def forward(ctx: Any, x, norm_weight, norm_bias, up, up_bias, down, down_bias, eps):  # noqa: PLR0913 (tensors of one product)
        """The MLP; a norm_weight of None means no norm, see `_normed`."""
        h, mean, rstd = _normed(x, norm_weight, norm_bias, eps, up.dtype)
        before = F.linear(h, up, up_bias)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, before, up, down)
        ctx.eps = eps
        return F.linear(F.gelu(before), down, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):
        """Gradients in the order of forward's arguments; None where none is needed."""
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
    """Whether this module computes the layers of a ViTModel or BertModel.

    Only if all their parts are those that transformers builds from the tower's config, all in the
    same mode and of the type of the states x. Anything that was changed (a hook, another dropout, a
    subclass such as LoRA's, a method of an object) then runs as it is, in transformers' layers.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or _looked_into():
        return False
    config: Any = tower.config
    if (
        getattr(config, "is_decoder", False)
        or config.hidden_size != config.num_attention_heads * _head(config)
        or config._attn_implementation not in ("eager", "sdpa")
    ):
        return False
    plain = _plain_parts(tower, config)
    return plain is not None and _parts(tower, x.dtype) == plain


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _looked_into() -> bool:
    """Whether a hook must see each module's call, or a derivative is needed that `Mlp` lacks."""
    module = torch.nn.modules.module
    hooks = (
        *module._global_forward_hooks.values(),
        *module._global_forward_pre_hooks.values(),
        *module._global_backward_hooks.values(),
        *module._global_backward_pre_hooks.values(),
    )
    return bool(
        torch.compiler.is_compiling()
        or any(not hook.__module__.startswith("torch.") for hook in hooks)  # FlopCounterMode's
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _parts(tower: nn.Module, dtype: torch.dtype | None) -> tuple[list, list] | None:
    """The parts of the tower around its layers, and each kind of layer that it has.

    None if a part cannot be compared: it has a hook, compiled code, weights of another type than
    `dtype` (None = any), or is in another mode than the parts around it.
    """
    around: list = []
    layers: list[list] = []
    inside: set[nn.Module] = set()
    for part in tower.modules():
        if part in inside:
            continue
        found, whole = around, [part]
        if type(part).__name__ in ("ViTLayer", "BertLayer"):
            found, whole = [], list(part.modules())
            inside.update(whole)
            layers.append(found)
        mode = part.training if found is not around else tower.training
        for one in whole:
            if (
                one.training != mode
                or one._compiled_call_impl is not None
                or has_hook(one)
                or (dtype is not None and not _of_type(one, dtype))
            ):
                return None
            found.append(_settings(one))
    kinds: list = []
    for layer in layers:
        if layer not in kinds:
            kinds.append(layer)
    return around, kinds


def _of_type(part: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all weights of the part itself are plain parameters of this type."""
    weights = (weight for weight in part._parameters.values() if weight is not None)
    return all(type(weight) is nn.Parameter and weight.dtype == dtype for weight in weights)


def _settings(part: nn.Module) -> tuple:
    """Class, plain values, functions and shapes of one part."""
    kept = {
        name: value
        for name, value in vars(part).items()
        if name[0] != "_"
        and name not in ("training", "layer_idx", "gradient_checkpointing")
        and (type(value) in (int, float, bool, str) or callable(value))
    }
    shapes = {name: None if w is None else w.shape for name, w in part._parameters.items()}
    if isinstance(part, nn.ModuleList):  # of layers, whose number may differ
        kept, shapes = {}, {}
    return type(part), kept, shapes


_PLAIN: dict[tuple, tuple[list, list] | None] = {}


def _plain_parts(tower: Any, config: Any) -> tuple[list, list] | None:
    """`_parts` of what transformers builds from a config; None for another tower."""
    kind = type(tower)
    if kind.__name__ not in ("ViTModel", "BertModel") or not _of_transformers(kind):
        return None
    values = tuple(
        item
        for item in vars(config).items()
        if type(item[1]) in (int, float, bool, str) or callable(item[1])
    )
    key = (kind, *values)
    if key not in _PLAIN:
        one_layer = copy.deepcopy(config)
        one_layer.num_hidden_layers = 1
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            _PLAIN[key] = _parts(kind(one_layer, add_pooling_layer=False), None)
    return _PLAIN[key]


def _of_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def has_hook(part: nn.Module) -> bool:
    """Whether a part has a hook, which would miss calls that are not made."""
    if not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks):
        return bool(part._backward_pre_hooks)
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    own = "transformers."  # it leaves hooks of its own behind, which collect hidden states
    return bool(part._backward_hooks or part._backward_pre_hooks) or any(
        not getattr(hook, "__module__", "").startswith(own) for hook in hooks
    )


def draws_dropout(model: nn.Module) -> bool:
    """Whether a training step of this model draws random numbers, or may do so.

    Parts of torch, transformers and mmkit are known: they have dropout as a number.
    """
    known = ("torch", "transformers", "mmkit")
    foreign = (type(part).__module__.partition(".")[0] not in known for part in model.modules())
    return any(foreign) or any(p > 0 for p in dropouts(model))


def dropouts(model: nn.Module) -> set[float]:
    """All dropout probabilities in a model: in its modules, and in the configs of its towers."""
    names, found = ("hidden_dropout_prob", "attention_probs_dropout_prob"), set()
    for part in model.modules():
        found |= {getattr(getattr(part, "config", None), name, 0.0) for name in names}
        named = (p for name, p in vars(part).items() if name == "p" or "dropout" in name)
        found |= {p for p in named if isinstance(p, int | float)}
    return found


def attend(mixed: Tensor, heads: int, masked_keys: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention (B, N, D) of queries, keys and values that are side by side in (B, N, 3D).

    masked_keys (B, N) bool: True = not attended to. The queries are scaled already.
    """
    batch, tokens, width = mixed.shape[0], mixed.shape[1], mixed.shape[2] // 3
    split = mixed.view(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    query, key, value = split.reshape(3, batch * heads, tokens, width // heads).unbind(0)
    scores = torch.bmm(query, key.transpose(1, 2))  # (B * H, N, N)
    if masked_keys is not None:
        scores = scores.view(batch, heads, tokens, tokens)
        # Not -inf: if all are masked, the softmax and all gradients through it would be NaN.
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(masked_keys[:, None, None, :], least)
        scores = scores.view(batch * heads, tokens, tokens)
    attention = _drop(scores.softmax(-1), dropout)
    mean = torch.bmm(attention, value).view(batch, heads, tokens, width // heads)
    return mean.transpose(1, 2).reshape(batch, tokens, width)


def _attention(
    w: Weights, x: Tensor, norm: nn.LayerNorm | None, shape: tuple[int, int],
    rows: Tensor | None, masked_keys: Tensor | None,
) -> Tensor:  # fmt: skip
    """What the attention of a layer adds to states x (R, D).

    shape: (B, N). rows (R,) int64: their positions among the B * N; None = all in order.
    """
    (mix, mix_bias), (batch, tokens) = w.attention, shape
    mixed = F.linear((x if norm is None else _norm(x, norm)).to(mix.dtype), mix, mix_bias)
    if rows is not None:
        mixed = mixed.new_zeros(batch * tokens, mixed.shape[1]).index_copy(0, rows, mixed)
    mean = attend(mixed.view(batch, tokens, -1), w.heads, masked_keys, w.attention_dropout)
    mean = mean.flatten(0, 1)
    return F.linear(mean if rows is None else mean.index_select(0, rows), *w.out)


def _mlp(w: Weights, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """What the MLP of a layer adds to states x (R, D)."""
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


def vit_layers(vit: Any, x: Tensor, valid: Tensor | None = None) -> Tensor:
    """States (B, N, D) after all layers of a ViTModel, before its last norm.

    valid (B, N) bool: False = padding, to which no token attends.
    """
    dtype, padding = computing_type(x), None if valid is None else ~valid
    batch, tokens, width = x.shape
    x = x.reshape(batch * tokens, width)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        w = weights_of(layer, vit.config, dtype)
        x = x + _drop(_attention(w, x, w.norms[0], (batch, tokens), None, padding), w.dropout)
        return x + _drop(_mlp(w, x, w.norms[1]), w.dropout)

    for layer in vit.layers:
        x = _kept_or_not(run, layer, x)
    return x.view(batch, tokens, width)


def _kept_or_not(run: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, x: Tensor) -> Tensor:
    """run(layer, x); with gradient checkpointing, only x is kept for the backward pass."""
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return checkpoint(run, layer, x, use_reentrant=False)
    return run(layer, x)


def bert_states(bert: Any, embedded: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
    """States (B, L, D) of a BertModel; zeros for padding.

    embedded (B, L, D), positions (B, L) int64, valid (B, L) bool. Captions are padded to the same
    length in the attention only.
    """
    batch, length, width = embedded.shape
    kept, rows = _places(valid)  # (T,), (R,)
    parts, dtype = bert.embeddings, computing_type(embedded)
    x = embedded.flatten(0, 1).index_select(0, kept)
    x = x + parts.token_type_embeddings.weight[0]
    x = x + parts.position_embeddings(positions.flatten().index_select(0, kept))
    x = F.pad(x, (0, 0, 0, len(rows) - len(kept)))
    x = _norm(x, parts.LayerNorm)
    x = _drop(x, bert.config.hidden_dropout_prob * bert.training)

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        w = weights_of(layer, bert.config, dtype)
        added = _attention(w, x, None, (batch, length), rows, ~valid)
        x = _norm(x + _drop(added, w.dropout), w.norms[0])
        return _norm(x + _drop(_mlp(w, x, None), w.dropout), w.norms[1])

    for layer in bert.encoder.layer:
        x = _kept_or_not(run, layer, x)
    states = x.new_zeros(batch * length, width).index_copy(0, kept, x[: len(kept)])
    return states.view(batch, length, width)


def _places(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the valid tokens of a batch (B, L) among B * L, and the rows to compute.

    The latter include some padding, up to a multiple of `ROWS`: the matrix library prepares and
    keeps code for each number of rows that it gets, and the number of valid tokens always differs.
    """
    flat = valid.flatten()
    kept = flat.nonzero()[:, 0]
    if len(kept) < 4 * ROWS:
        return kept, kept
    return kept, torch.cat([kept, (~flat).nonzero()[: -len(kept) % ROWS, 0]])


def projected(patches: Tensor, projection: Any) -> Tensor:
    """Patches (B, K, 3 * p * p) after a ViT's patch projection: (B, K, D)."""
    weight = projection.weight
    patches = patches.to(weight.dtype)
    if type(projection) is nn.Conv2d and not has_hook(projection):  # then it is a matrix product
        return F.linear(patches, weight.flatten(1), projection.bias)
    single = patches.flatten(0, 1).unflatten(1, weight.shape[1:])
    return projection(single).flatten(1).unflatten(0, patches.shape[:2])
