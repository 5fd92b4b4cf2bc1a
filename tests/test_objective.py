"""Any subset of the terms, however the batch is split: gradient and means of the whole batch."""

import pytest
import torch

from mmkit.config import TERMS
from mmkit.training.step import Contrast, backward
from tests.terms_by_hand import ALL, BESIDE, CASES, by_hand, check_close, gradients


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_whole_batch(make_terms_trainer, case, parts):
    """The gradient of every parameter and the value of each term. The wrong pairs of matching come
    from one micro-batch: there the reference is split in the same way, elsewhere not at all."""
    values = CASES[case]
    trainer = make_terms_trainer(**values, gradient_accumulation_steps=parts)
    batch = trainer.first_batch()
    terms = by_hand(trainer, batch, parts if "itm_weight" in values else 1)
    reference = gradients(trainer.model)
    trainer.model.zero_grad()
    loss = trainer.gradients(batch, 0)
    assert terms.keys() == trainer.terms.keys() == set(trainer.config.terms)
    for term, value in terms.items():
        torch.testing.assert_close(trainer.terms[term], value, rtol=1e-5, atol=0)
    weights = trainer.objective.weights(0, 2)
    assert float(loss) == pytest.approx(sum(weights[t] * float(v) for t, v in terms.items()))
    check_close(gradients(trainer.model), reference)


@pytest.mark.parametrize("case", ["all", "unmasked view", "MAE", "BERT", "a ratio for each"])
def test_dropout_is_replayed(make_terms_trainer, case):
    """Equal to keeping every graph under the same draws, those of the decoder too."""
    trainer = make_terms_trainer(**CASES[case], dropout=0.3, gradient_accumulation_steps=3)
    batch = trainer.first_batch()
    torch.manual_seed(7)
    terms = by_hand(trainer, batch, 3)
    draws, reference = torch.rand(3), gradients(trainer.model)
    trainer.model.zero_grad()
    torch.manual_seed(7)
    trainer.gradients(batch, 0)
    assert torch.equal(torch.rand(3), draws)  # what follows draws on as after one pass
    for term, value in terms.items():
        torch.testing.assert_close(trainer.terms[term], value, rtol=1e-5, atol=0)
    check_close(gradients(trainer.model), reference)


def test_a_mean_of_means_would_be_another_gradient(make_terms_trainer):
    """Why there are counts: micro-batches mask different numbers of tokens."""
    trainer = make_terms_trainer(**CASES["BERT"], gradient_accumulation_steps=3)
    batch = trainer.first_batch()
    terms = by_hand(trainer, batch, 1)
    counts = [int(m.mask.sum()) for m in (trainer.plan.draw(p, 0)[1] for p in batch.split(3))]
    assert len(set(counts)) > 1
    means = []
    for part in batch.split(3):
        trainer.model.zero_grad()
        means.append(by_hand(trainer, part, 1)["mlm"])
    assert abs(torch.stack(means).mean() - terms["mlm"]) > 1e-4 * terms["mlm"]


# -- each tower once -------------------------------------------------------------------------


def count_runs(model) -> dict[str, list]:
    """Record from now on, for each run of each part, whether it built a graph."""
    parts = {"vit": model.vit.layers[0], "bert": model.bert.encoder.layer[0]}
    if model.decoder is not None:
        parts |= {"pixels": model.decoder.pixel_head, "words": model.decoder.word_head}
    runs: dict[str, list] = {name: [] for name in parts}
    for name, part in parts.items():
        if part is not None:
            part.register_forward_hook(
                lambda module, args, out, name=name: runs[name].append(torch.is_grad_enabled())
            )
    return runs


@pytest.mark.parametrize(
    "values, views",
    [
        ({}, 1),
        (CASES["contrast, pixels, words"], 1),
        (ALL, 1),
        (CASES["unmasked view"], 2),
        (CASES["all, unmasked view"], 2),
    ],
)
def test_a_tower_runs_once_per_view_and_never_per_term(make_terms_trainer, values, views):
    """With a graph once for each micro-batch and view; without one, for the features of all but
    the last: as often as for contrast alone. The decoder runs only where there is a graph."""
    trainer = make_terms_trainer(**values, gradient_accumulation_steps=3)
    runs = count_runs(trainer.model)
    trainer.gradients(trainer.first_batch(), 0)
    for tower in ("vit", "bert"):
        assert (runs[tower].count(True), runs[tower].count(False)) == (3 * views, 2)
    assert runs.get("pixels") == runs.get("words") == (None if not values else [True] * 3)


@pytest.mark.parametrize("case, idle", [("MAE", "bert"), ("SimMIM", "bert"), ("BERT", "vit")])
def test_what_no_term_needs_does_not_run(make_terms_trainer, case, idle):
    """Images alone never run the BERT, words alone never the ViT, and nothing runs twice."""
    trainer = make_terms_trainer(**CASES[case], gradient_accumulation_steps=3)
    runs = count_runs(trainer.model)
    trainer.gradients(trainer.first_batch(), 0)
    assert runs.pop(idle) == []
    assert [r for r in runs.values() if r] == [[True] * 3] * 2
    reached = {name.split(".")[0] for name in gradients(trainer.model)}
    assert idle not in reached and not reached & {"logit_scale", "image_projection"}


def test_contrast_alone_is_what_it_was(make_terms_trainer, make_model):
    """No decoder, no other parameter, no other record; the gradient bit for bit that of a step that
    knows of no other term; and settings of the absent terms change nothing."""
    settings = dict(mim_schedule="last_fifth", decoder_width=64, pixel_error="l1",
                    norm_pix_loss=True, decoder_depth=3, cross_modal_ratio=0.5)  # fmt: skip
    ends = []
    for name, values in (("plain", {}), ("other", settings)):
        trainer = make_terms_trainer(
            **values, dropout=0.3, gradient_accumulation_steps=3, run_name=name
        )
        assert trainer.model.decoder is None
        plain = make_model(dropout=0.3)
        assert trainer.model.state_dict().keys() == plain.state_dict().keys()
        batch = trainer.first_batch()
        states = torch.get_rng_state()
        trainer.gradients(batch, 0)
        found = gradients(trainer.model)
        trainer.model.zero_grad()
        torch.set_rng_state(states)
        masks = iter([*trainer.drawn, *trainer.drawn[:2]])  # features of two, the last, the two
        encode = lambda part, t=trainer, masks=masks: t.encode(part, next(masks))  # noqa: E731
        scale = (trainer.model.logit_scale, trainer.model.logit_bias)
        backward(encode, batch.split(3), scale, Contrast())
        reference = gradients(trainer.model)
        assert found.keys() == reference.keys()
        assert all(torch.equal(found[n], reference[n]) for n in found)
        trainer.model.zero_grad()
        torch.set_rng_state(states)
        ends.append((trainer.fit().history, trainer.model.state_dict()))
    assert all(torch.equal(ends[0][1][name], w) for name, w in ends[1][1].items())
    for one, other in zip(ends[0][0], ends[1][0], strict=True):
        assert one["loss"] == other["loss"]
        assert not any(f"{term}_loss" in one for term in TERMS)


# -- schedules -------------------------------------------------------------------------------


def test_a_term_is_absent_until_its_schedule_says_so(make_terms_trainer):
    """The last three of 11 steps are in the last fifth: only there the term is recorded and its
    head runs, with its full weight."""
    trainer = make_terms_trainer(**BESIDE | dict(mim_schedule="last_fifth", num_epochs=11))
    runs = count_runs(trainer.model)
    history = [r for r in trainer.fit().history if r["split"] == "train"]
    assert [r["step"] for r in history if "mim_loss" in r] == [9, 10, 11]
    assert all("mlm_loss" in r and "contrastive_loss" in r for r in history)
    assert (len(runs["pixels"]), len(runs["words"])) == (3, 11)
    for record in history:
        weighted = 0.7 * record.get("mim_loss", 0.0) + 0.3 * record["mlm_loss"]
        assert record["loss"] == pytest.approx(record["contrastive_loss"] + weighted, rel=1e-6)


def test_schedules_by_hand(make_terms_trainer):
    """The fraction of the weight in each of five steps; a function is used as it is."""
    fractions = {
        "constant": [1, 1, 1, 1, 1],
        "rising": [0, 0.25, 0.5, 0.75, 1],
        "falling": [1, 0.75, 0.5, 0.25, 0],
        "first_half": [1, 1, 0, 0, 0],
        "last_half": [0, 0, 1, 1, 1],
        "last_fifth": [0, 0, 0, 0, 1],
    }
    own = (lambda progress: (1 - progress) ** 2, [1, 9 / 16, 1 / 4, 1 / 16, 0])
    for schedule, expected in [*fractions.items(), own]:
        trainer = make_terms_trainer(**BESIDE | dict(mlm_schedule=schedule, num_epochs=5))
        found = [trainer.objective.weights(step, 5).get("mlm", 0.0) for step in range(5)]
        assert found == pytest.approx([0.3 * fraction for fraction in expected])
        weights = trainer.objective.weights(4, 5)
        assert ("mlm" in weights) == bool(expected[4])
    assert "lambda" in trainer.config.to_dict()["mlm_schedule"]
