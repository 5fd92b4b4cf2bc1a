"""Images in shards are read by any process, once an epoch, and written to be read back."""

import json
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmkit import from_shards, split
from mmkit.data import shards as module
from mmkit.data.shard_index import read_index
from mmkit.data.shards import TarMembers, shard_order, write_shards
from mmkit.errors import Refused
from tests.data.hypothesis_settings import FEW
from tests.data.tars import image, member, pair, write_tar

pytestmark = pytest.mark.usefixtures("cache")

# -- the store -------------------------------------------------------------------------------


def test_a_store_can_be_pickled_and_keeps_few_files_open(make_shards, monkeypatch):
    folder = make_shards(*[1] * 9)
    monkeypatch.setattr(module, "OPEN_SHARDS", 3)

    def open_files() -> int:
        links = [f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd")]
        return sum(os.path.exists(n) and os.readlink(n).endswith(".tar") for n in links)

    store = TarMembers(read_index(folder))
    assert open_files() == 0
    for i in [*range(9), *range(9)]:
        assert store.open(i).read() == image(i) and open_files() <= 3
    assert open_files() == 3
    copy = pickle.loads(pickle.dumps(store))
    assert open_files() == 3
    assert copy.open(8).read() == image(8) and copy.name(8) == store.name(8)


def test_threads_that_share_a_store_read_their_own_images(make_shards, monkeypatch):
    """A file is closed when it is evicted, but not while somebody reads it."""
    folder = make_shards(*[3] * 8)
    monkeypatch.setattr(module, "OPEN_SHARDS", 1)
    store, wrong = TarMembers(read_index(folder)), []

    def read(start: int) -> None:
        for i in [(start + 7 * k) % 24 for k in range(400)]:
            if store.open(i).read() != image(i):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_large_image_is_refused_before_it_is_read(tmp_path):
    members = [member("0.jpg", b"x" * 5000), member("0.txt", b"x"), *pair("1", 1)]
    store = TarMembers(read_index(write_tar(tmp_path / "a.tar", members)), max_bytes=4999)
    with pytest.raises(Refused, match=r"a\.tar: 0\.jpg has 5,000 bytes, more than max_bytes=4,999"):
        store.open(0)
    assert store.open(1).read() == image(1)


def test_a_shard_that_changed_or_went_is_said(make_shards):
    folder = make_shards(3, 2)
    index = read_index(folder)
    store = TarMembers(index)
    store.open(2)
    os.truncate(folder / "00000.tar", 600)  # while it is open
    with pytest.raises(Refused, match=r"00000\.tar: 000002\.jpg: the shard ends before byte"):
        store.open(2)
    with pytest.raises(Refused, match=r"00000\.tar has changed"):
        TarMembers(index).open(0)
    os.utime(folder / "00001.tar", (1, 1))
    with pytest.raises(Refused, match=r"00001\.tar has changed"):
        store.open(3)
    (folder / "00001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001\.tar is gone"):
        store.open(4)


def test_an_address_that_gives_another_shard_than_before_is_noticed(
    make_shards, tmp_path, cache, serve
):
    folder = make_shards(1, 20)
    (tmp_path / "now.tar").write_bytes((folder / "00000.tar").read_bytes())
    index = read_index(f"{serve.url}/now.tar")
    (tmp_path / "now.tar").write_bytes((folder / "00001.tar").read_bytes())
    for path in (cache / "spool").glob("*.tar"):
        path.unlink()
    with pytest.raises(Refused, match=r"bytes and had .* when it was indexed; remove the folders"):
        TarMembers(index).open(0)


# -- the order of an epoch -------------------------------------------------------------------

ORDERS = dict(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any),
    lanes=st.integers(1, 20),
    seed=st.integers(0, 99),
    data=st.data(),
)


def order_of(counts, steps, seed=0, epoch=0, lanes=16) -> tuple[list, torch.Tensor]:
    shard = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    noise = torch.rand(len(shard), generator=torch.Generator().manual_seed(seed + epoch))
    return shard_order(noise, shard, steps, seed, epoch, lanes), shard


@FEW
@given(**ORDERS)
def test_an_epoch_has_every_row_once_in_equal_batches(counts, lanes, seed, data):
    steps = data.draw(st.integers(1, sum(counts)))
    batches, _ = order_of(counts, steps, seed, 0, lanes)
    assert sorted(torch.cat(batches).tolist()) == list(range(sum(counts)))
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == steps and max(sizes) - min(sizes) <= 1
    again, _ = order_of(counts, steps, seed, 0, lanes)
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_an_epoch_is_what_its_description_says():
    """Against the description, carried out row by row."""
    from mmkit.noise import mask_noise

    counts, steps, lanes = [5, 3, 0, 7, 2, 11], 5, 3
    batches, shard = order_of(counts, steps, seed=4, epoch=2, lanes=lanes)
    noise = torch.rand(28, generator=torch.Generator().manual_seed(6)).tolist()
    numbers = [0, 1, 3, 4, 5]  # shard 2 has no row
    draws = mask_noise(4, 2, torch.tensor(numbers), 1, "shards")[:, 0].tolist()
    dealt = [number for _, number in sorted(zip(draws, numbers, strict=True))]
    queued = []
    for lane in range(lanes):
        queue = []
        for number in dealt[lane::lanes]:
            rows = [row for row in range(28) if shard[row] == number]
            queue += sorted(rows, key=lambda row: noise[row])
        queued += [((p + 0.5) / len(queue), lane, row) for p, row in enumerate(queue)]
    queued.sort()
    for batch, part in zip(batches, np.array_split(np.arange(28), steps), strict=True):
        assert batch.tolist() == [row for _, _, row in sorted(
            (queued[i] for i in part), key=lambda entry: entry[1]
        )]  # fmt: skip


def test_epochs_and_seeds_differ():
    first, _ = order_of([9] * 40, 10)
    for options in (dict(epoch=1), dict(seed=1)):
        other, _ = order_of([9] * 40, 10, **options)
        assert not torch.equal(torch.cat(first), torch.cat(other))
    noise, shard = torch.linspace(0, 0.99, 360), torch.arange(360) // 9
    shards = [shard[shard_order(noise, shard, 10, 0, epoch)[0]].unique() for epoch in (0, 1)]
    assert not torch.equal(*shards)  # for the same noise, too


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("counts", [[50] * 64, [10 + 7 * (i % 13) for i in range(64)]])
def test_a_process_reads_its_own_shards(processes, counts):
    """Its part of every batch comes from few shards; every batch mixes many."""
    batches, shard = order_of(counts, sum(counts) // 64)
    for rank in range(processes):
        rows = torch.cat([batch.tensor_split(processes)[rank] for batch in batches])
        assert len(shard[rows].unique()) / 64 <= 1 / processes + 2 / 16  # two lanes are shared
    assert min(len(shard[batch].unique()) for batch in batches) >= 14
    # At any time a process reads one shard of each of its lanes, or two where one has ended.
    for rank in range(processes):
        fraction = [batch.tensor_split(processes)[rank] for batch in batches]
        assert np.mean([len(shard[rows].unique()) for rows in fraction]) <= 16 / processes + 3


def test_an_impossible_order_is_refused():
    noise, shard = torch.rand(7), torch.zeros(7)
    for steps in (0, 8):
        with pytest.raises(ValueError, match=f"steps={steps} must be 1 to 7"):
            shard_order(noise, shard, steps, 0, 0)
    with pytest.raises(ValueError, match=r"noise \(6,\) and shard \(7,\)"):
        shard_order(noise[1:], shard, 2, 0, 0)
    with pytest.raises(ValueError, match="lanes=0"):
        shard_order(noise, shard, 2, 0, 0, lanes=0)


class _Images(Dataset):
    def __init__(self, store):
        self.store = store

    def __getitem__(self, rows) -> list[bytes]:
        return [self.store.open(row).read() for row in rows]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_ranks_and_workers_see_every_sample_once_also_after_a_resume(make_shards, workers):
    """The parts of two ranks, read by worker processes, from the start and from the middle."""
    counts = [5, 9, 2, 7, 1, 6]
    index = read_index(make_shards(*counts))
    noise = torch.rand(30, generator=torch.Generator().manual_seed(1))

    def read(rank: int, ranks: int, first: int) -> list:
        batches = shard_order(noise, index.shard, 7, seed=3, epoch=1, lanes=4)
        fraction = [batch.tensor_split(ranks)[rank] for batch in batches[first:]]
        view = _Images(TarMembers(index))
        return list(DataLoader(view, sampler=fraction, batch_size=None, num_workers=workers))

    whole = read(0, 1, 0)
    samples = [sample for batch in whole for sample in batch]
    assert sorted(samples) == sorted(image(i) for i in range(30))
    assert read(0, 1, 3) == whole[3:]
    both = [a + b for a, b in zip(read(0, 2, 0), read(1, 2, 0), strict=True)]
    assert both == whole


# -- writing ---------------------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit(real, tmp_path):
    shards = write_shards(real, tmp_path / "50%: out", samples_per_shard=3)
    assert [path.name for path in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert sorted((tmp_path / "50%: out").iterdir()) == shards
    index = read_index(tmp_path / "50%: out", text=("txt", "json.caption"))
    assert index.captions == real.texts and index.refused == []
    assert index.shard.tolist() == [0, 0, 0, 1, 1, 1, 2]
    names = [key.partition(".tar: ")[2] for key in index.keys]
    suffixes = ["png", "jpg", "webp", "gif", "bmp", "tif", "ppm"]
    assert names == [f"{i:09d}.{suffix}" for i, suffix in enumerate(suffixes)]
    store = TarMembers(index)
    for row in range(7):
        assert store.open(row).read() == Path(real.image_name(row)).read_bytes()
    again = write_shards(real, tmp_path / "again", samples_per_shard=3)
    assert [a.read_bytes() for a in again] == [s.read_bytes() for s in shards]


def test_decoded_images_and_subsets_are_written_too(make_data, tmp_path):
    data = make_data(11, size=15)
    part = data.subset([7, 2, 5])
    index = read_index(write_shards(part, tmp_path / "out"))
    assert index.captions == part.texts
    assert [key[-13:] for key in index.keys] == [f"{i:09d}.png" for i in (7, 2, 5)]
    store = TarMembers(index)
    for row in range(3):
        pixels = np.asarray(Image.open(store.open(row)))
        assert np.array_equal(pixels, part[row]["image"].permute(1, 2, 0).numpy())


def test_webdataset_reads_what_is_written(real, tmp_path):
    import webdataset

    shards = write_shards(real, tmp_path / "out", samples_per_shard=4)
    read = webdataset.WebDataset([str(p) for p in shards], shardshuffle=False, empty_check=False)
    samples = list(read)
    assert [int(sample["__key__"]) for sample in samples] == list(range(7))
    for row, sample in enumerate(samples):
        metadata = json.loads(sample.get("json", "{}"))
        text = metadata["caption"] if metadata else [sample["txt"].decode()]
        assert text == real.texts[row]
        assert Path(real.image_name(row)).read_bytes() in sample.values()


def test_what_webdataset_writes_is_read(tmp_path):
    """Samples in folders, JSON beside the captions, compressed, as in shards of img2dataset."""
    import webdataset

    for suffix in ("tar", "tar.gz"):
        pattern = str(tmp_path / f"%03d.{suffix}")
        with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as writer:
            for i in range(7):
                metadata = {"caption": f"c{i}", "url": "https://x.org"}
                sample = {
                    "__key__": f"d/{i:05d}",
                    "jpg": image(i),
                    "txt": f"t{i}",
                    "json": metadata,
                }
                writer.write(sample)
        index = read_index(f"{tmp_path}/*.{suffix}", text=("txt", "json.caption"))
        assert index.captions == [[f"t{i}", f"c{i}"] for i in range(7)] and index.refused == []
        store = TarMembers(index)
        assert [store.open(i).read() for i in range(7)] == [image(i) for i in range(7)]


def same_rows(one, other):
    """The same batch, ids and metadata; groups join the same rows, whatever their numbers."""
    a, b = (data.batch(range(len(data))) for data in (one, other))
    for name in ("pixel_values", "input_ids", "valid", "sample_ids"):
        assert getattr(a, name).equal(getattr(b, name)), name
    assert torch.equal(a.correct(), b.correct()) and one.texts == other.texts
    assert one.fingerprint() == other.fingerprint()
    metadata = [{k: v for k, v in row.items() if k != "key"} for row in other.meta]
    assert metadata == one.meta


def test_ids_and_metadata_come_back_and_so_do_the_parts(by_artists, tmp_path):
    """Of a subset, whose ids have gaps, and of the whole; written again from what was read back."""
    options: dict = dict(meta=["artist", "year", "tags"], image_size=11)
    parts = split(by_artists, 0.2, 0.2, by="artist")
    train = parts[0]
    ids = train.sample_ids.tolist()
    assert ids != list(range(len(train)))
    shards = write_shards(train, tmp_path / "train", samples_per_shard=9)
    tokenizer = train.tokenizer
    back = from_shards(tmp_path / "train", tokenizer=tokenizer, **options)
    same_rows(train, back)
    for text in ("txt", "json.caption"):  # a part of the captions, the same ids
        some = from_shards(tmp_path / "train", text=text, on_error="skip", max_skipped=1.0)
        assert set(some.sample_ids.tolist()) < set(ids) or text == "txt"
        assert [some.texts[i][0].split()[-1] for i in range(len(some))] == [
            str(number) for number in some.sample_ids.tolist()
        ]
    again = write_shards(back, tmp_path / "again", samples_per_shard=9)
    assert [a.read_bytes() for a in again] == [s.read_bytes() for s in shards]
    write_shards(by_artists, tmp_path / "whole")
    whole = from_shards(tmp_path / "whole", tokenizer=by_artists.tokenizer, **options)
    same_rows(by_artists, whole)
    for mine, theirs in zip(parts, split(whole, 0.2, 0.2, by="artist"), strict=True):
        assert mine.sample_ids.equal(theirs.sample_ids) and mine.texts == theirs.texts


@pytest.mark.parametrize(
    "metadata, says",
    [
        ({"day": (1, 2)}, r"meta of row 1, 'day': '\(1, 2\)' \(tuple\) would not come back"),
        ({"size": float("nan")}, "'size': 'nan' .float."),
        ({"size": np.int64(3)}, "'size': '3' .int64. .* a string or a number"),
        ({3: "x"}, "meta of row 1, 3: 'x'"),
        ({"caption": "x"}, "key 'caption', which has another meaning in shards"),
        ({"mmkit_sample_id": 5}, "key 'mmkit_sample_id'"),
    ],
)
def test_metadata_that_would_not_come_back_are_refused(real, tmp_path, metadata, says):
    real.meta[1] = metadata
    with pytest.raises(ValueError, match=says):
        write_shards(real, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_shards_are_not_written_over_unless_asked_for(real, tmp_path):
    out = tmp_path / "out"
    write_shards(real, out, samples_per_shard=2)
    with pytest.raises(FileExistsError, match="has 4 shards; choose another folder, or overwrite"):
        write_shards(real, out)
    assert len(write_shards(real, out, overwrite=True)) == 1
    assert [path.name for path in out.iterdir()] == ["00000.tar"]
    (out / "mine.tar").touch()
    with pytest.raises(FileExistsError, match=r"other shards \(mine\.tar\)"):
        write_shards(real, out, overwrite=True)


def test_a_failure_leaves_the_folder_as_it_was(real, tmp_path):
    """With an unreadable image in the middle no shard appears, and earlier ones are kept."""
    out = tmp_path / "out"
    write_shards(real, out, samples_per_shard=2)
    before = {path: path.read_bytes() for path in out.iterdir()}
    Path(real.image_name(5)).write_bytes(b"no image")
    with pytest.raises(ValueError, match="image of row 5 cannot be read"):
        write_shards(real, out, samples_per_shard=2, overwrite=True)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    Image.new("RGB", (5, 7)).save(real.image_name(5), "JPEG2000")
    with pytest.raises(ValueError, match=r"row 5 is JPEG2000.* save it as one of JPEG"):
        write_shards(real, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(ValueError, match="a sample id occurs twice"):
        write_shards(real.subset([1, 1]), tmp_path / "new")
    with pytest.raises(ValueError, match="samples_per_shard=0"):
        write_shards(real, tmp_path / "new", samples_per_shard=0)
