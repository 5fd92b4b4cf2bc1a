"""The derivation of the committed table `splits.csv`: which images are held out.

A random split of emoji leaks: "a woman firefighter with dark skin tone" is nearly the same image
as the one with medium skin tone, and a model that was trained on the one recognises the other
without having learnt anything. Therefore whole families are held out (`concept`), or whole
combinations of family, gender and tone (`compose`), and images that `mm.overlap` calls
near-duplicates stay on one side of both splits: of the 308 and 294 test images that names alone
would choose, it finds 62 and 15 in training. The table is committed so that the splits are the same
everywhere and at every image size;
`python -m tests.openmoji_splits` writes it anew, and a test compares.
Walk-through: notebooks/01_data.ipynb.
"""

import csv
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from mmkit.data import image_duplicates
from mmkit.data.clusters import connected
from mmkit.data.openmoji.drawings import TABLE, drawing_path
from mmkit.data.openmoji.images import render, stable_hash
from mmkit.data.openmoji.names import characters, names
from tests.openmoji_names import (
    TONES,
    base_name,
    english,
    gender,
    group,
    skeleton,
    tones,
    wording,
)

FIELDS = "codepoints same_as family gender tone split group subgroup captions".split()
NEAR_IDENTICAL = 0.5  # mean absolute difference out of 255, judged at 32 px
SIZES = 32, 96  # at which look-alikes are searched: thin lines fade in small images
MARGIN = 1.25  # factor on the limits of `mm.overlap`, which compares other sizes, rounded
_NOT_GUESSABLE = {"Flags", "Symbols", "Component"}  # groups that are always trained on


def _components(count: int, links: list[tuple[int, int]]) -> list[int]:
    """For each of `count` rows the first row that links connect it with."""
    _, first, group = np.unique(connected(count, links), return_index=True, return_inverse=True)
    return first[group].tolist()


def _links_by(keys: list[str]) -> list[tuple[int, int]]:
    """Links of every row with the first row of the same key."""
    first: dict[str, int] = {}
    return [(first.setdefault(key, row), row) for row, key in enumerate(keys)]


def near_identical(pixels: np.ndarray, limit: float = NEAR_IDENTICAL) -> list[tuple[int, int]]:
    """Pairs of rows of uint8 (N, 3, 32, 32) whose mean absolute difference is at most `limit`.

    Means over 8 x 8 blocks differ by at most as much as the pixels do, so comparing them first
    leaves few pairs to compare in full.
    """
    full = torch.from_numpy(np.array(pixels)).float()  # (N, 3, 32, 32)
    blocks = F.avg_pool2d(full, 8).flatten(1)  # (N, 48)
    bound = torch.cdist(blocks, blocks, p=1) / blocks.shape[1]
    a, b = torch.where(torch.triu(bound <= limit + 1e-3, diagonal=1))
    distance = (full[a] - full[b]).abs().flatten(1).mean(1)
    return torch.stack([a, b], 1)[distance <= limit].tolist()


def look_alikes(pixels: np.ndarray) -> set[tuple[int, int]]:
    """Pairs of rows of uint8 (N, 3, S, S) that look alike, directly or mirrored.

    The measure is that of `mm.overlap` with wider limits (`MARGIN`), so that images that differ
    here differ for it at every image size. It is computed in double precision, so that the result
    is the same on every machine.
    """
    full = torch.from_numpy(np.array(pixels)).double()
    signature, mirrored = map(image_duplicates.unrounded_signature, (full, full.flip(3)))
    coarse = image_duplicates.coarse_cells(signature)
    found = set()
    for other in (signature, mirrored):
        distance = torch.cdist(coarse, image_duplicates.coarse_cells(other))
        a, b = torch.where(torch.triu(distance <= MARGIN * image_duplicates.COARSE, diagonal=1))
        near = image_duplicates.is_near(signature[a], other[b], MARGIN * image_duplicates.NEAR)
        found |= set(zip(a[near].tolist(), b[near].tolist(), strict=True))
    return found


def _merge_identical(stems: list[str], pixels: np.ndarray) -> dict[str, list[str]]:
    """{emoji: the other emoji with the same image}, without those that are drawn wrongly.

    An emoji with a skin tone whose drawing equals the one without is wrong and left out. The most
    specific name (man rather than person), then the shortest one, comes first.
    """
    same = defaultdict(list)
    for stem, image in zip(stems, pixels, strict=True):
        same[image.tobytes()].append(stem)
    merged = {}
    for emoji in same.values():
        fewest = min(len(tones(stem)) for stem in emoji)
        right = [stem for stem in emoji if len(tones(stem)) == fewest]
        right.sort(key=lambda stem: (_vague(stem), len(base_name(stem)), stem))
        merged[right[0]] = right[1:]
    return dict(sorted(merged.items()))


def _vague(stem: str) -> bool:
    """Does the name not say who is in the image?"""
    return "person" in gender(stem) or gender(stem) == "" or base_name(stem) == "family"


def derive_splits(cache_dir: str | Path | None = None) -> list[dict[str, str]]:
    """Derive the committed table again from the packages: names, code points and images.

    1. Identical images at 32 px become one row. 2. Whole families (same wording or code points
    without person, tone and direction, or near-identical images) are held out for `concept` by a
    hash, unless they look like an image outside. 3. Of the rest, combinations of family, gender and
    tone are held out for `compose` by a rotating assignment. 4. Images that look alike but fall on
    different sides are moved to the same side.
    """
    stems = named_drawings()
    pixels = render(stems, 32, cache_dir)
    merged = _merge_identical(stems, pixels)
    kept = list(merged)
    row_of = {stem: row for row, stem in enumerate(stems)}
    near = near_identical(pixels[[row_of[stem] for stem in kept]])
    variants = _links_by([skeleton(s) for s in kept]) + _links_by([wording(s) for s in kept])
    family = [wording(kept[root]) for root in _components(len(kept), variants)]
    concept = _components(len(kept), variants + near)
    alike = sorted(set().union(*(look_alikes(render(kept, size, cache_dir)) for size in SIZES)))
    split = _hold_out_concepts(kept, concept)
    _train_on_look_alikes(split, concept, alike)
    gendered = {f for f, stem in zip(family, kept, strict=True) if gender(stem)}
    rows = [
        {
            "codepoints": stem,
            "same_as": " ".join(merged[stem]),
            "family": family[i],
            "gender": gender(stem) or ("person" if family[i] in gendered else ""),
            "tone": "+".join(tones(stem)),
            "split": split[i],
            "captions": "|".join(english(one) for one in [stem, *merged[stem]]),
        }
        for i, stem in enumerate(kept)
    ]
    _add_groups(rows)
    _hold_out_combinations(rows)
    _keep_together(rows, near + alike)
    return rows


def named_drawings() -> list[str]:
    """File names of all drawings of Unicode emoji with a name, without extras and logos."""
    stems = sorted(path.stem for path in drawing_path("").parent.glob("*.svg"))
    return [stem for stem in stems if characters(stem) in names("en")]


def _add_groups(table: list[dict[str, str]]) -> None:
    """Add Unicode's group and subgroup to every row; new emoji have those of their family."""
    own = [group(entry["codepoints"]) for entry in table]
    of_family = {
        entry["family"]: found for entry, found in zip(table, own, strict=True) if found[0]
    }
    full = [
        found if found[0] else of_family.get(entry["family"], found)
        for entry, found in zip(table, own, strict=True)
    ]
    for entry, (main, sub) in zip(table, full, strict=True):
        entry |= {"group": main, "subgroup": sub}


def _hold_out_concepts(stems: list[str], concept: list[int]) -> list[str]:
    """Assign whole concepts to concept_test and concept_val by a hash of their first code points.

    The number in the hash was chosen so that the fractions of images are closest to 8 % and 4 %
    without a family of more than 24 images, which would dominate the test.
    """
    always_train = {
        root for stem, root in zip(stems, concept, strict=True) if group(stem)[0] in _NOT_GUESSABLE
    }
    split = []
    for root in concept:
        chance = stable_hash("concept 78 " + skeleton(stems[root])) % 1000 / 1000
        held = "concept_test" if chance < 0.10 else "concept_val" if chance < 0.15 else "train"
        split.append("train" if root in always_train else held)
    return split


def _train_on_look_alikes(
    split: list[str], concept: list[int], alike: list[tuple[int, int]]
) -> None:
    """Move whole concepts that look like an image of another side to training, in place.

    This is repeated, since two concepts of one side may look alike: if one moves, both must.
    """
    while straddling := {concept[i] for a, b in alike if split[a] != split[b] for i in (a, b)}:
        for row, root in enumerate(concept):
            split[row] = "train" if root in straddling else split[row]


def _hold_out_combinations(rows: list[dict[str, str]]) -> None:
    """Assign some combinations of family, gender and tone to the compose parts, in place.

    Each family starts at its own tone and each gender shifts it, so that every family occurs in
    training with other tones and every tone with other families. Pairs of tones (a, b) shift by
    a + 2 b.
    """
    order, genders = list(TONES.values()), ["", "man", "woman", "person"]
    for row in rows:
        if row["split"] != "train" or not row["tone"]:
            continue
        tone = [order.index(name) for name in row["tone"].split("+")]
        who = [genders.index(name) for name in row["gender"].split("+")]
        start = stable_hash("compose " + row["family"]) % 10 + 2 * who[0] + sum(who[1:])
        turn = (start + tone[0] + 2 * sum(tone[1:])) % 5
        if turn == 0:
            row["split"] = "compose_test"
        elif turn == 2 and start // 5 % 2:  # half as many
            row["split"] = "compose_val"


def _keep_together(rows: list[dict[str, str]], alike: list[tuple[int, int]]) -> None:
    """Move images that look alike to the side where most of them are, in place.

    In a tie the test wins, then validation; but if one of the images has no tone and can therefore
    not be held out as a combination, all go to training. The images of one combination (a woman
    walking left, and right) move together.
    """
    combination = [
        f"{row['family']} {row['gender']} {row['tone']}" if row["tone"] else f"row {i}"
        for i, row in enumerate(rows)
    ]
    together = defaultdict(list)
    for row, root in zip(rows, _components(len(rows), alike + _links_by(combination)), strict=True):
        together[root].append(row)
    for members in together.values():
        count = Counter(row["split"] for row in members)
        side = max(("compose_test", "compose_val", "train"), key=lambda name: count[name])
        if len(count) > 1:
            held_out = all(row["tone"] for row in members)
            for row in members:
                row["split"] = side if held_out else "train"


def write_table(rows: list[dict[str, str]]) -> None:
    """Write what `derive_splits` returns over the committed table."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    write_table(derive_splits())
