"""Figures of runs show their records: losses, terms, gradients, and where two runs differ."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import mmkit as mm
from mmkit import plots
from mmkit.training.run import Run
from tests.plots.drawn import labels, shown
from tests.train_small import DEFAULTS


@pytest.fixture
def run(tmp_path, make_model, make_data):
    config = mm.TrainingConfig(**DEFAULTS | dict(num_epochs=2, output_dir=str(tmp_path)))
    return mm.train_model(config, make_data(23), make_data(11, seed=1), make_model())


def test_training_curves_have_their_reference_line(run):
    left, right = shown(plots.training_curves({"a": run}, chance_negatives=11), 2)
    assert labels(left) == ("step", "loss (nats)") and "R@1" in right.get_ylabel()
    assert [text.get_text() for text in left.texts] == [f"guessing: ln(11) = {math.log(11):.2f}"]
    shown(plots.training_curves({"a": run}, x="minutes", k=5), 2)


def test_the_whole_and_the_resumed_run_are_compared():
    steps = [1, 2, 3]
    reference = ("whole", steps, [3.0, 2.0, 1.0])
    others = {"resumed": (steps, [3.0, 2.0, 1.0]), "other": (steps, [3.0, 2.0, 1.5])}
    axes = shown(plots.same_or_not(reference, others, events={"killed": 2}), 2)
    names = [text.get_text() for text in axes[1].get_legend().get_texts()]
    assert names == ["resumed: at most 0", "other: at most 0.5"]
    axes = shown(plots.same_or_not(reference, others, log=True), 2)
    assert [text.get_text() for text in axes[1].get_legend().get_texts()] == names
    equal, other = (line.get_ydata() for line in axes[1].lines)
    assert axes[1].get_yscale() == "log" and np.isnan(equal).all()
    np.testing.assert_array_equal(other, [math.nan, math.nan, 0.5])


def test_gradients_are_compared_with_the_true_one():
    """Half as long in the same direction, `logit_scale` four times as large."""
    torch.manual_seed(0)
    true = {"a": torch.randn(3, 5), "b": torch.randn(7), "logit_scale": torch.tensor(-0.25)}
    half = {n: g / 2 if n != "logit_scale" else 4 * g for n, g in true.items()}
    figure = plots.gradient_agreement(true, {"same": true, "half": half}, caption="take-away")
    left, right = shown(figure, 2)
    assert [text.get_text() for text in right.texts] == ["1", "1", "1", "1", "0.5", "4"]
    heights = [bar.get_height() for bar in right.patches]
    assert heights == pytest.approx([1, 1, 1, 1, 0.5, 4]) and right.get_ylim()[1] > 4
    same, star, other, other_star = left.lines[:4]
    sizes = [float(true[n].norm()) for n in "ab"]
    np.testing.assert_allclose(other.get_xdata(), sizes, rtol=1e-6)
    np.testing.assert_allclose(other.get_ydata(), np.array(sizes) / 2, rtol=1e-6)
    assert float(other_star.get_ydata()[0]) == pytest.approx(0.75)
    floor = 1e-10 * max(sizes)
    np.testing.assert_allclose([*same.get_ydata(), *star.get_ydata()], floor)
    unused = plots.gradient_agreement(true, {"no b": {n: true[n] for n in ("a", "logit_scale")}})
    ratio = sizes[0] / math.hypot(*sizes)
    words = [text.get_text() for text in shown(unused, 2)[1].texts]
    assert words == [f"{ratio:.3g}", f"{ratio:.3g}", "1"]


def gradient_records(count):
    """Image tower: two terms; text tower: one, at every other step. Validation has none."""
    for step in range(count):
        record = {"step": 10 * step, "split": "train"}
        record |= {f"gradient_norm/image/{t}": n + step for t, n in (("mim", 1), ("mlm", 2))}
        record |= {"gradient_cosine/image/mim·mlm": 0.02 - 0.4 * (step % 2)}
        yield record | ({"gradient_norm/text/mlm": 3.0} if step % 2 else {})
        yield {"step": 10 * step, "split": "val", "loss": 1.0}


def test_the_terms_of_the_loss_conflict_below_zero():
    """A row for each tower that was measured; norms on a logarithmic axis, zero marked."""
    axes = shown(plots.term_gradients(list(gradient_records(5)), "take-away"), 4)
    (mim, mlm), (cosine, zero) = axes[0].lines, axes[1].lines
    assert list(mlm.get_xdata()) == [0, 10, 20, 30, 40]
    assert list(mim.get_ydata()) == [1, 2, 3, 4, 5] and mim.get_label() == "mim"
    assert axes[0].get_yscale() == "log" and labels(axes[0])[1].startswith("image tower")
    np.testing.assert_allclose(cosine.get_ydata(), [0.02, -0.38, 0.02, -0.38, 0.02])
    assert list(zero.get_ydata()) == [0, 0] and sum(axes[1].get_ylim()) == 0
    assert "below 0: the terms conflict" in [text.get_text() for text in axes[1].texts]
    (line,) = axes[2].lines
    assert list(line.get_xdata()) == [10, 30] and labels(axes[2])[1].startswith("text tower")
    assert line.get_color() == mlm.get_color() != mim.get_color()
    with pytest.raises(ValueError, match="gradient_norm/<tower>/<term>"):
        plots.term_gradients([{"step": 1, "loss": 2.0}])


def test_many_gradients_are_averaged_in_the_middle_of_their_window():
    axes = shown(plots.term_gradients(list(gradient_records(75))), 4)
    raw, mean = axes[0].lines[:2]
    assert len(raw.get_ydata()) == 75 and axes[0].get_title() == "thick: mean of 3 values"
    np.testing.assert_allclose(mean.get_ydata(), raw.get_ydata()[1:-1])  # a straight line
    np.testing.assert_allclose(mean.get_xdata(), raw.get_xdata()[1:-1])


def test_each_term_of_the_loss_has_its_panel():
    """Training thin, validation with points; a key that no run has is left out."""

    def made(scale):
        train = [{"split": "train", "step": s, "loss": scale * s, "mlm_loss": 7} for s in (1, 2)]
        val = {"split": "val", "step": 2, "loss": 9 * scale, "mlm_accuracy": scale / 10}
        return Run(Path("x"), [*train, val], {})

    runs = {"one": made(1), "three": made(3)}
    keys = ["loss", "mim_loss", "mlm_loss", "mlm_accuracy"]
    figure = plots.loss_terms(runs, keys, {"loss": {"chance": 5}}, "take-away")
    axes = shown(figure, 3)
    assert [labels(ax) for ax in axes] == [
        ("step", "loss, all terms"),
        ("step", "token loss (nats)"),
        ("step", "accuracy on masked tokens (fraction)"),
    ]
    curves = [list(line.get_ydata()) for line in axes[0].lines]
    assert curves == [[1, 2], [9], [3, 6], [27], [5, 5]]
    assert [text.get_text() for text in axes[0].texts] == ["chance"]
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["one", "three", "training", "validation"]
    assert labels(shown(plots.loss_terms(runs, {"loss": "sum (nats)"}), 1)[0])[1] == "sum (nats)"
    with pytest.raises(ValueError, match="no record has any of"):
        plots.loss_terms(runs, ["loss/mim"])


def test_terms_of_a_real_run_have_their_panels(make_model, make_data, tmp_path):
    """The figures read the keys that a trainer writes, and leave None out."""
    values = dict(mim_weight=1.0, mlm_weight=0.5, decoder_width=32, term_gradients_every=1)
    config = mm.TrainingConfig(**DEFAULTS | values, max_steps=3, output_dir=str(tmp_path))
    run = mm.train_model(config, make_data(23), make_data(9, seed=1), make_model())
    axes = plots.loss_terms({"run": run}).axes
    assert {ax.get_ylabel() for ax in axes} >= {
        "loss, all terms", "contrastive loss (nats)", "token loss (nats)"
    }  # fmt: skip
    records = [r for r in run.history if r["split"] == "terms"]
    assert len(records) == 3
    for key in records[1]:
        if key.startswith("gradient_"):
            records[1][key] = None
    curves = shown(plots.term_gradients(records), 4)[0].lines
    assert all(len(curve.get_xdata()) == 2 for curve in curves)
