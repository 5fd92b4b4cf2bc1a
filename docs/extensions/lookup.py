"""Find a number in a result file or in the printed output of a committed notebook.

    .1f equal_time > rows > masked=0.5, seconds=10 > mean

is a format and a path: the file equal_time.json, in mmkit/results or tests/benchmarks/results, then
its keys. In a
list, `name=value, …` picks the one entry that agrees, and a number counts from 0; `max`, `min`,
`mean` and `plus_minus` (half of the 95 % interval of the mean, Student's t) are those of its
numbers; `first 0.45` is, in a list of (x, y), the first x whose y is that high, or nothing. A
format may start with a factor: `100*.0f`.

    .1f 06_many_processes > naive, 8 micro-batches .* -([0-9.]+) ±

is a format, a notebook and a regular expression with one group, searched in what the notebook
printed when it was last run.
"""

import functools
import json
import re
import statistics
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "mmkit/results", ROOT / "tests/benchmarks/results")


def _plus_minus(values: list[float]) -> float:
    """Half of the 95 % interval of a mean, by Student's t."""
    n = len(values)
    return float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5


_OF_LISTS = {"max": max, "min": min, "mean": statistics.fmean, "plus_minus": _plus_minus}


def path_of(name: str) -> Path:
    """The result file of that name; KeyError if there is none."""
    for folder in RESULTS:
        if (path := folder / f"{name}.json").exists():
            return path
    raise KeyError(f"no result file {name}.json")


@functools.cache
def result_file(name: str) -> Any:
    """The content of NAME.json, in mmkit/results or tests/benchmarks/results."""
    return json.loads(path_of(name).read_text())


@functools.cache
def printed(notebook: str) -> str:
    """What the cells of a notebook printed, texts in Markdown included."""
    cells = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = [o.get("text") or o.get("data", {}).get("text/markdown", "") for o in outputs]
    return "\n".join("".join(text) for text in texts)


def _agrees(entry: dict, condition: str) -> bool:
    key, _, wanted = condition.partition("=")
    found = entry.get(key.strip())
    if isinstance(found, int | float):
        return found == float(wanted)
    return str(found) == wanted.strip()


def _step(value: Any, step: str) -> Any:
    """One step down; KeyError that says what there is instead."""
    if isinstance(value, list) and step in _OF_LISTS:
        return _OF_LISTS[step](value)
    if isinstance(value, list) and step.startswith("first "):
        return next((x for x, y in value if y >= float(step[6:])), None)
    if isinstance(value, list) and "=" in step:
        found = [x for x in value if all(_agrees(x, part) for part in step.split(", "))]
        if len(found) != 1:
            raise KeyError(f"{step!r} fits {len(found)} of {len(value)} entries")
        return found[0]
    if isinstance(value, list):
        return value[int(step)]
    if not isinstance(value, dict) or step not in value:
        there = list(value) if isinstance(value, dict) else value
        raise KeyError(f"no {step!r} in {there}")
    return value[step]


def value_at(path: str) -> Any:
    """The value at `file > key > key …`."""
    name, *steps = path.split(" > ")
    value = result_file(name)
    for step in steps:
        value = _step(value, step)
    return value


def shown(value: Any, how: str) -> str:
    """The value in a format, such as `.1f`, `100*.0f` or `s`; a dash for None."""
    if value is None:
        return "–"
    factor, star, spec = how.rpartition("*")
    if star:
        value = float(factor) * value
    text = format(value, spec)
    return text.replace("-", "−") if isinstance(value, float) else text


def number(text: str) -> str:
    """`format file > key > …` as the page shows it."""
    how, path = text.split(" ", 1)
    return shown(value_at(path), how)


def printed_number(text: str) -> str:
    """`format notebook > regular expression` as the page shows it."""
    how, rest = text.split(" ", 1)
    notebook, pattern = rest.split(" > ", 1)
    match = re.search(pattern, printed(notebook), re.M)
    if match is None:
        raise KeyError(f"notebook {notebook} printed nothing like {pattern!r}")
    return shown(match[1] if how == "s" else float(match[1]), how)


def machine(name: str) -> str:
    """The machine of a result file: processor, cores, PyTorch, date."""
    m = result_file(name)["machine"]
    torch = str(m["torch"]).split("+")[0]
    text = f"{m['cpu']}, {m['cores']} cores, PyTorch {torch}, {m['date']}"
    return text + (f", restricted to {m['capability']}" if "capability" in m else "")
