"""Do the values stay the same to the bit? Two checkouts of mmkit compute the same things.

    python -m tests.contracts.golden [COMMIT]

COMMIT: what this checkout is compared with; by default the last one in which mmkit was a flat
package. Both run tests/contracts/golden_cases.py on this machine: runs in one process and in two,
every loss, term and masker, a kill and a resume, retrieval, reconstruction, probe, export; and this
checkout goes on with runs that the other has begun. Keys that were renamed are compared through
golden_names.json, old -> new. Takes about five minutes.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("golden_cases.py")
NAMES = json.loads(Path(__file__).with_name("golden_names.json").read_text())


def git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def last_flat_commit() -> str:
    """The commit before mmkit/trainer.py went to its sub-package."""
    moved = git("log", "-1", "--format=%H", "--diff-filter=D", "--", "mmkit/trainer.py").strip()
    return f"{moved}^" if moved else "HEAD"


def unpack(commit: str, folder: Path) -> None:
    archive = subprocess.Popen(
        ["git", "archive", commit, "mmkit"], cwd=ROOT, stdout=subprocess.PIPE
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=True)
    assert archive.wait() == 0


def compute(checkout: Path, out: Path, *options: str) -> dict:
    """What one checkout computes, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(CASES), str(out), *options]
    subprocess.run(command, env=environment, cwd=out.parent, check=True)
    found = json.loads(out.read_text())
    assert Path(found.pop("version")) == checkout / "mmkit", "another mmkit was imported"
    return found


def renamed(key: str) -> str:
    """The new name of a key, as a whole or by its parts (gradient_cosine/image/pixels·words).

    A name that is written with a "/" is that of a part alone.
    """
    if key in NAMES or not (parts := re.split(r"([/·.])", key))[1:]:
        return NAMES.get(key, key)
    return "".join(NAMES.get(part, NAMES.get(f"/{part}", part)) for part in parts)


def differences(old, new, where: str = "") -> list[str]:
    """Places where two nested values differ, the old one's keys under their new names."""
    if isinstance(old, dict) and isinstance(new, dict):
        old = {renamed(key): value for key, value in old.items()}
        found = [f"{where}/{key}: only in one of them" for key in sorted(old.keys() ^ new.keys())]
        for key in old.keys() & new.keys():
            found += differences(old[key], new[key], f"{where}/{key}")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line
            for i, (a, b) in enumerate(zip(old, new, strict=True))
            for line in differences(a, b, f"{where}/{i}")
        ]
    same = (
        old == new or (isinstance(old, str) and renamed(old) == new) or (old != old and new != new)
    )
    return [] if same else [f"{where}: {str(old)[:80]} -> {str(new)[:80]}"]


def count(value) -> int:
    """How many values are compared."""
    if isinstance(value, dict | list):
        return sum(map(count, value.values() if isinstance(value, dict) else value))
    return 1


def main() -> int:
    commit = sys.argv[1] if len(sys.argv) > 1 else last_flat_commit()
    with tempfile.TemporaryDirectory() as temporary:
        before, left = Path(temporary, "before"), Path(temporary, "left")
        before.mkdir()
        unpack(commit, before)
        old = compute(before, Path(temporary, "old.json"), "--leave-in", str(left))
        new = compute(ROOT, Path(temporary, "new.json"), "--resume-from", str(left))
    for name in ("all terms", "attentive"):  # what the other has begun ends as if it had ended it
        old["runs"][f"{name}, begun by the other"] = old["runs"][f"{name}, killed and resumed"]
    found = differences(old, new)
    print(*found[:60], sep="\n")
    name = git("log", "-1", "--format=%h %s", commit).strip()
    print(f"{len(found)} of {count(old)} values differ from those of {name}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
