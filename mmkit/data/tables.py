"""Read tables of images and captions: CSV, TSV, JSON lines; every row is returned or refused.

By Python's own csv and json, which say in which line an error is; also packed by gzip. A row is
(line, {column: value}) or (line, Refused). What makes a whole table unreadable (its encoding, its
separator, an unclosed quote) is a ValueError whose message gives the remedy.
Walk-through: notebooks/08_your_own_images.ipynb.
"""

import ast
import codecs
import csv
import gzip
import io
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import Refused, nearest

MOST_LETTERS = 1_000_000  # of a field; csv's own limit of 131,072 refuses long texts
HEAD = 100  # rows of JSON in which the names of columns are looked for
MOST_BYTES = 4_000_000_000  # of a JSON file that is read as one value
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_MARKS = {  # byte order marks; the longer ones first, as UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_OTHERS = {  # the first bytes of files that are no text
    b"PK\x03\x04": "a zip archive (a spreadsheet, perhaps); save it as CSV",
    b"\xd0\xcf\x11\xe0": "an Excel file; save it as CSV",
    b"SQLite format 3": "an SQLite data base; export the table as CSV",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"FEA1": "a Feather file; save it as parquet",
    b"PAR1": "a parquet file; give it the suffix .parquet",
}
GZIP = b"\x1f\x8b"
Row = tuple[int, dict[str, Any] | Refused]


def open_unpacked(path: str | os.PathLike) -> BinaryIO:
    """The bytes of a file, unpacked if it is gzip."""
    with open(path, "rb") as file:
        packed = file.read(2) == GZIP
    return cast(BinaryIO, gzip.open(path) if packed else open(path, "rb"))


def find_encoding(path: str | os.PathLike, encoding: str | None = None) -> str:
    """The encoding of a text file: the given one, else by its byte order mark, else UTF-8.

    Raises ValueError for an unknown name, and for a file that is not text.
    """
    if encoding is not None:
        try:
            "".encode(encoding)  # LookupError also for codecs that are not text: "rot13"
            return codecs.lookup(encoding).name
        except (LookupError, ValueError):
            raise ValueError(
                f"encoding={encoding!r} is not known; try 'utf-8', 'cp1252' or 'latin-1'"
            ) from None
    with open_unpacked(path) as file:
        head = file.read(4096)
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    for mark, what in _OTHERS.items():
        if head.startswith(mark):
            raise ValueError(f"{path} is {what}")
    if head[1::2].count(0) > len(head) // 4 or head[::2].count(0) > len(head) // 4:
        little = head[1::2].count(0) > head[::2].count(0)
        raise ValueError(
            f"{path} looks like UTF-16 without a byte order mark; give encoding="
            f"'utf-16-{'le' if little else 'be'}'"
        )
    return "utf-8"


def _lines(path: str | os.PathLike, encoding: str) -> Iterator[str]:
    """The lines of a text file with their ends; ValueError names a line that cannot be read."""
    number = 0
    with io.TextIOWrapper(open_unpacked(path), encoding, newline="") as file:
        try:
            for line in file:
                number += 1
                # with encoding="utf-8" given, Python does not remove a byte order mark
                yield line.removeprefix("\ufeff") if number == 1 else line
        except UnicodeError as error:
            number = _undecodable(path, encoding) or number + 1
            raise ValueError(
                f"{path}, line {number}: this is not {encoding} ({error}); save the file as UTF-8, "
                "or give its encoding, for example encoding='cp1252'"
            ) from None


def _undecodable(path: str | os.PathLike, encoding: str) -> int:
    """The first line that cannot be read; 0 if the encoding does not separate lines by bytes."""
    if not encoding.startswith(("utf-8", "utf_8", "ascii")):
        return 0
    with open_unpacked(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 0


def read_lines(path: str | os.PathLike, encoding: str | None = None, blank=False) -> list[str]:
    """The lines of a small text file, without blank ones; ValueError if it is not text."""
    lines = [line.strip() for line in _lines(path, find_encoding(path, encoding))]
    return [line for line in lines if line or blank]


# ---- CSV and TSV ---------------------------------------------------------------------------------


def read_csv(
    path: str | os.PathLike,
    *,
    encoding: str | None = None,
    separator: str | None = None,
    quotes: bool | str = True,
) -> tuple[list[str], Iterator[Row]]:
    r"""(columns, rows) of a table whose first line names its columns.

    separator: None recognises comma, semicolon, tab and bar. quotes: a field may be in double
    quotes and then contain separators, line ends, and quotes that are doubled; False treats quotes
    as letters; "backslash" is for quotes written \" within a field. Columns without a name are
    ignored. A row with more or fewer fields than the header, or with broken quotes, is refused.
    """
    if quotes not in (True, False, "backslash"):
        raise ValueError(f"quotes={quotes!r} is not a choice; take True, False or 'backslash'")
    found = find_encoding(path, encoding)
    separator = _separator(path, found, quotes) if separator is None else separator
    if len(separator) != 1 or separator in '"\r\n':
        raise ValueError(f"{path}: separator={separator!r} is not one character between fields")
    lines = _lines(path, found)
    first = next(lines, "")
    skipped = first.lower().startswith("sep=")  # spreadsheets write this line
    every = lines if skipped else itertools.chain([first], lines)
    spaced = re.compile(re.escape(separator) + ' +"')  # a.png, "a red one"
    strip = bool(quotes) and any(spaced.search(line) for line in _lines(path, found))
    reader = _reader(every, separator, quotes, strip)
    before, why = int(skipped), ""
    try:
        columns = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        _check_quotes(path, error, 1 + before, reader.line_num + before)
        columns, why = [], _explained(error)
    twice = {name for name in columns if name and columns.count(name) > 1}
    if not any(columns) or twice:
        why = f"column {min(twice)!r} occurs twice" if twice else why or "it is empty"
        raise ValueError(f"{path} has no usable first line: {why}; it must name the columns")
    return [name for name in columns if name], _csv_rows(path, reader, columns, before)


def _reader(lines: Iterable[str], separator: str, quotes: bool | str, strip: bool = False):
    # one limit for the whole process: it is raised, never lowered
    csv.field_size_limit(max(MOST_LETTERS, csv.field_size_limit()))
    options: dict[str, Any] = dict(delimiter=separator, skipinitialspace=strip)
    if not quotes:
        return csv.reader(lines, quoting=csv.QUOTE_NONE, **options)
    if quotes == "backslash":
        options |= dict(doublequote=False, escapechar="\\")
    return csv.reader(lines, strict=True, **options)


_QUOTES = """quotes=False if quotes are letters, or quotes='backslash' if they are written \\\""""


def _check_quotes(path, error: csv.Error, line: int, last: int) -> None:
    """Raise ValueError if an unclosed quote in this line swallows the rest of the table."""
    if "end of data" in str(error) or ("limit" in str(error) and last > line):
        raise ValueError(
            f"{path}: a double quote in line {line} is never closed; correct it, or give {_QUOTES}"
        ) from None


def _explained(error: csv.Error) -> str:
    """The message of a csv error, with a remedy."""
    if "limit" in str(error):
        return f"a field has more than {MOST_LETTERS:,} letters; shorten it or leave the row out"
    return f"{error}; give {_QUOTES}"


def _csv_rows(path, reader, columns: list[str], before: int) -> Iterator[Row]:
    while True:
        line = reader.line_num + 1 + before
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.line_num + before
            _check_quotes(path, error, line, last)
            lines = f"line {line}" if line == last else f"lines {line} to {last}"
            kind = "too long" if "limit" in str(error) else "broken quotes"
            yield line, Refused(kind, f"{path}, {lines}: {_explained(error)}")
            continue
        if len(fields) == len(columns):
            yield line, {n: x for n, x in zip(columns, fields, strict=True) if n}
        elif fields:  # a blank line is not a row
            yield (
                line,
                Refused(
                    "wrong number of fields",
                    f"{path}, line {line} has {len(fields)} fields, the first line {len(columns)}; "
                    "is there a separator in a caption without quotes?",
                ),
            )


def _separator(path, encoding: str, quotes: bool | str) -> str:
    """The separator that gives the header and the next lines equally many fields, at least two."""
    lines = list(itertools.islice(_lines(path, encoding), 50))
    if not lines:
        return ","
    if lines[0].lower().startswith("sep="):
        return lines[0].rstrip("\r\n")[4:5]
    best, most, unreadable = "", (0.0, 0), ""
    for separator in SEPARATORS:
        rows = _some_rows(lines, separator, quotes)
        width, unreadable = len(rows[0]) if rows else 0, unreadable or separator * (not rows)
        if width >= 2:
            alike = sum(len(row) == width for row in rows) / len(rows)
            tab_file = separator == "\t" and str(path).endswith((".tsv", ".tab"))
            most, best = max((most, best), ((alike + tab_file, width), separator))
    if not best and unreadable:
        return unreadable  # an unclosed quote, which the reader reports
    if not best:
        known = ", ".join(SEPARATORS.values())
        raise ValueError(
            f"{path} has one column under every known separator ({known}); it needs one for the "
            "image and one for the text; give separator=…"
        )
    return best


def _some_rows(lines: list[str], separator: str, quotes: bool | str) -> list[list[str]]:
    """The rows that can be read; broken quotes are reported later."""
    rows, reader = [], _reader(lines, separator, quotes)
    while True:
        try:
            rows.append(next(reader))
        except StopIteration:
            return [row for row in rows if row]
        except csv.Error:
            continue


# ---- JSON lines ----------------------------------------------------------------------------------


def read_jsonl(
    path: str | os.PathLike, *, encoding: str | None = None
) -> tuple[list[str], Iterator[Row]]:
    """(columns, rows) of a file with one JSON object per line, or of one array of objects.

    columns are those of the first hundred rows. Raises ValueError for another JSON value, such as
    COCO's annotations; the message names the function that reads it.
    """
    rows = _json_rows(path, encoding)
    head = list(itertools.islice(rows, HEAD))
    if _may_be_one_value(head):
        value = _one_value(path, encoding)
        if isinstance(value, list):
            rows = _entries(path, value)
            head = list(itertools.islice(rows, HEAD))
        elif value is not None:
            raise ValueError(_no_lines(path, value))
    columns = dict.fromkeys(key for _, row in head if isinstance(row, dict) for key in row)
    return list(columns), itertools.chain(head, rows)


def _may_be_one_value(head: list[Row]) -> bool:
    """Is the first line not an object, or the only line, with lists of objects in it?"""
    first = head[0][1] if head else {}
    if isinstance(first, Refused):
        return True
    if len(head) != 1 or any(key.lower() in IMAGE_COLUMNS for key in first):
        return False
    return any(
        isinstance(value, list) and value and isinstance(value[0], dict) for value in first.values()
    )


def _one_value(path, encoding: str | None) -> Any:
    """The JSON value of a whole file; None if it is not one, or too large to be read as one."""
    if os.path.getsize(path) > MOST_BYTES:
        return None
    try:
        return json.loads("".join(_lines(path, find_encoding(path, encoding))))
    except (ValueError, RecursionError):
        return None


def _entries(path, values: list) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        why = f"{path}, entry {number} is {type(value).__name__}, not an object with columns"
        yield number, value if isinstance(value, dict) else Refused("not JSON", why)


def _no_lines(path, value: Any) -> str:
    """What a JSON file that is not a table is, and the function that reads it."""
    images = value.get("images") if isinstance(value, dict) else None
    if isinstance(images, list) and "annotations" in value:
        return f"{path} has the form of COCO captions; take mm.from_coco({str(path)!r}, folder)"
    if isinstance(images, list) and images and "sentences" in dict(images[0]):
        call = f"mm.from_flickr30k({str(path)!r}, folder, split='train')"
        return f"{path} has the form of Karpathy's splits; take {call}"
    return (
        f"{path} is one JSON value ({type(value).__name__}), not JSON lines; write one object per "
        'line, such as {"image": "a.png", "text": "a caption"}, or an array of such objects'
    )


def _json_rows(path, encoding: str | None) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, find_encoding(path, encoding)), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"it is {type(value).__name__}, not an object with columns")
            yield number, value
        except (ValueError, RecursionError) as error:
            why = "nested too deep" if isinstance(error, RecursionError) else str(error)
            yield number, Refused("not JSON", f"{path}, line {number} is not one object: {why}")


def read_json(path: str | os.PathLike) -> Any:
    """The value of a JSON file; ValueError if it is not one."""
    try:
        with open_unpacked(path) as file:
            return json.loads(file.read().decode(find_encoding(path)))
    except UnicodeError:
        raise ValueError(f"{path} is not UTF-8 text; it should be a JSON file") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is not a JSON file: {why}") from None


# ---- columns -------------------------------------------------------------------------------------

IMAGE_COLUMNS = "image image_path img path file file_name filename filepath picture".split()
TEXT_COLUMNS = "text caption captions title sentence sentences".split()


# Suffixes of the files that `from_table` and `load_data` read as tables; see `read_table`.
TABLES = (".csv", ".tsv", ".tab", ".jsonl", ".ndjson", ".json", ".token", ".parquet")


def read_table(
    path: Path, encoding: str | None = None, separator: str | None = None, quotes: bool | str = True
) -> tuple[list[str], Iterator[Row], str, str]:
    """(columns, rows, name of a row in messages, hint for a missing column) of a table.

    The suffix decides how it is read. Parquet files are read as data sets (hub.py).
    """
    suffix = Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        unit = "entry" if suffix == ".json" else "line"  # of an array, perhaps
        return *read_jsonl(path, encoding=encoding), unit, ""
    columns, rows = read_csv(path, encoding=encoding, separator=separator, quotes=quotes)
    return columns, rows, "line", ". The first line of a table must name its columns"


_LIST = re.compile(r"""\s*\[\s*(['"]).*\1\s*\]\s*""", re.DOTALL)


def written_list(cell) -> list | None:
    """The captions of a cell that holds a list as Python or JSON write it: "['a', 'b']"."""
    if not isinstance(cell, str) or not _LIST.fullmatch(cell):
        return None
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if all(isinstance(text, str) for text in value) else None


def listed(values) -> list:
    """The values as a list: "artist" as ["artist"], and a list unchanged."""
    return list(values) if isinstance(values, list | tuple) else [values]


def pick_column(
    columns: Sequence[str], wanted: str | None, kind: str, source: str, hint: str = ""
) -> str:
    """The column of a kind, "image" or "text": the wanted one, else the only one of a usual name.

    hint: the end of the message if there is none.
    """
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{source} has no column {wanted!r}; {nearest(wanted, columns)}")
        return wanted
    usual = IMAGE_COLUMNS if kind == "image" else TEXT_COLUMNS
    found = [column for column in columns if column.lower() in usual]
    if len(found) != 1:
        shown = ", ".join(map(repr, columns[:20])) or "none"
        why = "several could be" if found else "none has a usual name"
        raise ValueError(
            f"{source}: which column holds the {kind}? {why} (columns: {shown}); give {kind}='…'"
            f"{hint}"
        )
    return found[0]
