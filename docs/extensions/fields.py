"""The comments beside the fields of a dataclass, as text: their meaning stands only there."""

import ast
import inspect
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass

_HEADING = re.compile(r"-- (.*?) -+$")


@dataclass
class Field:
    """A field of a dataclass, as it stands in the source."""

    name: str
    annotation: str
    default: str  # "" = required
    comment: str  # above it, or behind it in the same line
    heading: str  # of the part of the class that it stands in, such as "optimizer"


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Line number -> (comment, whether it has the line to itself)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.lstrip("# ").strip(), alone)
    return found


def fields_of(cls: type) -> list[Field]:
    """The fields in their order, each with its comment."""
    source = textwrap.dedent(inspect.getsource(cls))
    body = next(n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)).body
    comments, found, heading, last = _comments(source), [], "", body[0].lineno
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            last = node.end_lineno or node.lineno
            continue
        lines = []
        for line in range(last + 1, node.lineno):
            text, alone = comments.get(line, ("", False))
            if match := _HEADING.match(text):
                heading, lines = match[1], []
            elif alone:
                lines.append(text)
        if node.end_lineno in comments:
            lines.append(comments[node.end_lineno][0])
        default = "" if node.value is None else ast.unparse(node.value).replace("'", '"')
        found.append(
            Field(node.target.id, ast.unparse(node.annotation), default, " ".join(lines), heading)
        )
        last = node.end_lineno or node.lineno
    return found
