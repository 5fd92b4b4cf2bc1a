"""Where benchmarks write: what notebooks and the book read lies in the package, the rest here."""

from pathlib import Path

import mmkit.results

FOLDER = Path(__file__).with_name("results")
PUBLISHED = Path(mmkit.results.__file__).parent


def json_file(name: str, folder: Path = FOLDER) -> Path:
    """The file of a benchmark's results; in the package once it has been moved there."""
    published = PUBLISHED / f"{name}.json"
    return published if folder == FOLDER and published.exists() else folder / published.name
