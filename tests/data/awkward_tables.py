"""Awkward tables, and awkward paths in them, each with the expected result."""

import json
import os
import unicodedata
from pathlib import Path

from tests.data.awkward import BLUE, Case, captions, metadata, one_colour, row, shows, table

HEAD = "image,text\n"
TWO = HEAD + "a.png,a red one\nb.png,ein grüner\n"
BOTH = captions("a red one", "ein grüner")
LATIN = (HEAD + "a.png,one\nb.png,tw\xf6\nc.png,three\n").encode("latin-1")
LONG = "word " * 2_000_000  # 10 MB


def jsonl(*lines: str, **how):
    return table("\n".join(lines) + "\n", "pairs.jsonl", **how)


GOOD = '{"image": "a.png", "text": "a red one"}'


def blanks(count: int, *texts):
    """The captions, and how many were left out because they were blank."""

    def check(data):
        captions(*texts)(data)
        assert data.report.blank_captions == data.report.to_dict()["blank_captions"] == count
        assert f"{count} of rows with others, left out" in str(data.report)

    return check


def second(value: str) -> str:
    return f'{{"image": "b.png", "text": {value}}}'


# fmt: off
TABLES = [
    Case("a byte order mark", table(b"\xef\xbb\xbf" + TWO.encode()), "load", check=BOTH),
    Case(
        "a byte order mark and encoding='utf-8'",
        table(b"\xef\xbb\xbf" + TWO.encode(), encoding="utf-8"),
        "load",
        check=BOTH,
    ),
    Case("UTF-16 with a mark", table(TWO.encode("utf-16")), "load", check=BOTH),
    Case("UTF-32 with a mark", table(TWO.encode("utf-32")), "load", check=BOTH),
    Case(
        "UTF-16 without a mark",
        table(TWO.encode("utf-16-be")),
        "reject",
        "looks like UTF-16 without a byte order mark; give encoding='utf-16-be'",
    ),
    Case(
        "UTF-16 without a mark, encoding given",
        table(TWO.encode("utf-16-le"), encoding="utf-16-le"),
        "load",
        check=BOTH,
    ),
    Case(
        "cp1252",
        table(TWO.encode("cp1252")),
        "reject",
        r"line 3: this is not utf-8 .*encoding='cp1252'",
    ),
    Case("cp1252, given", table(TWO.encode("cp1252"), encoding="cp1252"), "load", check=BOTH),
    Case("broken UTF-8 in the middle", table(LATIN), "reject", "pairs.csv, line 3: this is not"),
    Case("an unknown encoding", table(TWO, encoding="utf-99"), "reject", "'utf-99' is not known"),
    Case("an encoding of no text", table(TWO, encoding="rot13"), "reject", "'rot13' is not known"),
    Case("semicolons", table(TWO.replace(",", ";")), "load", check=BOTH),
    Case("bars", table(TWO.replace(",", "|")), "load", check=BOTH),
    Case("tabs, with commas", table(TWO.replace(",", "\t") + "c.png\ta, b, c\n"), "load",
         check=captions("a red one", "ein grüner", "a, b, c")),
    Case("a separator given", table(TWO.replace(",", "~"), separator="~"), "load", check=BOTH),
    Case("a separator of two letters", table(TWO, separator=",,"), "reject",
         "separator=',,' is not one character"),
    Case("a sep= line", table("sep=;\r\n" + TWO.replace(",", ";")), "load", check=BOTH),
    Case("an empty sep= line", table("sep=\n" + TWO), "reject", "separator='' is not one"),
    Case("CRLF", table(TWO.replace("\n", "\r\n")), "load", check=BOTH),
    Case("CR alone", table(TWO.replace("\n", "\r")), "load", check=BOTH),
    Case("no end of the last line, blank lines",
         table("\n".join(["image,text", "", "a.png,a red one", "", "b.png,ein grüner"])), "load",
         check=BOTH),
    Case("separators, line ends and quotes in quotes",
         table(HEAD + 'a.png,"a, b"\nb.png,"two\nlines"\nc.png,"say ""cheese"""\n'), "load",
         check=captions("a, b", "two lines", 'say "cheese"')),
    Case("a quote that never ends", table(HEAD + 'a.png,one\nb.png,"two\nc.png,three\n'), "reject",
         "double quote in line 3 is never closed; .*quotes=False"),
    Case("a quote that never ends in the first line", table('image,"text\na.png,one\n'), "reject",
         "double quote in line 1 is never closed"),
    Case("broken quotes in the first line", table('"image"s,text\na.png,one\n'), "reject",
         "no usable first line: .*expected after"),
    Case("a quote that ends in another row",
         table(HEAD + 'a.png,one\nb.png,"two\nc.png,"three"\n'), "skip",
         r"lines 3 to 4: .*expected after.*quotes=False"),
    Case("stray quotes in a TSV", table('image\ttext\na.png\tone\nb.png\t"2" tall\n', "p.tsv"),
         "skip", "line 3: .*quotes=False"),
    Case("stray quotes in a TSV, taken for letters",
         table('image\ttext\na.png\tone\nb.png\t"2" tall\n', "p.tsv", quotes=False), "load",
         check=captions("one", '"2" tall')),
    Case("ragged rows", table(HEAD + "a.png,one\nb.png,two, too\nc.png\n"), "skip",
         "line 3 has 3 fields, the first line 2", bad_rows=2),
    Case("a column twice", table("image,text,text\na.png,one,two\n"), "reject",
         "column 'text' occurs twice"),
    Case("no names of columns", table("a.png,one\nb.png,two\n"), "reject",
         r"which column holds the image\?.*first line of a table must name"),
    Case("one column", table("image\na.png\n"), "reject", "one column under every known separator"),
    Case("an empty file", table(""), "reject", "no usable first line: it is empty"),
    Case("only names of columns", table(HEAD), "reject", "no row was found"),
    Case("NUL bytes", table(HEAD + "a.png,one\nb.png,tw\0o\n"), "load",
         check=captions("one", "tw o")),
    Case("NUL bytes alone", table(bytes(5000)), "reject", "looks like UTF-16"),
    Case("10 MB in a caption", lambda folder: table(HEAD + f"a.png,one\nb.png,{LONG}\n")(folder),
         "skip", "line 3: a field has more than 1,000,000 letters; shorten it or leave .* out$"),
    Case("150 KB in a caption", table(HEAD + f"a.png,one\nb.png,{'x' * 150_000}\n"), "load",
         check=captions("one", "x" * 150_000)),
    Case("10 MB as a name of a column", lambda folder: table(f"image,{LONG}\na.png,one\n")(folder),
         "reject", "no usable first line: a field has more than 1,000,000 letters"),
    Case("10 MB in a path", lambda folder: jsonl(GOOD, GOOD.replace("a.png", LONG))(folder),
         "skip", r"line 2: .{300,900}\.\.\..{0,9} does not exist"),
    Case("NaN, None and null are words",
         table(HEAD + "a.png,NaN\nb.png,None\nc.png,null\n"), "load",
         check=captions("NaN", "None", "null")),
    Case("a word separator of no width", table(HEAD + "a.png,one\u200btwo\n"), "load",
         check=captions("one two")),
    Case("a caption of white space", table(HEAD + "a.png,one\nb.png, \u00a0\u200b\n"), "skip",
         "line 3 is empty or not a string"),
    Case("no path", table(HEAD + "a.png,one\n ,two\n"), "skip", "line 3 names no image"),
    Case("nothing but bad rows", table(HEAD + "x.png,one\ny.png,two\n"), "reject",
         r"x\.png does not exist"),
    Case("columns of other names", table("bild,worte\na.png,one\n", image="bild", text="worte"),
         "load", check=captions("one")),
    Case("a column misspelt", table(TWO, text="texd"), "reject",
         r"no column 'texd'; did you mean 'text'\?"),
    Case("two columns for the image", table("image,path,text\na.png,a.png,one\n"), "reject",
         "several could be .*give image='…'"),
    Case("a caption in two columns, and an image in two rows",
         table("image,text,more\na.png,one,two\na.png,two,three\n", text=["text", "more"]), "load",
         check=captions(["one", "two", "three"])),
    Case("a spreadsheet", table(b"PK\x03\x04\x14\x00\xff\xfe" * 90, "pairs.csv"), "reject",
         "zip archive.*save it as CSV"),
    # JSON lines
    Case("JSON lines", jsonl(GOOD, second('["one", "two"]')), "load",
         check=captions("a red one", ["one", "two"])),
    Case("a broken line", jsonl(GOOD, '{"image": "b.png", "te'), "skip", "line 2 is not one"),
    Case("a line that is no object", jsonl(GOOD, "[1, 2]"), "skip", "it is list, not an object"),
    Case("100,000 deep", jsonl(GOOD, second("[" * 100_000 + "]" * 100_000)), "skip",
         "line 2 .*nested too deep"),
    Case("a null caption", jsonl(GOOD, second("null")), "skip", "not a string: .*None"),
    Case("a number for a caption", jsonl(GOOD, second("7")), "skip", "not a string: .*7"),
    Case("a NaN for a caption", jsonl(GOOD, second("NaN")), "skip", "not a string: .*nan"),
    Case("an object for a caption", jsonl(GOOD, second('{"en": "x"}')), "skip", "not a string"),
    Case("no caption in the list", jsonl(GOOD, second("[]")), "skip", "line 2 is empty"),
    Case("a number for a path", jsonl(GOOD, GOOD.replace('"a.png"', "3")), "skip", "no image: 3"),
    Case("a key that is missing", jsonl(GOOD, '{"text": "two"}'), "skip", "no image: None"),
    Case("half a letter in a caption", jsonl(GOOD, second('"h\\ud83dalf"')), "load",
         check=captions("a red one", "h?alf")),
    Case("half a letter in a path", jsonl(GOOD, GOOD.replace("a.png", "\\ud83d/\\udc80.png")),
         "skip", r"\\ud83d/\\udc80\.png does not exist"),
    Case("a JSON array", table('[\n{"image": "a.png",\n"text": "one"}\n]\n', "pairs.json"),
         "load", check=captions("one")),
    Case("a JSON array with a number", table(f"[{GOOD}, 7]", "pairs.json"), "skip",
         "entry 2 is int, not an object"),
    Case("a JSON array of numbers", table("[1, 2]", "pairs.json"), "reject",
         r"which column holds the image\?.*\(columns: none\); give image='…'$"),
    Case("a JSON object over several lines",
         table('{\n"image": "a.png",\n"text": "one"\n}', "p.json"), "reject",
         r"p.json is one JSON value \(dict\), not JSON lines; write one object per line"),
    Case("a JSON object with rows in it", table(f'{{"rows": [{GOOD}]}}', "p.json"), "reject",
         "is one JSON value"),
    Case("one row of JSON, with a list of objects",
         jsonl(GOOD[:-1] + ', "boxes": [{"x": 1}]}'), "load", check=captions("a red one")),
    Case("COCO's annotations as a table",
         table(json.dumps({"images": [{"id": 1}], "annotations": []}), "captions_val2017.json"),
         "reject", r"COCO captions; take mm.from_coco\('.*captions_val2017.json', folder\)"),
    Case("COCO's annotations as a table, indented",
         table(json.dumps({"images": [{"id": 1}], "annotations": []}, indent=1), "c.json"),
         "reject", "COCO captions; take mm.from_coco"),
    Case("Karpathy's splits as a table",
         table(json.dumps({"images": [{"sentences": []}]}), "dataset_flickr30k.json"),
         "reject", "Karpathy's splits; take mm.from_flickr30k"),
    Case("JSON lines without an image's column", jsonl('{"bild": "a.png", "text": "x"}'), "reject",
         r"columns: 'bild', 'text'\); give image='…'$"),
    Case("a key that the first row lacks",
         jsonl(GOOD, second('"two"')[:-1] + ', "artist": "M"}', meta="artist"), "load",
         check=metadata("artist", None, "M")),
    Case("a blank caption among others",
         table("image,c1,c2\na.png,one,\nb.png, ,two\n", text=["c1", "c2"]), "load",
         check=blanks(2, "one", "two")),
    Case("None and a number among others", jsonl(GOOD, second('["x", null, " "]')), "load",
         check=blanks(2, "a red one", "x")),
    Case("a number among captions", jsonl(GOOD, second('["x", 7]')), "skip", "not a string"),
]
# fmt: on


# ---- paths ---------------------------------------------------------------------------------------


def put(inside: Path, name: str) -> None:
    path = inside / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(one_colour("PNG", colour=BLUE))


def outside(inside: Path) -> None:
    put(inside.parent, "secret.png")
    (inside / "link.png").symlink_to(inside.parent / "secret.png")
    (inside / "up").symlink_to(inside.parent)


def loop(inside: Path) -> None:
    (inside / "loop.png").symlink_to("loop.png")


IS_BLUE = shows(BLUE)
OUT = "outside the folder|leads to .*secret.png, outside"

# fmt: off
PATHS = [
    Case("in a folder below", row("x/y/z.png", lambda f: put(f, "x/y/z.png")), "load",
         check=IS_BLUE),
    Case("back slashes", row(r"x\y\z.png", lambda f: put(f, "x/y/z.png")), "load", check=IS_BLUE),
    Case("white space", row(" my  pic.png ", lambda f: put(f, "my  pic.png")), "load",
         check=IS_BLUE),
    Case("a name with white space at its ends", row(" d.png", lambda f: put(f, " d.png")), "load",
         check=IS_BLUE),
    Case("composed letters in the table, not on the disk",
         row("é.png", lambda f: put(f, unicodedata.normalize("NFD", "é.png"))), "load",
         check=IS_BLUE),
    Case("composed letters on the disk, not in the table",
         row(unicodedata.normalize("NFD", "é.png"), lambda f: put(f, "é.png")), "load",
         check=IS_BLUE),
    Case("a link within", row("link.png", lambda f: (f / "link.png").symlink_to("c.png")), "load",
         check=IS_BLUE),
    Case(".. that stays within", row("x/../c.png", lambda f: (f / "x").mkdir()), "load",
         check=IS_BLUE),
    Case(".. that leaves", row("../secret.png", outside), "skip", OUT),
    Case("a link that leaves", row("link.png", outside), "skip", OUT),
    Case("a folder that is a link and leaves", row("up/secret.png", outside), "skip", OUT),
    Case("an absolute path", row("/etc/hostname"), "skip",
         "leads to /etc/hostname, outside /.*root='/etc'"),
    Case("a link to itself", row("loop.png", loop), "skip", "loop.png does not exist"),
    Case("a home folder", row("~/d.png"), "skip", "does not exist"),
    Case("a web address", row("https://example.org/d.png"), "skip", "download first"),
    Case("data: with an image", row("data:image/png,AAAA"), "skip", "is not a file"),
    Case("a folder", row("x", lambda f: (f / "x").mkdir()), "skip", "x is not a file"),
    Case("the folder itself", row("."), "skip", "is not a file"),
    Case("a pipe", row("pipe.png", lambda f: os.mkfifo(f / "pipe.png")), "skip", "is not a file"),
    Case("a device", row("zero.png", lambda f: (f / "zero.png").symlink_to("/dev/zero"), root="/"),
         "skip", "/dev/zero is not a file"),
    Case("NUL in a path", row("d\0.png"), "skip", "holds control characters"),
    Case("a very long name", row("d" * 5000 + ".png"), "skip", "does not exist"),
    Case("nothing there", row("d.png"), "skip",
         r"line 3: .*d\.png does not exist; is root='…' the folder of the images\?"),
]
# fmt: on
