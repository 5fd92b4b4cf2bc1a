"""Losses against slow loops over pairs, value and gradient."""

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from mmkit import info_nce, sigmoid_loss
from mmkit.losses import info_nce_rows, sigmoid_rows

B, D = 7, 11


def features(seed=0):
    torch.manual_seed(seed)
    image, text = (
        F.normalize(torch.randn(B, D, dtype=torch.float64), dim=1).float() for _ in range(2)
    )
    leaves = image, text, torch.tensor(3.7), torch.tensor(-1.3)
    return [leaf.requires_grad_() for leaf in leaves]


def slow_info_nce(image, text, scale, groups):
    """-log softmax of the own pair among itself and the pairs of other groups, both directions."""
    total = 0.0
    for queries, candidates in ((image, text), (text, image)):
        for i in range(B):
            allowed = [j for j in range(B) if j == i or groups[j] != groups[i]]
            scores = [scale * (queries[i] * candidates[j]).sum() for j in allowed]
            total = total - scores[allowed.index(i)] + torch.stack(scores).logsumexp(0)
    return total / (2 * B)


def slow_sigmoid(image, text, scale, bias, groups):
    total = 0.0
    for i in range(B):
        for j in range(B):
            logit = scale * (image[i] * text[j]).sum() + bias
            if i == j:
                total = total - F.logsigmoid(logit)
            elif groups[i] != groups[j]:
                total = total - F.logsigmoid(-logit)
    return total / B


GROUPS = [torch.arange(B), torch.tensor([0, 1, 0, 3, 1, 5, 0])]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_value_and_gradient_equal_the_slow_loop(kind, groups):
    results = []
    for slow in (False, True):
        image, text, scale, bias = features()
        if kind == "info_nce":
            loss = slow_info_nce if slow else info_nce
            value = loss(image, text, scale, groups)
        else:
            loss = slow_sigmoid if slow else sigmoid_loss
            value = loss(image, text, scale, bias, groups)
        value.backward()
        grads = [leaf.grad for leaf in (image, text, scale, bias) if leaf.grad is not None]
        results.append((value.detach(), *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", GROUPS)
def test_rows_of_the_matrix_add_up(groups):
    """Chunks and processes hold only their rows; together they are the whole loss."""
    image, text, scale, bias = features()
    parts = [slice(0, 2), slice(2, 5), slice(5, 7)]
    nce = sum(info_nce_rows(image[p], text[p], image, text, scale, p.start, groups) for p in parts)
    torch.testing.assert_close(nce / B, info_nce(image, text, scale, groups))
    sig = sum(sigmoid_rows(image[p], text, scale, bias, p.start, groups) for p in parts)
    torch.testing.assert_close(sig / B, sigmoid_loss(image, text, scale, bias, groups))


def test_a_collapsed_model_pays_the_logarithm_of_its_candidates():
    same = F.normalize(torch.ones(B, D), dim=1)
    assert info_nce(same, same, torch.tensor(14.3)).item() == pytest.approx(math.log(B), abs=1e-5)


def test_a_duplicate_is_not_a_negative():
    """The same pair twice in a batch pushes itself away, unless groups say that it is one."""
    image, text, scale, _ = (x.detach() for x in features())
    image[3], text[3] = image[0], text[0]
    text[0].requires_grad_()
    groups = torch.tensor([0, 1, 2, 0, 4, 5, 6])
    assert info_nce(image, text, scale, groups) < info_nce(image, text, scale)


def test_loss_is_float32_under_autocast():
    image, text, scale, _ = features()
    exact = info_nce(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(image, text, scale), exact)


@pytest.mark.parametrize("loss", [info_nce, functools.partial(sigmoid_loss, logit_bias=-1.3)])
def test_features_that_are_no_directions_are_said_or_made_some(loss):
    image, text, scale, _ = (x.detach() for x in features())
    exact = loss(image, text, scale=scale)
    with pytest.warns(UserWarning, match=r"1\.7 to 5 long, not 1: .* give normalize=True"):
        long = loss(5 * image, 1.7 * text, scale=scale)
    assert not torch.isclose(long, exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(loss(5 * image, 1.7 * text, scale=scale, normalize=True), exact)
        rounded = loss(image.bfloat16(), text.bfloat16(), scale=scale)  # off by up to 0.4 %
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("loss", [info_nce, functools.partial(sigmoid_loss, logit_bias=-1.3)])
def test_the_scale_may_be_a_number_and_rows_must_be_pairs(loss):
    image, text, scale, _ = (x.detach() for x in features())
    by_number = loss(image, text, scale=scale.item())
    torch.testing.assert_close(by_number, loss(image, text, scale=scale))
    for wrong in (text[:5], text[:, :3], text[0]):
        with pytest.raises(ValueError, match=r"image_features are \(7, 11\), text_features \("):
            loss(image, wrong, scale=scale)
