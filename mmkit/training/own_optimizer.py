"""A user's own optimizer: checks, and the precedence of its learning rate and weight decay.

Walk-through: notebooks/03_training.ipynb.
"""

import inspect
import math

import torch


def own_optimizer(build, groups: list[dict], peak: float) -> torch.optim.Optimizer:
    """The optimizer that a user's function builds over the parameter groups, checked.

    Args:
        build: function of a list of groups that returns an optimizer over all of them.
        groups: parameter groups with "params", "lr" and "weight_decay".
        peak: the configuration's learning rate, by which the groups' rates are scaled.
    Returns:
        The optimizer, each group with its peak learning rate as `peak_lr`.
    Raises:
        ValueError: the function returns anything else, an optimizer that needs a closure or leaves
            weights out, or a rate or decay that is negative or not finite.
    """
    given = {id(p): {**group, "params": ()} for group in groups for p in group["params"]}
    optimizer = build(groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(
            f"the optimizer function returned a {type(optimizer).__name__}; it must return a "
            "torch.optim.Optimizer over the groups it is given, "
            "such as lambda groups: torch.optim.SGD(groups)"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"{type(optimizer).__name__} recomputes the loss in each step (a closure), which "
            "training does not offer; take an optimizer without one, such as "
            "torch.optim.SGD(groups)"
        )
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if taken != given.keys():
        raise ValueError(
            f"the optimizer function left out {len(given.keys() - taken)} of {len(given)} weights, "
            f"and took {len(taken - given.keys())} others; give it all groups (for weights that "
            "must not learn, call requires_grad_(False) before training)"
        )
    _keep_own_values(optimizer, given, peak)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
        values = [float(group["lr"]), float(group.get("weight_decay", 0.0))]
        if not all(0 <= value < math.inf for value in values):
            raise ValueError(
                f"the optimizer function sets a learning rate of {values[0]} and a weight decay "
                f"of {values[1]}; both must be finite and at least 0"
            )
    return optimizer


def _keep_own_values(optimizer: torch.optim.Optimizer, given: dict[int, dict], peak: float):
    """Apply the rate and decay given to the constructor, which torch ignores in favour of groups'.

    A rate given to the constructor is scaled by layer as the configuration's would be, and the
    constructor's decay, even a default one, is used with it; a decay alone leaves the rates as they
    are. Weights that are never decayed stay undecayed. Values written into groups are kept.
    """
    known = inspect.signature(type(optimizer)).parameters
    values = {k: v for k, v in optimizer.defaults.items() if k in ("lr", "weight_decay")}
    own = {k: v for k, v in values.items() if k not in known or v != known[k].default}
    if any(own.get("lr") == group["lr"] for group in given.values()):
        del own["lr"]  # it was read from the groups
    elif "lr" in own:
        own = values
    for group in filter(lambda group: group["params"], optimizer.param_groups):
        asked = given[id(group["params"][0])]
        if "lr" in own and group["lr"] == asked["lr"]:
            group["lr"] = own["lr"] * (asked["lr"] / peak if peak else 1.0)
        if "weight_decay" in own and group["weight_decay"] == asked["weight_decay"] != 0:
            group["weight_decay"] = own["weight_decay"]
