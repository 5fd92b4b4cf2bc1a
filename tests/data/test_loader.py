"""A torch Subset of a data set is one, too; anything else is named, with a remedy."""

import pytest
import torch

import mmkit as mm


def test_a_torch_subset_of_ours_is_a_data_set(make_trainer, make_data, make_model):
    """The rows of a subset, and of a subset of it; anything else is an error with a remedy."""
    data, model = make_data(53), make_model()
    first, second = torch.utils.data.random_split(
        data, [37, 16], generator=torch.Generator().manual_seed(0)
    )
    val = torch.utils.data.Subset(second, range(3, 14))
    trainer = make_trainer(model, data=first, val=val, max_steps=1)
    assert trainer.train.sample_ids.tolist() == list(first.indices)
    assert trainer.val.sample_ids.tolist() == [second.indices[i] for i in range(3, 14)]
    trainer.fit()
    whole = data.subset(second.indices)
    assert mm.evaluate(model, second) == mm.evaluate(model, whole)
    assert mm.Index(model, second).dataset.texts == whole.texts
    assert mm.inspect(second).rows == 16
    assert mm.overlap(first, second, near=False).images == 16


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda d: torch.utils.data.DataLoader(d), r"is a DataLoader, .* \({}=loader\.dataset\)"),
        (lambda d: [(d[0]["image"], "a dog")], r"is a list, .* give mm\.MultimodalDataset\("),
        (
            lambda d: torch.utils.data.TensorDataset(torch.zeros(7)),
            "is a TensorDataset, not a data",
        ),
        (lambda d: torch.utils.data.Subset([1, 2, 3], [0]), "is a list, not a data set"),
        (lambda d: (d, d), "is a tuple, .* give one of the data sets in it"),
        (lambda d: "pairs.csv", r"is a str, .* mm\.load_data\('pairs\.csv'\)"),
    ],
)
def test_what_is_no_data_set_is_named(make_config, make_model, make_data, wrong, words):
    data, model = make_data(53), make_model()
    given = wrong(data)
    with pytest.raises(ValueError, match="train " + words.format("train")):
        mm.train_model(make_config(), given, None, model)
    with pytest.raises(ValueError, match="val " + words.format("val")):
        mm.train_model(make_config(), data, given, model)
    for call in (mm.evaluate, mm.embed, mm.evaluate_reconstruction, mm.Index):
        shown = (
            model if call is not mm.evaluate_reconstruction else make_model().add_decoder(width=32)
        )
        with pytest.raises(ValueError, match="dataset " + words.format("dataset")):
            call(shown, given)
