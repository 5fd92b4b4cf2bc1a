"""Names stand for shards, every sample is a row, and an index is read once per shard."""

import time

import numpy as np
import pytest

from mmkit.data.shard_index import expand_urls, read_index
from mmkit.data.shards import TarMembers
from mmkit.errors import Refused
from tests.data.tars import image, member, pair, reasons, write_tar

pytestmark = pytest.mark.usefixtures("cache")


def test_names_stand_for_shards(make_shards, tmp_path):
    """A file, a folder, a glob, braces and several of them: the same shards, in order."""
    folder = make_shards(2, 1, 3)
    all_three = [f"{folder}/{i:05d}.tar" for i in range(3)]
    assert expand_urls(folder) == expand_urls(str(folder)) == all_three
    assert expand_urls(f"{folder}/*.tar") == expand_urls(f"{folder}/{{00000..00002}}.tar")
    assert expand_urls([folder / "00002.tar", f"{folder}/0000[01].tar"]) == [
        all_three[2],
        *all_three[:2],
    ]
    assert expand_urls("s3://x/{a,b}.tar") == ["s3://x/a.tar", "s3://x/b.tar"]
    assert expand_urls(f"file://{folder}/0000[02].tar") == [
        f"file://{folder}/00000.tar",
        f"file://{folder}/00002.tar",
    ]
    odd = write_tar(tmp_path / "{a}[b].tar", pair("0"))
    assert expand_urls(odd) == [str(odd)]


@pytest.mark.parametrize(
    "name, says",
    [
        ("none.tar", "no file .*none.tar"),
        ("none/*.tar", "no file fits .*none/"),
        ("set/{00000..00001}.tar", r"no file .*00001\.tar \(of .*\{00000"),
        ("empty", "folder .*empty has no shards"),
        ("unbalanced{.tar", "no file"),
        ("file:///nowhere/*.tar", "no file fits file:///nowhere"),
    ],
)
def test_what_is_not_there_is_said(make_shards, tmp_path, monkeypatch, name, says):
    make_shards(1)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=says):
        expand_urls(name)


def test_no_shard_and_a_shard_twice_are_refused(make_shards):
    folder = make_shards(1, 1)
    with pytest.raises(ValueError, match="no shard is named"):
        expand_urls([])
    with pytest.raises(ValueError, match=r"00001\.tar is named twice"):
        expand_urls([folder, folder / "00001.tar"])
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        expand_urls("/dev/zero")


def test_every_sample_is_a_row(make_shards):
    folder = make_shards(5, 1, 3)
    index = read_index(folder)
    assert len(index) == 9 and index.refused == []
    assert index.captions == [[f"caption {i}"] for i in range(9)]
    assert index.shard.tolist() == [0] * 5 + [1] + [2] * 3
    assert index.keys[5] == f"{folder}/00001.tar: 000005.jpg"
    assert (index.shard.dtype, index.offset.dtype, index.size.dtype) == (
        np.int32,
        np.int64,
        np.int64,
    )
    store = TarMembers(index)
    assert len(store) == 9 and store.name(5) == index.keys[5]
    assert [store.open(i).read() for i in range(9)] == [image(i) for i in range(9)]


def test_an_index_is_read_from_the_cache_until_the_shard_changes(make_shards, cache, monkeypatch):
    folder = make_shards(3, 2)
    first = read_index(folder)
    files = list((cache / "shards").iterdir())
    assert len(files) == 2 and {f.suffix for f in files} == {".json"}
    scanned = []

    def scan(*arguments):
        scanned.append(1)
        return scan_tar(*arguments)

    from mmkit.data import shard_index

    scan_tar = shard_index.scan_tar
    monkeypatch.setattr(shard_index, "scan_tar", scan)
    again = read_index(folder)
    assert not scanned and again.keys == first.keys and again.captions == first.captions
    assert np.array_equal(again.offset, first.offset) and again.shards == first.shards
    read_index(folder, text="json.caption")
    assert len(scanned) == 2  # other suffixes
    for damaged in (b"", b"00000000\n", files[0].read_bytes()[:-7], b"\xff" * 99):
        files[0].write_bytes(damaged)
        assert read_index(folder).captions == first.captions
    assert len(scanned) == 6
    write_tar(folder / "00001.tar", pair("new", caption="another"))
    assert read_index(folder).captions[3:] == [["another"]] and len(scanned) == 7


def test_what_is_refused_is_kept_in_the_cache_too(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*pair("0"), member("1.txt", b"x")])
    first, again = read_index(path), read_index(path)
    assert [str(r) for r in first.refused] == [str(r) for r in again.refused]
    assert isinstance(again.refused[0], Refused) and reasons(again) == ["no image"]


@pytest.mark.slow
def test_fifty_thousand_samples_are_indexed_in_seconds(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for i in range(50_000) for m in pair(f"{i:09d}")])
    start = time.perf_counter()
    assert len(read_index(path)) == 50_000
    first = time.perf_counter() - start
    start = time.perf_counter()
    assert len(read_index(path)) == 50_000
    assert first < 10 and time.perf_counter() - start < first / 2
