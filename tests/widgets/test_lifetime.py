"""A lab that is gone leaves nothing in memory."""

import gc
import weakref

import pytest

from mmkit.widgets.mask_lab import _SHOWN, MaskLab


def dropped(lab) -> None:
    pass


def closed(lab) -> None:
    lab.close()
    assert repr(lab) == "MaskLab(closed)"
    assert lab._repr_mimebundle_() == {"text/plain": "MaskLab(closed)"}


def view_closed(lab) -> None:
    lab._repr_mimebundle_()
    lab.view.close()


@pytest.mark.parametrize("end", [dropped, closed, view_closed])
def test_a_lab_that_is_gone_leaves_no_model_no_data_and_no_widget(make_data, make_model, end):
    """ipywidgets itself keeps every widget, and what observes it, as long as the kernel runs."""
    from ipywidgets.widgets.widget import _instances

    _SHOWN.clear()
    gc.collect()
    before, alive = set(_instances), []
    for seed in range(5):
        model = make_model(seed=seed).add_decoder(words=True, pixels=True, across=True, width=32)
        lab = MaskLab(make_data(23), model)
        lab.row.value = 7
        alive += [weakref.ref(x) for x in (lab, lab.dataset, model, lab.ranking)]
        end(lab)
        del lab, model
    gc.collect()
    assert not [reference for reference in alive if reference() is not None]
    assert set(_instances) == before
