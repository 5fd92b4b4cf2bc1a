"""Images are read from a column of a Hugging Face data set when they are needed."""

from mmkit.data.hub import from_hub
from tests.data.awkward import BLUE, RED, one_colour


def test_one_split_is_loaded_with_the_captions_of_several_columns(cache):
    import datasets

    rows = {
        "image": [one_colour("PNG", colour=RED), one_colour("PNG", colour=BLUE)],
        "en": ["a cat", "a dog"],
        "more": [["my cat", "a cat"], []],
        "number": [3, 5],
    }
    table = datasets.Dataset.from_dict(rows)
    parts = datasets.DatasetDict(train=table.select([0]), test=table.select([1, 0]))
    data = from_hub(parts, split="test", text=["en", "more"], meta="number", image_size=8)
    assert data.texts == [["a dog"], ["a cat", "my cat"]]
    assert data.meta == [{"number": 5}, {"number": 3}]
    assert [tuple(data[row]["image"][:, 0, 0].tolist()) for row in (0, 1)] == [BLUE, RED]


def test_a_class_is_loaded_by_its_name(cache):
    """Not by its number: as a caption, and as metadata."""
    import datasets

    kinds = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    image = {"bytes": one_colour("PNG"), "path": None}
    table = datasets.Dataset.from_dict({"image": [image] * 2, "label": [1, 0]}, features=kinds)
    data = from_hub(table, text="label", meta="label", image_size=8)
    assert data.texts == [["dog"], ["cat"]] and data.meta == [{"label": "dog"}, {"label": "cat"}]
