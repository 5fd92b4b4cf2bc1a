"""Bytes are those that autograd keeps and that processes exchange."""

import dataclasses

import pytest
import torch

import mmkit as mm
from mmkit import cost
from mmkit.cost.memory import Numbers, kept_by_pair
from mmkit.models.layers import _places


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("ratio", [0.0, 0.75])
def test_kept_bytes_are_those_that_autograd_keeps(trainer_of, ratio, precision):
    """Compared with all storages that the graph of a forward pass saves, without weights."""
    trainer = trainer_of(61, image_mask_ratio=ratio, mixed_precision=precision)
    batch, found, held = trainer.first_batch(), {}, []
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights and x.ndim and x.shape[0] >= 61:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            held.append(x)  # or its memory is used for another tensor
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trainer.encode(batch, trainer.maskings(batch, 0))
    rows = len(_places(batch.valid)[1])  # valid tokens, rounded up to a whole number of rows
    words, longest = rows / 61, batch.valid.shape[1]
    patches = max(1, round(9 * (1 - ratio)))
    numbers = Numbers(2 if precision == "bf16" else 4, cpu=True)
    kept = kept_by_pair(
        trainer.config, trainer.model, (patches, words), (9, words), longest, numbers, 0.0
    )
    assert 61 * kept == pytest.approx(sum(found.values()), rel=0.08)


def test_bytes_exchanged_grow_with_the_processes(make_model):
    """Gradients 2 (W - 1) / W, features once and their gradients twice, Muon's weights, ids."""
    model = make_model()
    parameters = sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in mm.optim.parameter_groups(model)["matrices"].values())
    config = mm.TrainingConfig(batch_size=35)

    def exchanged(processes, **settings):
        changed = dataclasses.replace(config, **settings)
        return cost.predict(model_or_preset=model, config=changed, caption_length=5,
                            processes=processes).exchanged  # fmt: skip

    assert exchanged(1) == 0
    features = 35 * 13 * 4
    for world in (5, 7):
        fraction = (world - 1) / world
        expected = fraction * (2 * 4 * parameters + 4 * matrices + 2 * 3 * features + 8 * 35)
        assert exchanged(world) == pytest.approx(expected)
    plain = exchanged(5, loss="sigmoid", optimizer="adamw")
    assert exchanged(5, optimizer="adamw") - plain == pytest.approx(0.8 * 2 * features)
    ring = exchanged(5, loss="sigmoid", optimizer="adamw", exchange="neighbours")
    assert plain - ring == pytest.approx(0.8 * 2 * features)
