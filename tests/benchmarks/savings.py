"""mmkit's training step without one of the things that make it fast: what each of them brings.

    python -m tests.benchmarks.step_speed --savings     # tiny, 50 and 75 % hidden: about 6 minutes

Each class is `peers.Mmkit` but for that one thing; weights, pictures, captions and masks are the
same, and so is the loss, up to rounding (the last two compute in another way and say so).
"""

from typing import Any

import torch

from mmkit.models import encoder, layers
from mmkit.models.patches import pick_tokens
from mmkit.training import optim
from tests.benchmarks.peers import LEARNING_RATE, Mmkit


class Serial(Mmkit):
    """Both threads in every product, instead of a half of the batch for each."""

    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        self.trainer.at_once = lambda size: 1  # type: ignore[method-assign]


class TransformersLayers(Mmkit):
    """Layers as transformers computes them: three products for queries, keys and values, padding
    in all of them, and everything kept for the way back."""

    def __init__(self, *words, **options):
        encoder.own_layers = lambda tower, x: False  # type: ignore[assignment]
        super().__init__(*words, **options)


class Padded(Mmkit):
    """Captions with their padding in every product."""

    def __init__(self, *words, **options):
        def all_places(valid):
            everywhere = torch.arange(valid.numel())
            return everywhere, everywhere

        layers._places = all_places  # type: ignore[assignment]
        super().__init__(*words, **options)


class FullLength(Padded):
    """Captions padded to the longest of the training set, as a fixed context length does."""

    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        longest = int(self.trainer.train.encoded_captions()[1].max())
        for batch in self.batches:
            room = (0, longest - batch.input_ids.shape[1])
            batch.input_ids = torch.nn.functional.pad(batch.input_ids, room)
            batch.valid = torch.nn.functional.pad(batch.valid, room)


class Late(Mmkit):
    """Patches left out after the projection: all are normalised and projected."""

    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        project = self.model._patches

        def all_of_them(pixel_values, masking, mode):
            x = project(pixel_values, None, mode)
            if masking is None:
                return x
            return torch.cat([x[:, :1], pick_tokens(x[:, 1:], masking.ids_keep)], dim=1)

        self.model._patches = all_of_them  # type: ignore[method-assign]


class Replaced(Mmkit):
    """Hidden patches encoded as mask tokens."""

    def __init__(self, *words, **options):
        super().__init__(*words, image_mask_mode="replace", **options)


class FloatPictures(Mmkit):
    """Whole pictures as normalised floats before a patch is picked."""

    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        for batch in self.batches:
            batch.pixel_values = self.model.normalize(batch.pixel_values)


class Unfused(Mmkit):
    """AdamW as a loop over the weights."""

    def __init__(self, *words, **options):
        def loop(groups):
            return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=False, foreach=False)

        super().__init__(*words, optimizer=loop, **options)


class Muon(Mmkit):
    """Muon in AdamW's place, as in the default recipe."""

    def __init__(self, *words, **options):
        super().__init__(*words, optimizer="muon", **options)


class TorchMuon(Mmkit):
    """torch.optim.Muon, one matrix after the other."""

    def __init__(self, *words, **options):
        optim.Muon = torch.optim.Muon  # type: ignore[misc, assignment]
        super().__init__(*words, optimizer="muon", **options)


class Compiled(Mmkit):
    """torch.compile of transformers' layers, in place of ours."""

    def __init__(self, *words, **options):
        super().__init__(*words, compile=True, **options)


class Float32(Mmkit):
    """No bfloat16."""

    def __init__(self, size, ratio, data, batch_size, precision, **options):
        super().__init__(size, ratio, data, batch_size, "no", **options)


SAVINGS: dict[str, Any] = {
    "serial": Serial,
    "transformers' layers": TransformersLayers,
    "padded captions": Padded,
    "captions of full length": FullLength,
    "patches left out late": Late,
    "hidden patches encoded": Replaced,
    "float pictures": FloatPictures,
    "AdamW not fused": Unfused,
    "Muon": Muon,
    "torch's Muon": TorchMuon,
    "compiled": Compiled,
    "float32": Float32,
}
