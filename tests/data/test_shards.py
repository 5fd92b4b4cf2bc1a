"""Tar shards: every sample is read exactly once, and a hostile tar does no harm."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import tarfile
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mmkit import MultimodalDataset, from_shards, from_table, split
from mmkit.data import shards as module
from mmkit.data.shard_index import expand_urls, read_index
from mmkit.data.shards import TarMembers, shard_order, write_shards
from mmkit.data.spool import Spool
from mmkit.data.tar_index import split_name
from mmkit.errors import Refused

FEW = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMKIT_CACHE", str(folder))
    return folder


def image(i: int) -> bytes:
    """Not a real image, since nothing here decodes; the tests of `write_shards` have real ones."""
    return b"image %d " % i * (i % 7 + 1)


def member(name: str, data: bytes = b"", **metadata) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in metadata.items():
        setattr(info, key, value)
    return info, data


def pair(key: str, i: int = 0, caption: str = "a cat") -> list:
    return [member(f"{key}.jpg", image(i)), member(f"{key}.txt", caption.encode())]


def write_tar(path: Path, members: list, **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def make_shards(tmp_path):
    """Shards of the given numbers of samples; sample i is `image(i)`, "caption i"."""

    def make(*counts: int, folder: str = "set") -> Path:
        (tmp_path / folder).mkdir()
        i = 0
        for number, count in enumerate(counts):
            members = []
            for i in range(i, i + count):  # noqa: B020
                members += pair(f"{i:06d}", i, f"caption {i}")
            i += 1
            write_tar(tmp_path / folder / f"{number:05d}.tar", members)
        return tmp_path / folder

    return make


def reasons(index) -> list[str]:
    return [refused.reason for refused in index.refused]


# -- which shards ----------------------------------------------------------------------------


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
    assert expand_urls("pipe:cat {a,b}.tar") == ["pipe:cat a.tar", "pipe:cat b.tar"]
    assert expand_urls(r"pipe:sed 's/\.//' x.tar") == [r"pipe:sed 's/\.//' x.tar"]
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
        ("http://x.org/0.tar", "pipe:curl"),
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


# -- the index -------------------------------------------------------------------------------


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


def test_the_limit_of_a_header_is_for_one_member_not_for_all(make_shards):
    assert len(read_index(make_shards(200))) == 200


@FEW
@given(st.text("ab./_", max_size=9))
def test_names_are_split_as_webdataset_splits_them(name):
    """Except for hidden files, which belong to no sample."""
    from webdataset.tariterators import base_plus_ext

    ours, theirs = split_name(name), base_plus_ext(name)
    if ours is not None:
        assert ours == theirs
    elif theirs[0] is not None:
        assert name.rpartition("/")[2].startswith(".") or name.endswith(".")


def test_captions_come_from_the_members_named(tmp_path):
    """txt, a key of a JSON object (a string or a list), or several of these, in that order."""

    def metadata(value) -> bytes:
        return json.dumps({"caption": value, "other": "no"}).encode()

    path = write_tar(
        tmp_path / "a.tar",
        [
            *pair("0", caption="zero\n"),
            member("0.json", metadata("0")),
            *pair("1", caption="one"),
            member("1.JSON", metadata(["1", "eins"])),
            *pair("2", caption="two"),
            member("2.json", metadata(None)),
            *pair("3", caption="three"),
            member("3.json", metadata(3)),
            member("4.jpg", image(4)),
            member("4.json", b'["caption"]'),
        ],
    )
    index = read_index(path)
    assert index.captions == [["zero\n"], ["one"], ["two"], ["three"]]
    assert reasons(index) == ["no caption"]
    index = read_index(path, text="json.caption")
    assert index.captions == [["0"], ["1", "eins"]]
    assert reasons(index) == ["no caption", "caption not readable", "no caption"]
    index = read_index(path, text=("txt", "json.other"))
    assert index.captions[:3] == [["zero\n", "no"], ["one", "no"], ["two", "no"]]
    with pytest.raises(ValueError, match="at least one suffix"):
        read_index(path, text=())


def test_the_image_is_the_first_suffix_that_is_there(tmp_path):
    members = [member("0.png", b"png"), member("0.seg.png", b"seg"), *pair("0"), member("0.cls")]
    index = read_index(write_tar(tmp_path / "a.tar", members))
    assert index.keys[0].endswith("0.jpg") and index.refused == []
    index = read_index(tmp_path / "a.tar", image=("seg.png", "jpg"))
    assert TarMembers(index).open(0).read() == b"seg"


def test_metadata_are_keys_of_the_json(tmp_path):
    """The requested keys, unchanged; a .json that is not requested may have any content."""
    path = write_tar(
        tmp_path / "a.tar",
        [
            *pair("0"),
            member("0.json", b'{"caption": "x", "artist": "A", "size": [3, 5], "note": null}'),
            *pair("1"),
            member("1.json", b'{"artist": "B", "mmkit_sample_id": true}'),
            *pair("2"),
            *pair("3"),
            member("3.json", b'{"mmkit_sample_id": 41}'),
            *pair("4"),
            member("4.json", b"{"),
            *pair("5"),
            member("5.json", b'["mmkit_sample_id"]'),
            *pair("6"),
            member("6.json", b'{"artist":' + b"[" * 90_000 + b"]" * 90_000 + b"}"),
            *pair("7"),
            member("7.json", type=tarfile.SYMTYPE, linkname="0.json"),
        ],
    )
    plain = read_index(path)
    assert len(plain) == 8 and plain.refused == [] and plain.meta == [{}] * 8
    assert plain.ids == [None] * 3 + [41] + [None] * 4
    index = read_index(path, meta=["artist", "note", "size"])
    assert index.meta == [{"artist": "A", "note": None, "size": [3, 5]}, {"artist": "B"}, {}, {}]
    assert index.ids == [None] * 3 + [41] and index.fields == ["caption", "artist", "size", "note"]
    assert reasons(index) == [*["metadata not readable"] * 3, "not a file"]
    assert "not an object with keys" in str(index.refused[1])
    again = read_index(path, meta=["artist", "note", "size"])
    assert (again.meta, again.ids, again.fields) == (index.meta, index.ids, index.fields)


@pytest.mark.parametrize("depth", [*range(300, 1000, 23), 5000, 40_000])
def test_metadata_may_be_deep_but_not_too_deep_to_be_kept(tmp_path, depth):
    """Metadata fit the index on the disk, or are refused."""
    metadata = b'{"artist":' + b"[" * depth + b"]" * depth + b"}"
    path = write_tar(tmp_path / "a.tar", [*pair("0"), member("0.json", metadata), *pair("1")])
    for _ in range(2):
        index = read_index(path, meta=["artist"])
        assert len(index) + len(index.refused) == 2
    assert depth < 40_000 or reasons(index) == ["metadata not readable"]


def _refused_samples() -> list:
    """(reason, members of one sample) of each kind, named r0, r1, …"""
    link = dict(type=tarfile.SYMTYPE, linkname="/etc/passwd")
    deep = b'{"caption":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    samples: list = [
        ("no image", [member("r0.txt", b"x"), member("r0.pkl")]),
        ("no caption", [member("r1.jpg", b"x")]),
        ("hostile name", pair("../r2")),
        ("hostile name", pair("/tmp/r3")),
        ("hostile name", pair("a/../../r4")),
        ("hostile name", pair("r5\n\x1b[2J")),
        ("hostile name", [member("r6.jpg", pax_headers={"path": "r6\x00b.jpg"})]),
        ("not a file", [member("r7.jpg", **link), member("r7.txt", b"x")]),
        ("not a file", [member("r8.jpg", type=tarfile.LNKTYPE, linkname="r0.jpg")]),
        ("not a file", [member("r9.jpg", type=tarfile.CHRTYPE), member("r9.txt", b"x")]),
        ("two samples of one name", [*pair("s0"), *pair("s0")]),
        ("caption too long", [member("s1.jpg", b"x"), member("s1.txt", b"x" * 1_000_001)]),
        ("caption not readable", [member("s2.jpg", b"x"), member("s2.txt", b"\xff\xfe")]),
        ("caption not readable", [member("s3.jpg", b"x"), member("s3.json", deep)]),
        ("caption not readable", [member("s4.jpg", b"x"), member("s4.json", b"{")]),
        ("caption not readable", [member("s5.jpg"), member("s5.json", b'{"caption": "\\ud800"}')]),
    ]
    return samples


def test_what_cannot_be_used_is_refused_with_its_reason(tmp_path, monkeypatch):
    """Each between two good samples, which are kept; nothing is written anywhere."""
    members, expected = [], []
    for i, (reason, sample) in enumerate(_refused_samples()):
        members += [*pair(f"good{i}"), *sample]
        expected.append(reason)
    members += [*pair("good0"), member("folder.tar", type=tarfile.DIRTYPE)]
    (tmp_path / "here").mkdir()
    path = write_tar(tmp_path / "here" / "a.tar", members, format=tarfile.PAX_FORMAT)
    before = sorted(tmp_path.rglob("*"))
    index = read_index(path, text=("txt", "json.caption"))
    assert reasons(index) == [*expected, "two samples of one name"]
    assert index.captions == [["a cat"]] * len(expected)
    assert all(str(refused).startswith(f"{path}: ") for refused in index.refused)
    assert not any(set(str(r)) & set("\n\x00\x1b") for r in index.refused)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_unpickled(tmp_path):
    """webdataset's `decode()` would: a .pyd or .pth member can run any code there."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    trap = pickle.dumps(Trap())
    names = ("pkl", "pyd", "pickle", "pth", "pt", "npy", "npz", "txt.pyd")
    members = [*pair("0"), *(member(f"0.{name}", trap) for name in names)]
    index = read_index(write_tar(tmp_path / "a.tar", members), text=("txt", "json.caption"))
    assert len(index) == 1 and index.refused == []
    TarMembers(index).open(0).read()
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)  # the trap works
    assert (tmp_path / "sprung").exists()


# -- damaged tars ----------------------------------------------------------------------------


def test_of_a_tar_cut_off_anywhere_what_is_whole_is_kept(tmp_path):
    """One refusal says that there was more."""
    count, whole = 4, tmp_path / "whole.tar"
    write_tar(whole, [m for i in range(count) for m in pair(f"{i}", i)])
    data = whole.read_bytes()
    with tarfile.open(whole) as tar:
        ends = [m.offset_data + m.size for m in tar if m.name.endswith(".txt")]
        after = tar.offset
    for length in range(512, len(data), 97):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        index = read_index(tmp_path / "cut.tar")
        assert len(index) == sum(end <= length for end in ends), length
        assert reasons(index) == (["truncated shard"] if length < after + 512 else []), length
        assert [TarMembers(index).open(i).read() for i in range(len(index))] == [
            image(i) for i in range(len(index))
        ]
    (tmp_path / "cut.tar").write_bytes(data[:2000])
    message = str(read_index(tmp_path / "cut.tar").refused[0])
    assert "cut.tar: the tar is cut off after 2,000 bytes; the samples before that (1)" in message


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    """tarfile takes it for the end: two samples would be lost silently."""
    path = write_tar(tmp_path / "a.tar", [m for i in range(4) for m in pair(f"{i}", i)])
    data = bytearray(path.read_bytes())
    data[4 * 1024 + 100] ^= 1  # in the header of the third sample's image
    path.write_bytes(data)
    index = read_index(path)
    assert len(index) == 2 and reasons(index) == ["damaged shard"]
    joined = tmp_path / "joined.tar"  # two tars in one file: only the first is read
    write_tar(joined, pair("0"))
    joined.write_bytes(joined.read_bytes() * 2)
    assert len(read_index(joined)) == 1 and reasons(read_index(joined)) == ["damaged shard"]


@pytest.mark.parametrize(
    "data, says",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>404</html>" * 99, "a web page"),
        (b"PK\x03\x04" * 999, "it begins b'PK"),
        (bytes(20_000), "no members"),
        (gzip.compress(b"no tar" * 999), "it begins b'no tar"),
        (gzip.compress(bytes(99))[:-9], "gzip data"),
        (b"\x1f\x8bnothing", "gzip data"),
    ],
)
def test_what_is_no_tar_is_said_in_words(tmp_path, data, says):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"shard .*a\.tar: .*{says}|shard .*a\.tar.*{says}"):
        read_index(tmp_path / "a.tar")


def _header(name: str, size: bytes, kind: bytes) -> bytes:
    """A header with a right check sum, whatever its content."""
    info = tarfile.TarInfo(name)
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"S", b"0"])
@pytest.mark.parametrize(
    "size", [b"00037777777\0", b"77777777777\0", b"\xff" * 10 + b"\xfe\x00", b"\x80" + b"\xff" * 11]
)
def test_absurd_sizes_cost_no_memory(tmp_path, kind, size):
    """8 MB to 10²⁶ bytes of header, or a negative size, in a file that claims to have 4 GB."""
    path = write_tar(tmp_path / "a.tar", pair("0"))
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    with path.open("r+b") as file:
        file.seek(end)
        file.write(_header("bad.jpg", size, kind))
        file.truncate(4_000_000_000)  # a hole, which takes no disk space
    tracemalloc.start()
    try:
        index = read_index(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4_000_000
    assert len(index) == 1 and 1 <= len(index.refused) <= (2 if kind == b"S" else 1)


def test_sparse_members_and_endless_lists_of_holes_are_refused(tmp_path):
    """A sparse member's bytes are not its content; a list of holes is not read to its end."""
    records = b"".join(
        b"%d %s\n" % (len(r) + 4, r)
        for r in (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=9")
    )
    for holes, reason in ((b"1\n0\n9\n", "not a file"), (b"9" * 9 + b"\n", "damaged shard")):
        content = (holes + b"0\n" * (500_000 if reason == "damaged shard" else 0)).ljust(512, b"\0")
        path = write_tar(tmp_path / "a.tar", pair("0"))
        with tarfile.open(path) as tar:
            tar.getmembers()
            start = path.read_bytes()[: tar.offset]
        pax = _header("pax", b"%011o\0" % len(records), b"x") + records.ljust(512, b"\0")
        sparse = _header("1.jpg", b"%011o\0" % len(content), b"0") + content
        path.write_bytes(start + pax + sparse + bytes(-len(content) % 512 + 10_240))
        index = read_index(path)
        assert len(index) == 1 and reasons(index) == [reason]


@pytest.fixture(scope="module")
def good_tar(tmp_path_factory) -> bytes:
    """A tar with special members: long names, pax records, JSON, a link, a folder."""
    members = [
        *pair("0"),
        member("d", type=tarfile.DIRTYPE),
        *pair("d/" + "long" * 40, 3),
        member("2.png", image(2), pax_headers={"path": "2.png", "note": "n" * 99}),
        member("2.json", b'{"caption": ["two", "zwei"]}'),
        member("3.jpg", type=tarfile.SYMTYPE, linkname="0.jpg"),
        *pair("4", 4),
    ]
    path = tmp_path_factory.mktemp("good") / "a.tar"
    return write_tar(path, members, format=tarfile.PAX_FORMAT).read_bytes()


@FEW
@given(data=st.data())
def test_no_bytes_do_harm(tmp_path, cache, good_tar, data):
    """Random bytes, tars with flipped bytes or cut off: an index or a ValueError, nothing else."""
    kind = data.draw(st.sampled_from(["random", "flipped", "header", "cut", "gzip"]))
    if kind == "random":
        tar = data.draw(st.binary(max_size=3000))
    else:
        tar = bytearray(good_tar)
        for _ in range(data.draw(st.integers(0, 4))):
            offset = data.draw(st.integers(0, 8000))
            tar[offset] = data.draw(st.integers(0, 255))
        if kind == "header":  # with a right check sum again, so that the header is accepted
            block = data.draw(st.integers(0, 12)) * 512
            tar[block + 148 : block + 156] = b" " * 8
            tar[block + 148 : block + 155] = b"%06o\0" % sum(tar[block : block + 512])
        tar = tar[: data.draw(st.integers(0, len(tar)))] if kind == "cut" else tar
        tar = gzip.compress(tar)[: data.draw(st.integers(0, 2000))] if kind == "gzip" else tar
    path = tmp_path / "fuzzed.tar"
    path.write_bytes(tar)
    try:
        index = read_index(path, text=("txt", "json.caption"), meta=["caption"] * (kind == "cut"))
    except ValueError as error:
        assert str(path) in str(error)
    else:
        lengths = (index.captions, index.shard, index.offset, index.size, index.meta, index.ids)
        assert {len(x) for x in lengths} == {len(index.keys)}
        assert all(isinstance(c, str) for captions in index.captions for c in captions)
        assert all(isinstance(r, Refused) and r.reason and str(r) for r in index.refused)
        assert len(set(index.keys)) == len(index)
        assert (index.offset >= 0).all() and (index.size >= 0).all()
        store = TarMembers(index)
        assert [len(store.open(i).read()) for i in range(len(index))] == index.size.tolist()
    assert list(tmp_path.iterdir()) == [path]
    assert {p.name for p in cache.iterdir()} <= {"shards", "spool"}


# -- the cache of indexes --------------------------------------------------------------------


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


# -- pipes and gzip --------------------------------------------------------------------------


def test_the_output_of_a_command_and_gzip_are_read_alike(make_shards, tmp_path, cache):
    folder = make_shards(3, 2)
    packed = tmp_path / "packed"
    packed.mkdir()
    halves = [gzip.compress(p) for p in _halves(folder / "00000.tar")]
    (packed / "00000.tar.gz").write_bytes(b"".join(halves))  # two gzip files in one, as pigz makes
    (packed / "00001.tgz").write_bytes(gzip.compress((folder / "00001.tar").read_bytes()))
    log = tmp_path / "log"
    pipe = f"pipe:echo x >> {log}; cat {folder}/{{00000,00001}}.tar"
    for source in (packed, pipe, f"pipe:cat {packed}/00000.tar.gz"):
        index = read_index(source)
        store = TarMembers(index)
        assert index.captions == [[f"caption {i}"] for i in range(len(index))]
        assert [store.open(i).read() for i in range(len(index))] == [
            image(i) for i in range(len(index))
        ]
        assert len(index) == (3 if "gz" in str(source) else 5)
    assert log.read_text() == "x\n" * 2  # once per shard, for index and images
    assert TarMembers(read_index(pipe)).open(4).read() == image(4)
    assert log.read_text() == "x\n" * 2
    assert not list((cache / "spool").glob("*.tmp"))


def _halves(path: Path) -> tuple[bytes, bytes]:
    data = path.read_bytes()
    return data[:1500], data[1500:]


@pytest.mark.parametrize("verbose", ["0", "1"])
@pytest.mark.parametrize("status", [3, 141])
def test_no_half_shard_is_left_by_a_failure(make_shards, cache, monkeypatch, status, verbose):
    """webdataset ignores status 141, and every status with GOPEN_VERBOSE=1."""
    folder = make_shards(3)
    monkeypatch.setenv("GOPEN_VERBOSE", verbose)
    url = f"pipe:head -c 2000 {folder}/00000.tar; exit {status}"
    with pytest.raises(OSError, match=rf"shard pipe:head .*ended with status {status}") as caught:
        read_index(url)
    assert not isinstance(caught.value, FileNotFoundError)
    assert [p.suffix for p in (cache / "spool").iterdir()] == [".lock"]
    with pytest.raises(OSError, match="status 127"):
        read_index("pipe:no-such-command-here 2>/dev/null")


def test_processes_fetch_a_shard_once(make_shards, tmp_path, cache):
    folder, log = make_shards(3), tmp_path / "log"
    url = f"pipe:echo x >> {log}; sleep 0.5; cat {folder}/00000.tar"
    spool, fork = Spool(cache / "spool"), multiprocessing.get_context("fork")
    lengths = fork.Queue()

    def fetch() -> None:
        descriptor = spool.open(url, url)
        lengths.put(len(os.pread(descriptor, 10**6, 0)))

    processes = [fork.Process(target=fetch) for _ in range(3)]
    for process in processes:
        process.start()
    size = (folder / "00000.tar").stat().st_size
    assert [lengths.get(timeout=60) for _ in processes] == [size] * 3
    for process in processes:
        process.join()
    assert log.read_text() == "x\n"


def test_the_spool_removes_what_was_not_used_for_longest(make_shards, tmp_path, cache):
    folder, log = make_shards(1, 1, 1), tmp_path / "log"
    urls = [f"pipe:echo {i} >> {log}; cat {folder}/0000{i}.tar" for i in range(3)]
    size = (folder / "00000.tar").stat().st_size
    options = dict(spool_gigabytes=2.5 * size / 1e9)
    index = read_index(urls[:2])
    store = TarMembers(index, **options)
    for url in (urls[1], urls[0]):  # the second was fetched last, but the first was used last
        read_index(url, text=("txt", f"no{time.monotonic_ns()}"))
        time.sleep(0.02)
    third = TarMembers(read_index(urls[2], **options), **options)
    spooled = list((cache / "spool").glob("*.tar"))
    assert len(spooled) == 2 and sum(p.stat().st_size for p in spooled) <= 2.5 * size
    assert third.open(0).read() == image(2) and store.open(0).read() == image(0)
    assert log.read_text() == "0\n1\n2\n"
    assert store.open(1).read() == image(1)  # fetched again
    assert log.read_text() == "0\n1\n2\n1\n"
    with pytest.raises(ValueError, match="the limit of the spool; raise spool_gigabytes"):
        read_index(f"{urls[0]} ", spool_gigabytes=0.5 * size / 1e9)
    with pytest.raises(ValueError, match="must be above 0"):
        TarMembers(index, spool_gigabytes=0)


def test_a_command_that_gives_another_shard_than_before_is_noticed(make_shards, tmp_path, cache):
    folder = make_shards(1, 20)
    (tmp_path / "now.tar").write_bytes((folder / "00000.tar").read_bytes())
    index = read_index(f"pipe:cat {tmp_path}/now.tar")
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

TEXTS = ["a flag", "zwei Hälften\n", ["red", "rouge", "röd"], "four", "five", ["six"], "seven"]


@pytest.fixture
def real(tmp_path):
    """Seven images in files of several kinds, one of them with a wrong name."""
    kinds = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
    paths = []
    for i, kind in enumerate(kinds):
        paths.append(tmp_path / f"{i}.{'jpg' if i == 0 else kind.lower()}")
        Image.new("RGB", (20 + i, 11 + 2 * i), (30 * i, 255 - 30 * i, 99)).save(paths[-1], kind)
    return MultimodalDataset(paths, TEXTS, image_size=13)


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


ARTISTS = ["Ann", "Bob", "Cy", "Dee", "Eve", "Flo", "Gus", "Hal", "Ida", "Jo", "Kit"]


@pytest.fixture
def by_artists(tmp_path):
    """Sixty images in files, some with two captions; each has an artist, a year, a list."""
    lines = []
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 256, (17, 13, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        texts = [f"image {i}"] + [f"once more {i}"] * (i % 3 == 0)
        metadata = {"artist": ARTISTS[i % 11], "year": 1900 + i, "tags": ["é", None, 0.5]}
        lines.append(json.dumps({"image": f"{i}.png", "text": texts} | metadata))
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    return from_table(tmp_path / "set.jsonl", meta=["artist", "year", "tags"], image_size=11)


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


def test_ids_that_occur_twice_are_numbers_of_rows(by_artists, tmp_path):
    """Two sets of shards together, and a set in which some ids are unknown."""
    part = by_artists.subset([7, 5, 3])
    for name in ("one", "two"):
        write_shards(part, tmp_path / name)
    both = from_shards([tmp_path / "one", tmp_path / "two"], image_size=11)
    assert both.sample_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert from_shards(tmp_path / "two", image_size=11).sample_ids.tolist() == [7, 5, 3]
    other = [member("x.png", (tmp_path / "0.png").read_bytes()), member("x.txt", b"x")]
    path = write_tar(tmp_path / "two" / "x.tar", other)
    assert from_shards(tmp_path / "two", image_size=11).sample_ids.tolist() == [0, 1, 2, 3]
    assert from_shards(path, image_size=11).sample_ids.tolist() == [0]


def test_shards_of_before_still_load_and_img2dataset_has_metadata(real, tmp_path):
    """Without metadata nothing is added; keys of other .json are metadata, missing ones None."""
    shards = write_shards(real, tmp_path / "out")
    with tarfile.open(shards[0]) as tar:
        names = [m.name for m in tar if m.name.endswith(".json")]
    assert names == ["000000002.json"]  # the only one of several captions
    assert from_shards(tmp_path / "out", image_size=13).sample_ids.tolist() == list(range(7))
    png = (tmp_path / "6.ppm").read_bytes()
    metadata = {"caption": "c", "url": "https://x.org", "key": "000000000", "sha256": "ab"}
    foreign = write_tar(
        tmp_path / "foreign.tar",
        [
            *[member("0.jpg", png), member("0.json", json.dumps(metadata).encode())],
            *[member("1.jpg", png[:-1] + b"x"), member("1.json", b'{"caption": "d"}')],
        ],
    )
    data = from_shards(foreign, meta=["url", "key"], image_size=13)
    assert [row["url"] for row in data.meta] == ["https://x.org", None]
    assert data.meta[0]["key"] == "000000000" and data.texts == [["c"], ["d"]]
    with pytest.raises(ValueError, match=r"no \.json has the key 'ulr'; did you mean 'url'"):
        from_shards(foreign, meta=["ulr"])
    write_tar(tmp_path / "bare.tar", [member("0.jpg", png), member("0.txt", b"x")])
    with pytest.raises(ValueError, match=r"the key .url.; no sample has a \.json"):
        from_shards(tmp_path / "bare.tar", meta=["url"])


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


def test_the_suffix_of_images_can_be_named(by_artists, tmp_path):
    png = [(tmp_path / f"{i}.png").read_bytes() for i in range(2)]
    members = [member("0.jpg", png[0]), member("0.seg.png", png[1]), member("0.txt", b"x")]
    path = write_tar(tmp_path / "a.tar", members)
    for image, i in ((None, 0), ("seg.png", 1), (["seg.png", "jpg"], 1)):
        data = from_shards(path, image=image, image_size=11)
        assert data[0]["image"].equal(by_artists[i]["image"])


def test_shards_that_are_not_looked_at_are_said_to_be(by_artists, tmp_path):
    """The output of a command exceeds the spool: a bad image stops the training run."""
    written = write_shards(by_artists, tmp_path / "out", samples_per_shard=30)
    room = max(path.stat().st_size for path in written) / 1e9  # room for one of three
    members = [member("x.png", b"no image"), member("x.txt", b"x")]
    write_tar(tmp_path / "out/00002.tar", members)
    options: dict = dict(image_size=11, num_workers=0, on_error="skip")
    url = f"pipe:cat {tmp_path}/out/{{00000..00002}}.tar"
    data = from_shards(url, spool_gigabytes=room, **options)
    said = str(data.report)
    assert "not checked: the shards fill 0.0 GB, more than spool_gigabytes=0.000" in said
    assert "a broken image will stop the training" in said and "check='decode'" in said
    assert data.report.to_dict()["why_unchecked"] and len(data) == 61
    assert data.report.why_unchecked in str(data.subset([3]).report)
    with pytest.raises(Refused, match=r"00002\.tar: x\.png"):
        data.batch([60])
    for looked in (
        from_shards(url, spool_gigabytes=room, check="decode", **options),
        from_shards(url, **options),
    ):
        assert looked.report.skipped == {"not an image": 1} and len(looked) == 60
        assert "each decoded" in str(looked.report) and not looked.report.why_unchecked
    on_purpose = from_shards(url, spool_gigabytes=room, check="none", **options)
    assert str(on_purpose.report).count("not checked\n") == 1


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


@pytest.mark.slow
def test_fifty_thousand_samples_are_indexed_in_seconds(tmp_path):
    path = write_tar(tmp_path / "a.tar", [m for i in range(50_000) for m in pair(f"{i:09d}")])
    start = time.perf_counter()
    assert len(read_index(path)) == 50_000
    first = time.perf_counter() - start
    start = time.perf_counter()
    assert len(read_index(path)) == 50_000
    assert first < 10 and time.perf_counter() - start < first / 2
