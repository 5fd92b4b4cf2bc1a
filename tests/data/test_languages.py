"""Captions in any script, tokenizers of every kind, one model that is searched in two languages."""

import unicodedata

import pytest
import torch

import mmkit as mm
from mmkit.data.openmoji.drawings import read_table
from mmkit.data.openmoji.names import LANGUAGES, caption
from mmkit.data.partners import correct_pairs, partner_counts
from mmkit.data.tokenizer import (
    encode_texts,
    is_subword,
    special_ids,
    tokenizer_from_state,
    tokenizer_state,
    train_wordpiece,
    unk_rate,
)
from mmkit.masking.plan import draw_maskings
from mmkit.models.encoder import MultimodalEncoder

CAPTIONS = {
    "en": "a small cat sleeps",
    "de": "die größte Straße im Süden",
    "fr": "un garçon élève à Noël",
    "zh": "猫在睡觉",
    "ja": "カバンの中のがっこう",
    "th": "แมวกำลังนอนหลับ",
    "ar": "قطة صغيرة نائمة",
    "he": "חתול קטן",
    "hi": "हिन्दी में बिल्ली",
    "ko": "자는 고양이",
    "vi": "con mèo đang ngủ",
    "emoji": "a red ❤️ and 👩‍🚒 at work",
}
TEXTS = list(CAPTIONS.values())
BERT_NAMES = dict(
    unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
)
ROBERTA_NAMES = dict(
    unk_token="<unk>", pad_token="<pad>", cls_token="<s>", sep_token="</s>", mask_token="<mask>"
)


# ---- tokenizers of other kinds -------------------------------------------------------------------


def around(raw, ends=(), **names):
    """A Hugging Face tokenizer around one of the `tokenizers` library; ends: first, last token."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if ends:
        ids = [(token, raw.token_to_id(token)) for token in ends]
        form = f"{ends[0]} $A {ends[1]}"
        raw.post_processor = processors.TemplateProcessing(form, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def cased_wordpiece():
    """Like that of multilingual BERT: no lower-casing, accents kept."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    special = list(BERT_NAMES.values())
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    return around(raw, ("[CLS]", "[SEP]"), **BERT_NAMES)


def unigram():
    """Like that of XLM-R: SentencePiece, no spaces needed, four special tokens first."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        unk_token="<unk>",
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    return around(raw, ("<s>", "</s>"), **ROBERTA_NAMES)


def byte_level(special=(), ends=(), **names):
    """Like those of RoBERTa and GPT-2: any text is bytes, so that nothing is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXTS, trainer)
    return around(raw, ends, **names)


def roberta():
    return byte_level(ROBERTA_NAMES.values(), ("<s>", "</s>"), **ROBERTA_NAMES)


def gpt2():
    end = "<|endoftext|>"
    return byte_level([end], unk_token=end, bos_token=end, eos_token=end)


def padded_gpt2():
    tokenizer = gpt2()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return tokenizer


KINDS = {
    "trained here": lambda: train_wordpiece(TEXTS),
    "cased WordPiece": cased_wordpiece,
    "Unigram": unigram,
    "RoBERTa": roberta,
    "GPT-2 with a pad": padded_gpt2,
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param, KINDS[request.param]()


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


def bare(text: str) -> str:
    """What a round trip must keep: all but blanks (Chinese gets some), joiners and case."""
    kept = (c for c in text if unicodedata.category(c)[0] not in "ZC" and c != "\ufe0f")
    return unicodedata.normalize("NFC", "".join(kept)).lower()


def test_captions_in_any_script_come_back(kind):
    """Chinese, Japanese, Thai without spaces, right to left, combining vowels, emoji."""
    name, tokenizer = kind
    assert unk_rate(tokenizer, TEXTS) == 0
    input_ids, valid = encode_texts(tokenizer, TEXTS, 97)
    for row, inside, text in zip(input_ids, valid, TEXTS, strict=True):
        decoded = tokenizer.decode(row[inside], skip_special_tokens=True)
        assert bare(decoded) == bare(text)
        if name in ("RoBERTa", "GPT-2 with a pad"):  # bytes keep everything
            assert decoded == text
    assert (input_ids[~valid] == tokenizer.pad_token_id).all()


def test_saved_as_text_they_are_the_same_tokenizer(kind):
    _, tokenizer = kind
    other = tokenizer_from_state(tokenizer_state(tokenizer))
    masked = [*TEXTS, f"a {tokenizer.mask_token or 'cat'} here"]
    one, two = tokenizer(masked)["input_ids"], other(masked)["input_ids"]
    assert one == two
    assert [tokenizer.decode(ids) for ids in one] == [other.decode(ids) for ids in two]
    assert special_ids(tokenizer).tolist() == special_ids(other).tolist()
    assert torch.equal(is_subword(tokenizer), is_subword(other))


def test_an_encoder_of_any_kind_ignores_padding_and_hides_words_alone(kind):
    _, tokenizer = kind
    model = small_model(tokenizer)
    with torch.no_grad():
        together = mm.embed_texts(model, TEXTS)
        alone = torch.cat([mm.embed_texts(model, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone)
    input_ids, valid = encode_texts(tokenizer, TEXTS, 97)
    count = len(TEXTS)
    ids = torch.arange(count)
    batch = mm.Batch(torch.zeros(count, 3, 15, 15, dtype=torch.uint8), input_ids, valid, ids)
    for masker in ("random", "whole_word", "block"):
        _, masking = draw_maskings(batch, model.token_info, text=(masker, 0.6), seed=0, epoch=0)
        assert masking.mask.any()
        ends = torch.isin(input_ids, special_ids(tokenizer))
        assert not (masking.mask & (ends | ~valid)).any()
        assert (valid & ~ends & ~masking.mask).any(1).all()  # a token stays visible


def test_a_tokenizer_that_cannot_pad_says_what_to_do():
    tokenizer = gpt2()
    with pytest.raises(ValueError, match=r"no padding token.*add_special_tokens"):
        encode_texts(tokenizer, TEXTS, 97)
    with pytest.raises(ValueError, match="no padding token"):
        MultimodalEncoder.preset("tiny", tokenizer=tokenizer)


def test_pooling_by_the_first_token_needs_one_that_is_no_word():
    with pytest.raises(ValueError, match="use pooling='mean'"):
        small_model(padded_gpt2(), pooling="cls")
    small_model(roberta(), pooling="cls")


def test_one_token_for_unknown_and_end_is_never_masked():
    """GPT-2 has one token for all roles; as an end token it must not be drawn."""
    tokenizer = padded_gpt2()
    assert special_ids(tokenizer).tolist() == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    trained = train_wordpiece(TEXTS)
    assert trained.unk_token_id not in special_ids(trained)


# ---- what cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["a small cat"], 0),
        (["small 犬"], 1 / 6),  # a Chinese character is a word
        (["small zebra"], 1 / 2),  # z is not in the captions, so that the word is lost
        (["zzz", "cat"], 1 / 2),  # over all texts together
        (["zzzzz \n\u200d"], 1),  # blanks and joiners do not count
        ([" "], 0),
    ],
)
def test_what_a_wordpiece_cannot_read_is_counted_in_signs(texts, expected):
    """By hand: signs of words that became [UNK], which are single tokens however long the word."""
    tokenizer = train_wordpiece(["a small cat"])
    assert unk_rate(tokenizer, texts) == pytest.approx(expected)


def test_what_is_dropped_without_a_trace_counts_too():
    """BPE without bytes and without an unknown token drops letters; accents are also dropped."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    raw = Tokenizer(models.BPE())
    raw.train_from_iterator(["abab"], trainers.BpeTrainer(show_progress=False))
    assert unk_rate(around(raw), ["abxa"]) == pytest.approx(1 / 4)
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "ก": 1, "##น": 2, "e": 3}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()  # lower-cases and strips accents, as uncased BERT
    assert unk_rate(around(raw), ["กิน"]) == pytest.approx(1 / 3)
    assert unk_rate(around(raw), ["é"]) == 0
    assert unk_rate(around(raw), ["x"]) == 1  # the wrapper has no unk_token of its own


@pytest.mark.parametrize("make", [unigram, cased_wordpiece])
def test_captions_of_another_script_are_told(make):
    tokenizer = make()
    assert unk_rate(tokenizer, ["Это русский текст", "Ελληνικά"]) == 1
    assert 0 < unk_rate(tokenizer, ["a cat, русский"]) < 1
    assert unk_rate(roberta(), ["Это русский текст"]) == 0


def test_bad_input_is_refused_in_words():
    tokenizer = train_wordpiece(TEXTS)
    for texts in ([], "one text"):
        with pytest.raises(ValueError, match="at least one text"):
            unk_rate(tokenizer, texts)
    with pytest.raises(ValueError, match=r"vocab_size=20 does not hold .* which take \d+ tokens"):
        train_wordpiece(TEXTS, 20)
    with pytest.raises(ValueError, match="language='xx' is not known; choose from en, es"):
        mm.openmoji(language=["en", "xx"])
    with pytest.raises(ValueError, match="is not known"):
        mm.openmoji(language=[])


# ---- a vocabulary for many languages -------------------------------------------------------------


def test_one_vocabulary_for_fourteen_languages_spells_no_language_out():
    """Thousands of letters once filled the vocabulary: an English name took 25 tokens."""
    stems = [entry["codepoints"] for entry in read_table()[::4]]
    texts = {name: [caption(stem, name) for stem in stems] for name in LANGUAGES}
    everything = [text for names in texts.values() for text in names]
    tokenizer = train_wordpiece(everything)
    assert unk_rate(tokenizer, everything) == 0
    for name, captions in texts.items():
        alone = encode_texts(train_wordpiece(captions), captions, 97)[1].sum()
        together = encode_texts(tokenizer, captions, 97)[1].sum()
        assert together < 1.6 * alone, name
    for text, ids in zip(everything, tokenizer(everything)["input_ids"], strict=True):
        assert bare(tokenizer.decode(ids, skip_special_tokens=True)) == bare(text)


def test_chinese_characters_have_no_twin_that_never_occurs():
    """BERT's normalizer makes each of them a word, so that "##猫" would be a wasted token."""
    vocabulary = train_wordpiece(["猫在睡觉", "a cat"]).get_vocab()
    assert "猫" in vocabulary and "##猫" not in vocabulary and "##a" in vocabulary


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
