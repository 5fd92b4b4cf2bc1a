"""How much code there is: lines without docstrings, comments and blank lines (`make lint`).

    python -m tests.code_size

Fails where a file has more than 450 lines (all counted) or a function more than 60.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILE, FUNCTION = 450, 60  # lines at most
# What a newcomer reads, in this order.
SPINE = (
    "noise masking/core masking/image masking/plan models/patches models/encoder losses objective "
    "distributed training/step training/optim training/trainer evaluation/retrieval"
).split()
NOTHING = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(source: str) -> int:
    """Lines that hold code."""
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOTHING | {tokenize.ENDMARKER}:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0]
            if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str):
                found -= set(range(text.lineno, (text.end_lineno or 0) + 1))
    return len(found)


def too_long(path: Path) -> list[str]:
    """In words, what of a file is longer than it may be."""
    source, name = path.read_text(), path.relative_to(ROOT)
    lines, words = len(source.splitlines()), []
    if lines > FILE:
        words.append(f"{name} has {lines} lines, at most {FILE}")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > FUNCTION:
                words.append(f"{name}: {node.name} has {length} lines, at most {FUNCTION}")
    return words


def main() -> int:
    files = sorted((ROOT / "mmkit").rglob("*.py"))
    counts = {path: code_lines(path.read_text()) for path in files}
    spine = sum(counts[ROOT / "mmkit" / f"{name}.py"] for name in SPINE)
    print(f"mmkit: {sum(counts.values()):,} lines of code in {len(files)} files; ", end="")
    print(f"the {len(SPINE)} of the reading order: {spine:,}")
    found = [words for path in files for words in too_long(path)]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
