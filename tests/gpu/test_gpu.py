"""Tests that need a GPU; they are skipped without one."""

import pytest
import torch

import mmkit as mm
from mmkit import mask_noise
from mmkit.masking.image import IMAGE_MASKERS
from mmkit.masking.text import TEXT_MASKERS
from mmkit.models.patches import patchify, unpatchify
from mmkit.training.step import LOGITS, Contrast, backward, contrastive_fraction
from tests.conftest import shared

pytestmark = pytest.mark.gpu


def test_noise_has_the_same_bits_on_the_gpu():
    ids = torch.cat([torch.arange(1000), torch.tensor([2**62, -5])])
    assert torch.equal(mask_noise(3, 5, ids, 197), mask_noise(3, 5, ids.cuda(), 197).cpu())


def test_a_resident_set_gives_the_same_batches(make_data):
    pixels = torch.randint(0, 256, (23, 3, 15, 15), dtype=torch.uint8)
    here, there = (
        mm.MultimodalDataset.from_pixels(pixels, [f"number {i}" for i in range(23)], device=device)
        for device in (None, "cuda")
    )
    a, b = here.batch([3, 1, 7]), there.batch([3, 1, 7])
    assert b.pixel_values.is_cuda
    assert torch.equal(a.pixel_values, b.pixel_values.cpu()) and torch.equal(
        a.input_ids, b.input_ids.cpu()
    )


def test_features_are_the_same_on_the_gpu(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    here = mm.embed(model, data)
    there = mm.embed(model.to_device("cuda"), data)
    torch.testing.assert_close(here.image_features, there.image_features, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(here.text_features, there.text_features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_learns_in_every_precision(make_model, make_data, tmp_path, precision):
    data = make_data(23)
    config = mm.TrainingConfig(
        num_epochs=60, batch_size=23, learning_rate=5e-3, matrix_learning_rate=1.5e-2,
        warmup_steps=3, eval_every=60,
        mixed_precision=precision, output_dir=str(tmp_path), run_name=precision,
    )  # fmt: skip
    run = mm.train_model(config, data, data, make_model())
    assert run.history[-1]["loss"] < 1


ALL_TERMS = dict(
    mim_weight=1.0, mlm_weight=0.3, itm_weight=0.3, cross_modal=True, decoder_width=32,
    image_mask_ratio=0.5, text_mask_ratio=0.3,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_all_terms_learn_in_every_precision(make_model, make_data, tmp_path, precision):
    """Each loss is smaller at the end than at the start, and float32 skips no step."""
    config = mm.TrainingConfig(
        num_epochs=80, batch_size=23, learning_rate=5e-3, matrix_learning_rate=1.5e-2,
        warmup_steps=3, eval_every=80,
        log_every=1, mixed_precision=precision, output_dir=str(tmp_path),
        run_name=precision, **ALL_TERMS,
    )  # fmt: skip
    data = make_data(23)
    run = mm.train_model(config, data, data, make_model())
    steps = [r for r in run.history if r["split"] == "train"]
    for term in ("contrastive_loss", "mim_loss", "mlm_loss"):
        assert steps[-1][term] < 0.8 * steps[0][term], term
    assert steps[-1]["skipped_steps"] <= (10 if precision == "fp16" else 0)


def test_all_terms_in_micro_batches_have_the_gradient_of_the_whole(make_model, make_data, tmp_path):
    """Without matching, whose wrong pairs depend on the micro-batch."""
    values = ALL_TERMS | dict(itm_weight=0.0)

    def gradients(parts):
        config = mm.TrainingConfig(
            batch_size=23, mixed_precision="no", gradient_accumulation_steps=parts,
            output_dir=str(tmp_path), **values,
        )  # fmt: skip
        trainer = mm.MaskedMultimodalTrainer(config, make_data(23), None, make_model())
        trainer.net.train()
        trainer.gradients(trainer.first_batch(), 0)
        named = trainer.model.named_parameters()
        return torch.cat([p.grad.flatten().cpu() for _, p in named if p.grad is not None])

    whole = gradients(1)
    assert (gradients(4) - whole).norm() / whole.norm() < 1e-4


def test_resume_is_bit_exact_with_deterministic_kernels(make_model, make_data, tmp_path):
    data = make_data(53)

    def train(name, resume=False, stop=None):
        config = mm.TrainingConfig(
            num_epochs=4, batch_size=11, dropout=0.2, deterministic=True, log_every=1,
            checkpoint_every=2, mixed_precision="bf16", output_dir=str(tmp_path), run_name=name,
        )  # fmt: skip
        trainer = mm.MaskedMultimodalTrainer(config, data, None, make_model(dropout=0.2), resume)
        if stop is not None:
            step = trainer.train_step

            def stopping(*args):
                if trainer.step == stop:
                    raise KeyboardInterrupt
                return step(*args)

            trainer.train_step = stopping
        return trainer.fit()

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("killed", stop=9)
    resumed = train("killed", resume=True)
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in whole.history]


@pytest.mark.slow
def test_half_precision_reaches_what_float32_reaches(tmp_path):
    """R@1 on OpenMoji after six epochs, three seeds each: equal within the noise of the seeds."""
    train, val, test = mm.openmoji(64)
    reached = {}
    for precision in ("no", "bf16", "fp16"):
        for seed in range(3):
            config = mm.TrainingConfig(
                num_epochs=6, seed=seed, mixed_precision=precision, eval_every=6,
                output_dir=str(tmp_path), run_name=f"{precision}-{seed}",
            )  # fmt: skip
            run = mm.train_model(config, train, val)
            recall = mm.mean_recall(mm.evaluate(run.model.to_device("cuda"), test))
            reached.setdefault(precision, []).append(recall)
            skipped = [r["skipped_steps"] for r in run.history if r["split"] == "train"][-1]
            assert skipped < 20, f"{precision}: {skipped} steps skipped"
    print({name: [round(value, 3) for value in values] for name, values in reached.items()})
    mean = {name: sum(values) / 3 for name, values in reached.items()}
    noise = max(max(values) - min(values) for values in reached.values())
    for precision in ("bf16", "fp16"):
        assert mean[precision] > mean["no"] - max(noise, 0.02)


@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_accumulation_is_exact_on_the_gpu(make_model, make_data, kind):
    """With dropout: equal to keeping the graphs of all micro-batches under the same draws."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(dropout=0.3).to_device("cuda").train()
    batch = shared(make_data(53).batch(range(53))).to("cuda")
    parts, scale = batch.split(4), (model.logit_scale, model.logit_bias)

    def gradient(step):
        torch.manual_seed(7)
        model.zero_grad()
        step()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def whole():
        outputs = [model(part) for part in parts]
        image = torch.cat([o.image_features for o in outputs])
        text = torch.cat([o.text_features for o in outputs])
        contrastive_fraction(image, text, *scale, batch.partners, kind).backward()
        model.logit_bias.grad = torch.zeros_like(model.logit_bias) if kind == "info_nce" else (
            model.logit_bias.grad
        )  # fmt: skip

    reference = gradient(whole)
    ours = gradient(lambda: backward(model, parts, scale, Contrast(kind)))
    assert (ours - reference).norm() / reference.norm() < 1e-5


def test_memory_grows_with_the_micro_batch_on_the_gpu(tmp_path):
    """A step of 4,096 made-up images in sixteen micro-batches compared with one of 256.

    It may add the batch itself, which is on the device, the features of all pairs with their
    gradients, and a few matrices of the one slice of logits that is held at a time.
    """
    pixels = torch.randint(0, 256, (4096, 3, 64, 64), dtype=torch.uint8)
    texts = [f"image number {i}" for i in range(4096)]
    peak = {}
    for count in (256, 4096):
        data = mm.MultimodalDataset.from_pixels(pixels[:count], texts[:count])
        config = mm.TrainingConfig(
            batch_size=count, gradient_accumulation_steps=count // 256, output_dir=str(tmp_path)
        )
        trainer = mm.MaskedMultimodalTrainer(config, data)
        batch = trainer.first_batch()
        for _ in range(2):  # the first makes the optimizer state
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            trainer.train_step(batch, 0)
        peak[count] = torch.cuda.max_memory_allocated()
        del trainer, batch
    resident = pixels.nbytes + 4 * 2 * 4096 * 192 * 4  # features of both kinds, twice
    assert peak[4096] < peak[256] + resident + 12 * 4 * LOGITS, peak


@pytest.mark.parametrize("name", sorted(IMAGE_MASKERS))
def test_image_masks_are_the_same_on_the_gpu(name):
    """Equal to the bit; where sums decide (colours, attention), except for near-ties."""
    val = mm.openmoji(64)[1]
    torch.manual_seed(0)
    model = mm.MultimodalEncoder.preset("tiny", tokenizer=val.tokenizer).eval()
    batch = val.batch(range(100))
    image = (name, torch.eye(8) if name == "painted" else 0.6)
    masks = []
    for device in ("cpu", "cuda"):
        there = batch.to(device)
        masking, _ = mm.masking.draw_maskings(
            there, model.to_device(device), seed=3, epoch=5, image=image, layers=val.layers
        )
        masks.append(masking.mask.cpu())
        features = model.encode_image(there.pixel_values, masking)
        noise = torch.randint_like(there.pixel_values, 256)
        patches = patchify(there.pixel_values, 8)
        patches = torch.where(masking.mask[..., None], patchify(noise, 8), patches)
        assert torch.equal(features, model.encode_image(unpatchify(patches, 8, (8, 8)), masking))
    differing = (masks[0] != masks[1]).float().mean()
    assert differing <= (0.01 if name in ("cluster", "attentive", "inattentive") else 0)


@pytest.mark.parametrize("name", sorted(TEXT_MASKERS))
def test_text_masks_are_the_same_on_the_gpu(make_model, make_data, name):
    model, data = make_model(), make_data(53)
    frequency, batch = data.token_frequency(), data.batch(range(53))
    options = dict(text=(name, 0.5), text_mode="80/10/10", seed=3, epoch=5)
    model.token_frequency = frequency
    _, here = mm.masking.draw_maskings(batch, model.token_info, **options)
    tokens = model.to_device("cuda").token_info
    _, there = mm.masking.draw_maskings(batch.to("cuda"), tokens, **options)
    assert torch.equal(here.mask, there.mask.cpu())
    assert torch.equal(here.substitute, there.substitute.cpu())


def test_a_training_run_leaves_the_generators_of_the_gpu_as_they_were(
    make_model, make_data, tmp_path
):
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    config = mm.TrainingConfig(batch_size=11, num_epochs=1, output_dir=str(tmp_path), dropout=0.2)
    mm.train_model(config, make_data(23), None, make_model(dropout=0.2))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_a_caption_of_padding_alone_spoils_no_gradient_on_the_gpu(make_model, make_data):
    model, batch = make_model().to_device("cuda").train(), make_data(7).batch(range(7)).to("cuda")
    batch.valid[3] = False
    features = model.encode_text(batch.input_ids, batch.valid)
    features.square().cos().sum().backward()
    assert not features[3].any()
    gradients = [p.grad for p in model.bert.parameters() if p.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)
