"""How the terms of an objective interact: norms and cosines of their gradients.

A cosine below 0 means that a step that lowers one term raises the other (Yu et al. 2020, "Gradient
surgery for multi-task learning", arXiv:2001.06782).
Walk-through: notebooks/07_reconstruction.ipynb.
"""

from itertools import combinations

import torch
from torch import Tensor

from ..data.batch import Batch
from .random_state import random_states, set_random_states

TOWERS = {"image": "vit.", "text": "bert."}  # parts that several terms share, and their names


def tower_gradients(model: torch.nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    """The present gradient of each tower that has one, as a flat vector.

    Args:
        model: the encoder.
        scale: divisor of the gradients, such as an fp16 loss scale.
    Returns:
        {tower: (P,) float32}.
    """
    found = {}
    for tower, prefix in TOWERS.items():
        parts = [(p, p.grad) for n, p in model.named_parameters() if n.startswith(prefix)]
        if any(grad is not None for _, grad in parts):
            flat = [torch.zeros_like(p) if grad is None else grad for p, grad in parts]
            found[tower] = torch.cat([grad.flatten() for grad in flat]).float() / scale
    return found


def compare_terms(gradients: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Norms and pairwise cosines of the terms' gradients.

    Args:
        gradients: {term: {tower: flat gradient}}.
    Returns:
        {"gradient_norm/TOWER/TERM": norm, "gradient_cosine/TOWER/TERM·TERM": cosine}, the latter
        for each two terms that both reach a tower (NaN where one gradient is zero).
    """
    found = {}
    for tower in TOWERS:
        here = {term: flat[tower] for term, flat in gradients.items() if tower in flat}
        for term, flat in here.items():
            found[f"gradient_norm/{tower}/{term}"] = float(flat.norm())
        for one, other in combinations(here, 2):
            norms = here[one].norm() * here[other].norm()
            cosine = here[one] @ here[other] / norms
            found[f"gradient_cosine/{tower}/{one}·{other}"] = float(cosine)
    return found


def measure_terms(trainer, batch: Batch, epoch: int) -> dict[str, float]:
    """Compare the terms' gradients in a training run's next step, without changing the run.

    The gradient of each term alone, weighted as in the loss, on the towers that the terms share. No
    random number is used up and no weight is updated.

    Args:
        trainer: a MaskedMultimodalTrainer.
        batch: this process's part of the next batch, on the device.
        epoch: index of the epoch, from 0.
    Returns:
        The result of `compare_terms`.
    """
    model, device, scaler = trainer.model, trainer.device, trainer.scaler
    weights = trainer.objective.weights(trainer.step, trainer.total_steps)
    states, gradients = random_states(device), {}
    for term, weight in weights.items():
        model.zero_grad(set_to_none=True)
        set_random_states(states, device)
        trainer.gradients(batch, epoch, {term: weight})
        scale = scaler.get_scale() if scaler.is_enabled() else 1.0
        gradients[term] = tower_gradients(model, scale)
    set_random_states(states, device)
    model.zero_grad(set_to_none=True)
    return compare_terms(gradients)
