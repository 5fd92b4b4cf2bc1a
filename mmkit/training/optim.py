"""The optimizer, learning rate and weight decay of each parameter, and frozen towers.

Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalises the updates of the layers' weight
matrices in both towers; AdamW updates everything else. Never decayed: biases, norms, position
embeddings, class and mask tokens, logit_scale and logit_bias.
Walk-through: notebooks/03_training.ipynb.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainingConfig
from ..device import multiplies_bfloat16
from ..distributed import broadcast, rank_and_world_size
from .own_optimizer import own_optimizer

_NEVER_DECAYED = ("position_embeddings", "cls_token", "mask_token", "logit_", "token_type")
_QUINTIC = (3.4445, -4.7750, 2.0315)  # one iteration is a x + b (x x^T) x + c (x x^T)^2 x
_LAYER = re.compile(r"(vit|bert)\..*\blayers?\.(\d+)\.")  # tower and number of a layer


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by role.

    Args:
        model: an encoder, or a part of one.
    Returns:
        {"matrices": the layers' weight matrices (2-d), "decayed": other weights, "plain": those
        without weight decay}, each {name: parameter}.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "decayed": {}, "plain": {}}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or any(word in name for word in _NEVER_DECAYED):
            role = "plain"
        elif parameter.ndim == 2 and (".layers." in name or ".layer." in name):
            role = "matrices"
        else:
            role = "decayed"
        groups[role][name] = parameter
    return groups


def layer_multiplier(model: Any, name: str, layer_decay: float) -> float:
    """The learning rate of a parameter as a fraction of the full one.

    As in ELECTRA (Clark et al. 2020, arXiv:2003.10555) and BEiT, it is layer_decay to the
    power of the number of layers above the parameter. In a tower of depth L that number is L + 1
    for embeddings and mask token, L for the first layer, and 0 for the last norm; it is 0 for the
    projections and the decoder.

    Args:
        model: the encoder.
        name: name of the parameter in it.
        layer_decay: factor from a layer to the one below it, in (0, 1].
    Returns:
        A factor in (0, 1].
    """
    if layer := _LAYER.search(name):
        above = getattr(model, layer[1]).config.num_hidden_layers - int(layer[2])
    elif name.startswith("decoder."):
        above = 0
    elif "embeddings" in name or "mask_token" in name:
        tower = "vit" if name.startswith(("vit", "image")) else "bert"
        above = getattr(model, tower).config.num_hidden_layers + 1
    else:
        above = 0
    return layer_decay**above


class Muon(torch.optim.Muon):
    """torch's Muon, batched over matrices of equal shape and divided among processes.

    A batch of matrices keeps all cores busy; a single one of 192 x 192 does not. Each process
    orthogonalises its part of the matrices and sends the new weights to the others, so that the
    cost per process falls with their number. The momentum of a matrix is kept only by the process
    that updates it; `share_memory` copies it to all.

    Args:
        groups: parameter groups of matrices.
        options: of torch.optim.Muon (lr, weight_decay, momentum, …).
    """

    def __init__(self, groups: list[dict], **options):
        super().__init__(groups, **options)
        _, processes = rank_and_world_size()
        self.parts: list[list[nn.Parameter]] = [[] for _ in range(processes)]
        work = [0] * processes
        matrices = [p for group in self.param_groups for p in group["params"]]
        for matrix in sorted(matrices, key=_work, reverse=True):  # to the least busy process
            owner = work.index(min(work))
            self.parts[owner].append(matrix)
            work[owner] += _work(matrix)

    @torch.no_grad()
    def step(self, closure=None):
        """Update all matrices that have a gradient; closure is not called."""
        rank, processes = rank_and_world_size()
        learning = [[p for p in part if p.grad is not None] for part in self.parts]
        mine = set(learning[rank])
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter in mine:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for matrices in alike.values():
                self._update(matrices, group)
        for owner, part in enumerate(learning):
            if processes > 1:
                broadcast(part, owner)

    @torch.no_grad()
    def _update(self, matrices: list[Tensor], group: dict):
        """Update matrices of one shape."""
        rate, momentum = group["lr"], group["momentum"]
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]  # all have one
        buffers = []
        for matrix in matrices:
            state = self.state[matrix]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
            buffers.append(state["momentum_buffer"])
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov
        update = orthogonalize(torch.stack(ahead), group["ns_coefficients"], group["ns_steps"])
        torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
        height, width = matrices[0].shape
        step = rate * max(1, height / width) ** 0.5  # "original" adjustment in torch
        torch._foreach_add_(matrices, list(update.to(matrices[0].dtype)), alpha=-step)

    @torch.no_grad()
    def share_memory(self):
        """Copy the momentum of every matrix to every process, for a checkpoint."""
        rank, processes = rank_and_world_size()
        if processes == 1:
            return
        for owner, part in enumerate(self.parts):
            known = [torch.tensor([float(bool(self.state.get(p)))]) for p in part]
            known = [flag.to(p.device) for flag, p in zip(known, part, strict=True)]
            broadcast(known, owner)
            part = [p for flag, p in zip(known, part, strict=True) if flag]
            for parameter in part:
                if owner != rank and not self.state.get(parameter):
                    self.state[parameter]["momentum_buffer"] = torch.empty_like(parameter)
            broadcast([self.state[p]["momentum_buffer"] for p in part], owner)


def orthogonalizing_type(device: torch.device) -> torch.dtype:
    """The type of `orthogonalize`: bfloat16 where the device has units for it, else float32.

    The iterations tolerate rounding, so that the faster type is always preferred.
    """
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def orthogonalize(
    stack: Tensor, coefficients=_QUINTIC, steps: int = 5, dtype: torch.dtype | None = None
) -> Tensor:
    """Make each matrix of a stack nearly orthogonal, by Newton-Schulz iterations.

    As in torch.optim.Muon (Jordan et al. 2024), which always uses bfloat16. Singular values end
    near 1 (0.7 to 1.2), not at 1.

    Args:
        stack: (M, R, C) matrices.
        coefficients: (a, b, c) of the quintic polynomial.
        steps: number of iterations.
        dtype: type to compute in; None = `orthogonalizing_type` of the device.
    Returns:
        (M, R, C) of that type.
    """
    a, b, c = coefficients
    x = stack.to(dtype or orthogonalizing_type(stack.device))
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _work(matrix: Tensor) -> int:
    """Operations of one iteration up to a factor: n^2 m for an n x m matrix, n <= m."""
    return matrix.numel() * min(matrix.shape)


def _split_by_rate(model, parameters: dict[str, nn.Parameter], layer_decay, peak, decay) -> list:
    """Parameter groups of an optimizer, one per learning rate, in the order of the parameters."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = peak * layer_multiplier(model, name, layer_decay)
        by_rate.setdefault(rate, []).append(parameter)
    return [
        {"params": params, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for rate, params in by_rate.items()
    ]


def build_optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a run: AdamW, Muon with AdamW, or the user's own.

    With "muon", Muon updates the layers' weight matrices and AdamW the rest. A function as
    `config.optimizer` gets a list of parameter groups ("params", "lr", "weight_decay") and returns
    one optimizer over them; values that it sets take precedence, see `_keep_own_values`.

    Args:
        model: the encoder; frozen parameters are left out.
        config: optimizer, learning rates, weight decay and layer decay.
    Returns:
        One or two optimizers, whose groups hold their peak learning rates as `peak_lr`.
    Raises:
        ValueError: the function returns anything but an optimizer, or one that leaves weights out.
    """
    roles = parameter_groups(model)
    muon = config.optimizer == "muon" and roles["matrices"]

    def groups(role: str, peak: float, decay: float) -> list[dict]:
        return _split_by_rate(model, roles[role], config.layer_decay, peak, decay)

    if not muon:
        roles["decayed"] = roles["matrices"] | roles["decayed"]
    rest = groups("decayed", config.learning_rate, config.weight_decay)
    rest += groups("plain", config.learning_rate, 0.0)
    if callable(config.optimizer):
        return [own_optimizer(config.optimizer, rest, config.learning_rate)]
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        matrices = groups("matrices", config.matrix_lr, config.weight_decay)
        optimizers.append(Muon(matrices, lr=config.matrix_lr, momentum=0.95))
    fused = all(p.device.type in ("cpu", "cuda") for group in rest for p in group["params"])
    options: dict = dict(betas=(0.9, 0.98), eps=1e-6, fused=fused)
    optimizers.append(torch.optim.AdamW(rest, lr=config.learning_rate, **options))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], fraction: float) -> None:
    """Set the learning rate of every group to a fraction of its peak.

    A scheduler is not used: accelerate steps a prepared one once per process, so that it would
    end early.

    Args:
        optimizers: those of `build_optimizers`.
        fraction: of the peak, in [0, 1].
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["peak_lr"]


def freeze(model: Any, kind: str) -> list[nn.Parameter]:
    """Freeze a tower (Zhai et al. 2022, LiT, arXiv:2111.07991); call it after `model.train()`.

    A frozen tower gets no gradient, no weight decay and no dropout, and its activations are not
    kept. Projections, logit_scale and logit_bias always learn.

    Args:
        model: the encoder.
        kind: "image" or "text".
    Returns:
        The parameters that were not frozen before, for `unfreeze`.
    """
    tower = model.vit if kind == "image" else model.bert
    token = getattr(model, f"{kind}_mask_token")
    learning = [p for p in (*tower.parameters(), token) if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    tower.eval()
    return learning


def unfreeze(parameters: list[nn.Parameter]) -> None:
    """Let parameters learn again that `freeze` returned."""
    for parameter in parameters:
        parameter.requires_grad_(True)
