"""Images look as a person would see them; batches from files and from memory are the same."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
from mmkit import MultimodalDataset, train_wordpiece
from mmkit.data import image_cache
from mmkit.data.images import read_image, shift_images
from mmkit.data.loader import load_batches
from mmkit.data.partners import correct_pairs, very_common

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def files(tmp_path):
    """Seven images of different sizes, left half red and right half blue."""
    paths = []
    for i in range(7):
        image = Image.new("RGB", (20 + i, 11 + 2 * i), RED)
        image.paste(BLUE, (10, 0, 40, 40))
        paths.append(tmp_path / f"{i}.png")
        image.save(paths[-1])
    return paths


TEXTS = ["a flag", "two halves", "a flag", ["red and blue", "blue and red"], "five", "six", "seven"]


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


def test_workers_give_the_same_batches(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    keys = [(torch.tensor([0, 5, 3]), torch.rand(3)), (torch.tensor([6, 1]), torch.rand(2))]
    for here, there in zip(
        load_batches(data, keys, 0, False), load_batches(data, keys, 2, False), strict=True
    ):
        assert torch.equal(here.pixel_values, there.pixel_values)
        assert torch.equal(here.input_ids, there.input_ids)


def test_a_random_transform_draws_by_the_noise_of_its_image(files):
    """Draws depend on image and epoch, not on the batch; the process's own draws do not change."""

    def transform(image):
        drawn = torch.tensor([torch.rand(()), random.random(), np.random.rand()])
        return drawn[:, None, None].expand(3, 5, 5)

    data = MultimodalDataset(files, TEXTS, transform=transform)
    rows, noise = torch.tensor([2, 0, 1]), torch.tensor([0.3, 0.7, 0.1])
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    drawn = data.batch(rows, noise).pixel_values[..., 0, 0]
    assert len(drawn.unique()) == 9
    for workers in (0, 1):
        _, batch = load_batches(data, [([0], noise[:1]), (rows, noise)], workers, False)
        assert torch.equal(batch.pixel_values[..., 0, 0], drawn)
    assert torch.equal(data.batch([0], torch.tensor([0.7])).pixel_values[0, :, 0, 0], drawn[1])
    assert not torch.equal(data.batch([0], torch.tensor([0.6])).pixel_values[0, :, 0, 0], drawn[1])
    after = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    data.batch(rows)  # without noise they are not reproducible
    assert not torch.equal(before[0], torch.get_rng_state())


def test_padding_is_cut_to_the_longest_caption_of_the_batch(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    batch = data.batch([0, 3])
    assert batch.valid.sum(1).tolist() == [4, 5] and batch.input_ids.shape == (2, 5)
    assert data.batch([4]).input_ids.shape == (1, 3)


def slow_partners(data, rows, which):
    """(B, B): row j's caption is one of the captions of rows that show i's image."""
    same = data.content_hashes()
    read = [  # as the model reads them
        [tuple(data.tokenizer(c, truncation=True, max_length=data.max_length)["input_ids"])
         for c in captions]
        for captions in data.texts
    ]  # fmt: skip
    own = [{c for j in range(len(data)) if same[j] == same[i] for c in read[j]} for i in rows]
    drawn = [read[j][k] for j, k in zip(rows, which, strict=True)]
    return [[caption in captions for caption in drawn] for captions in own]


def test_a_partner_is_one_of_the_captions_of_an_image(files, tmp_path):
    """Against a slow loop: chains, an image given twice and saved twice, case, cut captions."""
    (tmp_path / "copy.png").write_bytes(files[2].read_bytes())
    texts = [["a flag", "b"], ["b", "c"], "c", ["A  Flag", "four five six seven"], "five",
             "four five six eight", "seven", "again two halves", "of a copy"]  # fmt: skip
    whole = MultimodalDataset([*files, files[1], tmp_path / "copy.png"], texts, image_size=13)
    rows, noise = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]), torch.linspace(0, 0.99, 8)
    shown = 0
    for data in (whole, whole.encoded_by(whole.tokenizer, 5), whole.subset(range(8, -1, -1))):
        for draws in (noise, noise.flip(0), None):
            batch = data.batch(rows, draws)
            which = [0 if draws is None else int(draws[k] * len(data.texts[row]))
                     for k, row in enumerate(rows)]  # fmt: skip
            correct = batch.correct()
            assert correct.tolist() == slow_partners(data, rows.tolist(), which)
            shown += int((correct != correct.T).sum())
            in_parts = [part.correct() for part in batch.split(3)]
            assert torch.equal(in_parts[1], correct[3:6, 3:6])
    assert shown, "no relation in one direction only"
    chain = MultimodalDataset(files[:3], [["a", "b"], ["b", "c"], "c"], image_size=13)
    captions, images = chain.partners()
    assert correct_pairs(images, captions).int().tolist() == [
        [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]
    ]  # fmt: skip


def test_data_that_is_one_to_one_carries_no_partners(files, make_data):
    batch = make_data(23).batch(range(7))
    assert batch.partners is batch.caption_ids is batch.image_captions is None
    assert torch.equal(batch[2:5].correct(), torch.eye(3, dtype=torch.bool))
    pixels = make_data(3).batch([0, 1, 0]).pixel_values
    data = MultimodalDataset.from_pixels(pixels, ["a", "b", "c"])
    assert data.batch(range(3)).correct().int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert data.encoded_by(data.tokenizer, 2).batch([0, 1]).correct().all()  # no text is left
    foreign = train_wordpiece(["b"])  # it reads no other letter: all are unknown, but not all equal
    other = MultimodalDataset.from_pixels(
        pixels[:2], [["xy", "zz"], ["XY", "yx"]], tokenizer=foreign
    )
    assert correct_pairs(*other.partners()[::-1]).int().tolist() == [[1, 1, 1, 0], [1, 0, 1, 1]]
    with pytest.raises(ValueError, match="2 sample_ids for 3 rows"):
        MultimodalDataset.from_pixels(pixels, ["a", "b", "c"], sample_ids=[5, 3])
    with pytest.raises(ValueError, match="sample id 5 occurs in 2 rows"):
        MultimodalDataset.from_pixels(pixels, ["a", "b", "c"], sample_ids=[5, 3, 5])


def test_files_are_read_whole_only_where_they_may_be_equal(tmp_path, monkeypatch):
    contents = [b"x" * 5000, b"y" + b"x" * 4999, b"z" * 5000, b"x" * 5000, b"x" * 4999]
    paths = [str(tmp_path / str(i)) for i in range(5)]
    for path, content in zip(paths, contents, strict=True):
        Path(path).write_bytes(content)
    read, hashed = [], image_cache.content_hash
    monkeypatch.setattr(
        image_cache, "content_hash", lambda store, i: read.append(i) or hashed(store, i)
    )
    keys = image_cache.same_files(paths)
    equal = {(i, j) for i in range(5) for j in range(i) if keys[i] == keys[j]}
    assert equal == {(3, 0)} and read == [0, 1, 3]


def test_very_common_captions_are_counted(make_data):
    """Counted by images, most common first; the lost negatives of a batch against a slow loop."""
    data = make_data(113, tokenizer=None)
    data.texts = [["Photo", f"thing {i}"] + ["rare"] * (i < 7) for i in range(113)]
    assert data.common_captions() == [("Photo", 113)]
    found = [very_common(count, 113) for count in (1, 9, 10)]
    assert found == [False, False, True]
    assert [very_common(count, 10_000) for count in (99, 100, 101)] == [False, False, True]
    _, _, first, counts = data.encoded_captions()
    pairs = correct_pairs(*data.partners()[::-1]).double()
    total = 0.0
    for i in range(113):
        for j in range(113):
            own = slice(int(first[j]), int(first[j] + counts[j]))
            total += float(pairs[i, own].mean()) if i != j else 0.0
    assert data.correct_captions.left_out() == pytest.approx(total / (113 * 112))


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


def save(path, array_or_image, **options):
    image = array_or_image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return np.asarray(read_image(path))


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was rotated: show the image rotated by 90 degrees clockwise
    seen = save(tmp_path / "turned.png", image, exif=exif)
    assert seen.shape == (16, 8, 3)
    assert tuple(seen[0, 0]) == RED and tuple(seen[15, 0]) == BLUE


def test_alpha_is_laid_over_white(tmp_path):
    image = Image.new("RGBA", (5, 3), (255, 0, 0, 0))
    assert (save(tmp_path / "clear.png", image) == 255).all()
    palette = Image.new("P", (5, 3), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 1)
    seen = save(tmp_path / "palette.png", palette, transparency=0)
    assert tuple(seen[0, 0]) == RED and tuple(seen[2, 4]) == WHITE


@pytest.mark.parametrize("top, dtype", [(65535, np.uint16), (255, np.uint8)])
def test_grey_images_keep_their_shades(tmp_path, top, dtype):
    """A 16-bit ramp stays a ramp; clipping would turn it white."""
    ramp = np.linspace(0, top, 17).astype(dtype)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.png", ramp)
    assert seen.shape == (5, 17, 3)
    assert np.abs(seen[0, :, 0].astype(int) - np.linspace(0, 255, 17)).max() <= 1


@pytest.mark.parametrize("top", [1.0, 1.0000001, 1.04, 2.5, 255.0, 255.5, 3000.0, 65535.0, 66000.0])
@pytest.mark.parametrize("lowest", [0.0, -1e-6])
def test_float_images_are_neither_black_nor_white(tmp_path, top, lowest):
    """Also where resampling or rounding left values just outside a usual range."""
    ramp = np.linspace(lowest, top, 17, dtype=np.float32)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.tiff", ramp)[0, :, 0].astype(int)
    assert seen[0] == 0 and (np.diff(seen) >= 0).all()
    assert np.abs(seen[8] - seen[16] / 2) <= 8 and seen[16] >= (10 if top == 3000 else 240)


def test_whole_numbers_of_a_small_range_are_seen(tmp_path):
    seen = save(tmp_path / "labels.tiff", np.arange(4, dtype=np.int32)[None].repeat(5, 0))
    assert seen[0, :, 0].tolist() == [0, 85, 170, 255]


def test_dark_16_bit_images_stay_dark(tmp_path):
    """0.3 % of white is nearly black, whatever the rest of the image contains."""
    assert (save(tmp_path / "dark.png", np.full((5, 3), 200, np.uint16)) <= 1).all()


def test_micro_batches_are_nearly_equal_and_as_many_as_asked_for(files):
    batch = MultimodalDataset(files, TEXTS, image_size=13).batch(range(7))
    for parts, sizes in ((1, [7]), (2, [4, 3]), (5, [2, 2, 1, 1, 1]), (9, [1] * 7)):
        tokens = batch.split(parts)
        assert [len(token) for token in tokens] == sizes
        assert torch.cat([token.sample_ids for token in tokens]).tolist() == list(range(7))


def test_float_images_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 17, dtype=np.float32)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.tiff", ramp)
    assert np.abs(seen[0, :, 0].astype(int) - np.linspace(0, 255, 17)).max() <= 1


def test_shift_moves_images_by_their_own_noise():
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    noise = torch.tensor([[0.5, 0.5], [0.999, 0.5], [0.5, 0.0]])
    moved = shift_images(pixels, noise)
    assert torch.equal(moved[0], pixels[0])
    assert torch.equal(moved[1, :, :-2], pixels[1, :, 2:])
    assert torch.equal(moved[2, :, :, 2:], pixels[2, :, :, :-2])
    assert torch.equal(moved[2, :, :, 0], pixels[2, :, :, 0])


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


# -- workers without shared memory ----------------------------------------------------------------

NO_SHARED_MEMORY = """
import resource, sys, torch
from pathlib import Path
from mmkit.data.loader import load_batches
from tests.train_small import data_in_files

data = data_in_files(Path(sys.argv[1]), 23)
data.transform = lambda image: torch.full((3, 223, 227), float(sum(image.size)))
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
keys = [(torch.arange(i, i + 7), torch.rand(7)) for i in (0, 7, 13)]
found = list(load_batches(data, keys, 2, False))
for batch, key in zip(found, keys, strict=True):
    wanted = data.batch(*key)
    for part in ("pixel_values", "input_ids", "valid", "sample_ids"):
        assert torch.equal(getattr(batch, part), getattr(wanted, part)), part
print("all batches came")
"""


def test_workers_without_room_for_shared_memory_send_their_batches_all_the_same(tmp_path):
    """No file of more than 1 MB, as in a full /dev/shm: a batch of 4 MB still arrives."""
    command = [sys.executable, "-c", NO_SHARED_MEMORY, str(tmp_path / "images")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all batches came\n", done.stderr[-2000:]


INVISIBLE = [
    "\u200e\u200f",
    "\u202e \u2066\u2069",
    "\u200d",
    "\u3164",
    "\u2800\u2800",
    "\ufe0f",
    "\U000e0041",
]


@pytest.mark.parametrize("caption", INVISIBLE)
def test_captions_that_nobody_can_see_are_blank(caption, tmp_path):
    """Blank captions are refused alone, but left out and counted beside others."""
    with pytest.raises(ValueError, match="is empty or not a string"):
        mm.MultimodalDataset.from_pixels(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [caption])
    for name in "ab":
        Image.new("RGB", (11, 13), (5, 7, 250)).save(tmp_path / f"{name}.png")
    paths, texts = [tmp_path / "a.png", tmp_path / "b.png"], [["a cat", caption], [caption]]
    data = mm.from_lists(paths, texts, on_error="skip", max_skipped=1.0, num_workers=0)
    assert data.texts == [["a cat"]] and data.report.blank_captions == 1
    assert data.report.skipped == {"no caption": 1}
    model = mm.MultimodalEncoder.preset("tiny", tokenizer=data.tokenizer)
    with pytest.raises(ValueError, match="none of them empty"):
        mm.embed_texts(model, [caption])


def test_marks_within_words_stay():
    """Joiners and marks of direction have a meaning between letters and emoji."""
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    for text in (
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\U0001f469\u200d\U0001f680",
        "7",
        "\u200eabc",
        "\u2764\ufe0f",
    ):
        assert mm.MultimodalDataset.from_pixels(pixels, [text]).texts == [[text]]


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
