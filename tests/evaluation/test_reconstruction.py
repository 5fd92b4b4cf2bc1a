"""Reconstructions are measured on what was masked, and kept at each validation of a run."""

import math

import pytest
import torch
from PIL import Image

import mmkit as mm
from mmkit.evaluation.reconstruction import (
    evaluate_reconstruction,
    example_images,
    guesses,
    mean_patches,
    partners,
    reconstruct,
)
from mmkit.models.patches import patchify
from tests.models.decoding import CORRECT
from tests.terms_by_hand import BESIDE
from tests.train_small import DEFAULTS

HEADS = dict(pixels=True, words=True, matching=True, across=True, width=32)


@pytest.fixture
def model(make_model):
    return make_model().add_decoder(**HEADS).eval()


def test_the_mean_patch_is_the_mean_at_its_position(make_data):
    data = make_data(23)
    pixels = data.batch(range(23)).pixel_values.double() / 255
    expected = patchify(pixels, 5).mean(0)
    torch.testing.assert_close(mean_patches(data, 5, chunk=7), expected.float())


def test_pixel_errors_and_baselines_by_a_slow_loop(model, make_data):
    """Over masked patches alone, in brightness, for any batch size."""
    data = make_data(11)
    baseline = mean_patches(data, 5)
    options = dict(image_mask=("random", 0.6), text_mask=("random", 0.4), baseline=baseline)
    found = evaluate_reconstruction(model, data, batch_size=11, **options)
    batch = data.batch(range(11))
    image, text = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=0, image=("random", 0.6), text=("random", 0.4),
        text_mode="replace", predict_tokens=True,
    )  # fmt: skip
    back = reconstruct(model, batch, image, text)
    true, errors, means, visibles = patchify(batch.pixel_values / 255, 5), [], [], []
    for row in range(11):
        visible = true[row][~image.mask[row]].mean(0)
        for position in image.mask[row].nonzero()[:, 0].tolist():
            patch = true[row, position]
            errors.append((back.predictions[row, position] - patch).square().mean().item())
            means.append((baseline[position] - patch).square().mean().item())
            visibles.append((visible - patch).square().mean().item())
    for name, values in (("pixel_error", errors), ("mean_patch_error", means),
                         ("visible_mean_error", visibles)):  # fmt: skip
        assert found[name] == pytest.approx(sum(values) / len(values), rel=1e-4)
    right = back.token_log_probs.argmax(1) == back.token_labels
    assert found["mlm_accuracy"] == pytest.approx(right.float().mean().item())
    nll = -back.token_log_probs.gather(1, back.token_labels[:, None]).mean().item()
    assert found["mlm_perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    again = evaluate_reconstruction(model, data, batch_size=4, **options)
    for name in found.keys() - {"itm_loss", "itm_accuracy"}:  # of a batch, by nature
        assert again[name] == pytest.approx(found[name], rel=1e-4), name


def test_visible_patches_stay_as_they_are(model, make_data):
    batch = make_data(7).batch(range(7))
    masking, _ = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=0, image=("random", 0.5)
    )
    back = reconstruct(model, batch, masking, context="none")
    before, after = patchify(batch.pixel_values, 5), patchify(back.images, 5)
    assert torch.equal(before[~masking.mask], after[~masking.mask])
    assert not torch.equal(before[masking.mask], after[masking.mask])


def test_guesses_name_the_masked_tokens(model, make_data, tokenizer):
    batch = make_data(5).batch(range(5))
    image, text = mm.masking.draw_maskings(
        batch, model.token_info, seed=0, epoch=0, text=("random", 0.5), predict_tokens=True
    )
    lines = guesses(model, batch, reconstruct(model, batch, image, text), top=3)
    for row, line in enumerate(lines):
        masked = text.mask[row].nonzero()[:, 0].tolist()
        assert [guess["position"] for guess in line["guesses"]] == masked
        assert [i for i, (_, kind) in enumerate(line["tokens"]) if kind == "mask"] == masked
        for guess in line["guesses"]:
            number = int(batch.input_ids[row, guess["position"]])
            assert guess["truth"] == tokenizer.convert_ids_to_tokens(number)
            chances = [chance for _, chance in guess["top"]]
            assert len(chances) == 3 and chances == sorted(chances, reverse=True)


def test_a_run_keeps_a_strip_at_each_validation(make_model, make_data, tmp_path):
    """As a file and in TensorBoard: original, masked, reconstructed, the same images each time."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = dict(mim_weight=1.0, contrastive_weight=0.0, decoder_width=32, num_epochs=2)
    config = mm.TrainingConfig(**DEFAULTS | values, output_dir=str(tmp_path), run_name="run")
    train, val = make_data(23), make_data(9, seed=1)
    run = mm.train_model(config, train, val, make_model())
    paths = sorted((run.path / "reconstructions").glob("*.png"))
    assert [int(path.stem) for path in paths] == [3, 6]
    original, masked, back = example_images(run.model, val, config)
    kept = mm.plots.read_strips(run.path)
    assert torch.equal(kept["original"], original) and torch.equal(kept["masked"], masked)
    assert torch.equal(kept["step 6"], back) and not torch.equal(kept["step 3"], back)
    events = EventAccumulator(str(run.path), size_guidance={"images": 0}).Reload()
    images = events.Images("original, masked, reconstructed")
    assert [image.step for image in images] == [3, 6]
    size = Image.open(paths[0]).size
    assert (images[0].width, images[0].height) == size
    assert "pixel_error" in run.history[-1] and "image_to_text_R@1" not in run.history[-1]


def test_partners_by_hand():
    """The next row of another group, cyclically; none if there is no other group."""
    assert partners(CORRECT, "matched") is None
    assert partners(CORRECT, "none").tolist() == [-1] * 5
    groups = torch.tensor([0, 0, 1, 2, 0])
    assert partners(groups[:, None] == groups, "mismatched").tolist() == [2, 2, 3, 4, 2]
    assert partners(CORRECT, "mismatched").tolist() == [1, 2, 3, 0, 0]  # 4 matches 3
    assert partners(torch.ones(3, 3, dtype=torch.bool), "mismatched").tolist() == [-1] * 3


@pytest.mark.parametrize("mode", ["drop", "replace", "80/10/10"])
def test_reconstruction_is_the_same_in_any_batches(make_terms_trainer, make_data, mode):
    """17 pairs at once, or 5 or 2 at a time: the mean over all that is masked."""
    values = BESIDE | dict(text_mask_mode=mode, cross_modal=True)
    model, val = make_terms_trainer(**values).model.eval(), make_data(17, seed=1)
    options = dict(text_mode=mode, baseline=torch.full((9, 75), 0.4))
    found = [evaluate_reconstruction(model, val, batch_size=n, **options) for n in (17, 5, 2)]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert {"mim_loss", "pixel_error", "mean_patch_error", "visible_mean_error", "mlm_loss",
            "mlm_accuracy", "mlm_perplexity"} == found[0].keys()  # fmt: skip
