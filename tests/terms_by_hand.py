"""Objectives of several terms, and their gradients by the definition of each term."""

import torch

import mmkit as mm
from mmkit.losses import masked_pixel_loss, masked_token_loss, matching_loss
from mmkit.models.decoder import ForwardSpec
from mmkit.models.patches import patchify

BESIDE = dict(mim_weight=0.7, mlm_weight=0.3, decoder_width=32, decoder_depth=1)
ALL = BESIDE | dict(itm_weight=0.4, cross_modal=True, image_mask_ratio=0.6)
ALONE = dict(contrastive_weight=0.0, decoder_width=32, decoder_depth=1)
CASES = {
    "all": ALL,
    "all, unmasked view": ALL | dict(contrastive_view="unmasked"),
    "matching alone": ALONE | dict(itm_weight=1.3, cross_modal=True),
    "contrast, pixels, words": BESIDE | dict(contrastive_weight=1.7),
    "sigmoid": BESIDE | dict(loss="sigmoid", augment="shift"),
    "unmasked view": BESIDE | dict(contrastive_view="unmasked"),
    "MAE": ALONE | dict(mim_weight=1.0, norm_pix_loss=True, image_mask_ratio=0.75),
    "SimMIM": ALONE | dict(mim_weight=1.0, image_mask_mode="replace", pixel_error="l1"),
    "BERT": ALONE | dict(mlm_weight=1.0, text_mask_mode="80/10/10"),
    "words dropped": BESIDE | dict(text_mask_mode="drop"),
    "a ratio for each": BESIDE | dict(
        cross_modal=True, cross_modal_ratio=0.5, image_mask_ratio=0.2,
        image_mask_schedule="uniform", image_mask_final_ratio=0.8, text_mask_ratio=0.1,
        text_mask_schedule="uniform", text_mask_final_ratio=0.6, text_mask_mode="drop",
    ),
}  # fmt: skip


def gradients(model) -> dict:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_close(ours: dict, reference: dict):
    """Each parameter's gradient is within 1e-5 of its norm (or of 1e-3 of the total norm)."""
    whole = torch.stack([g.norm() for g in reference.values()]).norm()
    for name in ours | reference:
        theirs = reference.get(name, torch.zeros(()))
        off = (ours.get(name, torch.zeros(())) - theirs).norm()
        assert off < 1e-5 * max(theirs.norm(), 1e-3 * whole), name


def by_hand(trainer, batch, parts: int | list[int], weights=None, epoch: int = 0) -> dict:
    """Each term by its definition, over all pairs at once, with all graphs kept; the gradient stays
    in the parameters. Dropout draws what an exact step from here draws. parts: the number of
    micro-batches, or the number of pairs of each."""
    config, model, objective = trainer.config, trainer.model, trainer.objective
    weights = weights or objective.weights(0, trainer.total_steps)
    modes = (config.image_mask_mode, config.text_mask_mode)
    whole = trainer.plan.augmented(batch, epoch)
    sizes = parts if isinstance(parts, list) else [len(part) for part in whole.split(parts)]
    micro_batches = [whole[rows] for rows in torch.arange(len(whole)).split(sizes)]
    outs, patches, masks = [], [], ([], [])
    for i, micro in enumerate(micro_batches):
        drawn = trainer.plan.draw(micro, epoch)
        before = torch.get_rng_state()
        if "contrastive" in weights and i < len(sizes) - 1:  # features first …
            with torch.no_grad():
                model(micro, *drawn, *modes, ForwardSpec(view=config.contrastive_view))
            after = torch.get_rng_state()
            torch.set_rng_state(before)  # … and then the same draws again
        outs.append(model(micro, *drawn, *modes, objective.wanted(micro, drawn, epoch, weights)))
        if "contrastive" in weights and i < len(sizes) - 1:
            torch.set_rng_state(after)
        patches.append(patchify(model.normalize(micro.pixel_values), model.patch_size))
        for kept, masking in zip(masks, drawn, strict=True):
            kept.append(None if masking is None else masking.mask)

    def joined(name):
        return torch.cat([getattr(out, name) for out in outs])

    terms = {}
    if "contrastive" in weights:
        args = joined("image_features"), joined("text_features"), model.logit_scale.exp()
        if config.loss == "sigmoid":
            terms["contrastive"] = mm.sigmoid_loss(*args, model.logit_bias, batch.correct())
        else:
            terms["contrastive"] = mm.info_nce(*args, batch.correct())
    if "mim" in weights:
        terms["mim"] = masked_pixel_loss(
            joined("pixels"), torch.cat(patches), torch.cat(masks[0]), config.norm_pix_loss,
            config.pixel_error,
        )  # fmt: skip
    if "mlm" in weights:
        terms["mlm"] = masked_token_loss(
            joined("token_logits"), batch.input_ids[torch.cat(masks[1])]
        )
    if "itm" in weights:
        terms["itm"] = matching_loss(joined("matching"), joined("match"))
    sum(weights[term] * value for term, value in terms.items()).backward()
    return {term: value.detach() for term, value in terms.items()}
