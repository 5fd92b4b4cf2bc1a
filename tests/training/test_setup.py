"""What cannot train is refused in words before a run starts."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import mmkit as mm
from mmkit.training.step import Contrast, backward


def test_two_unnamed_runs_are_two_folders(make_config, make_model, make_data):
    paths = [
        mm.train_model(
            make_config(run_name="", max_steps=1), make_data(53), None, make_model()
        ).path
        for _ in range(2)
    ]
    assert paths[0] != paths[1] and all((path / "best_model.pth").is_file() for path in paths)


def test_the_training_tokenizer_goes_to_the_validation_set(
    make_config, make_model, make_data, tokenizer
):
    train, val = make_data(53, tokenizer=None), make_data(17, tokenizer=None)
    val.texts = [["blue moon"]] * 17
    trainer = mm.MaskedMultimodalTrainer(make_config(), train, val, make_model())
    assert trainer.val.tokenizer is trainer.model.tokenizer is trainer.train.tokenizer
    assert val.tokenizer is not train.tokenizer and val.max_length == 77  # both are unchanged
    foreign = make_data(17, tokenizer=mm.train_wordpiece(["something else"]))
    with pytest.raises(ValueError, match="val set was given another tokenizer"):
        mm.MaskedMultimodalTrainer(make_config(), train, foreign, make_model())


def test_bad_starts_are_refused_in_words(make_config, make_model, make_data):
    with pytest.raises(ValueError, match=r"batch_size=99 is larger than the training set \(53"):
        mm.train_model(make_config(batch_size=99), make_data(53), None, make_model())
    with pytest.raises(ValueError, match="10 pairs cannot be divided among 1 processes and 11"):
        mm.train_model(
            make_config(gradient_accumulation_steps=11), make_data(53), None, make_model()
        )
    with pytest.raises(ValueError, match="masker 'blok' is not known"):
        mm.train_model(make_config(image_mask="blok"), make_data(53), None, make_model())
    with pytest.raises(ValueError, match="16 x 16 pixels, the encoder takes 15 x 15"):
        mm.train_model(make_config(), make_data(53, size=16), None, make_model())
    with pytest.raises(FileNotFoundError, match="no run in"):
        mm.Run.load("nowhere")


def test_gradient_checkpointing_gives_the_same_gradient_and_keeps_less(make_trainer):
    """Dropout on; the bytes that autograd holds after the forward pass are counted."""
    grads, held = {}, {}
    for asked in (False, True):
        trainer = make_trainer(gradient_checkpointing=asked, dropout=0.2)
        model, sizes = trainer.model.train(), []
        batch = trainer.first_batch()
        maskings = trainer.maskings(batch, 0)
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x
        )
        torch.manual_seed(3)
        with hooks:
            model(batch, *maskings)
        held[asked] = sum(sizes)
        torch.manual_seed(3)
        scale = (model.logit_scale, model.logit_bias)
        backward(lambda micro, m=model, x=maskings: m(micro, *x), [batch], scale, Contrast())
        grads[asked] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert held[True] < 0.5 * held[False]
    for name, wanted in grads[False].items():
        torch.testing.assert_close(grads[True][name], wanted)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler; none here")
def test_a_compiled_model_gives_the_same_losses(make_trainer):
    losses = {}
    for asked in (False, True):
        run = make_trainer(compile=asked, max_steps=7, num_epochs=2, run_name=f"c{asked}").fit()
        losses[asked] = [r["loss"] for r in run.history]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
    with pytest.raises(ValueError, match="take one"):
        make_trainer(compile=True, gradient_checkpointing=True)


def test_a_missing_compiler_is_said_in_words(make_trainer, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler on a CPU"):
        make_trainer(compile=True)


@pytest.mark.parametrize(
    "values, count, words",
    [
        (dict(batch_size=1), 7, "contrastive a single pair at a time .* take batch_size=3$"),
        (dict(batch_size=2), 5, r"contrastive a single pair at a time \(5 images.* batch_size=3$"),
        (dict(batch_size=1), 1, "take more images$"),
        (dict(batch_size=7, gradient_accumulation_steps=5, accumulation="naive"), 13,
         "contrastive a single .* take batch_size=13, or fewer micro-batches"),
        (dict(batch_size=7, gradient_accumulation_steps=5, itm_weight=1.0, cross_modal=True),
         13, "itm a single .* take batch_size=13, or fewer micro-batches"),
    ],
)  # fmt: skip
def test_a_pair_alone_is_refused_with_a_remedy_that_works(
    make_trainer, make_data, values, count, words
):
    """Without a mismatched pair a matching one has loss 0 and no gradient."""
    with pytest.raises(ValueError, match=words) as refused:
        make_trainer(data=make_data(count), **values)
    if size := re.search("take batch_size=([0-9]+)", str(refused.value)):
        assert make_trainer(data=make_data(count), **values | {"batch_size": int(size[1])})


def test_a_batch_of_one_may_reconstruct(make_trainer, make_data):
    values = dict(contrastive_weight=0.0, mim_weight=1.0, decoder_width=32, max_steps=1)
    trainer = make_trainer(data=make_data(7), batch_size=1, **values)
    _, norm = trainer.train_step(trainer.first_batch(), 0)
    assert norm > 0


def test_arguments_of_another_kind_are_named(make_config, make_model, make_data):
    data, model, config = make_data(53), make_model(), make_config()
    for arguments, words in (
        ((data, config), r"config is a MultimodalDataset; give mm\.TrainingConfig"),
        (({"num_epochs": 3}, data), r"config is a dict; give mm\.TrainingConfig\(\*\*config\)"),
        ((config, data, None, "runs/a/best_model.pth"), r"give what mm\.load\('runs/a/best"),
        ((config, data, None, torch.nn.DataParallel(model)), "give model.module: the trainer"),
        ((config, data, None, torch.nn.Linear(3, 5)), r"model is a Linear; give a mm\.Multimodal"),
        ((config, data, None, model, False, print), "callbacks=.* must be a list of functions"),
        ((config, data, None, model, False, ["stop"]), "must be a list of functions"),
        (
            (config, data, None, model, 3),
            "resume is of type int; give True, False or a run's folder",
        ),
        ((config, data, None, model, Path), "resume is of type type; give True, False or"),
        ((make_config(preset="nano"), data), "preset='nano' is not known; known: base, small"),
        ((make_config(preset="nano"), data, None, model), "preset='nano' is not known"),
        ((make_config(text_mask="wole_word"), data, None, model), "did you mean 'whole_word'"),
    ):
        with pytest.raises(ValueError, match=words):
            mm.train_model(*arguments)


def test_wrong_masks_are_refused_before_training(make_trainer, make_data, tmp_path):
    with pytest.raises(ValueError, match="needs drawings with layers"):
        make_trainer(image_mask="layers")
    wrong = make_trainer(image_mask="painted", painted_mask=[[1, 0], [0, 0]], run_name="wrong")
    with pytest.raises(ValueError, match=r"painted mask is \(2, 2\), the images are 3 x 3"):
        wrong.fit()
    assert not (tmp_path / "wrong").exists()


def test_layers_are_asked_of_the_validation_set_too(make_terms_trainer, make_data):
    """The error comes before the run, not at the end of its first epoch."""
    from mmkit.training.setup import check_maskers

    train, val = make_data(23), make_data(9)
    train.layers = object()
    layers = dict(image_mask="layers", image_mask_ratio=0.5)
    check_maskers(mm.TrainingConfig(**layers), train, val)  # nothing is reconstructed
    with pytest.raises(ValueError, match="needs drawings with layers"):
        check_maskers(mm.TrainingConfig(**layers, mim_weight=1), train, val)
