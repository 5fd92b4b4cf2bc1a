"""Batches from files and from memory are the same, and so are those of a subset."""

from collections import Counter

import pytest
import torch

import mmkit as mm
from mmkit import MultimodalDataset
from tests.data.two_colours import BLUE, RED, TEXTS


def test_an_item_is_image_text_and_id(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    item = data[3]
    assert item["image"].shape == (3, 13, 13) and item["image"].dtype == torch.uint8
    assert item["text"] == "red and blue" and item["sample_id"] == 3
    assert tuple(item["image"][:, 6, 0]) == RED and tuple(item["image"][:, 6, 12]) == BLUE
    assert len(data) == 7 and data[-1]["text"] == "seven"
    assert "7 images (3, 13, 13), 8 captions" in repr(data)


def test_files_and_memory_give_the_same_batches(files):
    lazy = MultimodalDataset(files, TEXTS, image_size=13)
    resident = MultimodalDataset(files, TEXTS, image_size=13, device="cpu")
    assert resident.resident and not lazy.resident
    noise = torch.tensor([0.9, 0.9, 0.1])
    a, b = lazy.batch([3, 0, 2], noise), resident.batch([3, 0, 2], noise)
    for name in ("pixel_values", "input_ids", "valid", "sample_ids", "caption_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.pixel_values.dtype == torch.uint8 and a.sample_ids.tolist() == [3, 0, 2]
    decode = lazy.tokenizer.decode
    assert decode(a.input_ids[0], skip_special_tokens=True) == "blue and red"
    assert decode(lazy.batch([3]).input_ids[0], skip_special_tokens=True) == "red and blue"


def test_padding_is_cut_to_the_longest_caption_of_the_batch(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    batch = data.batch([0, 3])
    assert batch.valid.sum(1).tolist() == [4, 5] and batch.input_ids.shape == (2, 5)
    assert data.batch([4]).input_ids.shape == (1, 3)


def test_subset_keeps_ids_and_partners(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    part = data.subset([5, 2, 0])
    assert part.sample_ids.tolist() == [5, 2, 0] and part[1]["text"] == "a flag"
    assert torch.equal(part.batch([0, 1]).pixel_values, data.batch([5, 2]).pixel_values)
    assert part.batch(range(3)).correct()[1, 2]


def test_a_transform_that_gives_floats_counts_as_normalised(files, make_model):
    def transform(image):
        return torch.full((3, 15, 15), 0.25) * (image.width % 2)

    data = MultimodalDataset(files, TEXTS, transform=transform)
    batch = data.batch([0, 1])
    assert batch.pixel_values.dtype == torch.float32
    assert torch.equal(make_model().normalize(batch.pixel_values), batch.pixel_values)


def test_frequency_of_tokens_is_counted_over_all_captions(files):
    """Against a loop over captions: no end tokens, no padding, every caption of an image once."""
    data = MultimodalDataset(files, TEXTS, image_size=13)
    captions = [c for text in TEXTS for c in ([text] if isinstance(text, str) else text)]
    counts = Counter()
    for caption in captions:
        counts.update(data.tokenizer(caption, add_special_tokens=False)["input_ids"])
    expected = torch.zeros(len(data.tokenizer))
    for token, count in counts.items():
        expected[token] = count / sum(counts.values())
    frequency = data.token_frequency()
    torch.testing.assert_close(frequency, expected)
    assert frequency.sum().item() == pytest.approx(1)
    assert frequency[data.tokenizer.convert_tokens_to_ids("and")] == pytest.approx(2 / 15)
    part = data.subset([3, 4])  # its own captions, the same ids
    assert part.token_frequency()[data.tokenizer.convert_tokens_to_ids("and")] == pytest.approx(
        2 / 7
    )
    cut = data.encoded_by(data.tokenizer, 3)  # truncated captions: the rest is not counted
    assert (cut.token_frequency() > 0).sum() < (expected > 0).sum()


def test_bad_input_is_refused_in_words(files, tmp_path):
    with pytest.raises(ValueError, match="7 image_paths but 6 texts"):
        MultimodalDataset(files, TEXTS[:6])
    with pytest.raises(FileNotFoundError, match=r"gone.png \(row 1\) does not exist"):
        MultimodalDataset([files[0], tmp_path / "gone.png"], ["a", "b"])
    with pytest.raises(ValueError, match="text of row 1 is empty"):
        MultimodalDataset(files[:2], ["a", "  "])
    for nothing in (None, float("nan"), [], [None]):  # the value of an empty cell in a table
        with pytest.raises(ValueError, match="text of row 1 is empty or not a string"):
            MultimodalDataset(files[:2], ["a", nothing])
    with pytest.raises(ValueError, match="image of row 0 is nan; give the path"):
        MultimodalDataset([float("nan"), files[0]], ["a", "b"])
    odd = MultimodalDataset(files, TEXTS, transform=lambda image: torch.zeros(3, 5, image.width))
    with pytest.raises(ValueError, match=r"gave \(3, 5, 21\) for image .*1.png \(row 1\)"):
        odd.batch([0, 1])
    with pytest.raises(ValueError, match=r"transform gave Png\w+ for image .*0.png \(row 0\)"):
        MultimodalDataset(files, TEXTS, transform=lambda image: image).batch([0])
    with pytest.raises(ValueError, match="dataset is empty"):
        MultimodalDataset([], [])
    for name, content in (("zero.jpg", b""), ("page.jpg", b"<html></html>")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "cut.png").write_bytes(files[6].read_bytes()[:60])
    for name in ("zero.jpg", "page.jpg", "cut.png"):
        data = MultimodalDataset([files[0], tmp_path / name], ["a", "b"])
        with pytest.raises(ValueError, match=rf"{name} \(row 1\) cannot be read"):
            data.batch([0, 1])
        with pytest.raises(ValueError, match=rf"{name} \(row 1\) cannot be read"):
            MultimodalDataset([files[0], tmp_path / name], ["a", "b"], device="cpu")


def test_a_view_is_encoded_once_and_shares_its_images(tmp_path, make_data, monkeypatch):
    calls, encode = [], mm.data.partners.encode_texts
    monkeypatch.setattr(
        mm.data.partners, "encode_texts", lambda *args: calls.append(args[2]) or encode(*args)
    )
    data = make_data(23)
    assert data.encoded_by(data.tokenizer, 77) is data
    for _ in range(3):
        views = [data.encoded_by(data.tokenizer, length) for length in (5, 7)]
        assert [view.batch(range(23)).input_ids.shape[1] for view in views] == [5, 7]
    assert calls == [5, 7]
    assert views[0].subset([4, 0]).batch([0]).input_ids.shape[1] == 5
    paths = [tmp_path / f"{row}.png" for row in range(3)]
    for row, path in enumerate(paths):
        path.write_bytes(data.image_file(row).getvalue())
    for first, second in ((0, 1), (1, 0)):  # for both decoding orders
        files = mm.MultimodalDataset(paths, ["a", "b", "c"], image_size=15)
        pair = (files, files.encoded_by(data.tokenizer, 5))
        pair[first].keep_on("cpu")
        assert pair[second].resident
        assert torch.equal(pair[second].batch([2]).pixel_values, data.batch([2]).pixel_values)
