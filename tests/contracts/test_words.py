"""One term, one meaning: the words that the field does not use are gone from code and prose."""

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXEMPT = {  # files about the older names themselves
    "CHANGELOG.md",
    "mmkit/older_names.py",
    "tests/test_older_names.py",
    "tests/contracts/golden.py",
    "tests/contracts/golden_cases.py",
    "tests/contracts/golden_names.json",
    "tests/contracts/test_words.py",
    "tests/contracts/test_layout.py",
}
WORDS = {
    "image": r"picture",
    "reconstruct, Reconstruction": r"put(s|ting)?[ _-]back|PutBack",
    "token": r"\bword[ -_]?pieces?\b(?<!wordpiece)|\bpieces? of (a|the|its|each) caption",
    "micro-batch": r"\bpieces? of (a|the|each) batch",
    "masked, visible": r"\b(hidden|seen)[ _](patch|token|word|pixel)|(atches|okens|ords)_hidden",
    "mim_, mlm_, itm_": r"\b(pixels|words|matching)_(weight|schedule|accuracy|perplexity)",
    "context": r"\bsees ?=|\bSEES\b",
    "weight matrices": r"hidden matri",
    "reference line, baseline, at random": r"yardstick|copycat|\bby lot\b",
    "padding": r"\bfillers?\b",
    "rank_and_world_size …": r"my_share|gather_rows|sum_over_processes|send_to_all|around_the_ring",
    "EMA, unfreeze, eval_mode …": r"RunningMean|\bthaw|\bat_rest\b|\bWanted\b|\bas_seen\b",
    "token_frequency …": r"piece_frequency|continues_word|maskable_words|unknown_share",
    "training run, backward pass …": r"\btrainings\b|optimizers?'? memory|\bthe way back\b",
    "metadata": r"\bfacts=",
}
OLDER = re.compile(r"@?older_(functions|arguments|attributes)\([^()]*\)")
# what a user's own files may say, and the folder of earlier releases
DATA = re.compile(r'"picture"|[("|]pictures\?|filepath picture|"put_back"|"pictures"')


def files():
    found = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kinds = {".py", ".md", ".ipynb", ".js", ".css"}
    return [n for n in found.stdout.split() if Path(n).suffix in kinds and n not in EXEMPT]


def text_of(name: str) -> str:
    text = (ROOT / name).read_text()
    if name.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
    return OLDER.sub("", text)


@pytest.mark.parametrize("better", WORDS)
def test_older_words_are_gone(better):
    found = []
    for name in files():
        for line in text_of(name).split("\n"):
            if re.search(WORDS[better], DATA.sub("", line)):
                found.append(f"{name}: {line.strip()}")
    assert not found, f"{len(found)} places should say “{better}”:\n" + "\n".join(found)
