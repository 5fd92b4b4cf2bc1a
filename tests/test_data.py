"""Pictures arrive as a person would see them; batches are the same from files and from memory."""

import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mmkit import MultimodalDataset
from mmkit.data import load_batches
from mmkit.pictures import read_picture, shift_pictures

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def files(tmp_path):
    """Seven pictures of different sizes, left half red and right half blue."""
    paths = []
    for i in range(7):
        picture = Image.new("RGB", (20 + i, 11 + 2 * i), RED)
        picture.paste(BLUE, (10, 0, 40, 40))
        paths.append(tmp_path / f"{i}.png")
        picture.save(paths[-1])
    return paths


TEXTS = ["a flag", "two halves", "a flag", ["red and blue", "blue and red"], "five", "six", "seven"]


def test_an_item_is_picture_text_and_id(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    item = data[3]
    assert item["image"].shape == (3, 13, 13) and item["image"].dtype == torch.uint8
    assert item["text"] == "red and blue" and item["sample_id"] == 3
    assert tuple(item["image"][:, 6, 0]) == RED and tuple(item["image"][:, 6, 12]) == BLUE
    assert len(data) == 7 and data[-1]["text"] == "seven"
    assert "7 pictures (3, 13, 13), 8 captions" in repr(data)


def test_files_and_memory_give_the_same_batches(files):
    lazy = MultimodalDataset(files, TEXTS, image_size=13)
    resident = MultimodalDataset(files, TEXTS, image_size=13, device="cpu")
    assert resident.resident and not lazy.resident
    noise = torch.tensor([0.9, 0.9, 0.1])
    a, b = lazy.batch([3, 0, 2], noise), resident.batch([3, 0, 2], noise)
    for name in ("pixel_values", "input_ids", "valid", "sample_ids", "group_ids"):
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


def test_a_random_transform_draws_by_the_noise_of_its_picture(files):
    """The same for a picture in an epoch, alone or not; the process's own draws are not moved."""

    def transform(picture):
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
    data.batch(rows)  # without noise they come as they come
    assert not torch.equal(before[0], torch.get_rng_state())


def test_padding_is_cut_to_the_longest_caption_of_the_batch(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    batch = data.batch([0, 3])
    assert batch.valid.sum(1).tolist() == [4, 5] and batch.input_ids.shape == (2, 5)
    assert data.batch([4]).input_ids.shape == (1, 3)


def test_groups_join_what_is_correct_for_each_other(files):
    """One caption of two pictures, and one picture given twice, are one group each."""
    data = MultimodalDataset([*files, files[1]], [*TEXTS, "again two halves"], image_size=13)
    groups = data.group_ids.tolist()
    assert groups[0] == groups[2] and groups[1] == groups[7]
    assert len(set(groups)) == 6
    chain = MultimodalDataset(files[:3], [["a", "b"], ["b", "c"], "c"], image_size=13)
    assert len(chain.group_ids.unique()) == 1


def test_subset_keeps_ids_and_groups(files):
    data = MultimodalDataset(files, TEXTS, image_size=13)
    part = data.subset([5, 2, 0])
    assert part.sample_ids.tolist() == [5, 2, 0] and part[1]["text"] == "a flag"
    assert torch.equal(part.batch([0, 1]).pixel_values, data.batch([5, 2]).pixel_values)
    assert part.group_ids[1] == part.group_ids[2]


def test_a_transform_that_gives_floats_counts_as_normalised(files, make_model):
    def transform(picture):
        return torch.full((3, 15, 15), 0.25) * (picture.width % 2)

    data = MultimodalDataset(files, TEXTS, transform=transform)
    batch = data.batch([0, 1])
    assert batch.pixel_values.dtype == torch.float32
    assert torch.equal(make_model().normalize(batch.pixel_values), batch.pixel_values)


def save(path, array_or_picture, **options):
    picture = array_or_picture
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    picture.save(path, **options)
    return np.asarray(read_picture(path))


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (16, 8), RED)
    picture.paste(BLUE, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    seen = save(tmp_path / "turned.png", picture, exif=exif)
    assert seen.shape == (16, 8, 3)
    assert tuple(seen[0, 0]) == RED and tuple(seen[15, 0]) == BLUE


def test_alpha_is_laid_over_white(tmp_path):
    picture = Image.new("RGBA", (5, 3), (255, 0, 0, 0))
    assert (save(tmp_path / "clear.png", picture) == 255).all()
    palette = Image.new("P", (5, 3), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 1)
    seen = save(tmp_path / "palette.png", palette, transparency=0)
    assert tuple(seen[0, 0]) == RED and tuple(seen[2, 4]) == WHITE


@pytest.mark.parametrize("top, dtype", [(65535, np.uint16), (255, np.uint8)])
def test_grey_pictures_keep_their_shades(tmp_path, top, dtype):
    """A 16-bit ramp stays a ramp; clipping would turn it white."""
    ramp = np.linspace(0, top, 17).astype(dtype)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.png", ramp)
    assert seen.shape == (5, 17, 3)
    assert np.abs(seen[0, :, 0].astype(int) - np.linspace(0, 255, 17)).max() <= 1


@pytest.mark.parametrize("top", [1.0, 1.0000001, 1.04, 2.5, 255.0, 255.5, 3000.0, 65535.0, 66000.0])
@pytest.mark.parametrize("lowest", [0.0, -1e-6])
def test_float_pictures_are_neither_black_nor_white(tmp_path, top, lowest):
    """Also where resampling or rounding left values just outside a usual range."""
    ramp = np.linspace(lowest, top, 17, dtype=np.float32)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.tiff", ramp)[0, :, 0].astype(int)
    assert seen[0] == 0 and (np.diff(seen) >= 0).all()
    assert np.abs(seen[8] - seen[16] / 2) <= 8 and seen[16] >= (10 if top == 3000 else 240)


def test_whole_numbers_of_a_small_range_are_seen(tmp_path):
    seen = save(tmp_path / "labels.tiff", np.arange(4, dtype=np.int32)[None].repeat(5, 0))
    assert seen[0, :, 0].tolist() == [0, 85, 170, 255]


def test_dark_16_bit_pictures_stay_dark(tmp_path):
    """0.3 % of white is nearly black, whatever the rest of the picture holds."""
    assert (save(tmp_path / "dark.png", np.full((5, 3), 200, np.uint16)) <= 1).all()


def test_micro_batches_are_nearly_equal_and_as_many_as_asked_for(files):
    batch = MultimodalDataset(files, TEXTS, image_size=13).batch(range(7))
    for parts, sizes in ((1, [7]), (2, [4, 3]), (5, [2, 2, 1, 1, 1]), (9, [1] * 7)):
        pieces = batch.split(parts)
        assert [len(piece) for piece in pieces] == sizes
        assert torch.cat([piece.sample_ids for piece in pieces]).tolist() == list(range(7))


def test_float_pictures_are_scaled(tmp_path):
    ramp = np.linspace(0, 1, 17, dtype=np.float32)[None].repeat(5, 0)
    seen = save(tmp_path / "ramp.tiff", ramp)
    assert np.abs(seen[0, :, 0].astype(int) - np.linspace(0, 255, 17)).max() <= 1


def test_shift_moves_pictures_by_their_own_noise():
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    noise = torch.tensor([[0.5, 0.5], [0.999, 0.5], [0.5, 0.0]])
    moved = shift_pictures(pixels, noise)
    assert torch.equal(moved[0], pixels[0])
    assert torch.equal(moved[1, :, :-2], pixels[1, :, 2:])
    assert torch.equal(moved[2, :, :, 2:], pixels[2, :, :, :-2])
    assert torch.equal(moved[2, :, :, 0], pixels[2, :, :, 0])


def test_frequency_of_pieces_is_counted_over_all_captions(files):
    """Against a loop over captions: no ends, no padding, every caption of a picture once."""
    data = MultimodalDataset(files, TEXTS, image_size=13)
    captions = [c for text in TEXTS for c in ([text] if isinstance(text, str) else text)]
    counts = Counter()
    for caption in captions:
        counts.update(data.tokenizer(caption, add_special_tokens=False)["input_ids"])
    expected = torch.zeros(len(data.tokenizer))
    for piece, count in counts.items():
        expected[piece] = count / sum(counts.values())
    frequency = data.piece_frequency()
    torch.testing.assert_close(frequency, expected)
    assert frequency.sum().item() == pytest.approx(1)
    assert frequency[data.tokenizer.convert_tokens_to_ids("and")] == pytest.approx(2 / 15)
    part = data.subset([3, 4])  # its own captions, the same ids
    assert part.piece_frequency()[data.tokenizer.convert_tokens_to_ids("and")] == pytest.approx(
        2 / 7
    )
    cut = data.encoded_by(data.tokenizer, 3)  # cut captions: what is cut is not counted
    assert (cut.piece_frequency() > 0).sum() < (expected > 0).sum()


def test_bad_input_is_refused_in_words(files, tmp_path):
    with pytest.raises(ValueError, match="7 image_paths but 6 texts"):
        MultimodalDataset(files, TEXTS[:6])
    with pytest.raises(FileNotFoundError, match=r"gone.png \(row 1\) does not exist"):
        MultimodalDataset([files[0], tmp_path / "gone.png"], ["a", "b"])
    with pytest.raises(ValueError, match="text of row 1 is empty"):
        MultimodalDataset(files[:2], ["a", "  "])
    for nothing in (None, float("nan"), [], [None]):  # what tables give for an empty cell
        with pytest.raises(ValueError, match="text of row 1 is empty or not a string"):
            MultimodalDataset(files[:2], ["a", nothing])
    with pytest.raises(ValueError, match="picture of row 0 is nan; give the path"):
        MultimodalDataset([float("nan"), files[0]], ["a", "b"])
    odd = MultimodalDataset(
        files, TEXTS, transform=lambda picture: torch.zeros(3, 5, picture.width)
    )
    with pytest.raises(ValueError, match=r"gave \(3, 5, 21\) for picture .*1.png \(row 1\)"):
        odd.batch([0, 1])
    with pytest.raises(ValueError, match=r"transform gave Png\w+ for picture .*0.png \(row 0\)"):
        MultimodalDataset(files, TEXTS, transform=lambda picture: picture).batch([0])
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
from mmkit.data import load_batches
from tests.train_small import data_in_files

data = data_in_files(Path(sys.argv[1]), 23)
data.transform = lambda picture: torch.full((3, 223, 227), float(sum(picture.size)))
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
    command = [sys.executable, "-c", NO_SHARED_MEMORY, str(tmp_path / "pictures")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "all batches came\n", done.stderr[-2000:]
