"""Every masker trains; masks are the same on two processes and after a kill."""

import dataclasses
import json
import signal

import pytest
import torch

import mmkit as mm
from mmkit.masking.image import IMAGE_MASKERS
from mmkit.masking.text import TEXT_MASKERS
from mmkit.models.attention import class_attention
from mmkit.training.summary import describe, effective_configuration
from tests.training.test_trainer import QUICK, same_weights, train_small


@pytest.fixture
def make_trainer(tmp_path, make_model, make_data):
    def make(data=None, model=None, **values):
        config = mm.TrainingConfig(**QUICK | dict(output_dir=str(tmp_path)) | values)
        return mm.MaskedMultimodalTrainer(
            config, data or make_data(53), None, model or make_model()
        )

    return make


@pytest.mark.parametrize("masker", sorted(IMAGE_MASKERS))
@pytest.mark.parametrize("mode", ["drop", "replace"])
def test_every_image_masker_trains(make_trainer, masker, mode):
    """A step with each masker has a finite gradient in every part that got an input."""
    values = dict(image_mask=masker, image_mask_mode=mode, gradient_accumulation_steps=2)
    data = model = None
    if masker == "painted":
        values["painted_mask"] = torch.eye(3)
    if masker == "layers":  # only the built-in images have layers
        data = mm.openmoji(64)[1]
        model = mm.MultimodalEncoder.preset("tiny", tokenizer=data.tokenizer)
        values["batch_size"] = 16
    trainer = make_trainer(data, model, **values)
    batch = trainer.first_batch()
    loss, norm = trainer.train_step(batch, 0)
    assert torch.isfinite(loss) and 0 < norm < float("inf")
    if masker not in ("painted", "layers"):
        shown = trainer.maskings(batch, 0)[0].mask.sum(1)
        assert (shown == 9 - round(9 * 0.5)).all()


@pytest.mark.parametrize("masker", sorted(TEXT_MASKERS))
@pytest.mark.parametrize("mode", ["drop", "replace", "80/10/10"])
def test_every_text_masker_trains(make_trainer, masker, mode):
    trainer = make_trainer(text_mask=masker, text_mask_mode=mode, text_mask_ratio=0.5)
    loss, norm = trainer.train_step(trainer.first_batch(), 0)
    assert torch.isfinite(loss) and 0 < norm < float("inf")


@pytest.mark.parametrize(
    "schedule, expected",
    [("constant", [2, 2, 2, 2, 2]), ("linear", [2, 3, 5, 6, 7]), ("cosine", [2, 3, 5, 6, 7])],
)
def test_the_ratio_follows_its_schedule(make_trainer, schedule, expected):
    """Of 9 patches, from 0.2 in the first epoch to 0.8 in the last one that masks anything."""
    final = None if schedule == "constant" else 0.8
    trainer = make_trainer(
        num_epochs=6, unmasked_epochs=1, image_mask_ratio=0.2,
        image_mask_schedule=schedule, image_mask_final_ratio=final,
    )  # fmt: skip
    batch = trainer.first_batch()
    masked = [trainer.maskings(batch, epoch)[0].mask.sum(1).unique().tolist() for epoch in range(5)]
    assert masked == [[count] for count in expected]
    assert trainer.maskings(batch, 5) == (None, None)


def test_a_uniform_ratio_is_one_of_its_own_for_each_sample(make_trainer):
    trainer = make_trainer(
        image_mask_ratio=0.1, image_mask_schedule="uniform", image_mask_final_ratio=0.9,
        text_mask_ratio=0.1, text_mask_schedule="uniform", text_mask_final_ratio=0.6,
    )  # fmt: skip
    batch = trainer.first_batch()
    image, text = trainer.maskings(batch, 0)
    counts = image.mask.sum(1)
    assert len(counts.unique()) > 3 and 1 <= counts.min() and counts.max() <= 8
    assert torch.equal(image.keep_valid.sum(1), 9 - counts)
    assert not torch.equal(counts, trainer.maskings(batch, 1)[0].mask.sum(1))
    again = trainer.maskings(batch[torch.arange(10, -1, -1)], 0)
    assert torch.equal(again[0].mask.flip(0), image.mask)
    assert torch.equal(again[1].mask.flip(0), text.mask)


def test_the_running_mean_is_what_attentive_looks_with(make_trainer, make_model):
    """The attention is that of the EMA, at half the resolution, not of the trained model."""
    trainer = make_trainer(image_mask="attentive", learning_rate=0.05, num_epochs=3)
    assert make_trainer().attention_ema is None
    rising = dict(image_mask_schedule="linear", image_mask_final_ratio=0.5)
    assert make_trainer(image_mask="attentive", image_mask_ratio=0.0, **rising).attention_ema
    batch = trainer.first_batch()
    for _ in range(3):
        trainer.train_step(batch, 0)
    pixels = trainer.model.normalize(batch.pixel_values)
    with torch.no_grad():
        mean, now = (
            class_attention(vit, pixels, half=True, of="mean")
            for vit in (trainer.attention_ema.module, trainer.model.vit)
        )
    masking = trainer.maskings(batch, 0)[0]
    assert not torch.allclose(mean, now)
    for seen, attention in zip(~masking.mask, mean, strict=True):
        assert attention[seen].min() >= attention[~seen].max()


def test_masks_are_drawn_once_per_step(make_trainer, monkeypatch):
    """The second pass of a micro-batch masks what the first masked, without drawing again."""
    trainer = make_trainer(image_mask="attentive", gradient_accumulation_steps=3)
    calls = []
    attend, tokens = trainer.plan.tokens.attend, trainer.plan.tokens
    monkeypatch.setattr(tokens, "attend", lambda x: calls.append(len(x)) or attend(x))
    trainer.train_step(trainer.first_batch(), 0)
    assert calls == [4, 4, 3]


def test_a_run_says_how_its_ratio_changes_and_what_it_pays_for(make_trainer):
    """The longest row is encoded; a schedule is named; the EMA's forward pass is counted."""
    rising = dict(image_mask_ratio=0.2, image_mask_final_ratio=0.8)
    trainer = make_trainer(image_mask_schedule="uniform", **rising)
    longest = trainer.maskings(trainer.first_batch(), 0)[0].ids_keep.shape[1]
    assert effective_configuration(trainer)["patches_encoded"] == longest
    assert "20 to 80 % at random; padded to the longest" in describe(trainer)
    assert "now; linear to 80 %" in describe(make_trainer(image_mask_schedule="linear", **rising))
    plain, looking = (
        effective_configuration(make_trainer(image_mask=name))["gflop_per_pair"]
        for name in ("random", "attentive")
    )
    assert plain < looking < 2 * plain


def test_a_run_from_before_these_fields_can_be_resumed(make_trainer, tmp_path):
    """A field that the file lacks is its default; a missing EMA is an error."""
    trainer = make_trainer(run_name="old", num_epochs=1)
    trainer.fit()
    path = tmp_path / "old/last/state.pth"
    state = mm.models.checkpoint.read_checkpoint(path)
    del state["ema"], state["config"]["image_mask_schedule"], state["config"]["ema_momentum"]
    mm.files.write_atomically(state, path)
    config, data, model = trainer.config, trainer.train, trainer.model
    assert mm.MaskedMultimodalTrainer(config, data, None, model, resume=True).step == 5
    state["config"]["image_mask"] = "attentive"
    mm.files.write_atomically(state, path)
    config = dataclasses.replace(config, image_mask="attentive")
    with pytest.raises(ValueError, match="no EMA to resume from"):
        mm.MaskedMultimodalTrainer(config, data, None, model, resume=True)


def test_wrong_masks_are_refused_before_training(make_trainer, make_data, tmp_path):
    with pytest.raises(ValueError, match="needs drawings with layers"):
        make_trainer(image_mask="layers")
    wrong = make_trainer(image_mask="painted", painted_mask=[[1, 0], [0, 0]], run_name="wrong")
    with pytest.raises(ValueError, match=r"painted mask is \(2, 2\), the images are 3 x 3"):
        wrong.fit()
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("name", ["painted", "layers", "attentive", "block"])
def test_evaluation_under_any_masker(name):
    """Masked scores need a masker by name; painted masks may differ from image to image."""
    val = mm.openmoji(64)[1].subset(range(37))
    torch.manual_seed(0)
    model = mm.MultimodalEncoder.preset("tiny", tokenizer=val.tokenizer)
    argument = torch.rand(37, 8, 8) < 0.5 if name == "painted" else 0.5
    features = mm.embed(model, val, image_mask=(name, argument), batch_size=11)
    plain = mm.embed(model, val, batch_size=11)
    assert not torch.allclose(features.image_features, plain.image_features)
    assert torch.equal(features.text_features, plain.text_features)
    if name == "painted":
        one = mm.embed(model, val.subset([17]), image_mask=(name, argument[17]))
        torch.testing.assert_close(one.image_features[0], features.image_features[17])
        with pytest.raises(ValueError, match="5 painted masks for 37 images"):
            mm.embed(model, val, image_mask=(name, argument[:5]))


# -- in processes of their own ---------------------------------------------------------------


def recorded(folder, name):
    """{(epoch, sample): (masked patches, masked tokens)} over all processes, each exactly once."""
    lines = [
        json.loads(line)
        for file in sorted((folder / name).glob("masks-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    keys = [(epoch, sample) for epoch, sample, *_ in lines]
    assert len(keys) == len(set(keys))
    return {(epoch, sample): masked for epoch, sample, *masked in lines}


@pytest.mark.slow
@pytest.mark.parametrize("masker", ["block", "attentive"])
def test_masks_are_the_same_on_two_processes_and_after_a_kill(tmp_path, masker):
    """What each sample masked in each epoch: one process, two, and one killed in mid-epoch."""
    values = dict(
        image_mask=masker, image_mask_schedule="uniform", image_mask_final_ratio=0.8,
        text_mask="whole_word", text_mask_mode="80/10/10", num_epochs=2, checkpoint_every=1,
    )  # fmt: skip
    runs = (("one", []), ("two", ["--processes", "2"]), ("killed", ["--kill-at", "7"]))
    for name, flags in runs:
        done = train_small(tmp_path, name, "--record", *flags, **values)
        assert done.returncode == (-signal.SIGKILL if name == "killed" else 0), done.stderr[-2000:]
    resumed = train_small(tmp_path, "killed", "--record", "--resume", **values)
    assert resumed.returncode == 0 and "resuming" in resumed.stdout, resumed.stderr[-2000:]
    whole = recorded(tmp_path, "one")
    assert len(whole) == 2 * 53 and any(words for _, words in whole.values())
    assert recorded(tmp_path, "two") == whole
    assert recorded(tmp_path, "killed") == whole
    same_weights(tmp_path, "one", "killed")


def test_frequencies_are_those_of_the_training_whatever_is_evaluated(
    make_data, make_model, tmp_path
):
    """A caption is masked the same in a part, in the whole, and by the model read back; without a
    training, the remedy that is named serves."""
    train, untrained, other = make_data(53), make_model(), make_model()
    rows, mask = [3, 5, 7, 11, 13, 17, 19, 23, 29, 31], dict(text_mask=("frequency", 0.5))
    part = train.subset(rows)
    assert not torch.equal(part.token_frequency(), train.token_frequency())
    with pytest.raises(ValueError, match=r"set model.token_frequency = train.token_") as said:
        mm.embed(untrained, train, **mask)
    config = mm.TrainingConfig(**QUICK | dict(output_dir=str(tmp_path), text_mask="frequency"))
    run = mm.train_model(config, train, part, model=untrained)
    assert torch.equal(untrained.token_frequency, train.token_frequency())
    for model in (untrained, mm.load(run.path / "best_model.pth")):
        whole = mm.embed(model, train, **mask).text_features
        torch.testing.assert_close(mm.embed(model, part, **mask).text_features, whole[rows])
    remedy = str(said.value).partition("set ")[2].partition(",")[0]
    exec(remedy, dict(model=other, train=train))
    assert mm.embed(other, part, **mask).text_features.isfinite().all()
