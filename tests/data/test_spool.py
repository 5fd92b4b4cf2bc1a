"""What lies at an address, and gzip, are fetched once, whole, and in bounded space."""

import gzip
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mmkit.data.shard_index import read_index
from mmkit.data.shards import TarMembers
from mmkit.data.spool import Spool
from tests.data.tars import image

pytestmark = pytest.mark.usefixtures("cache")


def test_addresses_and_gzip_are_read_alike(make_shards, tmp_path, cache, serve):
    folder = make_shards(3, 2)
    packed = tmp_path / "packed"
    packed.mkdir()
    halves = [gzip.compress(p) for p in _halves(folder / "00000.tar")]
    (packed / "00000.tar.gz").write_bytes(b"".join(halves))  # two gzip files in one, as pigz makes
    (packed / "00001.tgz").write_bytes(gzip.compress((folder / "00001.tar").read_bytes()))
    web, by_fsspec = f"{serve.url}/set/{{00000,00001}}.tar", f"file://{folder}/*.tar"
    for source in (packed, web, by_fsspec, f"{serve.url}/packed/00000.tar.gz"):
        index = read_index(source)
        store = TarMembers(index)
        assert index.captions == [[f"caption {i}"] for i in range(len(index))]
        assert [store.open(i).read() for i in range(len(index))] == [
            image(i) for i in range(len(index))
        ]
        assert len(index) == (3 if str(source).endswith("gz") else 5)
    asked = ["/set/00000.tar", "/set/00001.tar", "/packed/00000.tar.gz"]
    assert serve.asked == asked  # once per shard, for index and images
    assert TarMembers(read_index(web)).open(4).read() == image(4)
    assert serve.asked == asked
    assert not list((cache / "spool").glob("*.tmp"))


def _halves(path: Path) -> tuple[bytes, bytes]:
    data = path.read_bytes()
    return data[:1500], data[1500:]


@pytest.mark.parametrize("packed", [False, True])
def test_no_half_shard_is_left_by_a_failure(make_shards, cache, serve, packed):
    """A connection that ends too early, an address that does not exist."""
    path = make_shards(3) / "00000.tar"
    if packed:
        path = path.with_suffix(".tgz")
        path.write_bytes(gzip.compress(os.urandom(9000)))
    serve.cut_at = 2000
    with pytest.raises((OSError, ValueError), match=r"closed too early|gzip data: .* ended before"):
        read_index(f"{serve.url}/set/{path.name}")
    assert [p.suffix for p in (cache / "spool").iterdir()] == [".lock"]
    with pytest.raises(OSError, match="cannot be fetched: HTTP Error 404"):
        read_index(f"{serve.url}/set/none.tar")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_index("file:///nowhere/none.tar")


def test_processes_fetch_a_shard_once(make_shards, cache, serve):
    size = (make_shards(3) / "00000.tar").stat().st_size
    url, serve.wait = f"{serve.url}/set/00000.tar", 0.5
    spool, fork = Spool(cache / "spool"), multiprocessing.get_context("fork")
    lengths = fork.Queue()

    def fetch() -> None:
        descriptor = spool.open(url, url)
        lengths.put(len(os.pread(descriptor, 10**6, 0)))

    processes = [fork.Process(target=fetch) for _ in range(3)]
    for process in processes:
        process.start()
    assert [lengths.get(timeout=60) for _ in processes] == [size] * 3
    for process in processes:
        process.join()
    assert serve.asked == ["/set/00000.tar"]


def test_the_spool_removes_what_was_not_used_for_longest(make_shards, cache, serve):
    size = (make_shards(1, 1, 1) / "00000.tar").stat().st_size
    urls = [f"{serve.url}/set/0000{i}.tar" for i in range(3)]
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
    assert serve.asked == [f"/set/0000{i}.tar" for i in (0, 1, 2)]
    assert store.open(1).read() == image(1)  # fetched again
    assert serve.asked == [f"/set/0000{i}.tar" for i in (0, 1, 2, 1)]
    with pytest.raises(ValueError, match="the limit of the spool; raise spool_gigabytes"):
        read_index(f"{urls[0]}?again", spool_gigabytes=0.5 * size / 1e9)
    with pytest.raises(ValueError, match="must be above 0"):
        TarMembers(index, spool_gigabytes=0)
