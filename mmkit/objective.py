"""The objective: the weighted sum of contrast, masked pixels, masked tokens and matching.

Every term except the contrastive one is a mean over what was masked in the GLOBAL batch. Its parts
are sums over a micro-batch divided by the count of the whole batch, so that they add up to the same
mean however the batch is split (a mean of means would not, where micro-batches mask different
numbers of tokens). The masks are known before the forward pass, and with them the counts.
Walk-through: notebooks/07_reconstruction.ipynb.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .config import TrainingConfig
from .data.batch import Batch
from .distributed import all_reduce_sum
from .losses import masked_pixel_loss, masked_token_loss, matching_loss
from .masking.core import Masking
from .models.decoder import ForwardSpec
from .models.encoder import EncoderOutput, MultimodalEncoder
from .models.patches import patchify
from .noise import mask_noise

Maskings = tuple[Masking | None, Masking | None]
HEADS = {"mim": "pixels", "mlm": "words", "itm": "matching"}  # term -> the decoder's head for it


@dataclass
class MicroBatch:
    """A part of a batch, with what its forward pass is to compute."""

    batch: Batch
    maskings: Maskings
    wanted: ForwardSpec  # besides the features, see `Objective.wanted`
    terms: dict[str, Tensor] = field(default_factory=dict)  # its parts of the terms, once known

    @property
    def partners(self) -> tuple[Tensor, Tensor] | None:
        """Partners of its rows, see `Batch.partners`."""
        return self.batch.partners

    def __len__(self) -> int:
        return len(self.batch)


class Objective:
    """What each step computes besides the features, and the terms of its loss."""

    def __init__(self, config: TrainingConfig, model: MultimodalEncoder):
        self.config, self.model = config, model

    def weights(self, step: int, total_steps: int) -> dict[str, float]:
        """Weights of the terms in a step, those above 0."""
        return self.config.term_weights(step, total_steps)

    def wanted(
        self, batch: Batch, maskings: Maskings, epoch: int, weights: dict[str, float]
    ) -> ForwardSpec:
        """What the forward pass of a micro-batch computes, a pure function of the arguments."""
        config, ids = self.config, batch.sample_ids
        image, text = maskings
        context = matching = None
        if config.cross_modal and config.cross_modal_ratio < 1:
            draw = mask_noise(config.seed, epoch, ids, 1, "across")[:, 0]
            own = torch.arange(len(ids), device=ids.device)
            context = own.masked_fill(draw >= config.cross_modal_ratio, -1)
        if "itm" in weights:
            matching = mask_noise(config.seed, epoch, ids, 2, "matching")
        return ForwardSpec(
            contrast="contrastive" in weights,
            view=config.contrastive_view,
            pixels="mim" in weights and image is not None,
            tokens="mlm" in weights and text is not None,
            matching=matching,
            context=context,
        )

    def counts(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        """How many patches, tokens and pairs of the global batch each term is a mean over.

        {} for the contrastive term alone, which then needs no exchange between processes.
        """
        if self.config.terms == ["contrastive"]:
            return {}
        total = torch.zeros(3, dtype=torch.int64, device=self.model.logit_scale.device)
        for micro in micro_batches:
            (image, text), want = micro.maskings, micro.wanted
            if want.pixels and image is not None:
                total[0] += image.mask.sum()
            if want.tokens and text is not None:
                total[1] += text.mask.sum()
            if want.matching is not None:
                total[2] += num_pairs(micro.batch.correct(), want)
        counts = all_reduce_sum(total).tolist()  # waits for the GPU only once
        return dict(zip(HEADS, counts, strict=True))

    def parts(
        self, out: EncoderOutput, batch: Batch, maskings: Maskings, counts: dict[str, int]
    ) -> dict[str, Tensor]:
        """This micro-batch's part of the global mean of each term, unweighted."""
        parts, sums = {}, term_sums(self.model, out, batch, maskings, self.config.pixel_error)
        for term, value in sums.items():
            parts[term] = value / max(1, counts[term])
        return parts


def term_sums(
    model: MultimodalEncoder,
    out: EncoderOutput,
    batch: Batch,
    maskings: Maskings,
    pixel_error: str = "mse",
) -> dict[str, Tensor]:
    """Summed loss of each term that `out` has a prediction for."""
    sums, (image, text) = {}, maskings
    if out.pixels is not None and image is not None:
        patches = patchify(model.normalize(batch.pixel_values), model.patch_size)
        assert model.decoder is not None
        norm = model.decoder.norm_pix_loss
        sums["mim"] = masked_pixel_loss(
            out.pixels, patches, image.mask, norm, pixel_error, reduction="sum"
        )
    if out.token_logits is not None and text is not None:
        labels = batch.input_ids[text.mask]
        sums["mlm"] = masked_token_loss(out.token_logits, labels, reduction="sum")
    if out.matching is not None and out.match is not None:
        sums["itm"] = matching_loss(out.matching, out.match, reduction="sum")
    return sums


def num_pairs(correct: Tensor, wanted: ForwardSpec) -> Tensor:
    """Number of true and wrong pairs of a micro-batch.

    Each row whose decoder attends to the other modality is a true pair, and has a wrong image and a
    wrong caption where the micro-batch has both. correct (B, B): see `Batch.correct`.
    """
    own = torch.arange(len(correct), device=correct.device)
    looking = (
        torch.ones_like(own, dtype=torch.bool) if wanted.context is None else wanted.context == own
    )
    other = ~correct.all(1) & ~correct.all(0)
    return looking.sum() + 2 * (looking & other).sum()


PAIR_ENTROPY = math.log(3) - 2 / 3 * math.log(2)  # nats of one true pair in three: 0.637
