"""Recall@K against a slow loop; evaluation without masks; the loss of one pool of negatives."""

import itertools
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
import torch.nn.functional as F

from mmkit import MultimodalDataset, embed, evaluate, recall_at_k
from mmkit.data.partners import correct_pairs
from mmkit.evaluation import retrieval
from mmkit.losses import info_nce, sigmoid_loss


def slow_recall(queries, candidates, query_groups, groups, k):
    hits = 0
    for i in range(len(queries)):
        order = sorted(range(len(candidates)), key=lambda j: -float(queries[i] @ candidates[j]))
        hits += any(groups[j] == query_groups[i] for j in order[:k])
    return hits / len(queries)


@pytest.mark.parametrize("chunk", [2**25, 40])
def test_recall_equals_the_slow_loop(monkeypatch, chunk):
    """M captions for N images, several correct ones, whole or in chunks of rows."""
    monkeypatch.setattr(retrieval, "MATRIX", chunk)
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(13, 5), dim=1), F.normalize(torch.randn(29, 5), dim=1)
    image_groups = torch.arange(13) % 11
    text_groups = torch.arange(29) % 11
    result = recall_at_k(image, text, (1, 3, 7), image_groups, text_groups)
    for k in (1, 3, 7):
        assert result["image_to_text"][k] == slow_recall(image, text, image_groups, text_groups, k)
        assert result["text_to_image"][k] == slow_recall(text, image, text_groups, image_groups, k)


def slow_recall_by_caption(queries, candidates, correct, k):
    hits = 0
    for i in range(len(queries)):
        scores = [float(queries[i] @ c) for c in candidates]
        best = max(score for score, right in zip(scores, correct[i], strict=True) if right)
        hits += sum(s >= best and not r for s, r in zip(scores, correct[i], strict=True)) < k
    return hits / len(queries)


@pytest.mark.parametrize("chunk", [2**25, 300])
def test_recall_with_shared_captions_equals_a_count_by_caption(monkeypatch, make_data, chunk):
    """With random features: a caption of its own and a tag; a caption for all; a chain."""
    monkeypatch.setattr(retrieval, "MATRIX", chunk)
    torch.manual_seed(0)
    for captions in (
        lambda i: [f"thing {i}", f"tag {i % 5}"],
        lambda i: ["photo", f"thing {i}"],
        lambda i: [f"caption {i}", f"caption {i + 1}"],
        lambda i: [f"A thing {i // 2}", f"a thing {i // 3}", "two of them"][: 1 + i % 3],
    ):
        data = make_data(53, tokenizer=None)
        data.texts = [captions(i) for i in range(53)]
        lowered = [[c.lower() for c in texts] for texts in data.texts]
        flat = [c for texts in lowered for c in texts]
        correct = [[c in texts for c in flat] for texts in lowered]
        of_texts = [*zip(*correct, strict=True)]
        image, text = (F.normalize(torch.randn(n, 11), dim=1) for n in (53, len(flat)))
        for partners in (data.partners(), torch.tensor(correct)):
            result = recall_at_k(image, text, (1, 5), partners=partners)
            for k in (1, 5):
                found = {way: result[way][k] for way in result}
                assert found == {
                    "image_to_text": slow_recall_by_caption(image, text, correct, k),
                    "text_to_image": slow_recall_by_caption(text, image, of_texts, k),
                }


def test_a_perfect_model_is_perfect_whatever_the_case(make_model, make_data):
    data = make_data(7)
    data.texts = [[text.title() if i % 2 else text] for i, (text,) in enumerate(data.texts)]
    data.texts[5] = [data.texts[2][0].upper()]
    captions, images = data.partners()
    features = torch.eye(7)[[0, 1, 2, 3, 4, 2, 6]]
    result = recall_at_k(features, features, (1,), partners=(captions, images))
    assert result == {"image_to_text": {1: 1.0}, "text_to_image": {1: 1.0}}


def test_a_collapsed_model_scores_nothing():
    """Ties are misses: everything in one point is not a perfect model."""
    same = torch.ones(7, 3)
    assert recall_at_k(same, same, (1, 5))["image_to_text"] == {1: 0.0, 5: 0.0}
    perfect = recall_at_k(torch.eye(7), torch.eye(7), (1, 5))
    assert perfect["text_to_image"][1] == 1.0


def test_chance_is_that_of_all_orders(make_data):
    """Of every order of five candidates, with captions shared and an image in two rows."""
    data = make_data(3, tokenizer=None)
    data.texts = [["one", "two"], ["two"], ["three", "four"]]
    lists = [[{0, 1, 2}, {1, 2}, {3, 4}], [{0}, {0, 1}, {0, 1}, {2}, {2}]]
    for k in (1, 2, 5):
        expected = []
        for right, candidates in zip(lists, (5, 3), strict=True):
            orders = [*itertools.permutations(range(candidates))]
            hits = [bool(own & {*order[:k]}) for own in right for order in orders]
            expected.append(sum(hits) / len(hits))
        assert retrieval.chance_of_recall(data, k) == pytest.approx(expected)


def test_what_is_not_finite_is_a_miss_for_itself_alone():
    """As a query and as a candidate, also where all features are not finite."""
    torch.manual_seed(0)
    image = F.normalize(torch.randn(13, 5), dim=1)
    for bad in (float("nan"), float("inf")):
        text = image.clone()
        text[4, 2] = bad
        with pytest.warns(UserWarning, match="1 of 13 texts are not finite .* is row 4"):
            found = recall_at_k(image, text, (1, 13))
        assert found == {way: {1: 12 / 13, 13: 12 / 13} for way in found}
    broken = torch.full((7, 3), float("nan"))
    with pytest.warns(UserWarning, match="7 of 7 images"):
        assert recall_at_k(broken, broken, (1, 5))["text_to_image"] == {1: 0.0, 5: 0.0}


def test_an_image_that_is_not_finite_spoils_no_evaluation(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    pixels = model.normalize(data.batch(range(23)).pixel_values)
    without = [row for row in range(23) if row != 6]
    rest = MultimodalDataset.from_pixels(pixels, data.texts, tokenizer=data.tokenizer)
    expected = evaluate(model, rest.subset(without))
    pixels[6] = float("nan")
    with pytest.warns(UserWarning, match="1 of 23 images are not finite"):
        found = evaluate(model, rest)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["image_to_text"][1] <= expected["image_to_text"][1] * 22 / 23


def test_a_k_that_says_nothing_is_left_out(make_model, make_data):
    with pytest.warns(UserWarning, match="R@5, R@10 of 3 candidates would be 100 %"):
        found = recall_at_k(torch.eye(3), torch.eye(3))
    assert found["image_to_text"] == {1: 1.0}
    images, captions = torch.eye(5)[:2], torch.eye(5)
    partners = torch.arange(5), torch.tensor([[0, 1, 2], [3, 4, -1]])
    with pytest.warns(UserWarning, match="R@5 of 2 candidates"):
        found = recall_at_k(images, captions, (1, 5), partners=partners)
    assert found["image_to_text"].keys() == {1, 5} and found["text_to_image"].keys() == {1}
    with pytest.warns(UserWarning, match="R@10 of 7"):
        assert evaluate(make_model(), make_data(7))["image_to_text"].keys() == {1, 5}
    with pytest.raises(ValueError, match=r"ks=\(0,\): each must be a whole number, 1 or more"):
        recall_at_k(torch.eye(3), torch.eye(3), (0,))
    with pytest.raises(ValueError, match="0 images and 3 texts: give at least one of each"):
        recall_at_k(torch.zeros(0, 3), torch.eye(3))


def test_an_evaluation_says_how_many_captions_it_cut(make_model, make_data):
    model, data = make_model(), make_data(23)
    assert evaluate(model, data)["cut_captions"] == 0
    data.texts[4] = ["old red house " * 6, "cat"]
    data.texts[9] = ["old red house " * 6 + "moon"]
    data = data.subset(range(23))
    assert evaluate(model, data)["cut_captions"] == 2
    features = embed(model, data)  # what is left of both is the same
    assert features.image_captions[4, 0] == features.image_captions[9, 0]


def test_the_pool_takes_captions_that_tell_images_apart(make_model, make_data):
    """Of a category and a title it takes the title, whatever their order; else the first."""
    model, data = make_model().eval(), make_data(23)
    own = [texts[0] for texts in data.texts]
    assert torch.equal(data.correct_captions.rarest(), torch.arange(23))
    expected = retrieval.pool_loss(model, embed(model, data))
    tagged = make_data(23)
    tagged.texts = [["cat", text, "dog"] for text in own]
    rows = tagged.correct_captions.rarest()
    assert [[c for t in tagged.texts for c in t][row] for row in rows] == own
    found = retrieval.pool_loss(model, embed(model, tagged))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_pool_knows_its_partners(make_model, make_data):
    """Against the loss of the whole matrix, with a relation that holds in one direction only."""
    model, data = make_model().eval(), make_data(23)
    data.texts[5].append(data.texts[17][0])
    data.texts[8].insert(0, data.texts[2][0])
    for loss, whole in (("info_nce", info_nce), ("sigmoid", sigmoid_loss)):
        features = embed(model, data)
        first = data.correct_captions.rarest()
        captions, images = data.partners(None, first)
        correct = correct_pairs(images, captions)
        assert not torch.equal(correct, correct.T)
        args = features.image_features, features.text_features[first], model.logit_scale.exp()
        bias = (model.logit_bias,) if loss == "sigmoid" else ()
        expected = whole(*args, *bias, correct).item()
        assert retrieval.pool_loss(model, features, loss) == pytest.approx(expected, rel=1e-5)


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
    with pytest.raises(ValueError, match="7 images and 9 texts: give partners"):
        recall_at_k(torch.rand(7, 3), torch.rand(9, 3))
    with pytest.raises(ValueError, match="only one of image_groups and text_groups"):
        recall_at_k(torch.rand(7, 3), torch.rand(7, 3), image_groups=torch.arange(7))
    with pytest.raises(ValueError, match="query 1 has no correct candidate"):
        recall_at_k(
            torch.rand(2, 3), torch.rand(2, 3), (1,), torch.tensor([0, 1]), torch.tensor([0, 2])
        )


def test_evaluation_masks_nothing_unless_asked(make_model, make_data):
    """Also in a model left in training mode, with dropout; and it stays in training mode."""
    model, data = make_model(dropout=0.5).train(), make_data(23)
    result = evaluate(model, data)
    assert result == evaluate(model, data) and model.training
    assert evaluate(model, data, image_mask=("random", 0.5)) != result
    features = embed(model, data)
    whole = info_nce(features.image_features, features.text_features, model.logit_scale.exp())
    assert result["loss"] == pytest.approx(whole.item(), rel=1e-5)


def test_the_pool_loss_does_not_depend_on_chunks(make_model, make_data, monkeypatch):
    model, data = make_model().eval(), make_data(23)
    for loss in ("info_nce", "sigmoid"):
        features = embed(model, data)
        whole = retrieval.pool_loss(model, features, loss)
        monkeypatch.setattr(retrieval, "MATRIX", 5 * 23)
        assert retrieval.pool_loss(model, features, loss) == pytest.approx(whole, rel=1e-5)
        monkeypatch.undo()


def test_recall_warns_if_it_does_not_rank_by_cosines():
    """A caption with a long vector is then nearest to every image."""
    image = torch.eye(11)[:7]
    long = image.clone()
    long[3] += 1.1
    with pytest.warns(UserWarning, match="long, not 1: they are ranked by dot products"):
        misled = recall_at_k(image, 3 * long, ks=(1,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = recall_at_k(image, F.normalize(long, dim=1), ks=(1,))
    assert misled["image_to_text"][1] < right["image_to_text"][1] == 1
