"""Captions in any script survive encoding and decoding, and tokenizers survive a checkpoint."""

import itertools
import random
import time

import pytest
import torch

from mmkit.data.openmoji.drawings import read_table
from mmkit.data.openmoji.names import LANGUAGES, caption
from mmkit.data.tokenizer import (
    encode_texts,
    is_subword,
    special_ids,
    token_counts,
    tokenizer_from_state,
    tokenizer_state,
    train_wordpiece,
    unk_rate,
)
from mmkit.models.encoder import MultimodalEncoder
from tests.data import tokenizer_kinds as kinds

TEXTS = ["a red house", "an old blue boat", "the flag of France"]


def test_captions_come_back():
    tokenizer = train_wordpiece(TEXTS)
    input_ids, valid = encode_texts(tokenizer, TEXTS, 32)
    decoded = [tokenizer.decode(row, skip_special_tokens=True) for row in input_ids]
    assert decoded == [text.lower() for text in TEXTS]
    assert valid.sum(1).tolist() == [5, 6, 6]
    assert input_ids.tolist()[0][0] == tokenizer.cls_token_id


def test_another_process_trains_the_same_ids():
    """Hash maps have another seed in each process; the vocabulary must not depend on it."""
    import json
    import subprocess
    import sys

    code = f"import json, mmkit; print(json.dumps(mmkit.train_wordpiece({TEXTS}).get_vocab()))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(other.stdout) == train_wordpiece(TEXTS).get_vocab()


def test_training_does_not_depend_on_the_order_of_captions():
    a, b = train_wordpiece(TEXTS), train_wordpiece(TEXTS[::-1] + TEXTS)
    assert a.get_vocab() == b.get_vocab()


def test_long_captions_are_cut_and_end_with_their_end_token():
    tokenizer = train_wordpiece(TEXTS)
    input_ids, valid = encode_texts(tokenizer, ["a red house " * 9], 11)
    assert input_ids.shape == (1, 11) and valid.all()
    assert input_ids[0, -1] == tokenizer.sep_token_id


def test_a_tokenizer_that_pads_on_the_left_is_told_not_to():
    """Batches cut padding on the right; with padding on the left they would cut the tokens."""
    tokenizer = train_wordpiece(TEXTS)
    right = encode_texts(tokenizer, TEXTS, 32)
    tokenizer.padding_side = "left"
    left = encode_texts(tokenizer, TEXTS, 32)
    assert left[0].tolist() == right[0].tolist() and left[1].tolist() == right[1].tolist()


def test_saved_as_text_and_read_back():
    tokenizer = train_wordpiece(TEXTS)
    other = tokenizer_from_state(tokenizer_state(tokenizer))
    words = ["a RED boat", "unknown wörds", ""]
    assert tokenizer(words)["input_ids"] == other(words)["input_ids"]
    assert special_ids(tokenizer).tolist() == special_ids(other).tolist()
    assert tokenizer.unk_token_id not in special_ids(tokenizer)


def words_of(tokenizer, text):
    """The tokens of a text, grouped by word."""
    goes_on, words = is_subword(tokenizer), []
    for i in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if not goes_on[i]:
            words.append([])
        words[-1] += tokenizer.convert_ids_to_tokens([i])
    return words


def test_tokens_of_one_word_are_known_as_such():
    """Joining the tokens of each word gives the words of the text, without marks."""
    tokenizer = train_wordpiece(TEXTS)
    text = "an old redboat of francehouses"
    tokens = words_of(tokenizer, text)
    assert max(map(len, tokens)) > 2
    assert ["".join(word).replace("##", "") for word in tokens] == text.split()
    assert is_subword(tokenizer).shape == (len(tokenizer),)
    assert not is_subword(tokenizer)[special_ids(tokenizer)].any()
    mixed = train_wordpiece([*TEXTS, "\u2581 and \u0120 are words here"])  # marks of other kinds
    assert ["".join(w).replace("##", "") for w in words_of(mixed, text)] == text.split()


@pytest.mark.parametrize("mark", ["\u2581", "\u0120"])
def test_tokenizers_that_mark_where_words_begin(mark):
    """SentencePiece and byte-level BPE mark the beginnings of words instead: the same words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = (
        pre_tokenizers.Metaspace()
        if mark == "\u2581"
        else pre_tokenizers.ByteLevel(add_prefix_space=True)
    )
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    text = "an old redboat of francehouses"
    tokens = words_of(tokenizer, text)
    assert max(map(len, tokens)) > 2
    assert ["".join(word) for word in tokens] == [mark + word for word in text.split()]


def test_a_sentence_without_spaces_is_not_one_unknown_word():
    """Kana and Thai have no spaces; by default WordPiece gives up at 100 letters."""
    for sentence in ("かなのぶんしょう" * 20, "ภาษาไทยไม่มีช่องว่าง" * 12):
        tokenizer = train_wordpiece([sentence, "short"])
        assert len(sentence) > 100 and unk_rate(tokenizer, [sentence]) == 0
        again = tokenizer_from_state(tokenizer_state(tokenizer))
        assert unk_rate(again, [sentence]) == 0


SPELLED = ["a [MASK] red [PAD] house", "[SEP]", "[[CLS]] [UNK]s", "the <s>flag</s> of [mask]"]


def unigram():
    """Like that of XLM-R: its special tokens are in the vocabulary of the model itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    letters = sorted({*"".join(SPELLED), "\u2581"} - {" "})
    raw = Tokenizer(models.Unigram([(name, 0.0) for name in [*special, *letters]], unk_id=3))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    roles = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=raw, **dict(zip(roles, special, strict=True)))


@pytest.mark.parametrize("make", [lambda: train_wordpiece([*TEXTS, *SPELLED]), unigram])
def test_special_tokens_that_a_caption_spells_are_letters(make):
    """Only end tokens and padding have special ids; every letter is decoded again."""
    tokenizer = make()
    special = {*special_ids(tokenizer).tolist(), tokenizer.unk_token_id}
    input_ids, valid = encode_texts(tokenizer, SPELLED, 97)
    counts = token_counts(tokenizer, SPELLED)
    for text, row, inside, count in zip(
        SPELLED, input_ids.tolist(), valid.tolist(), counts, strict=True
    ):
        ids = list(itertools.compress(row, inside))
        assert len(ids) == count and ids[0] in special and ids[-1] in special
        assert not special & {*ids[1:-1]}, text
        back = tokenizer.decode(ids[1:-1]).replace(" ", "").replace("\u2581", "")
        assert back.casefold() == text.replace(" ", "").casefold()
    assert unk_rate(tokenizer, SPELLED) == 0


def test_tokens_are_counted_and_encoded_as_the_whole_text_would_be():
    """Word by word, and only from the beginning where that is the same."""
    draw = random.Random(0)
    words = (
        "a red-brown house, of an old... 'blue' boat & \u200d #7 b\u00fccher \u4e2d\u6587".split()
    )
    tokenizer = train_wordpiece([*TEXTS, "b\u00fccher, #7 & ... -"])
    texts = [" ".join(draw.choices(words, k=k)) for k in (1, 2, 5, 11, 23, 47, 97, 211)]
    texts += ["& " * 97 + "house", "\u200d " * 97 + "house", "a  house"]
    whole = tokenizer(texts)["input_ids"]
    assert token_counts(tokenizer, texts) == [len(ids) for ids in whole]
    for most in (5, 13, 31):
        input_ids, valid = encode_texts(tokenizer, texts, most)
        cut = tokenizer(texts, truncation=True, max_length=most)["input_ids"]
        assert [row[inside].tolist() for row, inside in zip(input_ids, valid, strict=True)] == cut


def test_a_caption_of_many_words_takes_time_in_proportion():
    """300,000 words: a tenth of a second each on a quiet machine; quadratic time is hours."""
    text = " ".join(random.Random(0).choices(TEXTS[0].split() + TEXTS[1].split(), k=300_007))
    tokenizer = train_wordpiece(TEXTS)
    started = time.process_time()
    assert unk_rate(tokenizer, [text]) == 0
    assert token_counts(tokenizer, [text]) == [300_009]
    assert encode_texts(tokenizer, [text], 32)[0].shape == (1, 32)
    assert time.process_time() - started < 2


def test_bad_input_is_refused_in_words():
    with pytest.raises(ValueError, match="0 captions"):
        train_wordpiece([])
    with pytest.raises(ValueError, match="cannot be read"):
        tokenizer_from_state({"json": "{", "special_tokens": {}})


# ---- tokenizers of other kinds -------------------------------------------------------------------


@pytest.fixture(scope="module", params=kinds.KINDS)
def kind(request):
    return request.param, kinds.KINDS[request.param]()


def test_captions_in_any_script_come_back(kind):
    """Chinese, Japanese, Thai without spaces, right to left, combining vowels, emoji."""
    name, tokenizer = kind
    assert unk_rate(tokenizer, kinds.TEXTS) == 0
    input_ids, valid = encode_texts(tokenizer, kinds.TEXTS, 97)
    for row, inside, text in zip(input_ids, valid, kinds.TEXTS, strict=True):
        decoded = tokenizer.decode(row[inside], skip_special_tokens=True)
        assert kinds.bare(decoded) == kinds.bare(text)
        if name in ("RoBERTa", "GPT-2 with a pad"):  # bytes keep everything
            assert decoded == text
    assert (input_ids[~valid] == tokenizer.pad_token_id).all()


def test_saved_as_text_they_are_the_same_tokenizer(kind):
    _, tokenizer = kind
    other = tokenizer_from_state(tokenizer_state(tokenizer))
    masked = [*kinds.TEXTS, f"a {tokenizer.mask_token or 'cat'} here"]
    one, two = tokenizer(masked)["input_ids"], other(masked)["input_ids"]
    assert one == two
    assert [tokenizer.decode(ids) for ids in one] == [other.decode(ids) for ids in two]
    assert special_ids(tokenizer).tolist() == special_ids(other).tolist()
    assert torch.equal(is_subword(tokenizer), is_subword(other))


def test_a_tokenizer_that_cannot_pad_says_what_to_do():
    tokenizer = kinds.gpt2()
    with pytest.raises(ValueError, match=r"no padding token.*add_special_tokens"):
        encode_texts(tokenizer, kinds.TEXTS, 97)
    with pytest.raises(ValueError, match="no padding token"):
        MultimodalEncoder.preset("tiny", tokenizer=tokenizer)


def test_one_token_for_unknown_and_end_is_never_masked():
    """GPT-2 has one token for all roles; as an end token it must not be drawn."""
    tokenizer = kinds.padded_gpt2()
    assert special_ids(tokenizer).tolist() == [tokenizer.eos_token_id, tokenizer.pad_token_id]
    trained = train_wordpiece(kinds.TEXTS)
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
    assert unk_rate(kinds.around(raw), ["abxa"]) == pytest.approx(1 / 4)
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "ก": 1, "##น": 2, "e": 3}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer()  # lower-cases and strips accents, as uncased BERT
    assert unk_rate(kinds.around(raw), ["กิน"]) == pytest.approx(1 / 3)
    assert unk_rate(kinds.around(raw), ["é"]) == 0
    assert unk_rate(kinds.around(raw), ["x"]) == 1  # the wrapper has no unk_token of its own


@pytest.mark.parametrize("make", [kinds.unigram, kinds.cased_wordpiece])
def test_captions_of_another_script_are_told(make):
    tokenizer = make()
    assert unk_rate(tokenizer, ["Это русский текст", "Ελληνικά"]) == 1
    assert 0 < unk_rate(tokenizer, ["a cat, русский"]) < 1
    assert unk_rate(kinds.roberta(), ["Это русский текст"]) == 0


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
        assert kinds.bare(tokenizer.decode(ids, skip_special_tokens=True)) == kinds.bare(text)


def test_chinese_characters_have_no_twin_that_never_occurs():
    """BERT's normalizer makes each of them a word, so that "##猫" would be a wasted token."""
    vocabulary = train_wordpiece(["猫在睡觉", "a cat"]).get_vocab()
    assert "猫" in vocabulary and "##猫" not in vocabulary and "##a" in vocabulary
