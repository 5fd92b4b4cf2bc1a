"""Numbers that are read from result files when the book is built, so that none is typed.

    {result}`.1f equal_time > rows > masked=0.5, seconds=10 > mean`     a role, see lookup.py
    {printed}`.1f 06_many_processes > naive, 8 .* -([0-9.]+) ±`         from a notebook's output

    ```{result-table} draw_masks
    :rows: maskers
    :key: masker
    Masker = label
    % of eight steps = .1f * > fraction of a
    ```

A row for each entry of `rows`, a list or a dict; `:key:` says by which keys the entries of a list
are named. `:only:` lists the names to show, `name = label`, one a line. A column is written
`header = format path`: `* > …` is a path in the row's entry, any other path starts at the file, and
`{row}` in it is the row's name. Two of them with ± between give one cell.

    ```{measured} equal_time
    python -m tests.benchmarks.equal_time
    ```

says by which command and on which machine a file was measured.
"""

from typing import ClassVar, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective, SphinxRole

from . import lookup


def _fault(where, text: str, error: Exception) -> str:
    return f"{where}: {text!r}: {error.args[0] if error.args else error!r}"


class Number(SphinxRole):
    """A role for a number from a file."""

    def __init__(self, find, file_of):
        self.find, self.file_of = find, file_of

    def run(self):
        """The number as text, or an error of the build."""
        try:
            shown = self.find(self.text)
        except (KeyError, IndexError, ValueError, TypeError, OSError) as error:
            text = _fault(self.name, self.text, error)
            return [], [self.inliner.reporter.error(text, line=self.lineno)]
        self.env.note_dependency(self.file_of(self.text))
        return [nodes.inline(self.rawtext, shown, classes=["measured-number"])], []


class Measured(SphinxDirective):
    """The command and the machine of a result file, and the file to download."""

    required_arguments = 1
    has_content = True

    def run(self):
        """A paragraph."""
        name, path = self.arguments[0], lookup.path_of(self.arguments[0])
        self.env.note_dependency(str(path))
        paragraph = nodes.paragraph(classes=["measured"])
        command = " ".join(self.content)
        paragraph += [nodes.literal(command, command), nodes.Text(f" ({lookup.machine(name)}). ")]
        target = "/" + str(path.relative_to(lookup.ROOT))
        link = addnodes.download_reference("", "", reftarget=target, refdoc=self.env.docname)
        link += nodes.literal("", path.name)
        paragraph += [nodes.Text("All numbers: "), link]
        return [paragraph]


class ResultTable(SphinxDirective):
    """A table whose rows are the entries of a result file."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar = {
        "rows": directives.unchanged_required,
        "key": directives.unchanged,
        "only": directives.unchanged,
    }

    def run(self):
        """A table, or an error of the build."""
        self.env.note_dependency(str(lookup.path_of(self.arguments[0])))
        try:
            return [_table(*self.cells())]
        except (KeyError, IndexError, ValueError, TypeError, OSError) as error:
            raise self.error(_fault(self.name, self.arguments[0], error)) from error

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """(headers, rows of texts)."""
        columns = [line.partition(" = ")[::2] for line in self.content if line.strip()]
        table = [
            [row.label if what == "label" else self.cell(what, row) for _, what in columns]
            for row in self.rows()
        ]
        return [header for header, _ in columns], table

    def cell(self, column: str, row: "Row") -> str:
        """The text of a column, `format path` or two of them, in a row."""
        texts = []
        for part in column.split(" ± "):
            how, path = part.split(" ", 1)
            if path.startswith("* > "):
                path = f"{self.options['rows']} > {row.step}{path[1:]}"
            path = f"{self.arguments[0]} > {path.replace('{row}', row.name)}"
            texts.append(lookup.shown(lookup.value_at(path), how))
        return "\u00a0±\u00a0".join(texts)

    def rows(self) -> list["Row"]:
        """The rows to show, in their order."""
        found = self.entries()
        if "only" not in self.options:
            return list(found.values())
        rows = []
        for line in filter(None, self.options["only"].splitlines()):
            name, _, label = (text.strip() for text in line.partition(" = "))
            row = found[name] if found else Row(name, name, name)
            rows.append(row._replace(label=label or name))
        return rows

    def entries(self) -> dict[str, "Row"]:
        """All rows by their names; {} without `:rows:`."""
        if "rows" not in self.options:
            return {}
        value = lookup.value_at(f"{self.arguments[0]} > {self.options['rows']}")
        if isinstance(value, dict):
            return {name: Row(name, name, name) for name in value}
        keys = self.options["key"].split(", ")
        names = [", ".join(str(entry[key]) for key in keys) for entry in value]
        return {name: Row(name, name, str(i)) for i, name in enumerate(names)}


class Row(NamedTuple):
    """A row of a table."""

    name: str
    label: str  # shown
    step: str  # to its entry, from `rows`


def _cell(text: str) -> nodes.entry:
    """A cell; numbers are set to the right."""
    number = text[:1] in "0123456789−–"
    return nodes.entry("", nodes.paragraph("", text), classes=["number"] if number else [])


def _table(headers: list[str], rows: list[list[str]]) -> nodes.table:
    group = nodes.tgroup(cols=len(headers))
    group += [nodes.colspec(colwidth=1) for _ in headers]
    for part, lines in ((nodes.thead(), [headers]), (nodes.tbody(), rows)):
        for line in lines:
            row = nodes.row()
            row += [_cell(text.replace(" %", "\u00a0%")) for text in line]
            part += row
        group += part
    return nodes.table("", group, classes=["result-table"])


def setup(app):
    """Register roles and directives."""
    file = lambda text: str(lookup.path_of(text.split(" ")[1]))  # noqa: E731
    notebook = lambda text: str(lookup.ROOT / f"notebooks/{text.split(' ')[1]}.ipynb")  # noqa: E731
    app.add_role("result", Number(lookup.number, file))
    app.add_role("printed", Number(lookup.printed_number, notebook))
    app.add_directive("measured", Measured)
    app.add_directive("result-table", ResultTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
