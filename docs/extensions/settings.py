"""Tables of settings and flags, read from the source.

`{settings} optimizer`: the fields of `TrainingConfig` under a heading of its source.
`{flags} Source`: the fields of the dataclass that several commands share.
`{flags} search`: the arguments of a command.
`{presets}`: the sizes of the presets.
"""

import dataclasses
import inspect
import re

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from mmkit.cli import commands, source_flags
from mmkit.config import TrainingConfig
from mmkit.models.presets import PRESETS

from .fields import fields_of

COMMANDS = {
    "inspect": commands.inspect_,
    "train": commands.train,
    "evaluate": commands._evaluate,
    "search": commands.search,
    "export": commands.export,
}
Row = tuple[str, str, str]  # name, default, meaning


def _inline(text: str) -> nodes.Node:
    """Text, or code: between backticks, or a --flag."""
    code = text.strip("`")
    return nodes.literal(code, code) if text.startswith(("`", "--")) else nodes.Text(text)


def _table(header: tuple[str, ...], rows: list, code_columns: int) -> nodes.table:
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=1) for _ in header]
    for part, lines in ((nodes.thead(), [header]), (nodes.tbody(), rows)):
        for line in lines:
            row = nodes.row()
            for column, text in enumerate(line):
                code = isinstance(part, nodes.tbody) and column < code_columns and text
                texts = [f"`{text}`"] if code else re.split(r"(`[^`]+`|--[a-z-]+)", text)
                row += nodes.entry("", nodes.paragraph("", "", *map(_inline, texts)))
            part += row
        group += part
    return nodes.table("", group, classes=["settings"])


def flag_of(name: str) -> str:
    """The flag of an argument."""
    return f"--{name.replace('_', '-')}"


def arguments_of(command: str) -> list[Row]:
    """The flags of a command, without the settings and the source that it shares with others."""
    function = COMMANDS[command]
    doc = inspect.getdoc(function).partition("Args:\n")[2]
    rows = []
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(getattr(parameter.annotation, "__origin__", None)):
            continue  # a table of its own
        meaning = re.search(rf"(?m)^    {name}: (.*(?:\n      .*)*)", doc)[1]
        required = parameter.default is inspect.Parameter.empty
        default = "" if required else _plain(parameter.default)
        positional = "Positional" in str(parameter.annotation)
        shown = name.upper() if positional else flag_of(name)
        rows.append((shown, default, " ".join(meaning.split())))
    return rows


def _plain(default) -> str:
    return f'"{default}"' if isinstance(default, str) else str(default)


class Settings(SphinxDirective):
    """A table of the fields under one heading of `TrainingConfig`."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        """A table; an error for a heading that the class does not have."""
        found = [f for f in fields_of(TrainingConfig) if f.heading.startswith(self.arguments[0])]
        if not found:
            raise self.error(f"TrainingConfig has no heading {self.arguments[0]!r}")
        rows = [(f.name, f.default, f.comment) for f in found]
        return [_table(("field", "default", "meaning"), rows, code_columns=2)]


class Flags(SphinxDirective):
    """A table of the flags of a command, or of those that commands share."""

    required_arguments = 1

    def run(self):
        """A table; an error for an unknown command."""
        name = self.arguments[0]
        if name == "Source":
            fields = fields_of(source_flags.Source)
            rows = [(flag_of(f.name), f.default, f.comment) for f in fields]
        elif name in COMMANDS:
            rows = arguments_of(name)
        else:
            raise self.error(f"mmkit has no command {name!r}")
        return [_table(("flag", "default", "meaning"), rows, code_columns=2)]


class Presets(SphinxDirective):
    """A table of the presets: sizes of the images, the towers and the common space."""

    def run(self):
        """A table."""
        header = ("preset", "image, patch", "ViT: width × depth, heads",
                  "BERT: width × depth, heads, length", "common space")  # fmt: skip
        rows = []
        for name, size in PRESETS.items():
            towers = ["{} × {}, {}".format(*size[tower]) for tower in ("vit", "bert")]
            text = f"{towers[1]}, {size['length']}"
            sides = f"{size['image']}, {size['patch']}"
            rows.append((name, sides, towers[0], text, str(size["embed_dim"])))
        return [_table(header, rows, code_columns=1)]


def setup(app):
    """Register the directives."""
    app.add_directive("settings", Settings)
    app.add_directive("flags", Flags)
    app.add_directive("presets", Presets)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
