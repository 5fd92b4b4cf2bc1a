"""The masking lab without a browser: masks are the trainer's, numbers are those of evaluation."""

import base64
import gc
import io
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
from mmkit.data.openmoji.layers import DrawingLayers
from mmkit.masking.image import IMAGE_MASKERS
from mmkit.masking.text import TEXT_MASKERS
from mmkit.widgets.mask_lab import _SHOWN, MaskLab
from mmkit.widgets.parts import png
from tests.train_small import DEFAULTS

WIDGET = "application/vnd.jupyter.widget-view+json"


def shown(lab):
    """The contents of the page, by part of the lab."""
    canvas = lab.canvas
    parts = dict(image=canvas.image, mask=canvas.mask, mode=canvas.mode, words=lab.words.value)
    return parts | ({"ranking": lab.ranking.value} if lab.model else {})


def paint(lab, *patches):
    """Paint as the browser does: it sends a memoryview."""
    mask = bytearray(lab.canvas.mask)
    for patch in patches:
        mask[patch] ^= 1
    lab.canvas.set_state({"mask": memoryview(bytes(mask))})


# -- controls --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, changes",
    [
        ("row", 9, "image mask words ranking"),
        ("seed", 3, "mask words ranking"),
        ("epoch", 2, "mask words ranking"),
        ("image_masker", "attentive", "mask ranking"),
        ("image_percent", 70, "mask words ranking"),
        ("image_mode", "replace", "mode words ranking"),
        ("text_masker", "truncate", "words ranking"),
        ("text_percent", 80, "words ranking"),
        ("text_mode", "replace", "words ranking"),
    ],
)
def test_a_control_changes_what_it_is_for_and_back_again(lab, name, value, changes):
    before, control = shown(lab), getattr(lab, name)
    old, control.value = control.value, value
    after = shown(lab)
    assert {part for part in before if after[part] != before[part]} == set(changes.split())
    control.value = old
    assert shown(lab) == before


def test_every_control_has_a_name_of_its_own(lab):
    names = [control.description for control in lab.controls]
    assert all(names) and len(set(names)) == len(names) == 9


def test_only_maskers_that_can_work_are_offered(make_data, make_model, plain_lab):
    everywhere = [n for n in IMAGE_MASKERS if n not in ("layers", "attentive", "inattentive")]
    assert list(plain_lab.image_masker.options) == everywhere
    assert list(plain_lab.text_masker.options) == list(TEXT_MASKERS)
    data = make_data(7)
    data.layers = DrawingLayers(15)
    assert list(MaskLab(data, make_model()).image_masker.options) == list(IMAGE_MASKERS)


@pytest.mark.parametrize(
    "image", ["random", "block", "inverse_block", "grid", "gaussian", "cluster"]
)
def test_the_image_mask_is_the_one_that_training_draws(lab, image, tmp_path):
    values = dict(image_mask=image, image_mask_ratio=0.6, seed=5, num_epochs=9)
    config = mm.TrainingConfig(**DEFAULTS | values, output_dir=str(tmp_path))
    trainer = mm.MaskedMultimodalTrainer(config, lab.dataset, model=lab.model)
    lab.seed.value, lab.image_masker.value, lab.image_percent.value = 5, image, 60
    for row, epoch in ((0, 0), (7, 3), (22, 8)):
        lab.row.value, lab.epoch.value = row, epoch
        drawn = trainer.maskings(lab.dataset.batch([11, row, 2]), epoch)[0]
        for part in ("mask", "ids_keep", "ids_restore"):
            assert torch.equal(getattr(drawn, part)[1:2], getattr(lab.masking, part))


@pytest.mark.parametrize("mode", ["drop", "80/10/10"])
@pytest.mark.parametrize("text", TEXT_MASKERS)
def test_the_text_mask_is_the_one_that_training_draws(lab, text, mode, tmp_path):
    values = dict(text_mask=text, text_mask_ratio=0.4, text_mask_mode=mode, seed=5, num_epochs=9)
    config = mm.TrainingConfig(**DEFAULTS | values, output_dir=str(tmp_path))
    trainer = mm.MaskedMultimodalTrainer(config, lab.dataset, model=lab.model)
    lab.seed.value, lab.text_masker.value, lab.text_percent.value = 5, text, 40
    lab.text_mode.value = mode
    for row, epoch in ((0, 0), (9, 3), (22, 8)):
        lab.row.value, lab.epoch.value = row, epoch
        drawn = trainer.maskings(lab.dataset.batch([4, row, 2]), epoch)[1]  # row 4 has most words
        length = lab.batch.input_ids.shape[1]
        assert torch.equal(drawn.mask[1:2, :length], lab.text_masking.mask)
        if mode == "80/10/10":
            assert torch.equal(drawn.substitute[1:2, :length], lab.text_masking.substitute)


def test_nothing_masked_is_no_masking(lab):
    lab.image_percent.value = lab.text_percent.value = 0
    assert lab.masking is None and lab.text_masking is None
    assert torch.equal(lab.still(), lab.dataset[4]["image"])
    assert "9 of 9 patches" in lab.words.value and lab.cost() == 1


# -- painting --------------------------------------------------------------------------------


def test_what_is_painted_in_the_browser_becomes_the_mask(lab):
    before, old = lab._masked_patches().copy(), shown(lab)
    paint(lab, 0, 7)
    expected = before.copy()
    expected.flat[[0, 7]] ^= True
    assert np.array_equal(lab.painted, expected)
    assert np.array_equal(lab.masking.mask.reshape(3, 3).numpy(), expected)
    assert lab.image_masker.value == "painted"
    assert {part for part in old if shown(lab)[part] != old[part]} >= {"mask", "ranking"}
    mask = ("painted", np.stack([expected] * 23))
    features = mm.embed(lab.model, lab.dataset, image_mask=mask, text_mask=("random", 0.5))
    by_hand = features.image_features[4] @ features.text_features[features.first_caption].T
    torch.testing.assert_close(lab.cosines, by_hand)


def test_other_masker_controls_go_back_to_computed_masks(lab):
    lab.image_masker.value = "grid"
    before = shown(lab)
    for name in ("image_percent", "seed", "epoch"):
        paint(lab, 3)
        assert lab.image_masker.value == "painted"
        getattr(lab, name).value += 1
        assert lab.image_masker.value == "grid"
        getattr(lab, name).value -= 1
        assert shown(lab) == before
    painted = lab.painted
    lab.image_masker.value = "painted"  # what was painted is still there
    assert np.array_equal(lab._masked_patches(), painted)
    lab.row.value, lab.image_mode.value, lab.text_percent.value = 6, "replace", 10
    assert lab.image_masker.value == "painted" and np.array_equal(lab._masked_patches(), painted)


def test_painted_begins_with_the_mask_that_is_shown(plain_lab):
    before = plain_lab.canvas.mask
    plain_lab.image_masker.value = "painted"
    assert plain_lab.canvas.mask == before == plain_lab.painted.tobytes()


def test_one_patch_stays_when_all_are_painted(lab):
    visible = np.argwhere(~lab._masked_patches())[-1]
    paint(lab, *np.flatnonzero(~lab._masked_patches()))
    assert np.argwhere(~lab.painted).tolist() == [visible.tolist()]
    assert lab.canvas.mask == lab.painted.tobytes()  # the browser is told
    assert f"row {visible[0] + 1}, column {visible[1] + 1}" in lab.words.value
    lab.image_percent.value = 30
    assert "must stay" not in lab.words.value
    lab.image_percent.value = 0
    lab.paint(np.ones((3, 3)))
    assert lab.masking.mask.sum() == 8


def test_a_painted_mask_of_another_grid_is_refused(lab):
    with pytest.raises(ValueError, match=r"\(2, 3\).*give an array of \(3, 3\)"):
        lab.paint(np.zeros((2, 3)))


def test_images_need_not_be_square():
    pixels = torch.arange(2 * 3 * 10 * 15).reshape(2, 3, 10, 15).to(torch.uint8)
    lab = MaskLab(mm.MultimodalDataset.from_pixels(pixels, ["a cat", "a dog"]), patch_size=5)
    assert lab.grid == (2, 3) == (lab.canvas.rows, lab.canvas.columns)
    lab.paint([[0, 0, 0], [1, 0, 0]])
    assert (lab.still() == 208).all(0).nonzero().min(0).values.tolist() == [5, 0]
    assert lab.still().shape == (3, 10, 15)


# -- the model's view ------------------------------------------------------------------------


def test_similarities_are_those_of_evaluation(lab):
    modes = dict(image_mode="replace", text_mode="replace")
    lab.image_mode.value = lab.text_mode.value = "replace"
    lab.seed.value = 7
    features = mm.embed(
        lab.model,
        lab.dataset,
        image_mask=("random", 0.5),
        text_mask=("random", 0.5),
        seed=7,
        **modes,
    )
    captions = features.text_features[features.first_caption[lab.rows]]
    torch.testing.assert_close(lab.cosines, features.image_features[4] @ captions.T)
    assert lab.rows == list(range(23)) and f"rank {lab.rank} of 23" in lab.ranking.value


def test_captions_are_encoded_once_and_the_model_is_left_as_it_was(lab, monkeypatch):
    calls = []
    for name in ("encode_text", "class_attention"):
        original = getattr(lab.model, name)
        monkeypatch.setattr(
            lab.model, name, lambda *a, _n=name, _f=original: calls.append(_n) or _f(*a)
        )
    lab.model.train()
    lab.image_masker.value = "attentive"
    lab.image_percent.value = 70
    paint(lab, 1)
    assert calls == ["class_attention"]
    lab.text_percent.value = 20
    assert calls == ["class_attention", "encode_text"]
    assert lab.model.training and all(part.training for part in lab.model.modules())


TEXT_CONTROLS = dict(seed=3, epoch=2, text_masker="block", text_percent=80, text_mode="replace")


@pytest.mark.parametrize("name, value", [("row", 9), *TEXT_CONTROLS.items()])
def test_captions_are_encoded_anew_for_each_text_control(make_data, make_model, name, value):
    lab = MaskLab(make_data(53), make_model())
    lab.image_percent.value = 0
    before = lab.cosines
    getattr(lab, name).value = value
    after = lab.cosines
    assert not torch.equal(after, before)
    lab._cache.clear()
    lab._update()
    assert torch.equal(lab.cosines, after)


def test_it_notices_that_the_model_was_trained(lab):
    before = lab.cosines
    with torch.no_grad():
        lab.model.text_projection[2].weight.mul_(-1)
    lab.image_percent.value += 1
    lab.image_percent.value -= 1
    torch.testing.assert_close(lab.cosines, -before)


def test_an_attentive_mask_of_the_lab_may_train_the_model(lab):
    lab.image_masker.value = "attentive"
    lab.model.encode_image(lab.batch.pixel_values, lab.masking)[0, 0].backward()


# -- what is shown ---------------------------------------------------------------------------


def test_the_image_is_sent_as_it_is_and_the_still_has_its_masked_patches_grey(plain_lab):
    image = plain_lab.dataset[0]["image"]
    sent = np.asarray(Image.open(io.BytesIO(plain_lab.canvas.image)))
    assert np.array_equal(sent, image.permute(1, 2, 0)) and plain_lab.canvas.image == png(image)
    mask = torch.from_numpy(plain_lab._masked_patches())
    pixels = mask.repeat_interleave(5, 0).repeat_interleave(5, 1)
    assert torch.equal(plain_lab.still(), torch.where(pixels, 208, image))


def test_a_normalised_image_is_shown_in_its_own_range(make_data):
    data = make_data(3)
    data._decoded.pixels = data._decoded.pixels.float() / 100 - 1
    lab = MaskLab(data, patch_size=5)
    assert lab.image().dtype == torch.uint8
    assert lab.image().min() == 0 and lab.image().max() == 255


@pytest.mark.parametrize("name", ["lab", "plain_lab"])
def test_a_saved_page_has_an_image(name, request, monkeypatch):
    lab = request.getfixturevalue(name)
    bundle = lab._repr_mimebundle_()
    assert set(bundle) == {WIDGET, "image/png", "text/plain"}
    still = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert still.width > 2 * still.height > 400
    assert bundle["text/plain"].startswith(f"MaskLab(row {lab.row.value}: ")
    displayed = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: displayed.append(data))
    lab._ipython_display_()
    assert [set(data) - {"text/plain"} for data in displayed] == [{"image/png"}, {WIDGET}]
    assert displayed[0]["image/png"].endswith(lab.canvas.still) and len(lab.canvas.still) == 60


# -- what stays in memory --------------------------------------------------------------------


def test_the_last_labs_on_a_page_work_without_a_variable(make_data, make_model):
    _SHOWN.clear()
    views, models = [], []
    for seed in range(5):
        lab = MaskLab(make_data(23), make_model(seed=seed))
        lab._repr_mimebundle_()
        views.append(lab.view)
        models.append(weakref.ref(lab.model))
        del lab
    gc.collect()
    assert [model() is not None for model in models] == [False, False, True, True, True]
    row = views[-1].children[0].children[0].children[0]
    words = views[-1].children[1].children[1]
    before, row.value = words.value, 9
    assert words.value != before
    _SHOWN.clear()
