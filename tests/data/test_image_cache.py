"""Cached images are decoded once, correct, complete, and within the size limit."""

import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmkit as mm
from mmkit.data import decoding, image_cache
from tests.conftest import captions, centre_square
from tests.data.seven_images import (
    NAMES,
    OPTIONS,
    SIDE,
    TEXTS,
    by_hand,
    folder,
    lists,
    parquet,
)
from tests.train_small import DEFAULTS

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def decodes(monkeypatch):
    """Names of the images that this process has decoded."""
    names, read = [], decoding.read_square

    def counted(*args, **options):
        names.append(options["name"])
        return read(*args, **options)

    monkeypatch.setattr(decoding, "read_square", counted)
    return names


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(image_cache, "SYNC_BYTES", 2 * 3 * SIDE * SIDE)  # 2, 2, 2, 1 images


def sizes_of(cache):
    """{size of an image in bytes: how many are complete in its cache}."""
    found = {}
    for path in (cache / "images").glob("*.keys"):
        count = path.stat().st_size // 16
        found[path.with_suffix(".rows").stat().st_size // max(1, count)] = count
    return found


def test_an_image_is_decoded_once_wherever_it_lies(root, decodes):
    lists(root, **OPTIONS).cached()
    assert len(decodes) == 7
    folder(root, **OPTIONS).cached()
    parquet(lambda path, name: path.read_bytes())(root, **OPTIONS).cached()
    moved = shutil.move(root, root.parent / "moved")
    data = folder(moved, **OPTIONS).cached()
    assert len(decodes) == 7
    assert torch.equal(data.batch(range(7)).pixel_values, by_hand(moved))
    folder(
        moved, **OPTIONS | dict(image_size=SIDE + 1)
    ).cached()  # another size is decoded separately
    assert len(decodes) == 14


def test_a_changed_image_is_noticed(root, decodes, monkeypatch):
    """Even one of the same length and time of writing, as cp -p and rsync write it."""
    later = time.time_ns() + 10**10  # long after all was written, so that hashes are stored
    monkeypatch.setattr(image_cache.time, "time_ns", lambda: later)
    hashed, content_hash = [], image_cache.content_hash
    monkeypatch.setattr(
        image_cache, "content_hash", lambda *args: hashed.append(args) or content_hash(*args)
    )
    for name in NAMES:
        Image.open(root / name).save(root / f"{name}.bmp")
    paths = [root / f"{name}.bmp" for name in NAMES]
    make = lambda: mm.from_lists(paths, TEXTS, **OPTIONS).cached()  # noqa: E731
    make(), make()
    assert len(decodes) == len(hashed) == 7
    metadata, content = paths[2].stat(), bytearray(paths[2].read_bytes())
    content[60:] = bytes(255 - value for value in content[60:])
    paths[2].write_bytes(content)
    os.utime(paths[2], ns=(metadata.st_atime_ns, metadata.st_mtime_ns))
    assert paths[2].stat().st_size == metadata.st_size
    seen = make().batch([2]).pixel_values[0]
    assert torch.equal(seen, centre_square(Image.open(paths[2]), SIDE))
    assert len(hashed) == 8


def test_a_fill_that_stops_leaves_nothing_half(root, cache, small_chunks, decodes, monkeypatch):
    data, decode = lists(root, **OPTIONS), decoding.ImageDecoder.decode

    def stop(self, row, noise=None):
        if row == 3:
            raise KeyboardInterrupt
        return decode(self, row, noise)

    with monkeypatch.context() as patch:
        patch.setattr(decoding.ImageDecoder, "decode", stop)
        with pytest.raises(KeyboardInterrupt):
            data.cached()
    assert sizes_of(cache) == {3 * SIDE * SIDE: 3} and len(decodes) == 3  # all that were finished
    del decodes[:]
    assert torch.equal(data.cached().batch(range(7)).pixel_values, by_hand(root))
    assert len(decodes) == 4 and sizes_of(cache) == {3 * SIDE * SIDE: 7}


def test_a_fill_that_is_killed_leaves_nothing_half(root, cache, small_chunks):
    """SIGKILL when four images are on the disk, but not yet the keys of the last two."""

    def fill():
        torch.set_num_threads(1)
        fsync, count = os.fsync, [0]

        def killed(number):
            fsync(number)
            count[0] += 1
            if count[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        image_cache.os.fsync = killed
        lists(root, **OPTIONS).cached()

    process = multiprocessing.get_context("fork").Process(target=fill)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    assert sizes_of(cache) == {2 * 3 * SIDE * SIDE: 2}  # two rows for each of two keys
    data = lists(root, **OPTIONS).cached()
    assert torch.equal(data.batch(range(7)).pixel_values, by_hand(root))
    assert sizes_of(cache) == {3 * SIDE * SIDE: 7}


@pytest.mark.parametrize("suffix", [".rows", ".keys"])
def test_a_file_of_the_cache_that_is_cut_off_is_made_anew(root, cache, small_chunks, suffix):
    lists(root, **OPTIONS).cached()
    (path,) = (cache / "images").glob(f"*{suffix}")
    os.truncate(path, path.stat().st_size // 2)
    data = lists(root, **OPTIONS).cached()
    assert torch.equal(data.batch(range(7)).pixel_values, by_hand(root))


def test_two_processes_decode_once(root, cache, small_chunks):
    read, log = decoding.read_square, root / "log"

    def slow(*args, **options):
        time.sleep(0.03)
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {options['name']}\n")
        return read(*args, **options)

    def fill():
        torch.set_num_threads(1)
        decoding.read_square = slow
        data = lists(root, **OPTIONS).cached()
        assert torch.equal(data.batch(range(7)).pixel_values, by_hand(root))

    context = multiprocessing.get_context("fork")
    both = [context.Process(target=fill) for _ in range(2)]
    [process.start() for process in both]
    [process.join(30) for process in both]
    assert [process.exitcode for process in both] == [0, 0]
    assert len(log.read_text().splitlines()) == 7


def test_an_image_that_could_not_be_decoded_once_is_tried_again(root, monkeypatch):
    """A temporary failure of the disk gives neither a cached black image nor a bad row."""
    read, failing = decoding.read_square, [NAMES[4]]

    def sometimes(*args, **options):
        if failing and options["name"].endswith(failing[0]):
            failing.pop()
            raise OSError(5, "Input/output error")
        return read(*args, **options)

    monkeypatch.setattr(decoding, "read_square", sometimes)
    options = OPTIONS | dict(on_error="skip", max_skipped=1.0)
    first = lists(root, **options)
    assert first.report.skipped == {"damaged": 1} and len(first) == 6
    assert "load the data once more" in first.report.examples["damaged"][0]
    again = lists(root, **options)
    assert not again.report.skipped
    assert torch.equal(again.batch(range(7)).pixel_values, by_hand(root))
    failing.append(NAMES[4])
    data = lists(root, **OPTIONS | dict(cache_dir=root / "other"))
    with pytest.raises(RuntimeError, match="could not be decoded before; try again"):
        data.cached()
    assert torch.equal(data.cached().batch(range(7)).pixel_values, by_hand(root))


def test_a_bad_image_in_the_cache_is_left_out_each_time(root, decodes):
    (root / NAMES[1]).write_bytes(b"<html>")
    (root / NAMES[5]).write_bytes((root / NAMES[5]).read_bytes()[:-40])
    options = OPTIONS | dict(on_error="skip", max_skipped=1.0)
    for _ in range(2):
        data = lists(root, **options)
        assert data.report.skipped == {"not an image": 1, "truncated": 1}
        good = [0, 2, 3, 4, 6]
        assert data.resident and data.texts == [TEXTS[i] for i in good]
        (root / NAMES[1]).unlink()  # a missing file is another reason
        (root / NAMES[1]).write_bytes(b"<html>")
        expected = [centre_square(Image.open(root / NAMES[i]), SIDE) for i in good]
        assert torch.equal(data.batch(range(5)).pixel_values, torch.stack(expected))


def test_a_cache_has_its_bound(root, cache):
    bound = 7 * 3 * SIDE * SIDE / 1e9
    data = lists(root, **OPTIONS | dict(cache_gigabytes=0.9 * bound))
    assert "decoded anew in each epoch" in data.prepare() and not data.resident
    with pytest.raises(ValueError, match=r"cannot be cached: .* is more than cache_gigabytes"):
        data.cached(max_gigabytes=0.9 * bound)
    assert not (cache / "images").exists()
    none = lists(root, **OPTIONS | dict(cache_gigabytes=0))
    assert none.prepare() == "" and not none.resident
    data = lists(root, **OPTIONS | dict(cache_gigabytes=1.1 * bound))
    assert "7 images decoded once" in data.prepare() and data.resident


def test_another_order_or_part_decodes_nothing_and_adds_nothing(root, cache, small_chunks, decodes):
    data = lists(root, **OPTIONS).cached()
    before = sizes_of(cache)
    for rows in ([6, 1, 3], [5, 4, 3, 2, 1, 0], [2, 2]):
        part = lists(root, **OPTIONS).subset(rows).cached()
        assert torch.equal(part.batch(range(len(rows))).pixel_values, by_hand(root)[rows])
    assert len(decodes) == len(data) and sizes_of(cache) == before


def test_what_was_not_used_for_longest_goes_first(root, cache):
    """Of three sizes the oldest is removed for a fourth, but none that was used today."""
    sizes = [SIDE, SIDE - 1, SIDE - 2]
    for size in sizes:
        lists(root, **OPTIONS | dict(image_size=size)).cached()
    for days, size in enumerate(reversed(sizes), 2):  # the first is the oldest
        for path in (cache / "images").glob("*.rows"):
            if path.stat().st_size == 7 * 3 * size**2:
                os.utime(path.with_suffix(".keys"), (time.time() - days * 86400,) * 2)
    lists(root, **OPTIONS).cached()  # used again, so no longer the oldest
    four = sum(7 * 3 * size**2 for size in range(SIDE - 3, SIDE + 1))

    def left():
        return sorted(round((size / 3) ** 0.5) for size in sizes_of(cache))

    room = dict(cache_gigabytes=(four - 200) / 1e9)
    lists(root, **OPTIONS | room | dict(image_size=SIDE - 3)).prepare()
    assert left() == [SIDE - 3, SIDE - 2, SIDE]
    tight = dict(cache_gigabytes=7 * 3 * (SIDE + 1) ** 2 / 1e9)
    lists(root, **OPTIONS | tight | dict(image_size=SIDE + 1)).prepare()
    assert left() == [SIDE - 3, SIDE, SIDE + 1]  # two of them are from today


def test_a_cache_begun_anew_is_another_file(root, cache, decodes):
    """More images than the limit: what still reads the old file reads what it read before."""
    data = lists(root, **OPTIONS).cached()
    pixels = pickle.loads(pickle.dumps(data._decoded.pixels))
    assert torch.equal(torch.from_numpy(data._decoded.pixels[[3]]), by_hand(root)[[3]])
    for name in NAMES:
        Image.open(root / name).rotate(180).save(root / f"{name} turned.png")
    paths = [root / f"{name} turned.png" for name in NAMES]
    bound = 8 * 3 * SIDE * SIDE / 1e9
    turned = mm.from_lists(paths, TEXTS, **OPTIONS | dict(cache_gigabytes=bound)).cached(
        max_gigabytes=bound
    )
    assert sizes_of(cache) == {3 * SIDE * SIDE: 7} and len(decodes) == 14
    assert not torch.equal(turned.batch([3]).pixel_values, by_hand(root)[[3]])
    assert torch.equal(data.batch([3]).pixel_values, by_hand(root)[[3]])
    with pytest.raises(FileNotFoundError):  # it had not opened the file, which is gone
        pixels[[3]]


@pytest.mark.parametrize("damage", ["other", "cut", "folder"])
def test_remembered_hashes_that_are_damaged_are_forgotten(
    root, cache, damage, decodes, monkeypatch
):
    later = time.time_ns() + 10**10  # long after all was written, so that hashes are stored
    monkeypatch.setattr(image_cache.time, "time_ns", lambda: later)
    lists(root, **OPTIONS).cached()
    (path,) = cache.glob("*.keys")
    assert path.stat().st_size == 7 * 16
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(b"nothing" * 999 if damage == "other" else path.read_bytes()[:55])
    data = lists(root, **OPTIONS).cached()
    assert len(decodes) == 7
    assert torch.equal(data.batch(range(7)).pixel_values, by_hand(root))


def test_a_cache_that_cannot_be_written_is_said_and_done_without(root, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    options = OPTIONS | dict(cache_dir=tmp_path / "file/cache")
    data = lists(root, **options)
    assert "the cache cannot write" in data.prepare() and not data.resident
    assert torch.equal(data.batch(range(7)).pixel_values, by_hand(root))
    with pytest.raises(ValueError, match=r"cannot be cached: the cache cannot write .*file/cache"):
        data.cached()
    assert lists(root, **options | dict(on_error="skip")).report.loaded == 7

    def full(*_):
        raise OSError(28, "No space left on device")

    data = lists(root, **OPTIONS | dict(cache_dir=tmp_path / "full"))
    monkeypatch.setattr(image_cache.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device\); give cache_dir=.* or cache_gi"):
        data.prepare()
    assert not list((tmp_path / "full/images").glob("*.tmp"))
    assert not list((tmp_path / "full/images").glob(".*"))


def mapped_files() -> int:
    """Bytes of files that are mapped into this process and in its memory."""
    found = re.search(r"RssFile:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))


def test_images_that_are_read_do_not_stay_in_memory(root, cache):
    side = 1600  # 54 MB of decoded images
    data = lists(root, **OPTIONS | dict(image_size=side)).cached()
    before = mapped_files()
    for row in range(7):
        assert data.batch([row]).pixel_values.any()
    assert mapped_files() - before < 3 * side * side
    kept = [np.memmap(path, mode="r") for path in (cache / "images").glob("*.rows")]
    assert (
        sum(int(one.sum()) for one in kept) and mapped_files() - before > 6 * 3 * side * side
    )  # a mapping


def test_a_cached_file_that_is_cut_off_while_in_use_is_said(root, cache):
    data = lists(root, **OPTIONS).cached()
    (path,) = (cache / "images").glob("*.rows")
    assert torch.equal(data.batch([6, 0]).pixel_values, by_hand(root)[[6, 0]])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="was cut off while in use; remove it"):
        data.batch([6])
    again = pickle.loads(pickle.dumps(data._decoded.pixels))[[0]]
    assert torch.equal(torch.from_numpy(again), by_hand(root)[:1])


def test_a_run_is_the_same_with_the_cache_without_it_and_in_memory(tmp_path, make_model):
    """The losses of each step are equal bit for bit."""
    generator = np.random.default_rng(0)
    (tmp_path / "p").mkdir()
    rows = ["image,text"]
    for i, text in enumerate(captions(23)):
        pixels = generator.integers(0, 256, (17, 19, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"p/{i}.png")
        rows += [f"p/{i}.png,{text}", f"p/{i}.png,again {text}"]
    (tmp_path / "pairs.csv").write_text("\n".join(rows))
    losses = {}
    for name, options, workers in (
        ("cached", {}, 0),
        ("anew", dict(cache_gigabytes=0), 2),
        ("memory", dict(device="cpu"), 0),
    ):
        data = mm.from_table(tmp_path / "pairs.csv", image_size=15, **options)
        values = dict(output_dir=str(tmp_path), run_name=name, num_epochs=2, num_workers=workers)
        run = mm.train_model(mm.TrainingConfig(**DEFAULTS | values), data, None, make_model())
        losses[name] = run.curve("loss")[1]
        assert data.resident == (name != "anew")
    assert len(losses["cached"]) == 6
    assert losses["cached"] == losses["anew"] == losses["memory"]


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
