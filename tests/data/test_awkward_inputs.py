"""Every awkward, broken or hostile input is loaded, skipped or rejected, with the right message."""

import csv
import json
import os
import re
import signal
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mmkit as mm
from mmkit.data.captions import clean_caption
from mmkit.data.images import check_image, read_image
from mmkit.data.tables import read_csv, read_jsonl
from mmkit.errors import Refused
from tests.data.awkward import noise, plain, png_claiming
from tests.data.awkward_any import ANY
from tests.data.awkward_files import CHECKPOINTS, PUBLISHED
from tests.data.awkward_images import IMAGES
from tests.data.awkward_shards import SHARDS
from tests.data.awkward_sources import FOLDERS, HUB
from tests.data.awkward_tables import PATHS, TABLES

CASES = [*TABLES, *PATHS, *IMAGES, *HUB, *FOLDERS, *ANY, *PUBLISHED, *SHARDS, *CHECKPOINTS]
OPTIONS = dict(image_size=8, num_workers=0, max_skipped=1.0, check="decode")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Separate caches for this test, and no program that a decoder could start."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MMKIT_CACHE", str(folder))
    ghostscript = folder / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {folder}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    yield folder
    assert not (folder / "started").exists()


@pytest.fixture(autouse=True)
def in_time():
    """A reader that waits for ever (for a pipe, for example) fails."""

    def stop(*_):
        raise TimeoutError("it takes more than 30 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def test_there_are_enough_cases_and_each_has_a_name():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 60
    assert {case.expect for case in CASES} == {"load", "skip", "reject"}
    assert all(case.words for case in CASES if case.expect != "load")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on broken files
@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_each_input_is_loaded_skipped_or_rejected(case, tmp_path):
    load = case.make(tmp_path)
    if case.expect == "load":
        for on_error in ("raise", "skip"):
            data = load(on_error=on_error, **OPTIONS)
            assert not data.report.skipped and data.report.loaded == data.report.rows > 0
            if case.check:
                case.check(data)
    elif case.expect == "skip":
        with pytest.raises((ValueError, FileNotFoundError)) as refused:
            load(on_error="raise", **OPTIONS)
        assert re.search(case.words, str(refused.value), re.DOTALL), refused.value
        report = load(on_error="skip", **OPTIONS).report
        assert (report.loaded, sum(report.skipped.values())) == (case.loaded, case.bad_rows)
        assert report.loaded + case.bad_rows == report.rows
        said = "\n".join(line for lines in report.examples.values() for line in lines)
        assert re.search(case.words, said, re.DOTALL), said
        assert len(said) < 2000
        json.loads(report.save(tmp_path / "report.json").read_text("utf-8"))
        str(report).encode()
    else:
        for on_error in ("raise", "skip"):
            with pytest.raises((ValueError, FileNotFoundError)) as refused:
                load(on_error=on_error, **OPTIONS)
            assert re.search(case.words, str(refused.value), re.DOTALL), refused.value
            assert len(str(refused.value)) < 2000


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    """60,000 x 60,000 pixels would be 10.8 GB; only the head is read."""
    path = tmp_path / "bomb.png"
    path.write_bytes(png_claiming(60_000, 60_000))
    tracemalloc.start()
    started = time.perf_counter()
    for read in (check_image, read_image):
        with pytest.raises(Refused, match="more pixels than can be decoded") as refused:
            read(path)
        assert refused.value.reason == "too many pixels"
    assert time.perf_counter() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
def test_an_image_with_random_damage_is_read_or_refused(kind, tmp_path):
    """Each of 60 damaged files gives an image or a `Refused`."""
    import random

    draw, data = random.Random(0), noise(kind, side=13)
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(min(len(data), draw.choice([60, 10_000])))] = draw.randrange(256)
        path = tmp_path / "damaged"
        path.write_bytes(damaged[: draw.choice([len(data), draw.randrange(len(data))])])
        for read in (check_image, read_image):
            try:
                read(path)
            except Refused as refused:
                assert str(path) in str(refused)


# ---- property-based ------------------------------------------------------------------------------

bounded = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
TOKENS = st.sampled_from(
    ["image", "text", "a.png", "b.png", ",", ";", "\t", "|", '"', '""', "\n", "\r\n", "\r", "sep=",
     "\ufeff", "\0", " ", "..", "/", "caption", "ü", "\ud800", "{", "}", ":", "[", "null", "1e999",
     '{"image": "a.png", "text": "x"}\n', "image,text\n", "a.png,words\n"]
)  # fmt: skip
structured = st.lists(TOKENS, max_size=40).map(
    lambda parts: "".join(parts).encode("utf-8", "surrogatepass")
)
after_head = structured.map(lambda rest: b"image,text\na.png,one\n" + rest)
contents = st.one_of(st.binary(max_size=200), structured, after_head)


@bounded
@given(contents, st.sampled_from([None, "utf-8", "utf-16", "cp1252", "latin-1"]), st.booleans())
def test_a_reader_gives_rows_or_a_value_error(tmp_path, content, encoding, quotes):
    path = tmp_path / "table"
    path.write_bytes(content)
    for read, how in ((read_csv, dict(quotes=quotes)), (read_jsonl, {})):
        try:
            columns, rows = read(path, encoding=encoding, **how)
            rows = list(rows)
        except ValueError as error:
            assert str(path) in str(error) and not isinstance(error, UnicodeError)
            continue
        lines = [line for line, _ in rows]
        assert lines == sorted(set(lines)), "each row has its line, in order"
        for _, row in rows:
            assert isinstance(row, Refused) or (read is read_jsonl) or list(row) == columns


@bounded
@given(contents, st.sampled_from([".csv", ".tsv", ".jsonl"]), st.sampled_from(["raise", "skip"]))
def test_a_table_gives_a_data_set_or_a_value_error(tmp_path, content, suffix, on_error):
    if not (tmp_path / "a.png").exists():
        plain(tmp_path)
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content)
    options = OPTIONS | dict(cache_gigabytes=0, check="head")
    try:
        data = mm.from_table(path, on_error=on_error, **options)
    except (ValueError, FileNotFoundError) as error:
        assert not isinstance(error, UnicodeError)
        return
    report = data.report
    assert report.loaded + sum(report.skipped.values()) == report.rows and report.loaded > 0
    assert on_error == "skip" or not report.skipped
    assert data.texts == [[clean_caption(c) for c in captions] for captions in data.texts]


@bounded
@given(
    st.lists(st.text(max_size=30).filter(clean_caption), min_size=1, max_size=5),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_what_csv_writer_wrote_comes_back(tmp_path, texts, separator, end, encoding):
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        if not path.exists():
            os.link(plain(tmp_path / f"{i}") / "a.png", path)
    table = tmp_path / "pairs.csv"
    with open(table, "w", encoding=encoding, newline="") as file:
        # before Python 3.13 csv does not quote other line ends, which is not a valid table
        odd = any({"\r", "\n"} & {*text} for text in texts)
        how = csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL
        writer = csv.writer(file, delimiter=separator, lineterminator=end, quoting=how)
        writer.writerow(["image", "text"])
        writer.writerows(zip([path.name for path in paths], texts, strict=False))
    data = mm.from_table(table, separator=separator, cache_gigabytes=0, image_size=8)
    assert data.texts == [[clean_caption(text)] for text in texts]


@bounded
@given(st.text())
def test_a_clean_caption_is_one_line_and_stays_as_it_is(text):
    clean = clean_caption(text)
    assert clean == clean_caption(clean) and clean == " ".join(clean.split())
    clean.encode("utf-8")  # no lone surrogates
