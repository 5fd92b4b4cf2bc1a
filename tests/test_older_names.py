"""Older names answer for one release, and say what they are called now."""

import pytest
import torch

import mmkit as mm
from mmkit.older_names import current_keys


@pytest.mark.parametrize("package, old, new", [
    (mm, "unknown_share", "unk_rate"),
    (mm, "put_back", "reconstruct"),
    (mm.masking, "maskable_words", "maskable_tokens"),
    (mm.masking, "hide_largest", "mask_largest"),
    (mm.plots, "picture_grid", "image_grid"),
    (mm.plots, "word_guesses", "token_guesses"),
    (mm.cost, "put_back_flops", "reconstruction_flops"),
    (mm.retrieval, "patch_word_similarity", "patch_token_similarity"),
])  # fmt: skip
def test_functions_answer_under_their_older_names(package, old, new):
    with pytest.warns(FutureWarning, match=f"{old} is called .*{new} now"):
        assert getattr(package, old) is getattr(package, new)
    with pytest.raises(AttributeError, match="no attribute 'put_bakc'"):
        package.put_bakc  # noqa: B018


def test_methods_and_attributes_answer(make_data, make_model):
    data = make_data(7)
    with pytest.warns(FutureWarning, match="MultimodalDataset.piece_frequency is called"):
        assert torch.equal(data.piece_frequency(), data.token_frequency())
    model, batch = (
        make_model().add_decoder(pixels=True, words=False, width=32),
        data.batch(range(3)),
    )
    masking = mm.masking.random_mask(mm.mask_noise(0, 0, batch.sample_ids, 9, "image"), 0.5, None)
    back = mm.reconstruct(model, batch, masking)
    with pytest.warns(FutureWarning, match="Reconstruction.pictures is called images now"):
        assert back.pictures is back.images
    with pytest.warns(FutureWarning, match=r"reconstruct\(sees=…\) is called context now"):
        older = mm.reconstruct(model, batch, masking, sees="none")
    assert torch.equal(older.images, mm.reconstruct(model, batch, masking, context="none").images)
    with pytest.warns(FutureWarning, match="context='right' is called 'matched' now"):
        assert torch.equal(
            mm.reconstruct(model, batch, masking, context="right").images, back.images
        )


def test_fields_of_the_configuration_answer():
    with pytest.warns(
        FutureWarning, match=r"TrainingConfig\(pixels_weight=…\) is called mim_weight"
    ):
        config = mm.TrainingConfig(pixels_weight=0.5)
    assert config.mim_weight == 0.5
    with pytest.warns(FutureWarning, match="words_schedule is called mlm_schedule now"):
        config.words_schedule = "rising"
    with pytest.warns(FutureWarning):
        assert config.words_schedule == config.mlm_schedule == "rising"
    with pytest.raises(ValueError, match="'pixel_weight'"):
        mm.TrainingConfig(pixel_weight=0.5)


def test_records_of_an_earlier_release_are_read_under_todays_names():
    older = {"loss": 1, "pixels_loss": 2, "words_accuracy": 3, "gradient_norm/image/matching": 4,
             "gradient_cosine/text/contrastive·pixels": 5, "matching_weight": 6, "pixel_error": 7,
             "wordsworth": 8}  # fmt: skip
    assert current_keys(older) == {
        "loss": 1, "mim_loss": 2, "mlm_accuracy": 3, "gradient_norm/image/itm": 4,
        "gradient_cosine/text/contrastive·mim": 5, "itm_weight": 6, "pixel_error": 7,
        "wordsworth": 8,
    }  # fmt: skip


def test_older_flags_answer(capsys):
    from mmkit.cli.commands import _current_flag

    words = ["train", "--pixels-weight", "0.5", "--words_schedule=rising", "--mim-weight=1"]
    found = [_current_flag(word) for word in words]
    assert found == ["train", "--mim-weight", "0.5", "--mlm-schedule=rising", "--mim-weight=1"]
    assert "--pixels-weight is called --mim-weight now" in capsys.readouterr().err
