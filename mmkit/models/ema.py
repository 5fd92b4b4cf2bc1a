"""A slowly moving copy of a module, for attention masks or to keep.

Walk-through: notebooks/05_checkpoints.ipynb.
"""

import copy
from typing import Any

import torch
from torch import nn


class EMA:
    """A copy of a module whose weights are the running mean (EMA) of the original's.

    Args:
        module: the original.
        momentum: of the mean, per step; it starts lower, at (1 + step) / (10 + step), so that a
            short run does not end with its initial weights. A-CLIP raises it from 0.996 to 1 over
            training instead.
    """

    def __init__(self, module: nn.Module, momentum: float):
        self.module: Any = copy.deepcopy(module).requires_grad_(False).eval()
        self.momentum, self.steps = momentum, 0

    @torch.no_grad()
    def update(self, module: nn.Module):
        """Move towards the weights of `module` by one step."""
        momentum = min(self.momentum, (1 + self.steps) / (10 + self.steps))
        mine, theirs = ([p.detach() for p in x.parameters()] for x in (self.module, module))
        torch._foreach_lerp_(mine, theirs, 1 - momentum)
        self.steps += 1

    def start(self, module: nn.Module) -> dict:
        """The state of a mean that starts at the present weights of `module`."""
        return {"weights": module.state_dict(), "steps": 0}

    def state_dict(self) -> dict:
        """What `load_state_dict` needs: tensors and a number."""
        return {"weights": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict):
        """Continue from a saved state."""
        self.module.load_state_dict(state["weights"])
        self.steps = state["steps"]
