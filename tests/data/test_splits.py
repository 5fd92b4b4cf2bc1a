"""Parts share nothing and depend only on the content; `overlap` reports what is shared."""

from collections import Counter

import numpy as np
import pytest
import torch

from mmkit import MultimodalDataset, openmoji
from mmkit.data.duplicates import signatures
from mmkit.data.image_duplicates import near_duplicates
from mmkit.data.splits import class_prompts, overlap, split
from tests.data.photographs import as_pixels, brighter, jpeg, photographs, smaller

PARTS = ("train", "val", "test")


def scenes(count=60, seed=0):
    """Patterns of 4 x 4 colours at 32 px: different images with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(20, 230, (count, 3, 4, 4), generator=generator)
    pixels = coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (pixels + torch.randint(0, 5, pixels.shape, generator=generator)).byte()


def texts_for(count):
    return [f"scene number {i}" for i in range(count)]


def doubled(tokenizer, count=60, **options):
    """Every scene twice, the second copy a little brighter; all captions differ."""
    first = scenes(count)
    second = (first.float() * 1.03 + 2).clamp(0, 255).byte()
    return MultimodalDataset.from_pixels(
        torch.cat([first, second]), texts_for(2 * count), tokenizer=tokenizer, **options
    )


def part_of(parts):
    """{caption: part}."""
    return {
        part.texts[i][0]: name
        for name, part in zip(PARTS, parts, strict=True)
        if part is not None
        for i in range(len(part))
    }


def test_a_random_split_leaks_and_the_one_by_near_does_not(tokenizer):
    data = doubled(tokenizer)
    rows = np.random.default_rng(0).permutation(120)
    leak = overlap(data.subset(rows[:90]), data.subset(rows[90:]))
    in_both = sum((row + 60) % 120 in rows[:90] for row in rows[90:])
    assert leak and leak.near == in_both > 10 and leak.exact == 0 and leak.captions == 0
    for a, b in leak.examples["near"]:
        assert (rows[a] - rows[90 + b]) % 60 == 0
    train, val, test = split(data, val=0.2, test=0.2)
    assert len(train) + len(val) + len(test) == 120
    for a, b in ((train, val), (train, test), (val, test)):
        found = overlap(a, b)
        assert not found and found.near == found.exact == found.captions == 0, str(found)
        assert str(found) == "No overlap of training and test found."
    by_content = split(data, val=0, test=0.3, by="content")
    assert overlap(by_content[0], by_content[2]), "only near-duplicates tell these apart"


def test_photographs_saved_again_stay_with_the_original(tokenizer):
    images = photographs(96)
    changed = [p for change in (jpeg, brighter, smaller) for p in map(change, images)]
    changed = [p.resize((96, 96)) for p in changed]
    pixels = as_pixels([*images, *changed])
    data = MultimodalDataset.from_pixels(pixels, texts_for(len(pixels)), tokenizer=tokenizer)
    part = part_of(split(data, 0.3, 0.3, seed=next_seed(data)))
    for i in range(len(pixels)):
        assert part[f"scene number {i}"] == part[f"scene number {i % len(images)}"]
    assert set(part.values()) == set(PARTS)


def next_seed(data):
    """The first seed that leaves no part of a tiny set empty."""
    for seed in range(50):
        try:
            split(data, 0.3, 0.3, seed=seed)
            return seed
        except ValueError:
            continue
    raise AssertionError("every seed leaves a part empty")


@pytest.mark.parametrize("by", ["near", "content", "scene"])
def test_order_and_names_move_nothing(tokenizer, by):
    meta = [{"scene": f"s{i % 60 // 2}"} for i in range(120)]
    data = doubled(tokenizer, meta=meta)
    before = part_of(split(data, by=by, val=0.2, test=0.2))
    order = np.random.default_rng(1).permutation(120)
    renamed = MultimodalDataset.from_pixels(
        data._take(order),
        [data.texts[i] for i in order],
        sample_ids=range(1000, 1120),
        tokenizer=tokenizer,
        meta=[{"file": "other", **meta[i]} for i in order],
    )
    assert part_of(split(renamed, by=by, val=0.2, test=0.2)) == before
    other = part_of(split(data, by=by, val=0.2, test=0.2, seed=1))
    assert sum(other[key] != before[key] for key in before) > 20


def test_more_images_move_only_what_they_join(tokenizer):
    first = scenes(60)
    extra = torch.cat([scenes(40, seed=1), brightened(first[:5])])
    small = MultimodalDataset.from_pixels(first, texts_for(60), tokenizer=tokenizer)
    pixels = torch.cat([extra, first])
    words = [f"extra {i}" for i in range(45)] + texts_for(60)
    large = MultimodalDataset.from_pixels(pixels, words, tokenizer=tokenizer)
    before, after = (part_of(split(data, 0.2, 0.2)) for data in (small, large))
    moved = [i for i in range(60) if before[words[45 + i]] != after[words[45 + i]]]
    assert set(moved) <= set(range(5))
    for i in range(5):
        assert after[f"extra {40 + i}"] == after[f"scene number {i}"]


def brightened(pixels):
    return (pixels.float() + 3).clamp(0, 255).byte()


def test_a_column_holds_groups_together_and_near_images_too(tokenizer):
    meta = [{"artist": f"artist {i % 17}", "year": 1900 + i} for i in range(60)]
    meta += [{"artist": f"copyist {i}", "year": 2000} for i in range(60)]
    data = doubled(tokenizer, meta=meta)
    parts = split(data, 0.2, 0.2, by="artist")
    seen = [{metadata["artist"] for metadata in part.meta} for part in parts]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    part = part_of(parts)
    assert all(part[f"scene number {i}"] == part[f"scene number {i + 60}"] for i in range(60))


def test_shares_come_near_what_was_asked(tokenizer):
    pixels = torch.randint(0, 256, (2000, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    data = MultimodalDataset.from_pixels(pixels.byte(), texts_for(2000), tokenizer=tokenizer)
    sizes = [len(part) for part in split(data, 0.1, 0.2, by="content")]
    assert sizes == pytest.approx([1400, 200, 400], abs=60)  # three standard deviations
    train, val, test = split(data, 0, 0.2, by="content")
    assert val is None and len(train) + len(test) == 2000


def test_a_shared_caption_joins_but_a_class_prompt_does_not(tokenizer):
    pixels = scenes(60)
    data = MultimodalDataset.from_pixels(pixels, texts_for(58) + ["Scene number 0!"] * 2)
    part = split(data, 0.2, 0.2)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert overlap(part[a], part[b]).captions == 0
    classes = [f"a photo of a {name}" for name in ("cat", "dog", "owl", "bee", "ant", "cow")]
    data = MultimodalDataset.from_pixels(pixels, [classes[i % 6] for i in range(60)])
    train, _, test = split(data, 0, 0.3)
    found = overlap(train, test)
    assert found.class_prompts and found.captions == len(test) and not found
    assert "caption" not in str(found)
    assert {c for (c,) in train.texts} == set(classes), "every class is trained on"
    train, _, test = split(data, 0, 0.4, by="caption", seed=1)
    assert not {c for (c,) in train.texts} & {c for (c,) in test.texts}


def test_a_category_leaves_something_to_divide(tokenizer):
    """A title and a category: a caption of half of the images joins no rows, one of two does."""
    words = [[f"scene number {i - i % 2}", "red" if i % 3 else "blue"] for i in range(60)]
    data = MultimodalDataset.from_pixels(scenes(60), words, tokenizer=tokenizer)
    parts = split(data, 0.2, 0.2)
    assert all(len(part) >= 2 for part in parts)
    titles = [{texts[0] for texts in part.texts} for part in parts]
    assert sum(map(len, titles)) == 30
    for part in parts[1:]:
        found = overlap(parts[0], part)
        assert found.captions == 0 and not found


def test_the_remedy_fits_what_joins(tokenizer):
    chain = [[f"caption {i}", f"caption {i + 1}"] for i in range(9)]
    data = MultimodalDataset.from_pixels(scenes(9), chain, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"1 groups .* leave captions out that many"):
        split(data)
    near = MultimodalDataset.from_pixels(
        torch.cat([scenes(1), brightened(scenes(1))] * 9), texts_for(18), tokenizer=tokenizer
    )
    with pytest.raises(ValueError, match=r"1 groups .*, or by='content', which joins less"):
        split(near)


def test_class_prompts_are_few_and_shared():
    assert class_prompts([[f"class {i % 3}"] for i in range(30)])
    assert class_prompts([[f"a photo of {i % 3}", f"a drawing of {i % 3}"] for i in range(30)])
    assert not class_prompts([[f"image {i}"] for i in range(30)])
    assert not class_prompts([[f"image {i // 2}"] for i in range(30)])
    assert not class_prompts([["the same"], ["the same"]])


def test_the_tokenizer_is_trained_on_the_training_part_alone(tokenizer):
    pixels, words = scenes(60), [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60)]
    data = MultimodalDataset.from_pixels(pixels, words, name="set")
    train, val, test = split(data, 0.2, 0.2)
    assert data._tokenizer is None, "no tokenizer of all captions was trained on the way"
    assert train.tokenizer is val.tokenizer is test.tokenizer
    vocabulary = train.tokenizer.get_vocab()
    assert all(text in vocabulary for (text,) in train.texts)
    assert not any(text in vocabulary for (text,) in test.texts)
    assert not train.given_tokenizer and (train.name, test.name) == ("set-train", "set-test")
    given = MultimodalDataset.from_pixels(pixels, words, tokenizer=tokenizer)
    parts = split(given, 0.2, 0.2)
    assert all(part.tokenizer is tokenizer and part.given_tokenizer for part in parts)


def test_hashes_of_files_are_taken_where_there_are_any(tokenizer):
    """A data set that hashes its files is decoded neither for by="content" nor for near=False."""

    class OfFiles(MultimodalDataset):
        resident = property(lambda self: False)

        def content_hashes(self):
            return [f"file {i // 2}" for i in self._rows]

        def _take(self, rows, noise=None):
            raise AssertionError("decoded")

    data = OfFiles.from_pixels(scenes(60), texts_for(60), tokenizer=tokenizer)
    part = part_of(split(data, 0.2, 0.2, by="content"))
    assert all(part[f"scene number {i}"] == part[f"scene number {i ^ 1}"] for i in range(60))
    quick = overlap(data.subset(range(11)), data.subset(range(11, 60)), near=False)
    assert quick.exact == 1 and quick.examples["exact"] == [(10, 0)] and quick.near is None
    by_hand = split(data, 0.2, 0.2, by="content", hashes=[b"%d" % (i % 20) for i in range(60)])
    assert Counter(part_of(by_hand)[f"scene number {i}"] for i in range(0, 60, 20)).total() == 3


def test_a_warning_has_numbers_rows_and_a_remedy(tokenizer):
    pixels = scenes(20)
    train = MultimodalDataset.from_pixels(pixels[:15], texts_for(15), tokenizer=tokenizer)
    test_pixels = torch.cat([pixels[15:], pixels[2:3], brightened(pixels[7:9])])
    words = [*texts_for(20)[15:], "new", "SCENE number 7", "other"]
    test = MultimodalDataset.from_pixels(test_pixels, words, tokenizer=tokenizer)
    found = overlap(train, test, names=("training", "validation"))
    assert (found.exact, found.near, found.captions, bool(found)) == (1, 2, 1, True)
    said = str(found)
    assert "1 of 8 validation images (12.5 %) are also in training" in said
    assert "2 of 8 validation images (25.0 %) are near-duplicates" in said
    assert "validation row = training row: 6 = 7, 7 = 8" in said and "mm.split" in said
    assert overlap(train, test, near=False).exact == 1


def test_near_groups_of_drawings_stay_whole():
    data = openmoji(device="cpu")[0].subset(range(0, 2800, 2))
    parts = split(data, 0.2, 0.2)
    part = part_of(parts)
    group = near_duplicates(signatures(data))
    sides = [{part[data.texts[i][0]] for i in np.flatnonzero(group == g)} for g in set(group)]
    assert all(len(side) == 1 for side in sides) and len(group) > len(sides) + 20


def test_what_cannot_be_split_is_said_in_words(make_data):
    data = make_data(23)
    with pytest.raises(ValueError, match=r"val=0.6 and test=0.4 must .* less than 1"):
        split(data, 0.6, 0.4)
    with pytest.raises(ValueError, match=r"by='artist' is not in meta; the data set has no meta"):
        split(data, by="artist")
    with pytest.raises(ValueError, match="3 hashes for 23 images"):
        split(data, hashes=["a"] * 3)
    same = MultimodalDataset.from_pixels(
        scenes(1).repeat(9, 1, 1, 1), texts_for(9), tokenizer=data.tokenizer
    )
    with pytest.raises(
        ValueError, match=r"(val|test|train) would be empty: 9 images form 1 groups"
    ):
        split(same)
    data.meta = [{"artist": "a", "year": 1} for _ in range(23)]
    with pytest.raises(ValueError, match="its keys are artist, year"):
        split(data, by="painter")
    data.meta[4], data.meta[6] = {"artist": float("nan")}, {"artist": None}
    with pytest.raises(ValueError, match="2 of 23 rows have no 'artist', the first is row 4"):
        split(data, by="artist")
