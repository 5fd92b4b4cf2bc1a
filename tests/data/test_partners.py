"""A caption is correct for the images that have it, and for no others: against slow loops."""

import pytest
import torch

from mmkit import MultimodalDataset
from mmkit.data.partners import correct_pairs, partner_counts, very_common
from tests.relation import IDS, TABLE, matrix


def slow_partners(data, rows, which):
    """(B, B): row j's caption is one of the captions of rows that show i's image."""
    same = data.content_hashes()
    read = [  # as the model reads them
        [tuple(data.tokenizer(c, truncation=True, max_length=data.max_length)["input_ids"])
         for c in captions]
        for captions in data.texts
    ]  # fmt: skip
    own = [{c for j in range(len(data)) if same[j] == same[i] for c in read[j]} for i in rows]
    drawn = [read[j][k] for j, k in zip(rows, which, strict=True)]
    return [[caption in captions for caption in drawn] for captions in own]


def test_a_partner_is_one_of_the_captions_of_an_image(files, tmp_path):
    """Against a slow loop: chains, an image given twice and saved twice, case, cut captions."""
    (tmp_path / "copy.png").write_bytes(files[2].read_bytes())
    texts = [["a flag", "b"], ["b", "c"], "c", ["A  Flag", "four five six seven"], "five",
             "four five six eight", "seven", "again two halves", "of a copy"]  # fmt: skip
    whole = MultimodalDataset([*files, files[1], tmp_path / "copy.png"], texts, image_size=13)
    rows, noise = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]), torch.linspace(0, 0.99, 8)
    shown = 0
    for data in (whole, whole.encoded_by(whole.tokenizer, 5), whole.subset(range(8, -1, -1))):
        for draws in (noise, noise.flip(0), None):
            batch = data.batch(rows, draws)
            which = [0 if draws is None else int(draws[k] * len(data.texts[row]))
                     for k, row in enumerate(rows)]  # fmt: skip
            correct = batch.correct()
            assert correct.tolist() == slow_partners(data, rows.tolist(), which)
            shown += int((correct != correct.T).sum())
            in_parts = [part.correct() for part in batch.split(3)]
            assert torch.equal(in_parts[1], correct[3:6, 3:6])
    assert shown, "no relation in one direction only"
    chain = MultimodalDataset(files[:3], [["a", "b"], ["b", "c"], "c"], image_size=13)
    captions, images = chain.partners()
    assert correct_pairs(images, captions).int().tolist() == [
        [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]
    ]  # fmt: skip


def test_very_common_captions_are_counted(make_data):
    """Counted by images, most common first; the lost negatives of a batch against a slow loop."""
    data = make_data(113, tokenizer=None)
    data.texts = [["Photo", f"thing {i}"] + ["rare"] * (i < 7) for i in range(113)]
    assert data.common_captions() == [("Photo", 113)]
    found = [very_common(count, 113) for count in (1, 9, 10)]
    assert found == [False, False, True]
    assert [very_common(count, 10_000) for count in (99, 100, 101)] == [False, False, True]
    _, _, first, counts = data.encoded_captions()
    pairs = correct_pairs(*data.partners()[::-1]).double()
    total = 0.0
    for i in range(113):
        for j in range(113):
            own = slice(int(first[j]), int(first[j] + counts[j]))
            total += float(pairs[i, own].mean()) if i != j else 0.0
    assert data.correct_captions.left_out() == pytest.approx(total / (113 * 112))


def test_the_relation_is_that_of_a_loop():
    """It is not symmetric, so that an exchange of the two directions would show."""
    assert torch.equal(correct_pairs(TABLE, IDS), matrix(IDS, TABLE))
    assert torch.equal(correct_pairs(TABLE[:3], IDS[4:]), matrix(IDS[4:], TABLE[:3]))
    assert not torch.equal(matrix(IDS, TABLE), matrix(IDS, TABLE).T)
    of_images, of_captions = partner_counts(TABLE, IDS)
    assert torch.equal(of_images, matrix(IDS, TABLE).sum(1))
    assert torch.equal(of_captions, matrix(IDS, TABLE).sum(0))
