"""Probes against scikit-learn by hand: they read features that carry the label, and no others."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from mmkit import MultimodalDataset
from mmkit.evaluation import probe
from mmkit.evaluation.probe import knn, labels, linear_probe, pooled_states, raw_pixels
from mmkit.masking.plan import draw_maskings

NAMES = np.array(["boat", "cat", "star"])


def clouds(count, distance, seed, width=5):
    """Features of three unequal classes around centres `distance` apart, and their labels."""
    generator = np.random.default_rng(seed)
    which = generator.choice(3, count, p=[0.6, 0.25, 0.15])
    return generator.normal(size=(count, width)) + distance * np.eye(3, width)[which], NAMES[which]


def sets(distance, train=113, test=53):
    return *clouds(train, distance, 0), *clouds(test, distance, 1)


def with_meta(data):
    """Two kinds of image that differ in brightness; row 3 is of unknown kind."""
    kinds = ["light" if row % 3 else "dark" for row in range(len(data))]
    data._decoded.pixels = data._decoded.pixels.clone()
    data._decoded.pixels[::3] //= 3
    data.meta = [{"group": kind, "family": f"f{row // 2}"} for row, kind in enumerate(kinds)]
    data.meta[3]["group"] = ""
    return data


# ---- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_states_are_what_the_projection_gets(make_model, make_data, pooling):
    """Image tower: the tokens by hand, pooled as the model pools, all rows in any batches."""
    model, data = make_model(pooling=pooling).eval(), make_data(23)
    with torch.no_grad():
        tokens = model.image_tokens(data.batch(range(23)).pixel_values)
    expected = tokens[:, 1:].mean(1) if pooling == "mean" else tokens[:, 0]
    states = pooled_states(model, data)
    assert states.shape == (23, 22) and states.dtype == torch.float32
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(pooled_states(model, data, batch_size=5), expected)
    projected = F.normalize(model.image_projection(states), dim=-1)
    torch.testing.assert_close(projected, model.encode_image(data.batch(range(23)).pixel_values))


def test_text_states_ignore_padding_and_extra_captions(make_model, make_data):
    """One row per image, from its first caption alone, whatever the length of the others."""
    model, data = make_model().eval(), make_data(23)
    data.texts[4].append("an old red bread")
    states = pooled_states(model, data, "text")
    assert states.shape == (23, 22)
    torch.testing.assert_close(pooled_states(model, data, "text", batch_size=1), states)
    alone = data.batch([5])
    with torch.no_grad():
        expected = model.text_tokens(alone.input_ids, alone.valid)[0].mean(1)
    torch.testing.assert_close(states[5:6], expected)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_states_under_a_mask(make_model, make_data, tower):
    """In evaluation mode, which ends with the call; masks change states, batch sizes do not."""
    model, data = make_model(dropout=0.5).train(), make_data(23)
    model.vit.eval()  # a frozen tower keeps its own flag
    whole = pooled_states(model, data, tower)
    assert torch.equal(whole, pooled_states(model, data, tower)) and not whole.requires_grad
    assert model.training and model.bert.training and not model.vit.training
    assert not model.image_projection._forward_pre_hooks
    mask = {f"{tower}_mask": ("random", 0.5)}
    masked = pooled_states(model, data, tower, **mask)
    assert (masked - whole).abs().amax(1).gt(1e-3).float().mean() > 0.9
    parts = pooled_states(model, data, tower, batch_size=7, **mask)
    torch.testing.assert_close(parts, masked, atol=1e-5, rtol=1e-5)
    assert not torch.equal(pooled_states(model, data, tower, seed=1, **mask), masked)


def test_states_of_the_visible_patches_only(make_model, make_data):
    """Under a mask the mean is over the kept patches."""
    model, data = make_model().eval(), make_data(11)
    batch = data.batch(range(11))
    masking, _ = draw_maskings(batch, model.token_info, seed=0, epoch=0, image=("random", 0.5))
    with torch.no_grad():
        expected = model.image_tokens(batch.pixel_values, masking)[:, 1:].mean(1)
    states = pooled_states(model, data, image_mask=("random", 0.5))
    torch.testing.assert_close(states, expected)


def test_raw_pixels_are_mean_colours(make_data):
    data = make_data(11)
    pixels = data.batch(range(11)).pixel_values.numpy() / 255
    expected = pixels.reshape(11, 3, 3, 5, 3, 5).mean((3, 5)).reshape(11, 27)
    assert np.allclose(raw_pixels(data, cells=3, batch_size=4), expected, atol=1e-6)
    with pytest.raises(ValueError, match="cells=16 must be between 1 and the image's 15 pixels"):
        raw_pixels(data, cells=16)


# ---- classifiers ---------------------------------------------------------------------------------


def test_linear_probe_equals_scikit_learn_by_hand():
    """C by cross-validation of the training set, then one fit; scores as scikit-learn's."""
    x, truth, y, tested = sets(1.5)
    result = linear_probe(torch.tensor(x), truth, torch.tensor(y), tested)
    scaler = StandardScaler().fit(x)
    x, y = scaler.transform(x), scaler.transform(y)

    def fitted(strength, rows=slice(None)):
        reader = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        return reader.fit(x[rows], truth[rows])

    scores = {}
    for strength in probe.GRID:
        held = np.empty_like(truth)
        for a, b in StratifiedKFold(5, shuffle=True, random_state=0).split(x, truth):
            held[b] = fitted(strength, a).predict(x[b])
        scores[strength] = balanced_accuracy_score(truth, held)
    assert result["C"] == max(scores, key=lambda c: (scores[c], -c))
    predicted = fitted(result["C"]).predict(y)
    assert result["predictions"] == predicted.tolist()
    assert result["accuracy"] == pytest.approx(np.mean(predicted == tested))
    expected = balanced_accuracy_score(tested, predicted)
    assert result["balanced_accuracy"] == pytest.approx(expected)
    assert 0.5 < expected < 1 and result["recall"].keys() == set(NAMES)
    cats = tested == "cat"
    assert result["recall"]["cat"] == pytest.approx(np.mean(predicted[cats] == "cat"))
    assert result["counts"]["cat"] == result["families"]["cat"] == cats.sum()
    assert result["chance"] == pytest.approx(1 / 3)
    assert result["accuracy_chance"] == pytest.approx(np.mean(tested == "boat"))


def test_knn_equals_scikit_learn_by_hand():
    x, truth, y, tested = sets(1.5)
    reader = KNeighborsClassifier(7, metric="cosine", weights="distance").fit(x, truth)
    result = knn(x, truth, y, tested, k=7)
    assert result["predictions"] == reader.predict(y).tolist() and result["k"] == 7
    assert result.keys() - {"k"} == linear_probe(x, truth, y, tested).keys() - {"C"}


@pytest.mark.parametrize("read", [linear_probe, knn])
def test_features_that_carry_the_label_are_read_and_random_ones_are_not(read):
    certain = read(*sets(30))
    assert certain["balanced_accuracy"] == 1 and certain["interval"] == [1, 1]
    guess = read(*sets(0, train=307, test=907))
    assert guess["balanced_accuracy"] == pytest.approx(1 / 3, abs=0.06)
    low, high = guess["interval"]
    assert low <= guess["balanced_accuracy"] <= high and 0.02 < high - low < 0.12


@pytest.mark.parametrize("read", [linear_probe, knn])
def test_nothing_is_chosen_by_the_test_labels(read):
    x, truth, y, tested = sets(1)
    result = read(x, truth, y, tested)
    shuffled = read(x, truth, y, np.random.default_rng(0).permutation(tested))
    for key in result.keys() & {"C", "k", "predictions"}:
        assert result[key] == shuffled[key]
    assert result["accuracy"] != shuffled["accuracy"]


def test_results_repeat_and_are_plain_values():
    result = linear_probe(*sets(1), seed=3)
    assert result == linear_probe(*sets(1), seed=3)
    assert json.loads(json.dumps(result)) == result
    assert result["interval"] != linear_probe(*sets(1), seed=4)["interval"]


def test_rows_in_another_order_or_another_type_change_nothing():
    x, truth, y, tested = sets(1)
    order = np.random.default_rng(0).permutation(len(y))
    numbers = [np.searchsorted(NAMES, part) for part in (truth, tested)]
    plain, moved = knn(x, truth, y, tested), knn(x, truth, y[order], tested[order])
    coded = knn(x, torch.tensor(numbers[0]), y, torch.tensor(numbers[1]))
    assert plain["recall"] == moved["recall"]
    assert list(plain["recall"].values()) == list(coded["recall"].values())
    assert list(coded["recall"]) == ["0", "1", "2"]


def test_intervals_draw_whole_families():
    """Ten copies of every test row tell no more than the row: the interval stays as wide."""
    x, truth, y, tested = sets(1.5)
    once = knn(x, truth, y, tested)
    copies = np.repeat(np.arange(len(y)), 10)
    many = (x, truth, y[copies], tested[copies])
    as_one = knn(*many, families=(np.arange(len(x)), copies))
    assert as_one["interval"] == pytest.approx(once["interval"])
    assert as_one["accuracy_interval"] == pytest.approx(once["accuracy_interval"])
    assert as_one["families"] == once["counts"]
    width = [result["interval"][1] - result["interval"][0] for result in (as_one, knn(*many))]
    assert width[1] < width[0] / 2


def test_the_interval_equals_a_slow_bootstrap():
    """Resampling rows within each class, one by one."""
    x, truth, y, tested = sets(1.5, test=211)
    result = knn(x, truth, y, tested)
    correct = np.array(result["predictions"]) == tested
    generator, draws = np.random.default_rng(7), []
    for _ in range(2000):
        parts = [generator.choice(correct[tested == name], sum(tested == name)) for name in NAMES]
        draws.append(np.mean([part.mean() for part in parts]))
    assert result["interval"] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.01)


def test_rows_of_one_image_are_one_family(make_data):
    """Whether meta names families or not; without either there is none."""
    once = make_data(7)
    twice = MultimodalDataset.from_pixels(
        once.batch([0, 1, 2, 0, 3, 2]).pixel_values, [f"caption {i}" for i in range(6)]
    )
    assert probe._known_families(once, once) is None
    names = ["image 0", "image 1", "image 2", "image 0", "image 3", "image 2"]
    assert probe._known_families(twice, once)[0] == names
    twice.meta[1] = {"family": "cats"}
    assert probe._known_families(twice, once)[0] == [names[0], "cats", *names[2:]]


def test_folds_never_split_a_family():
    truth = np.array(["a", "b"])[np.arange(60) % 2]
    families = np.array([str(row // 4) for row in range(60)])
    held = []
    for fit, out in probe._folds(truth, families, 0):
        assert not set(families[fit]) & set(families[out])
        held += out.tolist()
    assert sorted(held) == list(range(60))


def test_labels_never_trained_on_are_left_out_and_counted():
    x, truth, y, tested = sets(2)
    result = linear_probe(x, truth, y, tested)
    odd = np.concatenate([tested, ["moon", "moon"]])
    more = linear_probe(x, truth, np.concatenate([y, y[:2]]), odd)
    assert more["unseen"] == {"moon": 2} and result["unseen"] == {}
    assert more["test"] == len(y) and len(more["predictions"]) == len(y) + 2
    assert more["recall"] == result["recall"] and more["interval"] == result["interval"]


def test_readers_say_what_does_not_fit():
    x, truth, y, tested = sets(1)
    with pytest.raises(ValueError, match="113 rows of training features but 112 labels"):
        linear_probe(x, truth[1:], y, tested)
    with pytest.raises(ValueError, match="52 rows of test features but 53 labels"):
        knn(x, truth, y[1:], tested)
    with pytest.raises(ValueError, match="5 wide, test features 4"):
        knn(x, truth, y[:, 1:], tested)
    with pytest.raises(ValueError, match=r"have shape \(113,\)"):
        knn(x[:, 0], truth, y, tested)
    with pytest.raises(ValueError, match="the one class 'cat'; a probe needs at least two"):
        linear_probe(x, ["cat"] * len(x), y, tested)
    with pytest.raises(ValueError, match="53 test rows 0 have a label of the training set"):
        linear_probe(x, truth, y, ["moon"] * len(y))
    with pytest.raises(ValueError, match="in 1 classes"):
        knn(x, truth, y, ["cat"] * len(y))
    with pytest.raises(ValueError, match="k=114 must be between 1 and the 113 training rows"):
        knn(x, truth, y, tested, k=114)
    with pytest.raises(ValueError, match="3 families of 113 training rows"):
        knn(x, truth, y, tested, families=([1, 2, 3], tested))
    with pytest.raises(ValueError, match="at least one C, all above 0"):
        linear_probe(x, truth, y, tested, grid=[0, 1])
    with pytest.raises(ValueError, match="too few to choose C"):
        linear_probe(x[:3], NAMES, y, tested)
    assert linear_probe(x[:3], NAMES, y, tested, grid=[0.01])["C"] == 0.01


# ---- labels and all in one -----------------------------------------------------------------------


def test_labels_are_the_known_ones(make_data):
    data = make_data(5)
    data.meta = [{"group": name} for name in ("a", "", "b", None)] + [{}]
    rows, names = labels(data)
    assert rows.tolist() == [0, 2] and names.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="did you mean 'group'"):
        labels(data, "groups")
    data.meta = [{"group": "", "tone": "x"}] * 5
    with pytest.raises(ValueError, match="is empty in all 5 rows"):
        labels(data)
    with pytest.raises(ValueError, match=r"no meta.*set dataset\.meta"):
        labels(make_data(5))


def test_probe_is_its_parts(make_model, make_data):
    """States without unknown rows, unmasked and masked, families kept together; twice the same.

    Dark images are told from light ones by their mean colours.
    """
    model, train, test = make_model(), with_meta(make_data(61)), with_meta(make_data(37, seed=1))
    result = probe.probe(model, train, test, k=5)
    assert result == probe.probe(model, train, test, k=5) and model.training
    assert json.loads(json.dumps(result)) == result
    assert result["unknown"] == {"train": 1, "test": 1}
    assert list(result["rows"]) == ["everything seen", "50 % masked"]
    rows = [[row for row in range(len(data)) if row != 3] for data in (train, test)]
    families = tuple([f"f{row // 2}" for row in part] for part in rows)
    train, test = train.subset(rows[0]), test.subset(rows[1])
    for name, ratio in (("everything seen", 0.0), ("50 % masked", 0.5)):
        x, y = (pooled_states(model, d, image_mask=("random", ratio)) for d in (train, test))
        parts = (x, labels(train)[1], y, labels(test)[1])
        expected = linear_probe(*parts, families=families)
        del expected["predictions"]
        assert result["rows"][name]["linear"] == expected
        neighbours = knn(*parts, k=5, families=families)["recall"]
        assert result["rows"][name]["knn"]["recall"] == neighbours
    pixels = probe.probe_pixels(train, test, cells=3, k=5)
    assert pixels["rows"]["everything seen"]["linear"]["balanced_accuracy"] > 0.9


def test_probe_of_texts_with_masks_of_ones_own(make_model, make_data):
    model, train, test = make_model(), with_meta(make_data(61)), with_meta(make_data(37, seed=1))
    masks = {"start only": ("truncate", 0.5)}
    result = probe.probe(model, train, test, masks=masks, tower="text", k=5)
    assert result["tower"] == "text" and list(result["rows"]) == ["start only"]
    with pytest.raises(ValueError, match="tower='sound' is not known"):
        probe.probe(model, train, test, tower="sound")
    with pytest.raises(ValueError, match="tower='sound' is not known"):
        pooled_states(model, train, "sound")


def test_importing_leaves_scikit_learn_alone():
    code = "import sys, mmkit; mmkit.probe; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
