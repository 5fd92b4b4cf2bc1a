"""Any mask ratio, and what holds for any `Masking`."""

import torch
from hypothesis import strategies as st

from mmkit.masking.core import Masking

RATIOS = st.one_of(st.floats(0, 0.999), st.sampled_from([0.0, 0.5, 0.75, 0.9, 0.999]))


def consistent(masking: Masking):
    """ids_keep, ids_restore, keep_valid and mask are consistent."""
    tokens, kept = masking.mask.shape[1], masking.ids_keep.shape[1]
    everything = torch.arange(tokens).expand_as(masking.mask)
    assert torch.equal(masking.ids_restore.sort(1).values, everything)
    order = masking.ids_restore.argsort(1)  # kept, then masked
    assert torch.equal(order[:, :kept], masking.ids_keep)
    visible = ~masking.mask.gather(1, masking.ids_keep)
    if masking.keep_valid is None:
        assert visible.all() and ((~masking.mask).sum(1) == kept).all()
    else:
        assert torch.equal(visible, masking.keep_valid)
        count = (~masking.mask).sum(1)
        assert torch.equal(masking.keep_valid, torch.arange(kept) < count[:, None])
        assert kept == count.max()
