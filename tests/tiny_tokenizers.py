"""Tiny fast tokenizers of every kind that language models use, learned in milliseconds from a few sentences.

They are the same on every run: of the library's trainers only the one that breaks ties by itself is used. Each builder
gives a `tokenizers.Tokenizer`; `wrap` makes it what transformers hands out. Nothing here imports handloom: these are
what the tests compare against.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise

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
    words = [list("▁" + word) for line in CORPUS[:3] for word in line.split(" ")]
    alphabet = sorted({character for word in words for character in word} - set("z;\n\t\r#*"))
    merges = learn_merges([[c for c in word if c in alphabet] for word in words], 120)
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet, *("".join(merge) for merge in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(special)
    steps = [normalizers.Prepend("▁")] if prefix_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if prefix_space else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def learn_merges(words: list[list[str]], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al., 2016), ties broken by the alphabet."""
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs = Counter(pair for word in words for pair in pairwise(word))
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def _plain_words() -> list[str]:
    return [word for line in CORPUS for word in re.findall(r"\w+|[^\w\s]", line)]


def wordpiece() -> Tokenizer:
    """As BERT: continuation pieces, and spaces that decoding cleans up."""
    letters = sorted(set("".join(_plain_words()[:60])))
    pieces = ["[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    pieces += [*sorted(set(_plain_words()[:40])), "##s", "##ing", "##ly", "##aver"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.add_tokens(["we do not , they 've ' n't"])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5: a unigram model under Metaspace."""
    counts = Counter("".join(_plain_words())) | Counter(f"▁{word}" for word in _plain_words() if word.isascii())
    scored = sorted((piece, math.log(count / 5000)) for piece, count in counts.items())
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *scored]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def suffix_bpe() -> Tokenizer:
    """As the first GPT: `</w>` ends a word."""
    words = [[*word[:-1], word[-1] + "</w>"] for word in _plain_words()]
    alphabet = sorted({piece for word in words for piece in word})
    merges = learn_merges(words, 100)
    pieces = ["<unk>", *alphabet, *("".join(merge) for merge in merges)]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.add_special_tokens(["<unk>"])
    return tokenizer


def words() -> Tokenizer:
    """One token per word and no decoder at all: pieces are joined with spaces."""
    vocab = {word: index for index, word in enumerate(dict.fromkeys(["[UNK]", *_plain_words()]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]"])
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
