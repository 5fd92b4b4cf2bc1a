"""The lab's numbers and texts: what is visible, what it costs, which caption ranks first."""

import numpy as np
import pytest
import torch

import mmkit as mm
from mmkit.widgets.mask_lab import MaskLab
from mmkit.widgets.parts import caption_html, pool_rows, rank_of, ranking_html


def test_the_cost_is_that_of_what_is_encoded(lab, plain_lab):
    length, masked = int(lab.batch.valid.sum()), int(lab.text_masking.mask.sum())
    visible = int((~lab._masked_patches()).sum())
    whole = mm.cost.sample_flops(lab.model, 9, length)
    assert lab.cost() == mm.cost.sample_flops(lab.model, visible, length - masked) / whole
    lab.image_mode.value = "replace"
    assert lab.cost() == mm.cost.sample_flops(lab.model, 9, length - masked) / whole
    lab.text_mode.value = "80/10/10"
    assert lab.cost() == 1
    plain_lab.row.value, plain_lab.text_percent.value = 4, 50
    assert plain_lab.cost() == (visible + length - masked) / (9 + length)
    assert f"({visible + length - masked} of {9 + length} tokens)" in plain_lab.words.value


def test_the_pool_is_fixed_but_for_the_image():
    assert pool_rows(0, 7, 24) == list(range(7))
    base = pool_rows(0, 2811, 24)
    assert len(set(base)) == 24 and base == sorted(base) and max(np.diff(base)) <= 118
    for row in (5, 1400, 2810):
        rows = pool_rows(row, 2811, 24)
        assert row in rows and len(set(rows) - set(base)) <= 1 and len(set(rows)) == 24


def test_ties_count_against_the_rank():
    right = torch.tensor([False, True, False, True])
    assert rank_of(torch.tensor([0.1, 0.3, 0.2, 0.0]), right) == 1
    assert rank_of(torch.tensor([0.3, 0.3, 0.4, 0.0]), right) == 3
    assert rank_of(torch.full((4,), float("nan")), right) == 3
    assert rank_of(torch.tensor([float("nan"), 0.3, 0.2, 0.0]), right) == 1


def test_tokens_are_shown_under_their_masking(lab):
    tokens = lab.dataset.tokenizer.convert_ids_to_tokens(lab.batch.input_ids[0])
    masked = lab.text_masking.mask[0].tolist()
    kinds = [kind for _, kind in lab.tokens()]
    assert [token for token, _ in lab.tokens()] == tokens
    assert [kind == "dropped" for kind in kinds] == masked
    assert kinds[0] == kinds[-1] == "end" and sum(masked) == 3
    lab.text_mode.value = "replace"
    assert [token == "[mask]" for token, _ in lab.tokens()] == masked
    lab.text_mode.value = "80/10/10"
    others = 0
    for seed in range(20):
        lab.seed.value = seed
        masking = lab.text_masking
        for position, (token, kind) in enumerate(lab.tokens()):
            number = int(masking.substitute[0, position])
            if masking.mask[0, position] and number >= 0:
                assert (token, kind) == (
                    lab.dataset.tokenizer.convert_ids_to_tokens(number),
                    "other",
                )
                others += 1
    assert others > 0


def test_captions_are_text_and_not_markup(make_data, make_model):
    data = make_data(5)
    data.texts[2] = ['<b>cat</b> & "dog"']
    lab = MaskLab(data, make_model())
    lab.row.value = 2
    for html in (lab.words.value, lab.ranking.value):
        assert "&lt;b&gt;cat&lt;/b&gt; &amp; &quot;dog&quot;" in html
        assert "<b>cat" not in html
    html = caption_html("<i>", [("<u>", "visible")])
    assert "&lt;i&gt;" in html and "&lt;u&gt;" in html and "<i" not in html and "<u" not in html


def test_the_ranking_begins_with_the_best_and_marks_the_correct_one():
    html = ranking_html(["a", "b", "c"], torch.tensor([0.1, -0.5, 0.9]), torch.tensor([1, 0, 0]))
    assert html.index(">c<") < html.index(">a<") < html.index(">b<")
    assert html.count("✓") == 1 and 'class="text right" title="a"' in html
    assert "left: 25.0%; width: 25.0%" in html and "left: 50.0%; width: 45.0%" in html


def test_patches_must_fit(make_data, make_model):
    assert MaskLab(make_data(3, size=64)).grid == (8, 8)
    assert MaskLab(make_data(3, size=112)).grid == (7, 7)
    with pytest.raises(ValueError, match=r"=8 does not divide.*15 x 15.*try patch_size=5"):
        MaskLab(make_data(3))
    with pytest.raises(ValueError, match="patch_size=3, but the model's is 5"):
        MaskLab(make_data(3), make_model(), patch_size=3)
    with pytest.raises(ValueError, match="load them with image_size=15"):
        MaskLab(make_data(3, size=20), make_model())
