"""The built-in images at 32 px, rendered once for all of these tests."""

import pytest

from mmkit.data.openmoji.images import SPLITS, openmoji, render
from tests.data.openmoji.table import PARTS, TABLE


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def pixels(cache):
    """Every distinct image at 32 px, the size at which identity is decided."""
    return render([entry["codepoints"] for entry in TABLE], 32, cache)


@pytest.fixture(scope="session")
def sets(cache, pixels):
    """{split: {part: dataset}} at the size that is already rendered."""
    made = {}
    tokenizer = None
    for split in SPLITS:
        made[split] = dict(
            zip(PARTS, openmoji(32, split, "en", "cpu", tokenizer, cache), strict=True)
        )
        tokenizer = made[split]["train"].tokenizer
    return made
