"""Captions in any script, and small tokenizers of every kind."""

import unicodedata

from mmkit.data.tokenizer import train_wordpiece

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


def bare(text: str) -> str:
    """What a round trip must keep: all but blanks (Chinese gets some), joiners and case."""
    kept = (c for c in text if unicodedata.category(c)[0] not in "ZC" and c != "\ufe0f")
    return unicodedata.normalize("NFC", "".join(kept)).lower()
