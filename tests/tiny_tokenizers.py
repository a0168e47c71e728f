"""Tiny fast tokenizers of every kind that language models use, trained in milliseconds on a few sentences.

Each builder gives a `tokenizers.Tokenizer`; `wrap` makes it what transformers hands out. Nothing here imports handloom:
these are what the tests compare against.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "Once upon a time there was a weaver who wove tokens on a loom, slowly, by hand.",
    "The quick brown fox jumps over the lazy dog; it doesn't stop. I'm sure they've seen it, we're not!",
    "def add(a, b):\n    return a + b  # 12345 67890\n\n\tprint(add(1, 2))\r\n",
    "Größe, naïve café, Ελληνικά, русский язык, 日本語のテキスト, 你好世界, 한국어, 🙂🙃 👩‍👩‍👧 \u0301",
    "a  b   c    d     e      f, g . h ? i ! j ' k n't 'm 's 've 're do not [1, 2] 1,1,2 {\"key\": [\"value\"]}",
]

STRINGS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n \t\r\n",
    "hello",
    " hello",
    "hello ",
    "Hello world, it doesn't matter . Really ? Yes !",
    "runs   of     spaces and\ttabs\n\n\nand lines",
    "1234567890 3.14159 1e-5 0xDEADBEEF 1,000,000",
    "def f(x):\n    return x ** 2\n\n\nclass A:\n\tpass\n",
    '{"key": ["value", 1, null]}',
    "Größe naïve café ÀÉÎÕÜ ß ŀ",
    "e\u0301 é \u0301 a\u0308\u0323 ﬁ ½ Ⅷ",
    "日本語のテキスト 你好，世界。한국어 ไทย हिन्दी العربية עברית",
    "🙂 🙃 👩‍👩‍👧‍👦 🇩🇪 ✌🏽 \U0010ffff \ufffd \ufeff \u200b\u200d",
    "\x00\x01\x02\x7f \x80\x9f\xa0\xad",
    "<s>bos</s> <unk> <pad> <|endoftext|> <|im_start|>user\nhi<|im_end|>\n <0x41>",
    "▁▁ ▁a Ġb ĊĠ ##c d</w>",
    "a" * 300,
    "ab " * 100,
    "\u2028\u2029\u3000 \u00a0x",
    "don't can't I'm you've they're he's DON'T",
    "https://example.com/a?b=c&d=e#f user@example.com C:\\path\\file.txt",
]


def wrap(backend: Tokenizer, **settings: object) -> PreTrainedTokenizerFast:
    """The transformers tokenizer around `backend`."""
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def byte_bpe() -> Tokenizer:
    """Byte-level BPE as GPT-2 has it, with ChatML's tokens and awkward added ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    # Not special: with a space, outside the byte alphabet, and inside it where the bytes are no UTF-8.
    tokenizer.add_tokens(["two words", "日本", AddedToken("éé", normalized=False), "<think>"])
    return tokenizer


def byte_bpe_with_bos() -> Tokenizer:
    """As Llama 3: a regex before the bytes, and a post-processor that adds a bos token."""
    tokenizer = byte_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+|\s+(?!\S)|\s+|[^\s\p{L}\p{N}]+"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bos = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", bos)]
            ),
        ]
    )
    return tokenizer


def sentencepiece_bpe(*, prefix_space: bool) -> Tokenizer:
    """As Llama 2 (with a prefix space that decoding strips) and Gemma (without): byte fallback, `▁` for spaces."""
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trainer = trainers.BpeTrainer(
        vocab_size=460, special_tokens=pieces, show_progress=False, limit_alphabet=70, initial_alphabet=["▁"]
    )
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    steps = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return _only_special(tokenizer, special)


def _only_special(tokenizer: Tokenizer, special: list[str]) -> Tokenizer:
    """The same tokenizer with only `special` as added tokens (training marks the byte pieces too)."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in special]
    return Tokenizer.from_str(json.dumps(data))


def wordpiece() -> Tokenizer:
    """As BERT: continuation pieces, and spaces that decoding cleans up."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    special = ["[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    )
    tokenizer.add_tokens(["we do not , they 've ' n't"])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5: a unigram model under Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def suffix_bpe() -> Tokenizer:
    """As the first GPT: `</w>` ends a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def words() -> Tokenizer:
    """One token per word and no decoder at all: pieces are joined with spaces."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    return tokenizer


BUILDERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_bpe": byte_bpe,
    "byte_bpe_with_bos": byte_bpe_with_bos,
    "sentencepiece_prefix_space": lambda: sentencepiece_bpe(prefix_space=True),
    "sentencepiece": lambda: sentencepiece_bpe(prefix_space=False),
    "wordpiece": wordpiece,
    "unigram": unigram,
    "suffix_bpe": suffix_bpe,
    "words": words,
}


# What transformers adds around each: the tokenizer_config.json of such a model.
SETTINGS: dict[str, dict[str, object]] = {
    "byte_bpe": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
    "byte_bpe_with_bos": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
    "sentencepiece_prefix_space": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "sentencepiece": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "wordpiece": {"unk_token": "[UNK]", "cls_token": "[CLS]", "clean_up_tokenization_spaces": True},
    "unigram": {"eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": True},
    "suffix_bpe": {"unk_token": "<unk>"},
    "words": {"unk_token": "[UNK]"},
}


@cache
def tiny(name: str) -> Tokenizer:
    """The tokenizer of that name in BUILDERS, built once. Do not change it."""
    return BUILDERS[name]()
