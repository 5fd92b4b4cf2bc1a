"""The cost of a training step: counted and predicted before it runs, and measured."""

from ..models.flops import (
    logit_flops,
    muon_flops,
    objective_flops,
    reconstruction_flops,
    sample_flops,
    step_flops,
    tower_flops,
)
from ..older_names import older_functions
from .measure import (
    StepCost,
    matmul_rate,
    measure_ratios,
    measure_step,
    step_seconds,
    step_time,
)
from .prediction import Prediction, predict
from .profile import step_parts

__getattr__ = older_functions(__name__, "mm.cost", put_back_flops="reconstruction_flops")

__all__ = [
    "Prediction",
    "StepCost",
    "logit_flops",
    "matmul_rate",
    "measure_ratios",
    "measure_step",
    "muon_flops",
    "objective_flops",
    "predict",
    "reconstruction_flops",
    "sample_flops",
    "step_flops",
    "step_parts",
    "step_seconds",
    "step_time",
    "tower_flops",
]
