"""A table of any content gives its rows, or an error that names it."""

import csv
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmkit as mm
from mmkit.data.captions import clean_caption
from mmkit.data.tables import read_csv, read_jsonl
from mmkit.errors import Refused
from tests.data.awkward import OPTIONS, plain
from tests.data.hypothesis_settings import bounded

pytestmark = pytest.mark.usefixtures("watch")

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
