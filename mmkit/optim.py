"""Which parameter is updated by which rule.

Muon (Jordan et al. 2024; torch.optim.Muon) orthogonalises the update of the hidden matrices of both
towers; everything else goes to AdamW. Never decayed: biases, norms, position embeddings, class and
mask tokens, logit_scale and logit_bias. Walk-through: notebooks/03_training.ipynb.
"""

import torch
from torch import nn

from .config import TrainingConfig

_NEVER_DECAYED = ("position_embeddings", "cls_token", "mask_token", "logit_", "token_type")


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by role: "matrices" (hidden, 2-d), "decayed", "plain" (no decay)."""
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


def build_optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon on the hidden matrices and AdamW on the rest.

    Each group carries its peak learning rate as `peak_lr`. Raises ValueError where torch has no
    Muon.
    """
    groups = parameter_groups(model)
    matrices, decayed, plain = (list(groups[k].values()) for k in ("matrices", "decayed", "plain"))
    decay = config.weight_decay
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon" and matrices:
        if not hasattr(torch.optim, "Muon"):
            raise ValueError("optimizer='muon' needs torch 2.9 or newer; take optimizer='adamw'")
        muon = torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=decay, momentum=0.95)
        muon.param_groups[0]["peak_lr"] = config.matrix_lr
        optimizers.append(muon)
    else:
        decayed = matrices + decayed
    rest = [
        {"params": decayed, "weight_decay": decay, "peak_lr": config.learning_rate},
        {"params": plain, "weight_decay": 0.0, "peak_lr": config.learning_rate},
    ]
    rest = [group for group in rest if group["params"]]
    optimizers.append(torch.optim.AdamW(rest, lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6))
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], fraction: float) -> None:
    """Set every group to `fraction` of its peak.

    By hand: accelerate steps a prepared scheduler once per process, so that it would end early.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["peak_lr"]
