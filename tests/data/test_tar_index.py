"""Of any tar, damaged or hostile, what is whole is indexed and the rest refused, without harm."""

import gzip
import json
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkit.data.shard_index import read_index
from mmkit.data.shards import TarMembers
from mmkit.data.tar_index import split_name
from mmkit.errors import Refused
from tests.data.hypothesis_settings import FEW
from tests.data.tars import image, member, pair, reasons, write_tar

pytestmark = pytest.mark.usefixtures("cache")


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
    joined = tmp_path / "joined.tar"  # two equal tars in one file
    write_tar(joined, pair("0"))
    joined.write_bytes(joined.read_bytes() * 2)
    assert len(read_index(joined)) == 1
    assert reasons(read_index(joined)) == ["two samples of one name"]


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
