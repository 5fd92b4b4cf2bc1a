"""Turn captions into tokens.

`train_wordpiece` learns a WordPiece vocabulary from the captions themselves (Schuster & Nakajima
2012, the algorithm BERT uses), so that a small data set needs no download; any Hugging Face
tokenizer works in its place. Both are saved inside a checkpoint as plain text. `unk_rate` measures
how much of the captions a tokenizer cannot read.
Shapes: B batch, L text length, V vocabulary. `valid` is True for tokens, False for padding.
Walk-through: notebooks/01_data.ipynb.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# All special tokens that a tokenizer may have; the last entry is a list of further ones.
TOKEN_NAMES = (*SPECIAL_TOKENS, "bos_token", "eos_token", "extra_special_tokens")
LONGEST_WORD = 1000  # letters; WordPiece's usual 100 loses sentences of scripts without spaces
# Chinese characters: BERT's normalizer makes each of them a word.
_IDEOGRAPH = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


def train_wordpiece(texts: Sequence[str], vocab_size: int | None = None):
    """Train a lower-casing WordPiece tokenizer on captions (Schuster & Nakajima 2012).

    The same captions give the same vocabulary and the same ids, whatever their order.

    Args:
        texts: captions, at least one.
        vocab_size: number of tokens at most. None = 4,096, or three times the number of
            single-letter tokens if that is more: captions in many scripts have thousands of
            letters, and a small vocabulary would leave no room for whole words.

    Returns:
        A Hugging Face fast tokenizer.

    Raises:
        ValueError: no texts, or vocab_size is too small for the single letters.

    Example:
        >>> tokenizer = mm.train_wordpiece(["a red ball", "a red car"])
        >>> tokenizer.tokenize("A red CAR")
        ['a', 'red', 'car']
    """
    from tokenizers import normalizers, processors, trainers

    if not texts:
        raise ValueError("0 captions to train a tokenizer on; give at least one")
    unique, special = sorted(set(texts)), list(SPECIAL_TOKENS.values())
    normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    raw_letters = set().union(*unique)  # the normalizer treats each one separately
    letters = sorted({c for one in raw_letters for c in normalizer.normalize_str(one)} - {" "})
    inner = [f"##{letter}" for letter in letters if not _IDEOGRAPH.match(letter)]
    needed = len(special) + len(letters) + len(inner)
    vocab_size = vocab_size or max(4096, 3 * needed)
    if vocab_size < needed:
        raise ValueError(
            f"vocab_size={vocab_size} does not hold the single letters of the captions, which take "
            f"{needed} tokens; give more, or None"
        )

    # The trainer numbers inner letters in the order of a hash map, which differs between processes
    # and breaks its ties; naming them beforehand makes the result a function of the captions.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        initial_alphabet=letters,
        special_tokens=special + inner,
        show_progress=False,
    )
    raw = _wordpiece({}, normalizer)
    raw.train_from_iterator(unique, trainer)
    tokens = special + sorted(raw.get_vocab().keys() - set(special))
    tokenizer = _wordpiece({token: i for i, token in enumerate(tokens)}, normalizer)
    ends = [(token, tokens.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return _wrap(tokenizer.to_str(), SPECIAL_TOKENS)


def _wordpiece(vocab: dict[str, int], normalizer):
    """A `tokenizers` WordPiece with this vocabulary, which is empty before training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    unknown = SPECIAL_TOKENS["unk_token"]
    tokenizer = Tokenizer(
        models.WordPiece(vocab, unk_token=unknown, max_input_chars_per_word=LONGEST_WORD)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _wrap(tokenizer_json: str, special_tokens: dict):
    """A Hugging Face fast tokenizer around the text of a `tokenizers` file."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=_unused(tokenizer_json), **special_tokens)


def _unused(tokenizer_json: str):
    """A `tokenizers` tokenizer without the padding and truncation settings of its last use."""
    from tokenizers import Tokenizer

    raw = Tokenizer.from_str(tokenizer_json)
    raw.no_padding()
    raw.no_truncation()
    return raw


def encode_texts(tokenizer, texts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
    """Tokens of captions: `(input_ids (B, L) int64, valid (B, L) bool)`.

    L is the length of the longest caption, at most `max_length`; longer captions are truncated but
    keep their end token. A special token that a caption spells out ("[MASK]") is read as letters.
    Raises ValueError for a tokenizer that cannot pad.
    """
    check_padding(tokenizer)
    rows: list[list[int]] = []
    if _splits_at_spaces(tokenizer):
        rows = _encoded_by_words(tokenizer, spelled(tokenizer, texts), max_length)
    else:
        for block in _blocks(spelled(tokenizer, texts)):
            rows += tokenizer(block, truncation=True, max_length=max_length)["input_ids"]
    lengths = torch.tensor([len(ids) for ids in rows])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.full(valid.shape, tokenizer.pad_token_id)
    input_ids[valid] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.int64)
    return input_ids, valid


def _blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    """All texts in blocks that limit memory: a tokenizer takes 8 KB per text."""
    for start in range(0, len(texts), 8192):
        yield list(texts[start : start + 8192])


def spelled(tokenizer, texts: Sequence[str]) -> list[str]:
    """The texts, with a space inside each special token that they spell, so that it is letters.

    Otherwise a caption that contains "[MASK]" would put the mask token itself into the batch.
    """
    special = sorted(filter(lambda t: len(t) > 1, tokenizer.all_special_tokens), key=len)[::-1]
    apart = functools.partial(
        re.compile("|".join(map(re.escape, special))).sub, lambda m: f"{m[0][0]} {m[0][1:]}"
    )
    return [apart(t) if any(name in t for name in special) else t for t in texts]


def _splits_at_spaces(tokenizer) -> bool:
    """Is a text encoded word by word, so that a word's tokens do not depend on its neighbours?"""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = [type(getattr(backend, part, None)).__name__ for part in ("model", "pre_tokenizer")]
    return kinds == ["WordPiece", "BertPreTokenizer"]


def _by_word(tokenizer, texts: Iterable[Sequence[str]]) -> dict[str, list[int]]:
    """The tokens of each word of some texts (lists of words), without end tokens."""
    words = list({word for text in texts for word in text})
    options: dict = dict(add_special_tokens=False, truncation=False, padding=False, verbose=False)
    parts = (tokenizer(part, **options)["input_ids"] for part in _blocks(words))
    return dict(zip(words, itertools.chain.from_iterable(parts), strict=True))


def _encoded_by_words(tokenizer, texts: list[str], max_length: int) -> list[list[int]]:
    """The tokens of each text with its end tokens.

    Each different word is encoded once, and only the beginning of a long text is read.
    """
    with_ends, bare = (
        tokenizer("a", add_special_tokens=ends)["input_ids"] for ends in (True, False)
    )
    start = next(i for i in range(len(with_ends)) if with_ends[i : i + len(bare)] == bare)
    before, behind = with_ends[:start], with_ends[start + len(bare) :]
    most = max(0, max_length - len(before) - len(behind))
    beginnings = [text.split(" ", most + 16)[: most + 16] for text in texts]
    table, rows = _by_word(tokenizer, beginnings), []
    for text, words in zip(texts, beginnings, strict=True):
        ids = list(itertools.chain.from_iterable(map(table.__getitem__, words)))
        if len(ids) < most and len(words) == most + 16:  # words of joiners only have no token
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rows.append([*before, *ids[:most], *behind])
    return rows


def token_counts(tokenizer, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, both end tokens included, without truncation."""
    texts = spelled(tokenizer, texts)
    if not _splits_at_spaces(tokenizer):
        options: dict = dict(truncation=False, padding=False, verbose=False)
        return [len(x) for part in _blocks(texts) for x in tokenizer(part, **options)["input_ids"]]
    count = {w: len(i) for w, i in _by_word(tokenizer, (t.split(" ") for t in texts)).items()}
    ends = tokenizer.num_special_tokens_to_add()
    return [ends + sum(map(count.__getitem__, text.split(" "))) for text in texts]


def check_padding(tokenizer) -> None:
    """ValueError for a tokenizer without a padding token, such as GPT-2's."""
    if tokenizer.pad_token_id is None:
        raise ValueError(
            "the tokenizer has no padding token, and captions of a batch differ in length; call "
            "tokenizer.add_special_tokens({'pad_token': '[PAD]'}) before building data and model"
        )


def unk_rate(tokenizer, texts: Sequence[str]) -> float:
    """The fraction of the letters of some texts that a tokenizer cannot read.

    It counts letters, digits and signs (no blanks, no invisible ones) that are in an unknown token
    or in none. It does not count tokens: WordPiece makes ONE [UNK] of a whole unknown word.
    Letters that a tokenizer drops count as unread (an uncased BERT drops Thai vowel signs); letters
    that it only changes do not (e for é).

    Args:
        tokenizer: a Hugging Face fast tokenizer.
        texts: list of at least one text.

    Returns:
        Fraction in [0, 1]: 0 = all is read, 1 = nothing.

    Raises:
        ValueError: no texts, or the tokenizer is not a fast one.

    Example:
        >>> tokenizer = mm.train_wordpiece(["a red ball"])
        >>> mm.unk_rate(tokenizer, ["a red ball"]), mm.unk_rate(tokenizer, ["Я", "red"])
        (0.0, 0.25)
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts={texts!r}: give a list of at least one text")
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise ValueError(f"{name} does not give the positions of its tokens; use its fast version")
    options = dict(add_special_tokens=False, truncation=False, padding=False, verbose=False)
    unknown, lost, total = _unknown_ids(tokenizer), 0, 0
    times = Counter(word for text in spelled(tokenizer, texts) for word in text.split())
    parts = (
        (b, tokenizer(b, return_offsets_mapping=True, **options)) for b in _blocks(list(times))
    )
    each = (zip(b, e["input_ids"], e["offset_mapping"], strict=True) for b, e in parts)
    for word, ids, spans in itertools.chain.from_iterable(each):
        read = bytearray(len(word))  # 1 where a letter of the word is read
        for number, (start, end) in zip(ids, spans, strict=True):
            if number not in unknown:
                read[start:end] = bytes([1]) * (end - start)
        for number, (start, end) in zip(ids, spans, strict=True):
            if number in unknown:  # SentencePiece's word mark also covers the first letter
                read[start:end] = bytes(end - start)
        signs = [unicodedata.category(letter)[0] not in "ZC" for letter in word]
        total += times[word] * sum(signs)
        lost += times[word] * sum(sign and not one for sign, one in zip(signs, read, strict=True))
    return lost / max(1, total)


def _unknown_ids(tokenizer) -> set[int]:
    """Ids of the unknown token; empty for byte-level tokenizers."""
    model = tokenizer.backend_tokenizer.model  # a bare `tokenizers` file may name it only here
    name = getattr(model, "unk_token", None)
    ids = {getattr(model, "unk_id", None), tokenizer.unk_token_id}
    return (ids | {tokenizer.backend_tokenizer.token_to_id(name or "")}) - {None}


def special_ids(tokenizer) -> Tensor:
    """Ids that are never masked ([CLS], [SEP], [PAD], [MASK]), sorted.

    [UNK] may be masked unless it is an end token or the padding, too: GPT-2 has one token for all
    of these.
    """
    roles = ("pad", "cls", "sep", "mask", "bos", "eos")
    ends = {getattr(tokenizer, f"{role}_token_id") for role in roles}
    keep = {i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id or i in ends}
    return torch.tensor(
        sorted(keep), dtype=torch.int64, device="cpu"
    )  # also under the "meta" device


def word_ids(tokenizer) -> Tensor:
    """Ids of all tokens that are not `special_ids`, sorted."""
    ids = torch.arange(len(tokenizer), device="cpu")
    return ids[~torch.isin(ids, special_ids(tokenizer))]


def token_frequency(tokenizer, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """(V,) frequency of each token in captions (M, L) of these lengths, without special ones."""
    inside = torch.arange(input_ids.shape[1]) < lengths[:, None]
    counted = inside & ~torch.isin(input_ids, special_ids(tokenizer))
    counts = torch.bincount(input_ids[counted], minlength=len(tokenizer))
    return counts / counts.sum().clamp(min=1)


def is_subword(tokenizer) -> Tensor:
    """(V,) bool: does this token continue the word of the token before it?

    WordPiece marks such tokens ("##"); SentencePiece and byte-level BPE instead mark the tokens
    that begin a word ("\u2581", "\u0120").
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    model = tokenizer.backend_tokenizer.model
    if type(model).__name__ == "WordPiece":
        prefix = model.continuing_subword_prefix
        continues = [token.startswith(prefix) for token in tokens]
    else:
        continues = [not token.startswith(("\u2581", "\u0120")) for token in tokens]
    return torch.tensor(continues, device="cpu")


def tokenizer_state(tokenizer) -> dict:
    """A fast tokenizer as plain text, for a checkpoint.

    Raises ValueError for a tokenizer that is not backed by the `tokenizers` library.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        name = type(tokenizer).__name__
        raise ValueError(f"{name} cannot be saved as text; use its fast version (use_fast=True)")
    values = {name: getattr(tokenizer, name, None) for name in TOKEN_NAMES}
    special = {
        name: [str(token) for token in value] if isinstance(value, list) else str(value)
        for name, value in values.items()
        if value
    }
    return {"json": _unused(backend.to_str()).to_str(), "special_tokens": special}


def tokenizer_from_state(state: dict):
    """The tokenizer that `tokenizer_state` saved."""
    try:
        json.loads(state["json"])
        return _wrap(state["json"], dict(state["special_tokens"]))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the saved tokenizer cannot be read ({error}); the file is damaged"
        ) from None
