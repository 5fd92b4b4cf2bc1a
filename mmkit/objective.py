"""One objective: the weighted sum of contrast, hidden pixels, hidden words and matching.

Each term but the contrast is a mean over what was hidden in the GLOBAL batch: its parts are sums
over a micro-batch divided by the count of the whole, so that they add up to the same mean however
the batch is cut (a mean of means would not, where micro-batches hide different numbers). Masks are
known before the forward pass, and with them the counts. Walk-through:
notebooks/07_reconstruction.ipynb.
"""

import functools
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
from .masking.plan import MaskPlan
from .models.decoder import ForwardSpec
from .models.encoder import EncoderOutput, MultimodalEncoder
from .models.patches import patchify
from .noise import mask_noise

Maskings = tuple[Masking | None, Masking | None]


@dataclass
class MicroBatch:
    """A part of a batch with all that its forward pass is asked for."""

    batch: Batch
    maskings: Maskings
    wanted: ForwardSpec  # beside the features, see `Objective`
    terms: dict[str, Tensor] = field(default_factory=dict)  # its parts of the terms, as found

    @property
    def partners(self) -> tuple[Tensor, Tensor] | None:
        """Of its rows, see `Batch.partners`."""
        return self.batch.partners

    def __len__(self) -> int:
        return len(self.batch)


class Objective:
    """What each step is asked for beside its features, and what came of it."""

    def __init__(self, config: TrainingConfig, model: MultimodalEncoder):
        self.config, self.model = config, model

    def prepare_model(self):
        """Give the model the heads that the terms need; ValueError where its own do not serve."""
        config, decoder = self.config, self.model.decoder
        needed = {term: bool(getattr(config, f"{term}_weight"))
                  for term in ("pixels", "words", "matching")}  # fmt: skip
        if not any(needed.values()):
            return
        if decoder is None:
            depth, across = config.decoder_depth, config.cross_modal
            self.model.add_decoder(
                **needed,
                across=across,
                width=config.decoder_width,
                pixel_depth=depth if across or config.image_mask_mode == "drop" else 0,
                word_depth=depth if across or config.text_mask_mode == "drop" else 0,
                norm_pix_loss=config.norm_pix_loss,
                dropout=self.model.dropout,
            )
            return
        missing = [term for term in needed if needed[term] and not decoder.spec[term]]
        if missing:
            raise ValueError(
                f"the model's decoder has no head for {', '.join(missing)}; call "
                "model.add_decoder(...) with all heads, or set model.decoder = None for a new one"
            )
        fields = {"across": "cross_modal"}
        if needed["pixels"]:
            fields["norm_pix_loss"] = "norm_pix_loss"
        for name, option in fields.items():
            wanted = getattr(config, option)
            if decoder.spec[name] != wanted:
                raise ValueError(
                    f"{option}={wanted} is not what the model's decoder was built for; give "
                    f"{option}={decoder.spec[name]}, or set model.decoder = None for a new one"
                )
        for term, kind in (("pixels", "image"), ("words", "text")):
            dropped = getattr(config, f"{kind}_mask_mode") == "drop"
            if needed[term] and dropped and not decoder.spec[f"{term[:-1]}_depth"]:
                raise ValueError(
                    f"{kind}_mask_mode='drop' needs layers in the model's head for {term}, and it "
                    "has none; take 'replace', or set model.decoder = None for a new one"
                )

    def check_steps(self, total_steps: int, steps_per_epoch: int, plan: MaskPlan) -> list[str]:
        """Evaluate all schedules for all steps of the run: the terms that learn in none of them.

        Raises ValueError where a schedule leaves its range, or where a step has nothing to learn.
        """
        plan.check_ratios()
        hides, learns = functools.cache(plan.hides), set()
        for step in range(total_steps):
            self.config.lr_fraction(step, total_steps)  # raises outside [0, 1]
            terms, epoch = set(self.weights(step, total_steps)), step // steps_per_epoch
            idle = {
                term
                for term, kind in (("pixels", "image"), ("words", "text"))
                if term in terms and not hides(kind, epoch)
            }
            learns |= terms - idle
            if not terms - idle:
                masked = " (nothing is hidden in it)" if idle else ""
                raise ValueError(
                    f"step {step} of {total_steps} has no term to learn from{masked}; change the "
                    "terms' schedules, those of the masks, or unmasked_epochs"
                )
        return [term for term in self.config.terms if term not in learns]

    def weights(self, step: int, total_steps: int) -> dict[str, float]:
        """Each term's weight in a step, those above 0."""
        return self.config.term_weights(step, total_steps)

    def wanted(
        self, batch: Batch, maskings: Maskings, epoch: int, weights: dict[str, float]
    ) -> ForwardSpec:
        """What the forward pass of a micro-batch is asked for: a pure function of all this."""
        config, ids = self.config, batch.sample_ids
        image, text = maskings
        sees = matching = None
        if config.cross_modal and config.cross_modal_ratio < 1:
            draw = mask_noise(config.seed, epoch, ids, 1, "across")[:, 0]
            own = torch.arange(len(ids), device=ids.device)
            sees = own.masked_fill(draw >= config.cross_modal_ratio, -1)
        if "matching" in weights:
            matching = mask_noise(config.seed, epoch, ids, 2, "matching")
        pixels, words = "pixels" in weights, "words" in weights
        return ForwardSpec(
            contrast="contrastive" in weights,
            view=config.contrastive_view,
            pixels=pixels and image is not None,
            words=words and text is not None,
            matching=matching,
            sees=sees,
        )

    def counts(self, micro_batches: Sequence[MicroBatch]) -> dict[str, int]:
        """How many patches, words and pairs each term is a mean over, in the global batch.

        {} for contrast alone, which then pays for no exchange between processes.
        """
        if self.config.terms == ["contrastive"]:
            return {}
        total = torch.zeros(3, dtype=torch.int64, device=self.model.logit_scale.device)
        for micro in micro_batches:
            (image, text), want = micro.maskings, micro.wanted
            if want.pixels and image is not None:
                total[0] += image.mask.sum()
            if want.words and text is not None:
                total[1] += text.mask.sum()
            if want.matching is not None:
                total[2] += num_pairs(micro.batch.correct(), want)
        counts = all_reduce_sum(total).tolist()  # a GPU is waited for once
        return dict(zip(("pixels", "words", "matching"), counts, strict=True))

    def parts(
        self, out: EncoderOutput, batch: Batch, maskings: Maskings, counts: dict[str, int]
    ) -> dict[str, Tensor]:
        """Each term's part of the global mean that this micro-batch has; unweighted."""
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
    """Summed loss of each term whose prediction is in `out`."""
    sums, (image, text) = {}, maskings
    if out.pixels is not None and image is not None:
        patches = patchify(model.normalize(batch.pixel_values), model.patch_size)
        assert model.decoder is not None
        norm = model.decoder.norm_pix_loss
        sums["pixels"] = masked_pixel_loss(
            out.pixels, patches, image.mask, norm, pixel_error, reduction="sum"
        )
    if out.word_logits is not None and text is not None:
        labels = batch.input_ids[text.mask]
        sums["words"] = masked_token_loss(out.word_logits, labels, reduction="sum")
    if out.matching is not None and out.match is not None:
        sums["matching"] = matching_loss(out.matching, out.match, reduction="sum")
    return sums


def num_pairs(correct: Tensor, wanted: ForwardSpec) -> Tensor:
    """True and wrong pairs of a micro-batch: a wrong picture and a wrong caption for each row that
    looks across and has both beside it. correct (B, B): see `Batch.correct`."""
    own = torch.arange(len(correct), device=correct.device)
    looking = torch.ones_like(own, dtype=torch.bool) if wanted.sees is None else wanted.sees == own
    other = ~correct.all(1) & ~correct.all(0)
    return looking.sum() + 2 * (looking & other).sum()


PAIR_ENTROPY = math.log(3) - 2 / 3 * math.log(2)  # nats of one true pair in three: 0.637
