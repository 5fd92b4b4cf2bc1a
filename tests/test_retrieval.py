"""Recall@K against a slow loop; evaluation with masks off; search finds what was asked for."""

import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from mmkit import Index, embed, embed_texts, evaluate, recall_at_k, retrieval, zero_shot
from mmkit.losses import info_nce


def slow_recall(queries, candidates, query_groups, groups, k):
    hits = 0
    for i in range(len(queries)):
        order = sorted(range(len(candidates)), key=lambda j: -float(queries[i] @ candidates[j]))
        hits += any(groups[j] == query_groups[i] for j in order[:k])
    return hits / len(queries)


@pytest.mark.parametrize("chunk", [2**25, 40])
def test_recall_equals_the_slow_loop(monkeypatch, chunk):
    """M captions for N pictures, several correct ones, whole or in chunks of rows."""
    monkeypatch.setattr(retrieval, "_MATRIX", chunk)
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(13, 5), dim=1), F.normalize(torch.randn(29, 5), dim=1)
    image_groups = torch.arange(13) % 11
    text_groups = torch.arange(29) % 11
    result = recall_at_k(image, text, (1, 3, 7), image_groups, text_groups)
    for k in (1, 3, 7):
        assert result["image_to_text"][k] == slow_recall(image, text, image_groups, text_groups, k)
        assert result["text_to_image"][k] == slow_recall(text, image, text_groups, image_groups, k)


def test_a_collapsed_model_scores_nothing():
    """Ties are misses: everything in one point is not a perfect model."""
    same = torch.ones(7, 3)
    assert recall_at_k(same, same)["image_to_text"] == {1: 0.0, 5: 0.0, 10: 1.0}
    broken = torch.full((7, 3), float("nan"))
    assert recall_at_k(broken, broken, (1, 5))["text_to_image"] == {1: 0.0, 5: 0.0}
    perfect = recall_at_k(torch.eye(7), torch.eye(7))
    assert perfect["text_to_image"][1] == 1.0


@pytest.mark.slow
def test_recall_of_many_pairs_fits_in_memory():
    """20,000 pairs: the whole matrix would be 1.6 GB; the peak stays a fraction of it."""
    code = """
        import resource, torch, mmkit as mm
        torch.manual_seed(0)
        x = torch.nn.functional.normalize(torch.randn(20_000, 16), dim=1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = mm.recall_at_k(x, x)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert result["image_to_text"][1] == 1.0, result
        print(grown / 1e6)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert float(done.stdout) < 0.8, done.stderr


def test_recall_needs_to_know_what_belongs_together():
    with pytest.raises(ValueError, match="7 pictures and 9 texts"):
        recall_at_k(torch.rand(7, 3), torch.rand(9, 3))
    with pytest.raises(ValueError, match="only one of image_groups and text_groups"):
        recall_at_k(torch.rand(7, 3), torch.rand(7, 3), image_groups=torch.arange(7))
    with pytest.raises(ValueError, match="query 1 has no correct candidate"):
        recall_at_k(
            torch.rand(2, 3), torch.rand(2, 3), (1,), torch.tensor([0, 1]), torch.tensor([0, 2])
        )


def test_embedding_ignores_batches_and_counts_all_captions(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    data.texts[4].append("an old red bread")
    a, b = embed(model, data), embed(model, data, batch_size=5)
    torch.testing.assert_close(a.image_features, b.image_features)
    torch.testing.assert_close(a.text_features, b.text_features)
    assert a.image_features.shape == (23, 13) and a.text_features.shape == (24, 13)
    assert a.text_groups[5] == a.image_groups[4] and a.first_caption[5] == 6


def test_evaluation_hides_nothing_unless_asked(make_model, make_data):
    """Also in a model left in training mode, with dropout; and it stays in training mode."""
    model, data = make_model(dropout=0.5).train(), make_data(23)
    result = evaluate(model, data)
    assert result == evaluate(model, data) and model.training
    assert evaluate(model, data, image_mask=("random", 0.5)) != result
    features = embed(model, data)
    whole = info_nce(
        features.image_features, features.text_features, model.logit_scale.exp(), data.group_ids
    )
    assert result["loss"] == pytest.approx(whole.item(), rel=1e-5)


def test_the_pool_loss_does_not_depend_on_chunks(make_model, make_data, monkeypatch):
    model, data = make_model().eval(), make_data(23)
    for loss in ("info_nce", "sigmoid"):
        features = embed(model, data)
        whole = retrieval.pool_loss(model, features, loss)
        monkeypatch.setattr(retrieval, "_MATRIX", 5 * 23)
        assert retrieval.pool_loss(model, features, loss) == pytest.approx(whole, rel=1e-5)
        monkeypatch.undo()


def test_search_by_words_and_by_picture(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    index = Index(model, data, mixed_precision="no")
    hits = index.search("old red cat", k=5)
    scores = index.features.image_features @ embed_texts(model, ["old red cat"])[0]
    assert [hit.row for hit in hits] == scores.argsort(descending=True)[:5].tolist()
    assert hits[0].score == pytest.approx(scores.max().item(), abs=1e-5)
    own = index.search(data[7]["image"], k=1)[0]
    assert own.row == 7 and own.score == pytest.approx(1, abs=1e-4) and own.text == data[7]["text"]
    with pytest.raises(ValueError, match="k=24 must be between 1 and the 23 pictures"):
        index.search("cat", k=24)
    with pytest.raises(ValueError, match="none of them empty"):
        index.search(" ")
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        index.search("gone.png")


def test_zero_shot_takes_the_nearest_class(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    prompts = {"cat": ["a cat", "old cat"], "dog": ["a dog"], "boat": ["boat"]}
    classes, scores = zero_shot(model, embed(model, data), prompts)
    cat = F.normalize(embed_texts(model, prompts["cat"]).mean(0), dim=0)
    torch.testing.assert_close(scores[:, 0], embed(model, data).image_features @ cat)
    assert torch.equal(classes, scores.argmax(1)) and scores.shape == (23, 3)
