"""Any subset of the terms, however the batch is split: gradient and means of the whole batch."""

import itertools

import pytest
import torch

import mmkit as mm
from mmkit.config import TERMS
from mmkit.evaluation.reconstruction import evaluate_reconstruction
from mmkit.losses import masked_pixel_loss, masked_token_loss, matching_loss
from mmkit.models.decoder import ForwardSpec
from mmkit.models.patches import patchify
from mmkit.training.step import Contrast, backward
from mmkit.training.term_gradients import TOWERS
from tests.training.test_trainer import QUICK

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


@pytest.fixture
def make_trainer(tmp_path, make_model, make_data):
    """A trainer with 23 pairs a step, two of which share a caption."""

    def make(val=None, resume=False, callbacks=(), model=None, **values):
        values = dict(batch_size=23, output_dir=str(tmp_path), run_name="run") | values
        config = mm.TrainingConfig(**QUICK | values)
        train = make_data(23)
        train.texts[5].append(train.texts[17][0])  # correct for image 5, not the other way round
        model = model or make_model(dropout=config.dropout)
        trainer = mm.MaskedMultimodalTrainer(config, train, val, model, resume, callbacks)
        trainer.net.train()
        return trainer

    return make


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


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_whole_batch(make_trainer, case, parts):
    """The gradient of every parameter and the value of each term. The wrong pairs of matching come
    from one micro-batch: there the reference is split in the same way, elsewhere not at all."""
    values = CASES[case]
    trainer = make_trainer(**values, gradient_accumulation_steps=parts)
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
def test_dropout_is_replayed(make_trainer, case):
    """Equal to keeping every graph under the same draws, those of the decoder too."""
    trainer = make_trainer(**CASES[case], dropout=0.3, gradient_accumulation_steps=3)
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


def test_a_mean_of_means_would_be_another_gradient(make_trainer):
    """Why there are counts: micro-batches mask different numbers of tokens."""
    trainer = make_trainer(**CASES["BERT"], gradient_accumulation_steps=3)
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
def test_a_tower_runs_once_per_view_and_never_per_term(make_trainer, values, views):
    """With a graph once for each micro-batch and view; without one, for the features of all but
    the last: as often as for contrast alone. The decoder runs only where there is a graph."""
    trainer = make_trainer(**values, gradient_accumulation_steps=3)
    runs = count_runs(trainer.model)
    trainer.gradients(trainer.first_batch(), 0)
    for tower in ("vit", "bert"):
        assert (runs[tower].count(True), runs[tower].count(False)) == (3 * views, 2)
    assert runs.get("pixels") == runs.get("words") == (None if not values else [True] * 3)


@pytest.mark.parametrize("case, idle", [("MAE", "bert"), ("SimMIM", "bert"), ("BERT", "vit")])
def test_what_no_term_needs_does_not_run(make_trainer, case, idle):
    """Images alone never run the BERT, words alone never the ViT, and nothing runs twice."""
    trainer = make_trainer(**CASES[case], gradient_accumulation_steps=3)
    runs = count_runs(trainer.model)
    trainer.gradients(trainer.first_batch(), 0)
    assert runs.pop(idle) == []
    assert [r for r in runs.values() if r] == [[True] * 3] * 2
    reached = {name.split(".")[0] for name in gradients(trainer.model)}
    assert idle not in reached and not reached & {"logit_scale", "image_projection"}


def test_contrast_alone_is_what_it_was(make_trainer, make_model):
    """No decoder, no other parameter, no other record; the gradient bit for bit that of a step that
    knows of no other term; and settings of the absent terms change nothing."""
    settings = dict(mim_schedule="last_fifth", decoder_width=64, pixel_error="l1",
                    norm_pix_loss=True, decoder_depth=3, cross_modal_ratio=0.5)  # fmt: skip
    ends = []
    for name, values in (("plain", {}), ("other", settings)):
        trainer = make_trainer(**values, dropout=0.3, gradient_accumulation_steps=3, run_name=name)
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


def test_a_term_is_absent_until_its_schedule_says_so(make_trainer):
    """The last three of 11 steps are in the last fifth: only there the term is recorded and its
    head runs, with its full weight."""
    trainer = make_trainer(**BESIDE | dict(mim_schedule="last_fifth", num_epochs=11))
    runs = count_runs(trainer.model)
    history = [r for r in trainer.fit().history if r["split"] == "train"]
    assert [r["step"] for r in history if "mim_loss" in r] == [9, 10, 11]
    assert all("mlm_loss" in r and "contrastive_loss" in r for r in history)
    assert (len(runs["pixels"]), len(runs["words"])) == (3, 11)
    for record in history:
        weighted = 0.7 * record.get("mim_loss", 0.0) + 0.3 * record["mlm_loss"]
        assert record["loss"] == pytest.approx(record["contrastive_loss"] + weighted, rel=1e-6)


def test_schedules_by_hand(make_trainer):
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
        trainer = make_trainer(**BESIDE | dict(mlm_schedule=schedule, num_epochs=5))
        found = [trainer.objective.weights(step, 5).get("mlm", 0.0) for step in range(5)]
        assert found == pytest.approx([0.3 * fraction for fraction in expected])
        weights = trainer.objective.weights(4, 5)
        assert ("mlm" in weights) == bool(expected[4])
    assert "lambda" in trainer.config.to_dict()["mlm_schedule"]


@pytest.mark.parametrize(
    "values, message",
    [
        (BESIDE | dict(contrastive_weight=0.0, mlm_weight=0.0, mim_schedule="last_half"),
         "step 0 of 5 has no term to learn from; change"),
        (CASES["BERT"] | dict(mlm_schedule=lambda p: float(p < 0.7)), "step 3 of 5 has no term"),
        (CASES["MAE"] | dict(unmasked_epochs=1), r"step 4 of 5 .*\(nothing is masked in it\)"),
        (CASES["MAE"] | dict(image_mask_schedule="linear", image_mask_final_ratio=0.0),
         r"step 4 of 5 .*\(nothing is masked in it\)"),
        (CASES["BERT"] | dict(text_mask_schedule="cosine", text_mask_ratio=0.0,
                              text_mask_final_ratio=0.3),
         r"step 0 of 5 .*\(nothing is masked in it\)"),
    ],
)  # fmt: skip
def test_a_step_with_nothing_to_learn_is_refused_before_the_run(make_trainer, values, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**dict(num_epochs=5) | values)


# -- what the terms do to each other ---------------------------------------------------------


@pytest.mark.parametrize("case", ["all", "all, unmasked view", "a ratio for each"])
def test_measured_gradients_are_those_of_each_term_alone(make_trainer, case):
    """Norms and cosines on each tower by autograd, weighted as in the loss; the gradients add up to
    that of the step."""
    trainer = make_trainer(**CASES[case])
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


def test_measuring_changes_nothing(make_trainer, make_data):
    """With dropout, EMA and micro-batches, the run ends with the same bits as without it."""
    ends = []
    for every in (0, 1):
        trainer = make_trainer(
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


# -- validation ------------------------------------------------------------------------------


def test_the_validated_loss_is_the_weighted_sum(make_trainer, make_data):
    """Each term counts with its full weight, whatever the schedules say."""
    val = make_data(17, seed=1)
    trainer = make_trainer(val, **ALL | dict(mim_schedule="last_fifth", num_epochs=6))
    records = [r for r in trainer.fit().history if r["split"] == "val"]
    for record in records:
        weights = dict(contrastive=1.0, mim=0.7, mlm=0.3, itm=0.4)
        weighted = 0.0
        for term, weight in weights.items():  # in this order: the same bits in any process
            weighted += weight * record[f"{term}_loss"]
        assert record["loss"] == weighted
    assert record["contrastive_loss"] == pytest.approx(mm.evaluate(trainer.model, val)["loss"])
    again = evaluate_reconstruction(
        trainer.model, val, image_mask=("random", 0.6), text_mask=("random", 0.3)
    )
    assert {k: record[k] for k in again} == again


@pytest.mark.parametrize("mode", ["drop", "replace", "80/10/10"])
def test_reconstruction_is_the_same_in_any_batches(make_trainer, make_data, mode):
    """17 pairs at once, or 5 or 2 at a time: the mean over all that is masked."""
    values = BESIDE | dict(text_mask_mode=mode, cross_modal=True)
    model, val = make_trainer(**values).model.eval(), make_data(17, seed=1)
    options = dict(text_mode=mode, baseline=torch.full((9, 75), 0.4))
    found = [evaluate_reconstruction(model, val, batch_size=n, **options) for n in (17, 5, 2)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert {"mim_loss", "pixel_error", "mean_patch_error", "visible_mean_error", "mlm_loss",
            "mlm_accuracy", "mlm_perplexity"} == found[0].keys()  # fmt: skip


def test_a_ratio_that_rises_from_zero_is_validated_with_something_masked(make_trainer, make_data):
    """Otherwise the term would be 0 at the start, and the first model would stay the best."""
    values = dict(image_mask_ratio=0.0, image_mask_schedule="linear", image_mask_final_ratio=0.75)
    trainer = make_trainer(make_data(7, seed=1), **BESIDE | values, num_epochs=2)
    records = [r for r in trainer.fit().history if r["split"] == "val"]
    assert all(r["mim_loss"] > 0 for r in records)


# -- error messages --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(mlm_weight=0.3), "mlm_weight=0.3 with text_mask_ratio=0 .*text_mask_ratio=0.3"),
        (dict(mim_weight=1, image_mask_ratio=0), "masks nothing, .*image_mask_ratio=0.75"),
        (dict(itm_weight=1.0), "itm_weight=1.0 needs cross_modal=True"),
        (dict(contrastive_weight=0), "nothing is learned: one of contrastive_weight, mim_"),
        (dict(mim_weight=-1), "mim_weight=-1 must be 0 or more"),
        (dict(cross_modal_ratio=0), r"cross_modal_ratio=0 must be in \(0, 1\]"),
        (dict(decoder_width=33), "decoder_width=33 must be a multiple of 32"),
        (dict(decoder_depth=0), "decoder_depth=0 must be at least 1"),
        (dict(pixel_error="mae"), "pixel_error='mae' is not a choice"),
        (dict(contrastive_view="whole"), "known: masked, unmasked"),
        (dict(mlm_schedule="risng"), "mlm_schedule='risng' is not known; did you mean 'ris"),
        (dict(mim_weight=1, image_mask="layers", image_mask_ratio=0), "masks nothing"),
        (dict(mim_weight=1, image_mask="painted", painted_mask=[[0, 0]]), "masks nothing"),
        (dict(contrastive_view="unmasked"), "would mask nothing"),
        (dict(cross_modal=True), "cross_modal=True needs a decoder"),
        (dict(term_gradients_every=0.5), "term_gradients_every=0.5 must be a whole number"),
    ],
)
def test_an_impossible_configuration_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        mm.TrainingConfig(**values)


def test_a_model_with_another_decoder_is_refused(make_trainer, make_model):
    """The message names the missing heads, or the setting that the decoder was built for."""
    model = make_model().add_decoder(words=False, width=32)
    with pytest.raises(ValueError, match=r"no head for words; call model\.add_decoder"):
        make_trainer(model=model, **BESIDE)
    model = make_model().add_decoder(width=32)
    with pytest.raises(ValueError, match=r"cross_modal=True is not what .* give cross_modal=False"):
        make_trainer(model=model, **BESIDE, cross_modal=True)
    with pytest.raises(ValueError, match="norm_pix_loss=True is not what"):
        make_trainer(model=model, **BESIDE, norm_pix_loss=True)
    decoder = model.decoder
    assert make_trainer(model=model, **BESIDE).model.decoder is decoder  # one that fits stays


def test_other_micro_batches_are_another_run_where_there_is_matching(make_trainer):
    """Wrong pairs come from one micro-batch: a resume with other micro-batches is refused, but not
    one that only measures more."""
    make_trainer(**ALL, gradient_accumulation_steps=2, max_steps=1).fit()
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 2 -> 3"):
        make_trainer(**ALL, gradient_accumulation_steps=3, max_steps=1, resume=True)
    same = dict(gradient_accumulation_steps=2, max_steps=1, resume=True)
    make_trainer(**ALL, **same, term_gradients_every=1)
    make_trainer(**BESIDE, gradient_accumulation_steps=2, max_steps=1).fit()
    make_trainer(**BESIDE, gradient_accumulation_steps=3, max_steps=1, resume=True)


def test_a_fraction_outside_0_to_1_is_refused(make_trainer):
    """Below 0 a term would be maximised, above 1 exceed its weight, and NaN is no number."""
    for fraction in (-0.5, 50, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"mim_schedule gives .* at step 1 of 3"):
            make_trainer(**BESIDE, mim_schedule=lambda p, x=fraction: x if p else 1.0, max_steps=3)


# -- runs whose terms change -----------------------------------------------------------------


def test_a_term_that_masks_nothing_is_not_logged(make_trainer, make_data):
    """In unmasked epochs there are no patches and no tokens to predict."""
    values = dict(batch_size=11, num_epochs=2, unmasked_epochs=1, log_every=1)
    run = make_trainer(val=make_data(9, seed=1), **BESIDE | values).fit()
    steps = [r for r in run.history if r["split"] == "train"]
    assert len(steps) == 6
    assert all("mim_loss" in r and "mlm_loss" in r for r in steps[:3])
    assert all("mim_loss" not in r and "mlm_loss" not in r for r in steps[3:])
    assert all(r["loss"] == pytest.approx(r["contrastive_loss"]) for r in steps[3:])


def test_without_validation_the_last_of_changing_terms_is_kept(make_trainer, capsys):
    """The loss of reconstruction is below that of contrast: its epochs would always be the best."""
    first = dict(
        mim_schedule=lambda p: float(p < 0.5), contrastive_schedule=lambda p: float(p >= 0.5)
    )
    trainer = make_trainer(mim_weight=0.1, num_epochs=4, image_mask_ratio=0.5, **first)
    run = trainer.fit()
    assert "best_model.pth is the last one" in capsys.readouterr().out
    assert run.best["epoch"] == 3
    weights = mm.load(run.path / "best_model.pth").state_dict()
    assert all(torch.equal(weights[n], p) for n, p in trainer.model.state_dict().items())


@pytest.mark.parametrize("there, here", [(False, True), (True, False)])
def test_a_fork_may_have_other_terms(make_trainer, make_model, there, here):
    """The towers continue; a decoder that only the fork needs starts with new weights."""
    terms = {True: BESIDE, False: {}}
    common = dict(num_epochs=2, ema_decay=0.5)
    source = make_trainer(run_name="source", **terms[there] | common)
    source.fit()
    values = terms[here] | common | dict(num_epochs=3, run_name="fork")
    fork = make_trainer(resume=str(source.path), model=make_model(seed=1), **values)
    before = source.model.state_dict()
    for name, value in fork.model.state_dict().items():
        assert name.startswith("decoder.") or torch.equal(value, before[name]), name
    assert (fork.model.decoder is not None) == here
    assert fork.fit().history[-1]["step"] == 3


def test_a_strip_of_a_ratio_that_rises_masks_something(make_trainer, make_data):
    """Its masks are those of validation."""
    from mmkit.evaluation.reconstruction import example_images

    rising = dict(image_mask_ratio=0.0, image_mask_schedule="linear", image_mask_final_ratio=0.6)
    trainer = make_trainer(contrastive_weight=1, mim_weight=1, num_epochs=3, **rising)
    original, masked, back = example_images(trainer.model, make_data(9), trainer.config)
    assert not torch.equal(original, masked) and not torch.equal(original, back)


def test_layers_are_asked_of_the_validation_set_too(make_trainer, make_data):
    """The error comes before the run, not at the end of its first epoch."""
    from mmkit.training.setup import check_maskers

    train, val = make_data(23), make_data(9)
    train.layers = object()
    layers = dict(image_mask="layers", image_mask_ratio=0.5)
    check_maskers(mm.TrainingConfig(**layers), train, val)  # nothing is reconstructed
    with pytest.raises(ValueError, match="needs drawings with layers"):
        check_maskers(mm.TrainingConfig(**layers, mim_weight=1), train, val)
