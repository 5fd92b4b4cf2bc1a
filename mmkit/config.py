"""All settings of a training run, in one dataclass.

Values are checked when the object is made; the error for an unknown key names the nearest known
one. `batch_size` is the GLOBAL batch of one optimizer step, whatever the number of processes and of
gradient accumulation steps. Walk-through: notebooks/03_training.ipynb.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

from .errors import as_type, nearest
from .older_names import OLDER_FIELDS, older_arguments, older_attributes, say_renamed
from .schedules import RATIO_SCHEDULES, SCHEDULES, TERM_SCHEDULES, fraction

TERMS = ("contrastive", "mim", "mlm", "itm")  # terms of the objective
OPTIMIZERS = ("muon", "adamw")

_OWN = {  # fields that also take a function
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    **{f"{term}_schedule": TERM_SCHEDULES for term in TERMS},
}
_CHOICES = _OWN | {
    "image_mask_mode": ("drop", "replace"),
    "text_mask_mode": ("drop", "replace", "80/10/10"),
    "image_mask_schedule": RATIO_SCHEDULES,
    "text_mask_schedule": RATIO_SCHEDULES,
    "mixed_precision": ("auto", "bf16", "fp16", "no"),
    "accumulation": ("exact", "naive"),
    "exchange": ("gather", "neighbours"),
    "augment": ("none", "shift"),
    "contrastive_view": ("masked", "unmasked"),
    "pixel_error": ("mse", "l1"),
}

# a rule for numbers, as text -> a function that tells whether it holds, and the fields it is for
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "at least 1": (
        lambda x: x >= 1,
        "num_epochs batch_size max_steps gradient_accumulation_steps eval_every log_every "
        "keep_last decoder_depth max_skipped_steps",
    ),
    "0 or more": (
        lambda x: x >= 0,
        "learning_rate matrix_learning_rate weight_decay warmup_steps max_grad_norm "
        "unmasked_epochs frozen_image_epochs frozen_text_epochs checkpoint_every num_workers "
        "term_gradients_every contrastive_weight mim_weight mlm_weight itm_weight",
    ),
    "in [0, 1)": (
        lambda x: 0 <= x < 1,
        "dropout ema_decay ema_momentum image_mask_final_ratio text_mask_final_ratio",
    ),
    "in [0, 1): 0 masks nothing, 0.5 half; it is a fraction, not per cent": (
        lambda x: 0 <= x < 1,
        "image_mask_ratio text_mask_ratio",
    ),
    "in [0, 1]": (lambda x: 0 <= x <= 1, "final_lr_fraction"),
    "in (0, 1]; 1 = the same for all": (lambda x: 0 < x <= 1, "layer_decay"),
    "in (0, 1]; to look at none of them: cross_modal=False": (
        lambda x: 0 < x <= 1,
        "cross_modal_ratio",
    ),
    "at least 0.01 (the scale's clamp)": (lambda x: x >= 0.01, "temperature"),
    "a multiple of 32, at least 32": (lambda x: x >= 32 and x % 32 == 0, "decoder_width"),
    "a whole number of 64 bits": (lambda x: -(2**63) <= x < 2**63, "seed"),
}
_RULE_OF = {name: rule for rule, (_, names) in _RULES.items() for name in names.split()}


def _checked(name: str, given: Any, annotation: Any) -> Any:
    """The value of a field of `TrainingConfig`; ValueError for a wrong type, choice or number."""
    if name in _OWN and callable(given):
        return given
    if name == "painted_mask":  # an array becomes plain values for JSON
        return None if given is None else _rows_of_patches(given)
    if name in ("image_mask", "text_mask") and callable(given):
        raise ValueError(
            f"{name}={given!r} must be a string: give your function a name by "
            f"mmkit.masking.{name.upper()}ERS['mine'] = function, and that name here"
        )
    value = as_type(name, given, annotation)
    if name in _CHOICES and value not in _CHOICES[name]:
        what, own = ("known", "; or give a function") if name in _OWN else ("a choice", "")
        raise ValueError(f"{name}={given!r} is not {what}; {nearest(value, _CHOICES[name])}{own}")
    rule = _RULE_OF.get(name)
    if rule and value is not None and not _RULES[rule][0](value):
        none = "None or " if NoneType in get_args(annotation) else ""
        raise ValueError(f"{name}={given!r} must be {none}{rule}")
    return value


def _refuse_unknown_keys(cls):
    """Make the dataclass's `__init__` name the nearest known key when it gets an unknown one."""
    original, known = cls.__init__, [f.name for f in dataclasses.fields(cls)]

    @functools.wraps(original)
    def init(self, *args, **kwargs):
        for key in kwargs:
            if key not in known:
                raise ValueError(f"{cls.__name__} has no field {key!r}; {nearest(key, known)}")
        original(self, *args, **kwargs)

    cls.__init__ = older_arguments(**OLDER_FIELDS)(init)
    return cls


def _rows_of_patches(painted) -> list[list[int]]:
    """A painted mask as rows of 0 and 1; ValueError unless its rows have the same length."""
    try:
        painted = json.loads(painted) if isinstance(painted, str) else painted
        rows = [[int(bool(masked)) for masked in row] for row in painted]
    except (TypeError, ValueError, RuntimeError):
        rows = []
    if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"painted_mask={painted!r} must be rows of equal length, 1 = masked")
    return rows


@older_attributes(**OLDER_FIELDS)
@_refuse_unknown_keys
@dataclass
class TrainingConfig:
    """All settings of a run; the defaults train the `tiny` preset well on two CPU cores.

    Names of presets and maskers, to which users may add, are checked when a training run starts;
    everything else is checked when the object is made and when a field is set.

    Raises:
        ValueError: a key is unknown (the message names the nearest known one), or a value has a
            wrong type or breaks a rule (the message names value, rule and remedy).

    Example:
        >>> config = mm.TrainingConfig(image_mask="block", mim_weight=0.5)
        >>> config.terms, config.image_mask_ratio
        (['contrastive', 'mim'], 0.5)
        >>> config.image_mask_ratio = 50
        Traceback (most recent call last):
        ValueError: image_mask_ratio=50 must be in [0, 1): 0 masks nothing, 0.5 half; ...
    """

    # -- length and size ---------------------------------------------------------------------

    # Passes over the training set.
    num_epochs: int = 14
    # Images per optimizer step, over all processes and micro-batches.
    batch_size: int = 128
    # AdamW's peak learning rate, for the default batch and the initial weights of a preset; towers
    # that start with transformers' deviation 0.02 may need 2e-3 (and 30 steps of warmup).
    learning_rate: float = 5e-4
    # Decoupled decay per step, as a fraction of the learning rate; for matrices only (not for
    # biases, norms, position embeddings and learned tokens).
    weight_decay: float = 0.1
    # Optimizer steps in which the learning rate rises from 0 to its peak.
    warmup_steps: int = 10
    # Micro-batches per optimizer step: more need less memory and give the same gradient.
    gradient_accumulation_steps: int = 1
    # The norm of the whole gradient is clipped to this; 0 = no clipping.
    max_grad_norm: float = 1.0
    # Optimizer steps after which training (and its schedule) ends; None = after num_epochs.
    max_steps: int | None = None

    # -- optimizer ---------------------------------------------------------------------------

    # Optimizer: "muon" (for the matrices of the layers; AdamW for the rest) | "adamw"; in Python
    # also f(groups with "params", "lr", "weight_decay") -> torch.optim.Optimizer.
    optimizer: str = "muon"
    # Muon's peak learning rate; None = 12 x learning_rate.
    matrix_learning_rate: float | None = None
    # How the learning rate falls after the warmup: "cosine" | "linear" | "constant"; in Python also
    # f(progress in [0, 1]) -> fraction in [0, 1].
    schedule: str = "cosine"
    # Learning rate at the last step, as a fraction of the peak, in [0, 1].
    final_lr_fraction: float = 0.02
    # Learning rate of a layer as a fraction of the next layer's, in (0, 1]; 1 = the same for all.
    layer_decay: float = 1.0
    # Number of first epochs in which the ViT is frozen (LiT: all epochs).
    frozen_image_epochs: int = 0
    # Number of first epochs in which the BERT is frozen; projections and temperature always learn.
    frozen_text_epochs: int = 0
    # Decay per step of a running mean (EMA) of all weights, which is then validated and kept as the
    # best model: 0 = none, 0.99 to 0.9999 by the length of the run.
    ema_decay: float = 0.0

    # -- model and loss ----------------------------------------------------------------------

    # Encoder to build if no model is given: "tiny" | "small" | "base".
    preset: str = "tiny"
    # Probability, in [0, 1), that a value is dropped in both towers and the projections of a model
    # built from the preset.
    dropout: float = 0.0
    # Initial temperature (CLIP's 1/14.3), at least 0.01; it is learned.
    temperature: float = 0.07
    # Contrastive loss: "info_nce" (softmax over the batch) | "sigmoid" (each pair by itself).
    loss: str = "info_nce"
    # How processes exchange their texts: "gather" (all at once) | "neighbours" (sigmoid only: round
    # a ring, so that one block of logits is held at a time).
    exchange: str = "gather"

    # -- terms: the loss is their weighted sum -------------------------------------------------

    # Weight of the contrastive loss: image and caption find each other; 0 = no contrastive loss.
    contrastive_weight: float = 1.0
    # Weight of reconstructing masked patches (MIM); with the contrastive loss, at most 1.
    mim_weight: float = 0.0
    # Weight of predicting masked tokens (MLM); with the contrastive loss, 0.1 to 1.
    mlm_weight: float = 0.0
    # Weight of telling true pairs from similar wrong pairs of the micro-batch (ITM).
    itm_weight: float = 0.0
    # How contrastive_weight changes over the steps: constant, rising, falling, first_half,
    # last_half or last_fifth; in Python also f(progress in [0, 1]) -> fraction in [0, 1].
    contrastive_schedule: str = "constant"
    # How mim_weight changes over the steps; choices as for contrastive_schedule.
    mim_schedule: str = "constant"
    # How mlm_weight changes over the steps; choices as for contrastive_schedule.
    mlm_schedule: str = "constant"
    # How itm_weight changes over the steps; choices as for contrastive_schedule.
    itm_schedule: str = "constant"
    # Views that the contrastive loss compares: "masked" (the same that are reconstructed) |
    # "unmasked" (whole images and captions, for which the encoder runs a second time).
    contrastive_view: str = "masked"
    # Let the decoder attend to the other modality, too.
    cross_modal: bool = False
    # Fraction of the pairs, in (0, 1], for which the decoder attends to the other modality; it
    # reconstructs the rest without.
    cross_modal_ratio: float = 0.75
    # Error of reconstructed patches: "mse" (MAE) | "l1" (SimMIM).
    pixel_error: str = "mse"
    # Give each target patch mean 0 and deviation 1: better features on photographs, but noise on
    # the flat patches of drawings, and reconstructions without colours.
    norm_pix_loss: bool = False
    # Width of the decoder's layers, a multiple of 32.
    decoder_width: int = 128
    # Layers of each decoder; if masked tokens are replaced and cross_modal is off, a linear head
    # needs none.
    decoder_depth: int = 2

    # -- what is masked ----------------------------------------------------------------------

    # Which patches are masked: a name in mmkit.masking.IMAGE_MASKERS.
    image_mask: str = "random"
    # Fraction of the patches to mask, in [0, 1).
    image_mask_ratio: float = 0.5
    # Masked patches: "drop" (not encoded, which saves time) | "replace" (by a mask token).
    image_mask_mode: str = "drop"
    # How image_mask_ratio changes: "constant" | "linear" | "cosine" (over the epochs, to the final
    # ratio) | "uniform" (drawn between the two for each sample and epoch).
    image_mask_schedule: str = "constant"
    # Final ratio of image_mask_schedule, in [0, 1); None with "constant".
    image_mask_final_ratio: float | None = None
    # Rows of patches, 1 = masked (or the same as JSON), for image_mask="painted" only.
    painted_mask: str | list[list[int]] | None = None
    # Decay per step, in [0, 1), of the running mean (EMA) of the ViT that "attentive" uses.
    ema_momentum: float = 0.996
    # Which tokens are masked: a name in mmkit.masking.TEXT_MASKERS.
    text_mask: str = "random"
    # Fraction of the tokens to mask, in [0, 1); padding and special tokens do not count.
    text_mask_ratio: float = 0.0
    # Masked tokens: "replace" (by a mask token) | "drop" (not encoded) | "80/10/10" (BERT's).
    text_mask_mode: str = "replace"
    # How text_mask_ratio changes; choices as for image_mask_schedule.
    text_mask_schedule: str = "constant"
    # Final ratio of text_mask_schedule, in [0, 1); None with "constant".
    text_mask_final_ratio: float | None = None
    # Number of last epochs in which nothing is masked (FLIP's unmasked tuning).
    unmasked_epochs: int = 0
    # Augmentation of the images: "none" | "shift" (by up to 1/16 of the side; never flipped).
    augment: str = "none"

    # -- machine -----------------------------------------------------------------------------

    # Number type: "auto" (the one that is fast on the device) | "bf16" | "fp16" (scaled) | "no".
    mixed_precision: str = "auto"
    # Steps in a row without a finite gradient after which training stops.
    max_skipped_steps: int = 20
    # Keep only the input of each layer for the backward pass: less memory, a third slower.
    gradient_checkpointing: bool = False
    # Compile each transformer layer with torch.compile (on a CPU this needs a C++ compiler).
    compile: bool = False
    # Gradient of micro-batches: "exact" (that of the whole batch) | "naive" (with fewer negatives).
    accumulation: str = "exact"
    # Use deterministic kernels; a bit-exact resume on a GPU needs them.
    deterministic: bool = False
    # Seed of all random draws: weights, order, masks, dropout.
    seed: int = 0
    # Number of processes that decode images from files.
    num_workers: int = 2

    # -- output ------------------------------------------------------------------------------

    # Epochs between two validations; the last epoch is always validated.
    eval_every: int = 1
    # Steps between two records of the training loss.
    log_every: int = 10
    # Steps between two writes of last/state.pth; 0 = at the end of each epoch.
    checkpoint_every: int = 0
    # Steps between two measurements of the gradient of each term (each costs as much as a step for
    # every term); 0 = never.
    term_gradients_every: int = 0
    # Number of states kept in last/: state.pth, and earlier ones as state-STEP.pth.
    keep_last: int = 1
    # Folder of all runs; <output_dir>/<run_name>/ holds everything that a run writes.
    output_dir: str = "runs"
    # Name of the run's folder; "" = date and time.
    run_name: str = ""

    def __setattr__(self, name: str, value: Any):
        """Set a field; ValueError for an unknown name, a wrong type or a broken rule."""
        fields = self.__dataclass_fields__
        if name in OLDER_FIELDS:
            say_renamed(f"config.{name}", name := OLDER_FIELDS[name])
        if name not in fields:
            known = nearest(name, fields)
            raise ValueError(f"{type(self).__name__} has no field {name!r}; {known}")
        object.__setattr__(self, name, _checked(name, value, fields[name].type))

    def __post_init__(self):
        """Check rules between fields; each field's own rule was checked when it was set."""
        for kind in ("image", "text"):
            name, schedule = f"{kind}_mask_final_ratio", getattr(self, f"{kind}_mask_schedule")
            rule = "given with a schedule, and only then: a fraction in [0, 1)"
            self._check(name, (getattr(self, name) is None) == (schedule == "constant"), rule)
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "compile=True with gradient_checkpointing=True recompiles every layer; take one"
            )
        if self.exchange != "gather" and self.loss != "sigmoid":
            raise ValueError(
                f"exchange={self.exchange!r} needs loss='sigmoid': a softmax needs all candidates "
                "of a row at once; take exchange='gather'"
            )
        self._check_mask()
        self._check_terms()
        if self.gradient_accumulation_steps > self.batch_size:
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} leaves empty "
                f"micro-batches of batch_size={self.batch_size}; take at most {self.batch_size}"
            )

    def _check_mask(self):
        rule = "given with image_mask='painted', and only then: rows of patches, 1 = masked"
        given = self.painted_mask is not None
        self._check("painted_mask", given == (self.image_mask == "painted"), rule)
        if self.image_mask in ("painted", "layers") and self.image_mask_schedule != "constant":
            raise ValueError(
                f"image_mask_schedule={self.image_mask_schedule!r} has nothing to change: "
                f"{self.image_mask!r} uses no ratio; take 'constant'"
            )
        if self.image_mask == "layers" and self.augment != "none":
            raise ValueError(
                f"augment={self.augment!r} moves the image away from its layers; with "
                "image_mask='layers' take augment='none'"
            )

    def _check_terms(self):
        if not any(getattr(self, f"{term}_weight") for term in TERMS):
            names = ", ".join(f"{term}_weight" for term in TERMS)
            raise ValueError(f"nothing is learned: one of {names} must be above 0")
        for term, kind in (("mim", "image"), ("mlm", "text")):
            if not getattr(self, f"{term}_weight"):
                continue
            masks = [getattr(self, f"{kind}_mask_{which}") for which in ("ratio", "final_ratio")]
            if kind == "image" and self.painted_mask is not None:
                masks = [masked for row in self.painted_mask for masked in row]
            if not any(masks):
                example = 0.75 if kind == "image" else 0.3
                raise ValueError(
                    f"{term}_weight={getattr(self, f'{term}_weight')!r} with {kind}_mask_ratio=0 "
                    f"(or an empty painted mask) masks nothing, so that there is nothing to "
                    f"reconstruct; take {kind}_mask_ratio={example}"
                )
        if self.itm_weight and not self.cross_modal:
            raise ValueError(
                f"itm_weight={self.itm_weight!r} needs cross_modal=True: to compare a caption with "
                "an image, the decoder must attend to it"
            )
        reconstructs = [term for term in self.terms if term != "contrastive"]
        if self.contrastive_view == "unmasked" and not reconstructs:
            raise ValueError(
                "contrastive_view='unmasked' without a term that reconstructs would mask nothing; "
                "take image_mask_ratio=0, or mim_weight, mlm_weight or itm_weight above 0"
            )
        if self.cross_modal and not reconstructs:
            raise ValueError(
                "cross_modal=True needs a decoder; set mim_weight, mlm_weight or itm_weight above 0"
            )

    @property
    def terms(self) -> list[str]:
        """Terms of the objective whose weight is above 0."""
        return [term for term in TERMS if getattr(self, f"{term}_weight")]

    @property
    def terms_change(self) -> bool:
        """Whether terms or their weights differ between steps."""
        constants = ("constant", TERM_SCHEDULES["constant"])
        changes = any(getattr(self, f"{term}_schedule") not in constants for term in self.terms)
        return changes or bool(self.unmasked_epochs and {"mim", "mlm"} & set(self.terms))

    def term_weights(self, step: int, total_steps: int) -> dict[str, float]:
        """Weights of the terms in a step, those above 0."""
        progress, where = step / max(1, total_steps - 1), f"step {step} of {total_steps}"
        weights = {}
        for term in self.terms:
            name = f"{term}_schedule"
            shape = getattr(self, name)
            shape = shape if callable(shape) else TERM_SCHEDULES[shape]
            value = fraction(name, shape(progress), where)
            weights[term] = getattr(self, f"{term}_weight") * value
        return {term: weight for term, weight in weights.items() if weight}

    def _check(self, name: str, holds: bool, rule: str):
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}")

    @property
    def matrix_lr(self) -> float:
        """Muon's peak learning rate, or its default."""
        return (
            12 * self.learning_rate
            if self.matrix_learning_rate is None
            else self.matrix_learning_rate
        )

    def lr_fraction(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) as a fraction of its peak.

        Linear warmup over `warmup_steps`, then the schedule down to `final_lr_fraction`.
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - 1 - self.warmup_steps)
        shape = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        value = fraction("schedule", shape(min(1.0, progress)), f"step {step} of {total_steps}")
        return self.final_lr_fraction + (1 - self.final_lr_fraction) * value

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and checkpoints; a function becomes its name."""
        values = dataclasses.asdict(self)
        for name in ("schedule", "optimizer", *(f"{term}_schedule" for term in TERMS)):
            if callable(values[name]):
                values[name] = f"function {getattr(values[name], '__qualname__', name)}"
        return values
