"""Functions that only read a model leave everything unchanged: modes, generators, flags.

And what is seen does not depend on the mode that the model was found in.
"""

import dataclasses
import random

import numpy as np
import pytest
import torch

import mmkit as mm
from mmkit.evaluation.features import patch_token_similarity
from mmkit.evaluation.probe import pooled_states
from mmkit.evaluation.reconstruction import example_images, reconstruct
from mmkit.training.step import contrastive_fraction

IMAGE = torch.arange(3 * 15 * 15, dtype=torch.int64).remainder(251).to(torch.uint8)
IMAGE = IMAGE.reshape(3, 15, 15)


def everything(model) -> dict:
    """Modes of all parts, generators, flags, gradients."""
    return {
        "modes": [part.training for part in model.modules()],
        "learning": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
        "hooks": [(*p._forward_pre_hooks, *p._forward_hooks) for p in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": [*np.random.get_state()[1].tolist(), np.random.get_state()[2]],
        "python": random.getstate(),
        "flags": (
            torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.is_autocast_enabled("cpu"),
        ),
    }  # fmt: skip


def masked(model, data):
    batch = data.batch(range(7))
    maskings = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=0, image=("random", 0.5), text=("random", 0.5)
    )
    return batch, *maskings


def looked_up(index, query):
    return torch.tensor([[hit.row, hit.score] for hit in index.search(query, 5)])


def lab(model, data):
    lab = mm.widgets.MaskLab(data, model)
    lab.seed.value = 3
    return lab.cosines


CALLS = {
    "embed": lambda m, d: mm.embed(m, d).text_features,
    "evaluate": lambda m, d: torch.tensor(mm.evaluate(m, d)["loss"]),
    "embed_texts": lambda m, d: mm.embed_texts(m, ["a cat", "red dog"]),
    "zero_shot": lambda m, d: mm.zero_shot(m, mm.embed(m, d), {"x": ["cat"], "y": ["dog"]})[1],
    "search by words": lambda m, d: looked_up(mm.Index(m, d, "no"), "old star"),
    "search by an image": lambda m, d: looked_up(mm.Index(m, d, "no"), IMAGE),
    "patch_token_similarity": lambda m, d: patch_token_similarity(m, IMAGE, "old star")[1],
    "class_attention": lambda m, d: m.class_attention(IMAGE[None]),
    "pooled_states": lambda m, d: pooled_states(m, d, "text"),
    "reconstruction": lambda m, d: torch.tensor(
        mm.evaluate_reconstruction(m, d, image_mask=("random", 0.5))["pixel_error"]
    ),
    "reconstruct": lambda m, d: reconstruct(m, *masked(m, d)).token_log_probs,
    "example_images": lambda m, d: example_images(m, d, mm.TrainingConfig())[2].float(),
    "MaskLab": lab,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_look_moves_nothing_and_sees_the_same_in_every_mode(make_model, make_data, call):
    data = make_data(23)
    model = make_model(dropout=0.4).add_decoder(pixels=True, words=True, width=32).to_device("cpu")
    expected = call(model.eval(), data)
    model.train()
    model.vit.eval()
    model.bert.encoder.layer[1].attention.eval()
    before = everything(model)
    torch.testing.assert_close(call(model, data), expected, rtol=0, atol=0)
    assert everything(model) == before


def test_loading_sharing_and_measuring_move_nothing(make_model, make_data, tmp_path):
    model, data = make_model(dropout=0.4), make_data(23)
    batch = data.batch(range(23))
    model(batch).image_features.sum().backward()
    gradient = model.image_mask_token.grad, model.vit.embeddings.cls_token.grad.clone()
    before = everything(model)
    model.save_pretrained(tmp_path)
    mm.load(tmp_path)
    mm.cost.measure_ratios(model, batch, (0.0, 0.5), rounds=1)
    mm.cost.matmul_rate(model, 23, 9, 5, rounds=1)
    assert everything(model) == before
    assert model.image_mask_token.grad is gradient[0]
    assert torch.equal(model.vit.embeddings.cls_token.grad, gradient[1])


def config(tmp_path, **values):
    small = dict(batch_size=11, num_epochs=2, warmup_steps=1, log_every=1, dropout=0.2)
    small |= dict(output_dir=str(tmp_path), mixed_precision="no", text_mask_ratio=0.3)
    return mm.TrainingConfig(**small | values)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_training_run_leaves_generators_and_flags_as_they_were(
    make_model, make_data, tmp_path, deterministic
):
    """Also where the caller uses strict determinism."""
    data, model = make_data(23), make_model(dropout=0.2)
    model.train()
    model.bert.eval()
    seen = []
    callback = lambda trainer, record: seen.append(  # noqa: E731
        torch.are_deterministic_algorithms_enabled()
    )
    for asked in (False, True):
        torch.use_deterministic_algorithms(asked)
        try:
            before = everything(model)
            settings = config(tmp_path, deterministic=deterministic, run_name=f"{asked}")
            trainer = mm.MaskedMultimodalTrainer(settings, data, None, model, callbacks=[callback])
            now = everything(model)
            trainer.fit()
            after = everything(model)
        finally:
            torch.use_deterministic_algorithms(False)
        assert now == before
        for key in before.keys() - {"gradients", "hooks"}:
            assert after[key] == before[key], key
    assert set(seen) == {False, True}  # a callback runs with the flags of the caller


def test_models_built_after_trainings_differ(make_data, make_model, tmp_path):
    data, drawn = make_data(23), []
    for name in ("first", "second"):
        mm.train_model(config(tmp_path, run_name=name, max_steps=1), data, None, make_model(seed=1))
        drawn.append((torch.rand(3), np.random.rand(), random.random()))
    torch.manual_seed(1)
    make_model(seed=1)
    expected = torch.rand(3)
    assert torch.equal(drawn[0][0], expected)  # as without the training run
    assert drawn[0][1] != drawn[1][1] and drawn[0][2] != drawn[1][2]


def test_a_training_run_is_not_moved_by_what_its_callbacks_do(make_data, make_model, tmp_path):
    """Callbacks draw, build, train, search and evaluate; weights and records are unchanged."""
    data, val = make_data(23), make_data(13, seed=1)

    def busy(trainer, record):
        torch.manual_seed(record["step"])
        np.random.seed(5)
        random.seed(7)
        torch.use_deterministic_algorithms(True)
        other = make_model(dropout=0.3, seed=record["step"])
        mm.evaluate(trainer.model, val)
        mm.Index(trainer.model, val).search("old cat")
        mm.embed_texts(trainer.model, ["a cat"])
        if record["step"] == 2:
            settings = config(tmp_path, run_name="inner", max_steps=2, seed=3)
            mm.train_model(settings, data, None, other)

    weights, records = [], []
    for name, callbacks in (("alone", []), ("watched", [busy])):
        model = make_model(dropout=0.2, seed=4)
        try:
            settings = config(tmp_path, run_name=name)
            run = mm.train_model(settings, data, val, model, callbacks=callbacks)
        finally:
            torch.use_deterministic_algorithms(False)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        records.append([record["loss"] for record in run.history])
    assert torch.equal(*weights) and records[0] == records[1]


def test_a_step_by_hand_draws_as_in_the_run(make_data, make_model, tmp_path):
    """Whatever the caller has drawn in between: `train_step` uses the run's own generators."""
    data, found = make_data(23), []
    for drawn in (0, 5):
        settings = config(tmp_path)
        trainer = mm.MaskedMultimodalTrainer(settings, data, None, make_model(dropout=0.3))
        trainer.net.train()
        torch.rand(drawn)
        before = torch.get_rng_state()
        for _ in range(2):
            loss, norm = trainer.train_step(trainer.first_batch(), 0)
        found.append((float(loss), norm))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


def test_a_model_is_judged_by_the_loss_that_it_was_trained_by(make_model, make_data, tmp_path):
    data = make_data(23)
    run = mm.train_model(config(tmp_path, loss="sigmoid"), data, data, make_model())
    run.model.save_pretrained(tmp_path / "shared")
    for model in (run.model, mm.load(tmp_path / "shared")):
        losses = (None, "sigmoid", "info_nce")
        own, named, other = (mm.evaluate(model, data, loss=loss)["loss"] for loss in losses)
        assert own == named == pytest.approx(run.best["loss"]) != pytest.approx(other)
    state = torch.load(run.path / "best_model.pth", weights_only=True)
    del state["architecture"]["loss"]  # as older versions wrote it
    torch.save(state, tmp_path / "old.pth")
    assert mm.load(tmp_path / "old.pth").loss == "sigmoid"  # its configuration says so
    del state["config"]
    torch.save(state, tmp_path / "old.pth")
    assert mm.load(tmp_path / "old.pth").loss == "info_nce"


def spoilt(data, rows):
    """The same images as normalised floats; those of some rows are not finite."""
    pixels = data.batch(range(len(data))).pixel_values.float() / 127.5 - 1
    pixels[rows, 1, 4, 3] = float("nan")
    store = data.subset(range(len(data)))
    store.batch = lambda picked, noise=None: dataclasses.replace(
        data.batch(picked, noise), pixel_values=pixels[torch.as_tensor(list(picked))]
    )
    store.encoded_by = lambda *_: store
    return store


def test_one_spoilt_image_is_named_and_costs_itself_alone(make_data, make_model, tmp_path):
    """The validation loss is that of the other rows, and a best model is saved."""
    train, val = make_data(23), make_data(13, seed=1)
    others = [row for row in range(13) if row != 7]
    settings = config(tmp_path, mim_weight=0.5, image_mask_ratio=0.5, decoder_width=32)
    with pytest.warns(UserWarning) as said:
        run = mm.train_model(settings, train, spoilt(val, [7]), make_model())
    words = [str(one.message) for one in said]
    named = f"1 of 13 images have no finite features (sample ids {int(val.sample_ids[7])}); their"
    assert any(named in line and "check the transform" in line for line in words)
    assert not any("normalised already" in line for line in words)
    assert all(np.isfinite(r["loss"]) for r in run.history if r["split"] == "val")
    model = run.model
    clean = spoilt(val, []).subset(others)
    whole = spoilt(val, []).batch(others)
    clean.batch = lambda picked, noise=None: whole[torch.as_tensor(list(picked))]
    clean.encoded_by = lambda *_: clean
    assert run.best["contrastive_loss"] == pytest.approx(mm.evaluate(model, clean)["loss"])
    found = mm.evaluate_reconstruction(model, clean, image_mask=("random", 0.5))
    assert run.best["pixel_error"] == pytest.approx(found["pixel_error"], rel=1e-4)


def test_a_run_without_a_finite_loss_keeps_its_newest_model(make_data, make_model, tmp_path):
    train, val = make_data(23), make_data(13, seed=1)
    with pytest.warns(UserWarning, match="13 of 13 images have no finite features"):
        run = mm.train_model(config(tmp_path), train, spoilt(val, range(13)), make_model())
    assert [r["best"] for r in run.history if r["split"] == "val"] == [True, True]
    assert run.best["epoch"] == 1 and run.best["loss"] is None
    assert mm.embed(run.model, val).image_features.isfinite().all()


def test_a_name_that_is_not_known_is_never_taken_for_another(make_model, make_data):
    model, data = make_model().add_decoder(pixels=True, words=True, width=32), make_data(13)
    with pytest.raises(ValueError, match="mixed_precision='bf1' is not known; did you mean 'bf16'"):
        mm.embed(model, data, mixed_precision="bf1")
    with pytest.raises(ValueError, match="view='unmask' is not known; did you mean 'unmasked'"):
        mm.evaluate_reconstruction(model, data, view="unmask")
    image, text = (torch.eye(5) for _ in range(2))
    scale, bias = torch.tensor(2.0), torch.tensor(-3.0)
    with pytest.raises(ValueError, match="loss='siglip' is not known"):
        contrastive_fraction(image, text, scale, bias, None, "siglip")


def test_a_run_that_ended_too_soon_says_so_and_its_remedy_works(make_data, make_model, tmp_path):
    data = make_data(23)

    def fails(trainer, record):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        settings = config(tmp_path, run_name="soon")
        mm.train_model(settings, data, data, make_model(), callbacks=[fails])
    words = "ended before its first validation, .* go on with resume=True, run_name='soon'"
    with pytest.raises(FileNotFoundError, match=words):
        _ = mm.Run.load(tmp_path / "soon").model
    again = mm.train_model(config(tmp_path, run_name="soon"), data, data, make_model(), resume=True)
    assert again.model.embed_dim == 13
