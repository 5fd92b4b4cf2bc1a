"""An encoder with a tokenizer of any kind, and one model that is searched in two languages."""

import pytest
import torch

import mmkit as mm
from mmkit.data.openmoji.drawings import read_table
from mmkit.data.openmoji.names import LANGUAGES, caption
from mmkit.data.partners import correct_pairs, partner_counts
from mmkit.data.tokenizer import (
    encode_texts,
    special_ids,
    train_wordpiece,
    unk_rate,
)
from mmkit.masking.plan import draw_maskings
from mmkit.models.encoder import MultimodalEncoder
from tests.data import tokenizer_kinds as kinds


def small_model(tokenizer, **options):
    from transformers import BertConfig, ViTConfig

    tower = dict(hidden_size=22, num_hidden_layers=2, num_attention_heads=2, intermediate_size=31)
    torch.manual_seed(0)
    return MultimodalEncoder(
        ViTConfig(image_size=15, patch_size=5, **tower),
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=97, **tower),
        tokenizer,
        embed_dim=13,
        **options,
    ).eval()


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_an_encoder_of_any_kind_ignores_padding_and_hides_words_alone(kind):
    tokenizer = kinds.KINDS[kind]()
    model = small_model(tokenizer)
    with torch.no_grad():
        together = mm.embed_texts(model, kinds.TEXTS)
        alone = torch.cat([mm.embed_texts(model, [text]) for text in kinds.TEXTS])
    torch.testing.assert_close(together, alone)
    input_ids, valid = encode_texts(tokenizer, kinds.TEXTS, 97)
    count = len(kinds.TEXTS)
    ids = torch.arange(count)
    batch = mm.Batch(torch.zeros(count, 3, 15, 15, dtype=torch.uint8), input_ids, valid, ids)
    for masker in ("random", "whole_word", "block"):
        _, masking = draw_maskings(batch, model.token_info, text=(masker, 0.6), seed=0, epoch=0)
        assert masking.mask.any()
        ends = torch.isin(input_ids, special_ids(tokenizer))
        assert not (masking.mask & (ends | ~valid)).any()
        assert (valid & ~ends & ~masking.mask).any(1).all()  # a token stays visible


def test_pooling_by_the_first_token_needs_one_that_is_no_word():
    with pytest.raises(ValueError, match="use pooling='mean'"):
        small_model(kinds.padded_gpt2(), pooling="cls")
    small_model(kinds.roberta(), pooling="cls")


def test_bad_input_is_refused_in_words():
    tokenizer = train_wordpiece(kinds.TEXTS)
    for texts in ([], "one text"):
        with pytest.raises(ValueError, match="at least one text"):
            unk_rate(tokenizer, texts)
    with pytest.raises(ValueError, match=r"vocab_size=20 does not hold .* which take \d+ tokens"):
        train_wordpiece(kinds.TEXTS, 20)
    with pytest.raises(ValueError, match="language='xx' is not known; choose from en, es"):
        mm.openmoji(language=["en", "xx"])
    with pytest.raises(ValueError, match="is not known"):
        mm.openmoji(language=[])


# ---- images named in several languages ---------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def both(cache):
    """Train, val, test with English and German captions, at 32 px."""
    return mm.openmoji(32, language=["en", "de"], cache_dir=cache)


def test_each_image_has_its_names_in_every_language_the_first_one_canonical(both, cache):
    train = both[0]
    english, german = (mm.openmoji(32, language=name, cache_dir=cache)[0] for name in ("en", "de"))
    table = read_table()
    for row, texts in zip(english.sample_ids.tolist(), english.texts, strict=True):
        stems = [table[row]["codepoints"], *table[row]["same_as"].split()]
        assert texts == list(dict.fromkeys(map(caption, stems)))  # one language: unchanged
    for mixed, *single in zip(train.texts, english.texts, german.texts, strict=True):
        assert mixed == list(dict.fromkeys(single[0] + single[1]))
    assert [texts[0] for texts in train.texts] == [texts[0] for texts in english.texts]
    swapped = mm.openmoji(32, language=("de", "en"), cache_dir=cache)[2]
    assert swapped[0]["text"] == swapped.texts[0][0] != both[2].texts[0][0]
    twice = mm.openmoji(32, language=["en", "de", "en"], cache_dir=cache)[0]
    assert twice.texts == train.texts
    row = train.texts.index(["a lemon", "zitrone"])
    drawn = train.batch([row] * 2, torch.tensor([0.1, 0.9])).input_ids  # training draws either one
    decoded = [train.tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    assert decoded == ["a lemon", "zitrone"]


def test_a_word_that_means_different_things_makes_no_false_negative(cache):
    """Indonesian "pil" is a pill, Turkish "pil" a battery.

    It is correct for both images, but the other captions of the one are not correct for the other.
    """
    train = mm.openmoji(32, language=LANGUAGES, cache_dir=cache)[0]
    flat = [text for texts in train.texts for text in texts]
    _, _, first, counts = train.encoded_captions()
    rows = [row for row, texts in enumerate(train.texts) if "pil" in texts]
    assert len(rows) == 2
    for row, other in (rows, rows[::-1]):
        own = range(int(first[row]), int(first[row] + counts[row]))
        captions, images = train.partners([other], torch.tensor(own))
        shared = correct_pairs(images, captions)[0].tolist()
        assert [flat[j] for j, found in zip(own, shared, strict=True) if found] == ["pil"]
    captions, images = train.partners()
    of_images, of_captions = partner_counts(images, captions)
    assert (of_captions > 1).float().mean() < 0.02  # 22 images share a caption with another
    assert torch.equal(of_images.sum(), of_captions.sum()) and train.common_captions() == []


def test_a_german_query_finds_what_its_english_twin_finds(both, cache, tmp_path):
    """One model, one vocabulary, two languages: by chance one of 94 images would be found."""
    from transformers import BertConfig, ViTConfig

    train = both[0].subset(range(0, 2811, 30))
    config = mm.TrainingConfig(
        num_epochs=20, batch_size=24, learning_rate=2e-3, matrix_learning_rate=6e-3,
        image_mask_ratio=0.0, warmup_steps=10, mixed_precision="no",
        output_dir=str(tmp_path),
    )  # fmt: skip
    tower = dict(hidden_size=64, num_attention_heads=2, intermediate_size=128)
    words = dict(vocab_size=len(train.tokenizer), max_position_embeddings=32)
    torch.manual_seed(0)
    model = MultimodalEncoder(
        ViTConfig(image_size=32, patch_size=8, num_hidden_layers=2, **tower),
        BertConfig(num_hidden_layers=1, **words, **tower),
        train.tokenizer,
        embed_dim=64,
    )
    trainer = mm.MaskedMultimodalTrainer(config, train, model=model)
    trainer.net.train()
    for epoch in range(config.num_epochs):  # not `fit`, which writes a checkpoint per epoch
        for keys in trainer.epoch_batches(epoch):
            trainer.train_step(train.batch(*keys), epoch)
            trainer.step += 1
    index = mm.Index(model.eval(), train)
    found = {
        name: [index.search(texts[position], 1)[0].row for texts in train.texts]
        for name, position in (("en", 0), ("de", -1))
    }
    rows = range(len(train))
    for name, hits in found.items():  # 0.82 and 0.85 when this was written
        assert sum(map(int.__eq__, hits, rows)) > 0.5 * len(train), name
    assert sum(map(int.__eq__, found["en"], found["de"])) > 0.5 * len(train)
    german = mm.openmoji(32, language="de", cache_dir=cache)[0].subset(range(0, 2811, 30))
    assert mm.mean_recall(mm.evaluate(model, german), 1) > 0.5  # one language is scored by itself
