"""Images are read from a column of a Hugging Face data set when they are needed."""

import pytest

from mmkit.data.hub import Column, from_hub
from mmkit.errors import Refused
from tests.data.awkward import BLUE, RED, one_colour


def test_a_column_gives_bytes_as_they_are_and_files_of_its_folder_alone(tmp_path):
    import datasets

    (tmp_path / "in").mkdir()
    (tmp_path / "in/two.png").write_bytes(b"two")
    (tmp_path / "secret.png").write_bytes(b"secret")
    images = [
        {"bytes": b"one", "path": None},
        {"bytes": None, "path": "two.png"},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": None},
    ]
    table = datasets.Dataset.from_dict({"image": images, "text": ["a", "b", "c", "d"]})
    store = Column(table, "image", str(tmp_path / "in"), "birds")
    assert len(store) == 4 and store.name(1) == "birds, image of row 1"
    assert [store.open(row).read() for row in (0, 1)] == [b"one", b"two"]
    with pytest.raises(Refused, match=r"image of row 2: .*secret\.png, outside"):
        store.open(2)
    with pytest.raises(Refused, match="birds, image of row 3 is empty"):
        store.open(3)


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
