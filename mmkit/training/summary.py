"""The effective configuration, which a run prints before it starts.

It is read from the model and its first batch, not from the settings, so that a mask that masks
nothing, or an accumulation that loses negatives, shows here.
Walk-through: notebooks/03_training.ipynb.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

from ..config import TERMS, TrainingConfig
from ..data.images import as_if_not_normalised
from ..data.partners import partner_counts
from ..device import multiplies_bfloat16, why_precision
from ..evaluation.retrieval import chance_of_recall
from ..files import shown
from ..masking.image import ATTENTION_MASKERS
from ..masking.text import maskable_tokens
from ..models.flops import objective_flops, tower_flops
from ..models.layers import dropouts
from ..noise import mask_noise
from ..objective import PAIR_ENTROPY
from .optim import Muon, orthogonalizing_type


def effective_configuration(trainer) -> dict:
    """Parameters, tokens encoded per pair, realised ratios, negatives, FLOPs, precision, machine.

    Args:
        trainer: a MaskedMultimodalTrainer.
    Returns:
        Plain values by name. Ratios are fractions of patches and of maskable tokens; FLOPs are per
        pair and training step; "words" is the mean number of tokens of a caption.
    """
    config, model = trainer.config, trainer.model
    batch = trainer.first_batch()
    image, text = trainer.maskings(batch, epoch=0)
    patches, padded = model.num_patches, batch.valid.shape[1]
    encoded_patches = patches
    tokens = encoded_tokens = batch.valid.sum(1).float().mean().item()
    if image is not None and config.image_mask_mode == "drop":
        encoded_patches = image.ids_keep.shape[1]  # including padding, where ratios differ
    if text is not None and config.text_mask_mode == "drop":
        encoded_tokens = text.keep_valid.sum(1).float().mean().item()
        padded = text.ids_keep.shape[1]
    maskable = maskable_tokens(batch.input_ids, batch.valid, model.special_ids).sum().item()
    pairs = len(trainer.train) / trainer.steps_per_epoch
    look = 0.0 if trainer.attention_ema is None else tower_flops(model.vit.config, patches / 4 + 1)
    encoded, whole = (encoded_patches, encoded_tokens), (patches, tokens)
    flops = objective_flops(config, model, encoded, whole, padded) + look
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "optimizer": " + ".join(map(_optimizer, trainer.optimizers)),
        "rates": "; ".join(map(_rates, trainer.optimizers)),
        "dropout": _dropout(model),
        "images": len(trainer.train),
        "captions": sum(map(len, trainer.train.texts)),
        "steps": trainer.total_steps,
        "pairs_per_step": pairs,
        "patches": patches,
        "patches_encoded": encoded_patches,
        "image_mask_ratio": 0.0 if image is None else image.mask.float().mean().item(),
        "words": tokens,
        "tokens_encoded": encoded_tokens,
        "text_mask_ratio": 0.0 if text is None else text.mask.sum().item() / max(1, maskable),
        **_negatives(trainer),
        "gflop_per_pair": flops / 1e9,
        "precision": _name(trainer.precision or torch.float32),
        "why_precision": why_precision(config.mixed_precision, trainer.device),
        "device": str(trainer.device),
        "processes": trainer.processes,
        "threads": torch.get_num_threads(),
        "not_normalised": as_if_not_normalised(batch.pixel_values, model.pixel_stats),
    }


def _negatives(trainer) -> dict[str, float]:
    """Negatives in the run's first batch, over all processes.

    "negatives" of a pair (mean of both directions), number of pairs "compared" with it, and
    "guessing_costs", the loss of guessing: the mean of ln(1 + negatives).
    """
    config, train = trainer.config, trainer.train
    rows = train.epoch_rows(config.seed, 0, trainer.steps_per_epoch)[0]
    if config.accumulation != "exact":  # each micro-batch by itself
        parts = config.gradient_accumulation_steps
        by_rank = rows.tensor_split(trainer.processes)
        rows = torch.cat([own.tensor_split(min(parts, len(own)))[0] for own in by_rank])
    noise = mask_noise(config.seed, 0, train.sample_ids[rows], 1, "caption")[:, 0]
    captions, images = train.partners(rows, train.drawn_captions(rows, noise))
    negatives = len(rows) - torch.cat(partner_counts(images, captions)).double()
    return {
        "negatives": negatives.mean().item(),
        "compared": len(rows) - 1,
        "guessing_costs": negatives.log1p().mean().item(),
    }


def _pool(data) -> tuple[float, float]:
    """(loss of guessing in a validation, chance level of R@1), with all partners."""
    captions, images = data.partners(None, data.correct_captions.rarest())
    negatives = len(data) - torch.cat(partner_counts(images, captions)).double()
    return negatives.log1p().mean().item(), sum(chance_of_recall(data)) / 2


def _guessing(config, costs: float) -> str:
    """A text with the loss of guessing; "" for the sigmoid loss, which has no such reference."""
    if config.loss != "info_nce":
        return ""
    among = math.exp(costs)
    count = f"{among:.0f}" if abs(among - round(among)) < 1e-6 else f"{among:.1f}"
    return f"; guessing costs ln({count}) = {costs:.2f}"


def describe(trainer) -> str:
    """Describe the effective configuration, with the reference lines of the training curves.

    Args:
        trainer: a MaskedMultimodalTrainer.
    Returns:
        A text of several lines: run, model, peak rates, data, masks, negatives, cost, machine,
        validation, and under "beware" settings that are likely mistakes.
    Example:
        >>> trainer = mm.MaskedMultimodalTrainer(mm.TrainingConfig(batch_size=8), data, model=model)
        >>> print(mm.describe(trainer).splitlines()[3])
        data        23 images, ...
    """
    e, config = effective_configuration(trainer), trainer.config
    left_out = e["compared"] - e["negatives"]
    count = f"{e['negatives']:.1f} of {e['compared']}" if left_out else f"{e['compared']}"
    lines = {
        "run": shown(trainer.path),
        "model": f"{e['parameters'] / 1e6:.2f} M parameters, {e['optimizer']}, dropout "
        f"{e['dropout']}",
        "peak rates": e["rates"],
        "data": f"{e['images']:,} images, {e['captions']:,} captions; "
        f"{e['steps']:,} steps of {e['pairs_per_step']:.1f} pairs",
        "image mask": f"{config.image_mask}, {100 * e['image_mask_ratio']:.1f} % masked "
        f"({config.image_mask_mode}{_schedule(config, 'image')}): {e['patches_encoded']} of "
        f"{e['patches']} patches encoded",
        "text mask": f"{config.text_mask}, {100 * e['text_mask_ratio']:.1f} % masked "
        f"({config.text_mask_mode}{_schedule(config, 'text')}): "
        f"{e['tokens_encoded']:.1f} of {e['words']:.1f} tokens encoded",
        "terms": _terms(trainer),
        "negatives": f"{count} per pair{_guessing(config, e['guessing_costs'])}",
        "cost": f"{e['gflop_per_pair']:.2f} GFLOP per pair and step",
        "machine": f"{e['device']}, {e['precision']} ({e['why_precision']}), "
        f"processes: {e['processes']}, threads: {e['threads']}",
    }
    if cut := trainer.train.cut_captions():
        lines["data"] += f"; {cut:,} captions are longer than {trainer.train.max_length} tokens"
        lines["data"] += " and are cut"
    if left_out:
        lines["negatives"] += "; the others match, too"
    if common := trainer.train.common_captions():
        named = ", ".join(f"“{caption}” ({n:,} images)" for caption, n in common[:3])
        more = f" and {len(common) - 3:,} more" if len(common) > 3 else ""
        fraction = 100 * trainer.train.correct_captions.left_out()
        lines["negatives"] += (
            f"; over all batches {fraction:.1f} % do, mainly because very many images share a "
            f"caption: {named}{more}"
        )
    if config.terms == ["contrastive"]:
        del lines["terms"]  # the default
    if "contrastive" not in config.terms:
        del lines["negatives"]
    lines["validation"] = _validation(trainer)
    if tools := _tools(trainer):
        lines["tools"] = "; ".join(tools)
    if beware := _beware(trainer, e):
        lines["beware"] = "; ".join(beware)
    return "\n".join(f"{name:11} {text}" for name, text in lines.items())


def _validation(trainer) -> str:
    """A text on how best_model.pth is chosen."""
    config, val = trainer.config, trainer.val
    if val is None:
        chosen = "chosen by the training loss"
        if config.terms_change:
            chosen = "the last one (the terms of the training loss change)"
        return f"none: best_model.pth is {chosen}"
    text = f"{len(val):,} images"
    if cut := val.cut_captions():
        text += f", {cut:,} captions cut"
    if "contrastive" in config.terms:
        costs, chance = _pool(val)
        text += f" as one pool{_guessing(config, costs)}; chance of R@1 {100 * chance:.1f} %"
    return text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's name, with the type that Muon computes in."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Muon):
        return kind
    return f"{kind} ({_name(orthogonalizing_type(optimizer.param_groups[0]['params'][0].device))})"


def _rates(optimizer: torch.optim.Optimizer) -> str:
    """A text with an optimizer's peak learning rates and weight decays."""
    texts = []
    for key in ("peak_lr", "weight_decay"):
        values = sorted({float(group.get(key, 0.0)) for group in optimizer.param_groups})
        texts.append(f"{values[0]:g}" + (f" to {values[-1]:g}" if len(values) > 1 else ""))
    return f"{type(optimizer).__name__} {texts[0]}, decay {texts[1]}"


def _beware(trainer, e: dict) -> list[str]:
    """Texts on what is likely a mistake, each with its remedy."""
    config, beware = trainer.config, _settings_without_use(trainer, e)
    if trainer.trained_before:
        beware.append(
            f"the model has been trained before ({trainer.trained_before:,} steps) and this run "
            "starts from its weights; for a new start build a new model, or leave model= out"
        )
    if config.warmup_steps > e["steps"] / 2:
        beware.append(
            f"the warmup takes {config.warmup_steps} of {e['steps']} steps, so that the learning "
            "rate hardly decays; lower warmup_steps, or train longer"
        )
    if e["not_normalised"]:
        beware.append(e["not_normalised"])
    slow = trainer.precision == torch.float16 and trainer.device.type == "cpu"
    if slow or (trainer.precision == torch.bfloat16 and not multiplies_bfloat16(trainer.device)):
        beware.append(
            f"{e['device']} has no units for {e['precision']}, which is slower than float32 there; "
            "take mixed_precision='auto'"
        )
    return beware


def _learns(term: str) -> Callable[[TrainingConfig], bool]:
    return lambda config: term in config.terms


# field -> what it needs in order to have an effect, as a text and as a test
_NEEDS: dict[str, tuple[str, Callable[[TrainingConfig], bool]]] = {
    "matrix_learning_rate": ("optimizer='muon'", lambda c: c.optimizer == "muon"),
    "image_mask": ("image_mask_ratio above 0", lambda c: _masks(c, "image")),
    "text_mask": ("text_mask_ratio above 0", lambda c: _masks(c, "text")),
    "text_mask_mode": ("text_mask_ratio above 0", lambda c: _masks(c, "text")),
    "ema_momentum": ("an attentive masker", lambda c: c.image_mask in ATTENTION_MASKERS),
    "cross_modal_ratio": ("cross_modal=True", lambda c: c.cross_modal),
    "pixel_error": ("mim_weight above 0", _learns("mim")),
    "norm_pix_loss": ("mim_weight above 0", _learns("mim")),
    "decoder_width": ("a term that reconstructs", lambda c: c.terms != ["contrastive"]),
    "decoder_depth": ("a term that reconstructs", lambda c: c.terms != ["contrastive"]),
    **{f"{term}_schedule": (f"{term}_weight above 0", _learns(term)) for term in TERMS},
}


def _masks(config: TrainingConfig, kind: str) -> bool:
    """Whether the configuration masks a modality at all."""
    ratios = [getattr(config, f"{kind}_mask_{which}") for which in ("ratio", "final_ratio")]
    return any(ratios) or (kind == "image" and config.painted_mask is not None)


def _settings_without_use(trainer, e: dict) -> list[str]:
    """Texts on settings that were chosen and have no effect in this run."""
    config, found = trainer.config, []
    default = TrainingConfig()
    for name, (need, used) in _NEEDS.items():
        if (value := getattr(config, name)) != getattr(default, name) and not used(config):
            found.append(f"{name}={value!r} has no effect without {need}")
    given = dict(trainer.model_settings)
    if given and trainer.model.decoder is not None:
        given["decoder_width"] = trainer.model.decoder.spec["width"]
    for name, actual in given.items():
        if (asked := getattr(config, name)) not in (actual, getattr(default, name), "own"):
            found.append(f"{name}={asked!r} is for a new model; the given one has {actual!r}")
    masked = [kind for kind in ("image", "text") if _masks(config, kind)]
    if config.unmasked_epochs >= trainer.num_epochs and masked:
        found.append(
            f"unmasked_epochs={config.unmasked_epochs} of {trainer.num_epochs} epochs: nothing is "
            "masked in this run; lower it, or take ratios of 0"
        )
        masked = []
    for kind in masked:  # by the masks of the first epoch
        ratio = getattr(config, f"{kind}_mask_ratio")
        if ratio and not e[f"{kind}_mask_ratio"]:
            found.append(f"{kind}_mask_ratio={ratio!r} masks nothing; raise it, or take 0")
    for term in trainer.idle_terms:
        found.append(
            f"{term}_weight={getattr(config, f'{term}_weight'):g} has nothing to learn from in any "
            f"step; change {term}_schedule, unmasked_epochs or the masks"
        )
    if not any(group["peak_lr"] for o in trainer.optimizers for group in o.param_groups):
        found.append("all learning rates are 0: no weight will change")
    return found


def _dropout(model) -> str:
    """A text with the model's dropout: one number, or one for each part where they differ."""
    projections = nn.ModuleList([model.image_projection, model.text_projection])
    parts = {"ViT": model.vit, "BERT": model.bert, "projections": projections}
    if model.decoder is not None:
        parts["decoder"] = model.decoder
    most = {name: max(dropouts(part), default=0.0) for name, part in parts.items()}
    if len(set(most.values())) == 1:
        return f"{most['ViT']:g}"
    return ", ".join(f"{value:g} ({name})" for name, value in most.items())


def _terms(trainer) -> str:
    """A text with the weighted terms of the loss, the decoder, and the loss of guessing a match."""
    config, texts = trainer.config, []
    for term in config.terms:
        schedule = getattr(config, f"{term}_schedule")
        name = "own schedule" if callable(schedule) else schedule
        how = "" if schedule == "constant" else f" ({name})"
        texts.append(f"{getattr(config, f'{term}_weight'):g} x {term}{how}")
    line = " + ".join(texts)
    if "contrastive" in config.terms and config.contrastive_view == "unmasked":
        line += "; contrast on an unmasked view"
    if (decoder := trainer.model.decoder) is not None:
        parts = {"pixel": decoder.pixel_layers, "token": decoder.word_layers}
        depths = {"pixel": decoder.spec["pixel_depth"], "token": decoder.spec["word_depth"]}
        layers = [f"{depths[k]} for {k}s" for k, part in parts.items() if part]
        line += f"; decoder layers: {', '.join(layers) or 'none'}, {decoder.spec['width']} wide"
        if decoder.across:
            fraction = 100 * config.cross_modal_ratio
            line += f", with the other modality as context in {fraction:.0f} % of the pairs"
    if "itm" in config.terms:
        line += f"; guessing a match costs {PAIR_ENTROPY:.2f}"
    return line


def _tools(trainer) -> list[str]:
    """Texts on the other features that this run uses."""
    config, tools = trainer.config, []
    for kind, tower in (("image", "ViT"), ("text", "BERT")):
        if epochs := getattr(config, f"frozen_{kind}_epochs"):
            tools.append(f"{tower} frozen for {min(epochs, trainer.num_epochs)} epochs")
    if config.layer_decay < 1:
        tools.append(f"each layer learns at {config.layer_decay:g} times the rate of the one above")
    if config.ema_decay:
        tools.append(f"a running mean of the weights (decay {config.ema_decay:g}) is validated")
    if config.gradient_checkpointing:
        tools.append("activations recomputed in the backward pass")
    if config.compile:
        tools.append("layers compiled (the first steps are slow)")
    return tools


def _schedule(config, kind: str) -> str:
    """A text on how a ratio changes after the first epoch."""
    schedule = getattr(config, f"{kind}_mask_schedule")
    if schedule == "constant":
        return ""
    start, final = (100 * getattr(config, f"{kind}_mask_{x}") for x in ("ratio", "final_ratio"))
    if schedule == "uniform":
        return f", {start:.0f} to {final:.0f} % at random; padded to the longest"
    return f", now; {schedule} to {final:.0f} %"
