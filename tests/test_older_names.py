"""Older names answer for one release, and say what they are called now."""

import pytest
import torch

import mmkit as mm


def test_functions_answer_under_their_older_names(make_data):
    data = make_data(7)
    with pytest.warns(FutureWarning, match="mm.unknown_share is called mm.unk_rate now"):
        assert mm.unknown_share(data.tokenizer, ["zebra"]) == mm.unk_rate(data.tokenizer, ["zebra"])
    with pytest.warns(FutureWarning, match="data.piece_frequency is called data.token_frequency"):
        assert torch.equal(data.piece_frequency(), data.token_frequency())
    batch, special = data.batch(range(3)), torch.tensor([0])
    with pytest.warns(FutureWarning, match="mm.masking.maskable_tokens now"):
        older = mm.masking.maskable_words(batch.input_ids, batch.valid, special)
    assert torch.equal(older, mm.masking.maskable_tokens(batch.input_ids, batch.valid, special))
