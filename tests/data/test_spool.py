"""A command's output and gzip are fetched once, whole, and in bounded space."""

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
