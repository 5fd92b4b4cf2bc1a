"""The measured gradients are those of each term alone, and measuring changes nothing."""

import itertools

import pytest
import torch

from mmkit.training.term_gradients import TOWERS
from tests.terms_by_hand import ALL, CASES, by_hand, gradients


@pytest.mark.parametrize("case", ["all", "all, unmasked view", "a ratio for each"])
def test_measured_gradients_are_those_of_each_term_alone(make_terms_trainer, case):
    """Norms and cosines on each tower by autograd, weighted as in the loss; the gradients add up to
    that of the step."""
    trainer = make_terms_trainer(**CASES[case])
    batch = trainer.first_batch()
    measured = trainer.measure_terms(batch, 0)
    weights, alone = trainer.objective.weights(0, trainer.total_steps), {}
    by_hand(trainer, batch, 1)
    whole = gradients(trainer.model)
    for term in weights:
        trainer.model.zero_grad()
        by_hand(trainer, batch, 1, {term: weights[term]})
        alone[term] = gradients(trainer.model)
    for tower, prefix in TOWERS.items():
        names = [n for n, _ in trainer.model.named_parameters() if n.startswith(prefix)]
        flat = {
            term: torch.cat([g.get(n, torch.zeros_like(whole[n])).flatten() for n in names])
            for term, g in alone.items()
        }
        total = torch.cat([whole[n].flatten() for n in names])
        assert (sum(flat.values()) - total).norm() < 1e-5 * total.norm()
        for term, gradient in flat.items():
            found = measured.pop(f"gradient_norm/{tower}/{term}")
            assert found == pytest.approx(float(gradient.norm()), rel=1e-4)
        for one, other in itertools.combinations(weights, 2):
            found = measured.pop(f"gradient_cosine/{tower}/{one}·{other}")
            cosine = torch.cosine_similarity(flat[one], flat[other], dim=0)
            assert found == pytest.approx(float(cosine), abs=1e-4)
    assert measured == {}


def test_measuring_changes_nothing(make_terms_trainer, make_data):
    """With dropout, EMA and micro-batches, the run ends with the same bits as without it."""
    ends = []
    for every in (0, 1):
        trainer = make_terms_trainer(
            make_data(7, seed=1), **ALL, dropout=0.3, ema_decay=0.9, num_epochs=3,
            gradient_accumulation_steps=2, term_gradients_every=every, run_name=f"every{every}",
        )  # fmt: skip
        history = trainer.fit().history
        measured = [r for r in history if r["split"] == "terms"]
        assert [r["step"] for r in measured] == ([] if not every else [0, 1, 2])
        for record in measured:
            assert len([k for k in record if k.startswith("gradient_")]) == 2 * (4 + 6)
        records = [r for r in history if r["split"] != "terms"]
        clocks = {"seconds", "samples_per_second", "waiting_for_data"}
        records = [{k: v for k, v in r.items() if k not in clocks} for r in records]
        ends.append((records, trainer.model.state_dict(), trainer.ema.module.state_dict()))
    assert ends[0][0] == ends[1][0]
    for one, other in zip(ends[0][1:], ends[1][1:], strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
