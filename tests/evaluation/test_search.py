"""Search finds what was asked for, by a text and by an image."""

import pytest

import mmkit as mm
from mmkit import Index, embed_texts


def test_search_by_text_and_by_image(make_model, make_data):
    model, data = make_model().eval(), make_data(23)
    index = Index(model, data, mixed_precision="no")
    hits = index.search("old red cat", k=5)
    scores = index.features.image_features @ embed_texts(model, ["old red cat"])[0]
    assert [hit.row for hit in hits] == scores.argsort(descending=True)[:5].tolist()
    assert hits[0].score == pytest.approx(scores.max().item(), abs=1e-5)
    own = index.search(data[7]["image"], k=1)[0]
    assert own.row == 7 and own.score == pytest.approx(1, abs=1e-4) and own.text == data[7]["text"]
    with pytest.raises(ValueError, match="k=24 must be between 1 and the 23 images"):
        index.search("cat", k=24)
    with pytest.raises(ValueError, match="none of them empty"):
        index.search(" ")
    with pytest.raises(FileNotFoundError, match=r"gone\.png does not exist"):
        index.search("gone.png")


@pytest.mark.parametrize("kind", [int, bool, float, bytes, type(None)])
def test_what_is_neither_a_text_nor_a_path_is_refused_and_closes_nothing(
    kind, make_model, make_data, tmp_path
):
    """Python opens a number as the file that has it, reads it, and closes it."""
    data = make_data(5)
    index = Index(make_model(), data)
    for call, words in (
        (lambda x: index.search(x, k=1), "is neither a text nor an image; give a text"),
        (mm.load, "is not a path; give the name of a file or a folder"),
        (mm.from_folder, "is not a path"),
        (mm.from_table, "is not a path"),
        (mm.from_class_folders, "is not a path"),
        (lambda x: mm.from_shards([x]), "is not a path"),
        (lambda x: mm.from_coco(x, x), "is not a path"),
        (lambda x: mm.from_lists([x], ["a"]), "names no image|its format is not known"),
        (lambda x: mm.MultimodalDataset([x], ["a"]), "give the path of a file"),
    ):
        with open(tmp_path / "file", "wb") as file:
            value = None if kind is type(None) else kind(file.fileno())
            with pytest.raises(ValueError, match=words):
                call(value)
            file.write(b"still open")
