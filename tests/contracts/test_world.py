"""Two and three processes are one: gradients, masks, losses, batches, scores, memory of logits."""

import subprocess
import sys

import pytest
import torch

import mmkit as mm
from tests import world_cases
from tests.terms_by_hand import by_hand, check_close
from tests.world_cases import BATCHES, CHUNK, GRADIENTS, LOSSES, OBJECTIVES, PAIRS, WIDTH

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """{1: what one process computed, 2: two, 3: three} (tests/world_cases.py)."""
    folder = tmp_path_factory.mktemp("worlds")
    command = [sys.executable, "-m", "tests.world_cases", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {n: torch.load(folder / f"{n}.pth", weights_only=True) for n in (1, 2, 3)}


def whole_batch(case, number: int) -> tuple[torch.Tensor, dict]:
    """The reference: loss and gradients by one forward pass and the definition of the loss."""
    trainer = world_cases.trainer_of(case)
    encoder, config = trainer.model.train(), trainer.config
    batch = trainer.train.batch(*trainer.epoch_batches(1)[number])
    batch = trainer.plan.augmented(batch, 1)
    modes = (config.image_mask_mode, config.text_mask_mode)
    out = encoder(batch, *trainer.plan.draw(batch, 1), *modes)
    features = (out.image_features, out.text_features, out.logit_scale.exp())
    if config.loss == "sigmoid":
        loss = mm.sigmoid_loss(*features, out.logit_bias, batch.correct())
    else:
        loss = mm.info_nce(*features, batch.correct())
    loss.backward()
    return loss.detach(), world_cases.gradients_of(encoder)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
@pytest.mark.parametrize("number", BATCHES)
def test_gradients_are_those_of_the_whole_batch(worlds, processes, case, number):
    """Masks on, partners on several processes, unequal parts; for each parameter."""
    loss, reference = whole_batch(case, number)
    found = worlds[processes]["gradients"][f"{case} {number}"]
    torch.testing.assert_close(found["loss"], loss, rtol=1e-6, atol=0)
    whole = torch.cat([g.flatten() for g in reference.values()]).norm()
    off = {name: (found["gradients"][name] - g).norm() for name, g in reference.items()}
    assert torch.stack([*off.values()]).norm() < 1e-5 * whole
    for name, gradient in reference.items():
        if gradient.norm() > 1e-3 * whole:
            assert off[name] < 1e-5 * gradient.norm(), name
    assert len(set(found["sums"])) == 1  # the same in every process


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("case, parts", OBJECTIVES)
@pytest.mark.parametrize("number", BATCHES)
def test_every_term_is_that_of_the_whole_batch(worlds, processes, case, parts, number):
    """Value and gradient of each parameter, with unequal counts on each process. Mismatched pairs
    are drawn within a micro-batch: k processes are one process with k micro-batches."""
    trainer = world_cases.trainer_of_terms(case, parts)
    trainer.model.train()
    batch = trainer.train.batch(*trainer.epoch_batches(1)[number])
    found = worlds[processes]["objectives"][f"{case} {parts} {number}"]
    sizes = [size for cut in found["micro_batches"] for size in cut]
    sizes = sizes if case == "matching" else [len(batch)]
    terms = by_hand(trainer, batch, sizes, epoch=1)
    reference = world_cases.gradients_of(trainer.model)
    assert terms.keys() == found["terms"].keys()
    for term, value in terms.items():
        torch.testing.assert_close(found["terms"][term], value, rtol=1e-5, atol=0)
    weights = trainer.objective.weights(0, trainer.total_steps)
    total = sum(weights[term] * float(value) for term, value in terms.items())
    assert float(found["loss"]) == pytest.approx(total, rel=1e-5)
    check_close(found["gradients"], reference)
    assert len(set(found["sums"])) == 1


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", [17, 2])
def test_reconstruction_counts_each_patch_and_word_once(worlds, processes, count):
    """Also with fewer images than processes; all processes know the result."""
    ours, alone = (worlds[n]["reconstruction"][count] for n in (processes, 1))
    everyone = ours.pop("everyone")
    assert all(one == ours for one in everyone) and len(everyone) == processes
    for context, found in ours.items():
        assert found == pytest.approx(alone[context], rel=1e-5)
        assert {"mim_loss", "mlm_loss", "mean_patch_error"} <= found.keys()


@pytest.mark.parametrize("processes", [2, 3])
def test_masks_are_the_same_and_parts_are_uneven(worlds, processes):
    for name, found in worlds[processes]["gradients"].items():
        assert found["masks"] == worlds[1]["gradients"][name]["masks"]
        assert sum(map(sum, found["micro_batches"])) == len(found["masks"])
    case = f"{GRADIENTS[1]} 0"  # 11 pairs, three micro-batches
    parts = worlds[processes]["gradients"][case]["micro_batches"]
    assert parts == {2: [[2, 2, 2], [2, 2, 1]], 3: [[2, 1, 1], [2, 1, 1], [1, 1, 1]]}[processes]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_image_is_seen_once_per_epoch(worlds, processes):
    """With the batches and the order of one process."""
    for epoch, alone in zip(worlds[processes]["order"], worlds[1]["order"], strict=True):
        batches = [[sample for part in batch for sample in part] for batch in epoch]
        assert sorted(sample for batch in batches for sample in batch) == list(range(53))
        assert batches == [batch[0] for batch in alone]


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("count", [17, 2])
def test_evaluation_counts_each_sample_once(worlds, processes, count):
    """Also with fewer samples than processes, under masks, with several captions of an image."""
    ours, alone = (worlds[n]["evaluation"][count] for n in (processes, 1))
    assert len(ours["features"]["image_features"]) == count
    assert len(ours["features"]["text_features"]) == count + 2
    for name, value in alone["features"].items():
        torch.testing.assert_close(ours["features"][name], value, rtol=0, atol=1e-6)
    for ours_, alone_ in zip(ours["scores"], alone["scores"], strict=True):
        assert ours_.pop("loss") == pytest.approx(alone_["loss"], rel=1e-5)
        assert ours_ == {k: v for k, v in alone_.items() if k != "loss"}
    assert all(one == ours["everyone"][0] for one in ours["everyone"])


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("kind, exchange", LOSSES)
def test_logits_take_local_times_global_memory(worlds, processes, kind, exchange):
    """Forward and backward; with neighbours one block at a time; sliced, at most the limit."""
    at_once = world_cases.step.LOGITS
    whole = worlds[1]["shares"][f"{kind} gather {at_once}"]
    for chunk in (at_once, CHUNK):
        found = worlds[processes]["shares"][f"{kind} {exchange} {chunk}"]
        for name in ("loss", "image", "text", "scale", "bias"):
            torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-6)
        columns = PAIRS if exchange == "gather" else max(found["rows"])
        for rows, largest, kept in zip(
            *(found[k] for k in ("rows", "largest", "kept")), strict=True
        ):
            if chunk == at_once:
                assert largest == rows * columns
            else:
                assert PAIRS * WIDTH <= largest <= CHUNK
            if chunk == CHUNK or exchange == "neighbours":  # recomputed in the backward pass
                assert kept < rows * columns / 2


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("optimizer, close", [("adamw", 1e-4), ("muon", 3e-3)])
def test_frozen_towers_and_running_means_are_those_of_one_process(
    worlds, processes, optimizer, close
):
    """Two epochs, the ViT frozen in the first. In bfloat16, Muon rounds more."""
    ours, alone = worlds[processes][optimizer], worlds[1][optimizer]
    assert ours["losses"] == pytest.approx(alone["losses"], rel=close)
    for kind in ("weights", "mean"):
        off = [(ours[kind][n] - w).float().norm() for n, w in alone[kind].items()]
        size = [w.float().norm() for w in alone[kind].values()]
        assert torch.stack(off).norm() < close * torch.stack(size).norm()
