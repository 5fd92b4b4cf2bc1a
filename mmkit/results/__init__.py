"""Measured results that notebooks and the book read. Each names the machine it was measured on.

`python -m tests.benchmarks.NAME`, in the repository, writes NAME.json here anew; "savings" is of
`tests.benchmarks.step_speed --savings`. The docstring of a benchmark says what its rows are.
"""

import json
from pathlib import Path
from typing import Any

from ..errors import nearest

__all__ = ["read"]


def read(name: str) -> dict[str, Any]:
    """Read measured results.

    Args:
        name: the benchmark that measured them, such as "race".
    Returns:
        "machine" and what the benchmark found.
    Raises:
        ValueError: there are no results of that name.
    Example:
        >>> mm.results.read("equal_time")["machine"]["cpu"]
        'AMD EPYC'
    """
    known = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.json"))}
    if name not in known:
        raise ValueError(f"there are no results {name!r}; {nearest(name, list(known))}")
    return json.loads(known[name].read_text(encoding="utf-8"))
