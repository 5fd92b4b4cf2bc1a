"""mmkit's training step without one of its optimisations: what each of them saves.

    python -m tests.benchmarks.step_speed --savings     # tiny, 50 and 75 % masked: about 6 minutes

Each class is `peers.Mmkit` without that optimisation; weights, images, captions and masks are the
same, and so is the loss, up to rounding (the last two compute in another way, as they say).
"""

from typing import Any

import torch

from mmkit.models import encoder, layers
from mmkit.models.patches import pick_tokens
from mmkit.training import optim
from tests.benchmarks.peers import LEARNING_RATE, Mmkit


class TransformersLayers(Mmkit):
    """Layers as transformers computes them: three products for queries, keys and values, padding
    in all of them, and everything kept for the backward pass."""

    def __init__(self, *settings, **options):
        encoder.own_layers = lambda tower, x: False  # type: ignore[assignment]
        super().__init__(*settings, **options)


class Padded(Mmkit):
    """Captions with their padding in every product."""

    def __init__(self, *settings, **options):
        def all_positions(valid):
            everywhere = torch.arange(valid.numel())
            return everywhere, everywhere

        layers._places = all_positions  # type: ignore[assignment]
        super().__init__(*settings, **options)


class FullLength(Padded):
    """Captions padded to the longest of the training set, as a fixed context length does."""

    def __init__(self, *settings, **options):
        super().__init__(*settings, **options)
        longest = int(self.trainer.train.encoded_captions()[1].max())
        for batch in self.batches:
            room = (0, longest - batch.input_ids.shape[1])
            batch.input_ids = torch.nn.functional.pad(batch.input_ids, room)
            batch.valid = torch.nn.functional.pad(batch.valid, room)


class Late(Mmkit):
    """Patches dropped after the projection: all are normalised and projected."""

    def __init__(self, *settings, **options):
        super().__init__(*settings, **options)
        project = self.model._patches

        def project_all(pixel_values, masking, mode):
            x = project(pixel_values, None, mode)
            if masking is None:
                return x
            return torch.cat([x[:, :1], pick_tokens(x[:, 1:], masking.ids_keep)], dim=1)

        self.model._patches = project_all  # type: ignore[method-assign]


class Replaced(Mmkit):
    """Masked patches encoded as mask tokens."""

    def __init__(self, *settings, **options):
        super().__init__(*settings, image_mask_mode="replace", **options)


class FloatImages(Mmkit):
    """Whole images as normalised floats before patches are picked."""

    def __init__(self, *settings, **options):
        super().__init__(*settings, **options)
        for batch in self.batches:
            batch.pixel_values = self.model.normalize(batch.pixel_values)


class Unfused(Mmkit):
    """AdamW as a loop over the weights."""

    def __init__(self, *settings, **options):
        def loop(groups):
            return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=False, foreach=False)

        super().__init__(*settings, optimizer=loop, **options)


class Muon(Mmkit):
    """Muon instead of AdamW, as in the default recipe."""

    def __init__(self, *settings, **options):
        super().__init__(*settings, optimizer="muon", **options)


class TorchMuon(Mmkit):
    """torch.optim.Muon, one matrix after the other."""

    def __init__(self, *settings, **options):
        optim.Muon = torch.optim.Muon  # type: ignore[misc, assignment]
        super().__init__(*settings, optimizer="muon", **options)


class Compiled(Mmkit):
    """transformers' layers compiled by torch.compile, instead of ours."""

    def __init__(self, *settings, **options):
        super().__init__(*settings, compile=True, **options)


class Float32(Mmkit):
    """float32 instead of bfloat16."""

    def __init__(self, size, ratio, data, batch_size, precision, **options):
        super().__init__(size, ratio, data, batch_size, "no", **options)


SAVINGS: dict[str, Any] = {
    "transformers' layers": TransformersLayers,
    "padded captions": Padded,
    "captions of full length": FullLength,
    "patches left out late": Late,
    "masked patches encoded": Replaced,
    "float images": FloatImages,
    "AdamW not fused": Unfused,
    "Muon": Muon,
    "torch's Muon": TorchMuon,
    "compiled": Compiled,
    "float32": Float32,
}
