"""Losses against slow loops over pairs, patches and tokens, value and gradient."""

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mmkit as mm
from mmkit import info_nce, sigmoid_loss
from mmkit.losses import CONTRASTIVE, info_nce_rows, sigmoid_rows
from mmkit.models.patches import patchify
from mmkit.objective import term_sums
from tests.models.decoding import draw, wanted
from tests.relation import IDS, TABLE, matrix

B, D = 7, 11


def features(seed=0):
    torch.manual_seed(seed)
    image, text = (
        F.normalize(torch.randn(B, D, dtype=torch.float64), dim=1).float() for _ in range(2)
    )
    leaves = image, text, torch.tensor(3.7), torch.tensor(-1.3)
    return [leaf.requires_grad_() for leaf in leaves]


def slow_info_nce(image, text, scale, correct):
    """-log softmax of the own pair among itself and wrong ones, in both directions."""
    total = 0.0
    for queries, candidates, matches in ((image, text, correct), (text, image, correct.T)):
        for i in range(B):
            allowed = [j for j in range(B) if j == i or not matches[i, j]]
            scores = [scale * (queries[i] * candidates[j]).sum() for j in allowed]
            total = total - scores[allowed.index(i)] + torch.stack(scores).logsumexp(0)
    return total / (2 * B)


def slow_sigmoid(image, text, scale, bias, correct):
    total = 0.0
    for i in range(B):
        for j in range(B):
            logit = scale * (image[i] * text[j]).sum() + bias
            if i == j:
                total = total - F.logsigmoid(logit)
            elif not correct[i, j]:
                total = total - F.logsigmoid(-logit)
    return total / B


GROUPS = torch.tensor([0, 1, 0, 3, 1, 5, 0])  # a transitive relation: equal is correct
PARTNERS = [
    None,
    GROUPS,
    (GROUPS, GROUPS[:, None]),
    (IDS, TABLE),
    matrix(IDS, TABLE),
]


def correct_of(partners):
    if partners is None:
        return torch.eye(B, dtype=torch.bool)
    if partners is GROUPS:
        return GROUPS[:, None] == GROUPS
    return matrix(*partners) if isinstance(partners, tuple) else partners


@pytest.mark.parametrize("partners", PARTNERS)
@pytest.mark.parametrize("kind", ["info_nce", "sigmoid"])
def test_value_and_gradient_equal_the_slow_loop(kind, partners):
    results = []
    for slow in (False, True):
        image, text, scale, bias = features()
        given = correct_of(partners) if slow else partners
        if kind == "info_nce":
            loss = slow_info_nce if slow else info_nce
            value = loss(image, text, scale, given)
        else:
            loss = slow_sigmoid if slow else sigmoid_loss
            value = loss(image, text, scale, bias, given)
        value.backward()
        grads = [leaf.grad for leaf in (image, text, scale, bias) if leaf.grad is not None]
        results.append((value.detach(), *grads))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("partners", PARTNERS)
def test_rows_of_the_matrix_add_up(partners):
    """Chunks and processes hold only their rows; their sum is the whole loss."""
    image, text, scale, bias = features()
    parts = [slice(0, 2), slice(2, 5), slice(5, 7)]
    nce = sum(
        info_nce_rows(image[p], text[p], image, text, scale, p.start, partners) for p in parts
    )
    torch.testing.assert_close(nce / B, info_nce(image, text, scale, partners))
    sig = sum(sigmoid_rows(image[p], text, scale, bias, p.start, partners) for p in parts)
    torch.testing.assert_close(sig / B, sigmoid_loss(image, text, scale, bias, partners))


def test_a_collapsed_model_has_the_logarithm_of_its_candidates_as_loss():
    same = F.normalize(torch.ones(B, D), dim=1)
    assert info_nce(same, same, torch.tensor(14.3)).item() == pytest.approx(math.log(B), abs=1e-5)


def test_a_duplicate_is_not_a_negative():
    """A pair that is twice in a batch is its own negative, unless the groups say otherwise."""
    image, text, scale, _ = (x.detach() for x in features())
    image[3], text[3] = image[0], text[0]
    text[0].requires_grad_()
    groups = torch.tensor([0, 1, 2, 0, 4, 5, 6])
    aware = info_nce(image, text, scale, group_ids=groups)
    assert aware < info_nce(image, text, scale)
    assert torch.equal(aware, info_nce(image, text, scale, groups))  # the older form


def test_partners_of_other_pairs_are_refused():
    image, text, scale, bias = features()
    for wrong in (GROUPS[:5], (IDS, TABLE[:5]), matrix(IDS, TABLE)[:, :5], torch.eye(B)):
        with pytest.raises(ValueError, match=r"partners of 7 pairs .* bool matrix \(7, 7\)"):
            info_nce(image, text, scale, wrong)
        with pytest.raises(ValueError, match="partners of 7 pairs"):
            sigmoid_loss(image, text, scale, bias, wrong)


class Matrices(TorchDispatchMode):
    """Record every bool tensor of at least B x B entries that an operation makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.dtype == torch.bool and out.numel() >= B * B:
            self.made.append(function)
        return out


def test_one_to_one_data_holds_no_matrix_of_partners():
    for partners, some in ((None, False), ((IDS, TABLE), True)):
        with Matrices() as found:
            info_nce(*features()[:3], partners).backward()
        assert bool(found.made) == some


def test_trivial_partners_change_nothing():
    """If only own partners are correct, the bits are the same as without any relation."""
    found = []
    for partners in (None, (torch.arange(B), torch.arange(B)[:, None])):
        leaves = features()
        loss = info_nce(*leaves[:3], partners) + sigmoid_loss(*leaves, partners)
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *found))


def test_loss_is_float32_under_autocast():
    image, text, scale, _ = features()
    exact = info_nce(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(info_nce(image, text, scale), exact)


@pytest.mark.parametrize("loss", [info_nce, functools.partial(sigmoid_loss, logit_bias=-1.3)])
def test_features_that_are_not_unit_length_give_a_warning_or_are_normalised(loss):
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


def test_a_loss_of_ones_own_is_trained_and_measured_by_its_name(
    make_data, make_model, tmp_path, monkeypatch
):
    """Only images look for captions: one function and one line, in two micro-batches."""

    def one_way(rows, candidates, scale, bias, offset, partners):
        own = torch.arange(len(rows[0])) + offset
        return F.cross_entropy(scale * rows[0] @ candidates[1].T, own, reduction="sum")

    monkeypatch.setitem(CONTRASTIVE, "one_way", one_way)
    data, model = make_data(20), make_model()
    config = dict(batch_size=20, image_mask_ratio=0.0, output_dir=str(tmp_path), loss="one_way")
    config |= dict(gradient_accumulation_steps=2, mixed_precision="no")
    trainer = mm.MaskedMultimodalTrainer(mm.TrainingConfig(**config), data, model=model)
    found = mm.embed(model, data)
    logits = model.logit_scale.exp() * found.image_features @ found.text_features.T
    expected = F.cross_entropy(logits, torch.arange(20)).item()
    assert mm.evaluate(model, data)["loss"] == pytest.approx(expected, rel=1e-5)
    loss, _ = trainer.train_step(trainer.first_batch(), epoch=0)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert abs(expected - mm.evaluate(make_model(), data)["loss"]) > 1e-3  # InfoNCE is another
    config["loss"] = "one_wy"
    with pytest.raises(ValueError, match="did you mean 'one_way'"):
        mm.train_model(mm.TrainingConfig(**config), data)


@pytest.mark.parametrize("error", ["mse", "l1"])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_loss_is_of_masked_patches_alone(make_decoding, make_data, error, norm_pix_loss):
    """Against a slow loop over rows with 2, 3, … masked patches; no gradient at visible ones."""
    model, batch = make_decoding(norm_pix_loss=norm_pix_loss), make_data(7).batch(range(7))
    image, _ = draw(model, batch, "uniform")
    assert len(image.mask.sum(1).unique()) > 2
    out = model(batch, image, None, wanted=wanted(tokens=False))
    out.pixels.retain_grad()
    found = term_sums(model, out, batch, (image, None), error)["mim"]
    target, total = patchify(model.normalize(batch.pixel_values), 5), 0.0
    for row, position in image.mask.nonzero().tolist():
        true = target[row, position]
        if norm_pix_loss:
            true = (true - true.mean()) / (true.var() + 1e-6) ** 0.5
        off = out.pixels[row, position] - true
        total = total + (off.abs() if error == "l1" else off**2).mean()
    torch.testing.assert_close(found, total)
    found.backward()
    assert torch.equal(out.pixels.grad.abs().sum(-1) > 0, image.mask)


def test_the_loss_is_of_masked_words_alone(make_decoding, make_data):
    """In the order of `mask.nonzero()`, for captions of 2 to 6 words."""
    model, batch = make_decoding(), make_data(7).batch(range(7))
    _, text = draw(model, batch)
    assert len(text.mask.sum(1).unique()) > 2
    out = model(batch, None, text, wanted=wanted(pixels=False), text_mode="replace")
    found = term_sums(model, out, batch, (None, text))["mlm"]
    total = 0.0
    positions = text.mask.nonzero().tolist()
    for logits, (row, position) in zip(out.token_logits, positions, strict=True):
        total = total - logits.log_softmax(0)[batch.input_ids[row, position]]
    torch.testing.assert_close(found, total)
