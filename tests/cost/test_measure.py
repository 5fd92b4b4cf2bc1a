"""What a step took is measured as an independent count says it."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from mmkit import cost


def kept_by_forward(trainer) -> int:
    """Bytes of all storages that the graph of one whole forward pass saves, without weights."""
    batch, found, held = trainer.first_batch(), {}, []
    weights = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            held.append(x)  # or its memory is used for another tensor
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        trainer.encode(batch, trainer.maskings(batch, 0))
    return sum(found.values())


def test_operations_and_kept_bytes_are_counted(trainer_of):
    """Half of a batch keeps about half; what the loss keeps comes on top of the forward pass."""
    trainer = trainer_of(image_mask_ratio=0.5)
    kept = kept_by_forward(trainer)
    with FlopCounterMode(display=False) as counter:
        trainer.train_step(trainer.first_batch(), 0)
    found = cost.measure_step(trainer, rounds=1)
    assert found.flops == counter.get_total_flops()
    assert kept <= found.kept_bytes < 1.1 * kept
    assert (found.peak_bytes is None) == (trainer.device.type == "cpu")
    halves = cost.measure_step(trainer_of(gradient_accumulation_steps=2), rounds=1)
    whole = cost.measure_step(trainer_of(), rounds=1)
    assert 0.4 < halves.kept_bytes / whole.kept_bytes < 0.7
    assert halves.flops > whole.flops


def test_a_slow_step_is_measured_as_slow(trainer_of, monkeypatch):
    trainer = trainer_of()
    encode = trainer.encode
    monkeypatch.setattr(trainer, "encode", lambda *words: (time.sleep(0.3), encode(*words))[1])
    for measured in (
        lambda: cost.measure_step(trainer, rounds=1).seconds,
        lambda: cost.step_seconds({"slow": trainer}, rounds=1)["slow"],
    ):
        start = time.perf_counter()
        seconds = measured()
        others = 2 * 0.3  # it takes three steps or more, each as slow
        assert 0.3 <= seconds <= time.perf_counter() - start - others


def test_a_rate_is_a_number_of_operations_per_second(make_model):
    rate = cost.matmul_rate(make_model(), 64, 9, 5, rounds=3)
    assert 0.01 < rate < 1e6
