"""Records the ids that llama.cpp's own tokenizer gives to 200 strings: writes tokenizer_ids_*.json beside this file.

    pip install llama-cpp-python==0.3.36 gguf==0.19.0
    python tests/data/record_tokenizer_ids.py smollm2 .../SmolLM2-135M-Instruct.Q4_1.gguf
    python tests/data/record_tokenizer_ids.py gemma3 .../gemma-3-270m-q4_k_m.gguf
    python tests/data/record_tokenizer_ids.py spm

Each string is tokenized by `Llama(path, vocab_only=True).tokenize(text, add_bos=False, special=...)`, twice: `plain`
with `special=False` (control tokens typed in the text are text), `special` with `special=True` (they are tokens).
For the byte-level vocabulary of SmolLM2 that is repeated with `tokenizer.ggml.pre` replaced in a copy of the file, to
record every pre-tokenizer that handloom knows. `spm` makes a small SentencePiece vocabulary out of the strings
themselves, and records it with and without `tokenizer.ggml.add_space_prefix`. This file is not a test and needs
nothing of handloom.
"""

from __future__ import annotations

import json
import re
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

PRES = ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")

PLAIN = [
    "",
    " ",
    "  ",
    "a",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time, there was a little girl who lived in a village near the forest.",
    " leading space",
    "trailing space ",
    "  two leading, two trailing  ",
    "I'm sure you're right; they've said we'll see what he'd do, isn't it?",
    "I'M SURE YOU'RE RIGHT; THEY'VE SAID WE'LL SEE WHAT HE'D DO.",
    "it's 'quoted' and \"double-quoted\" and `ticked`",
    "don\u2019t mix \u2018curly\u2019 and \u201ccurly\u201d quotes\u2026 or \u2013 dashes \u2014 either",
    "CamelCaseIdentifier snake_case_identifier kebab-case-identifier SCREAMING_SNAKE",
    "www.example.com/path?query=1&other=two#fragment",
    "https://user:pass@example.org:8080/a/b/c.html?x=%20y",
    "C:\\Program Files\\App\\file.txt",
    "/usr/local/bin/python3 --version",
    "!!!???...,,,;;;:::",
    "<<>>==!=<=>=&&||++--**//%%^^~~",
    "#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "a+b=c; x*y/z-w%v",
    "------------------------------------------------",
    "================================================================",
    "****bold**** _italic_ ~~strike~~",
    "antidisestablishmentarianism",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 3,
    "a" * 300,
    "ab" * 100,
    "xyzzyplughqwertzuiop" * 10,
    "0123456789abcdef" * 16,
]
SPACES = [" " * n for n in (3, 4, 7, 8, 15, 16, 31, 32, 33, 40, 100)] + [
    "a b",
    "a  b",
    "a   b",
    "a    b",
    "a\u00a0b",
    "a\u00a0\u00a0b",
    "a\u2003b\u2009c\u202fd\u3000e",
    "a\u200bb\ufeffc",
    "word     word          word",
    "   indented\n      more\n   back",
    "end of line   \nnext",
    "\t",
    "\t\t",
    "\ttab",
    "a\tb\tc",
    "a \t b",
    " \t ",
    "\t\t\t\tdeep",
    "\n",
    "\n\n",
    "\n\n\n",
    "\n" * 10,
    "\n" * 40,
    "\r",
    "\r\n",
    "line\r\nline\r\n\r\nline",
    "a\nb\nc",
    "a\n\nb\n\n\nc\n\n\n\nd",
    " \n \n ",
    "text \n\n  text",
    "para one.\n\npara two.\n\n\tindented",
    "\n leading newline",
    "trailing newline\n",
    "\v\f",
    "a\u0085b\u2028c\u2029d",
    "\t \n \r\n \u00a0",
    "\u2581",
    "a\u2581b \u2581\u2581 c",
    "G\u0120 \u010a \u0109",
]
NUMBERS = [
    "0",
    "7",
    "42",
    "123",
    "1234",
    "12345",
    "123456789",
    "1234567890123456789012345678901234567890",
    "3.14159265358979",
    "-1.5e-10",
    "1,234,567.89",
    "$19.99 and \u20ac20,00 and \u00a35",
    "50% of 200 = 100",
    "2024-02-29T12:34:56.789Z",
    "+1 (555) 010-9999",
    "0x1F 0b1010 0o777",
    "192.168.0.1:8080",
    "v1.2.3-rc4",
    "10 20 30",
    "1 2  3   4    5",
    "room101 B2B 4ever x86_64 utf8",
    "1st 2nd 3rd 4th",
    "\u00b2\u00b3\u00b9 \u00bd\u00bc\u00be",
    "\u2160\u2161\u2162 \u2460\u2461",
    "\u0661\u0662\u0663\u0664 \u0967\u0968\u0969 \uff11\uff12\uff13",
    "1\n2\n3",
    "9" * 64,
]
CODE = [
    "def f(x):\n    return x + 1\n",
    "class A(B):\n\tdef __init__(self, *args, **kwargs) -> None:\n\t\tsuper().__init__(*args, **kwargs)\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    '#include <stdio.h>\nint main(void) {\n  printf("%d\\n", 42);\n  return 0;\n}\n',
    "const f = async (x) => await fetch(`/api/${x}`).then(r => r.json());",
    "SELECT * FROM users WHERE name = 'O''Brien' AND age >= 21;",
    '<div class="a"><p>Hi &amp; bye</p></div>',
    "<html><body><h1>Title</h1><table><tr><td>1</td></tr></table></body></html>",
    '{"key": [1, 2.5, true, null, "v\\u00e9"]}',
    'fn main() { let v: Vec<u8> = vec![0; 16]; println!("{:?}", v); }',
    'if [ -f "$HOME/.bashrc" ]; then . "$HOME/.bashrc"; fi',
    "^(?:[a-z0-9]+)@\\w+\\.(com|org)$",
    "\\frac{a}{b} \\int_0^\\infty e^{-x^2} dx = \\frac{\\sqrt{\\pi}}{2}",
    "| a | b |\n|---|---|\n| 1 | 2 |\n",
    "```python\nprint('hi')\n```",
    "- item\n  - nested\n    - deeper\n1. one\n2. two",
    "x\u00b2 + y\u00b2 = z\u00b2; \u2200x\u2208\u211d: x\u2265x; \u03b1\u03b2\u03b3 \u2192 \u2207\u00d7F",
    "\x1b[31mred\x1b[0m",
    "import torch\n\n\nx = torch.zeros(2, 3)  # comment\n",
    "public static void main(String[] args) {}",
]
EMOJI = [
    "\U0001f600",
    "\U0001f600\U0001f601\U0001f602",
    "I \u2764\ufe0f you",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f469\U0001f3fd\u200d\U0001f4bb codes",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea",
    "1\ufe0f\u20e3 2\ufe0f\u20e3",
    "\U0001fae0\U0001fae1 \U0001f9ff",
    "\u2603\ufe0e text style",
    "ok\U0001f44d\U0001f3ffok",
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
]
SCRIPTS = [
    "caf\u00e9 na\u00efve r\u00e9sum\u00e9 \u00fcber stra\u00dfe",
    "cafe\u0301 nai\u0308ve \u0041\u030a",
    "\u00c5\u212b\u0041\u030a",
    "Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324\u031ea\u0363\u0343\u0355lgo",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0401\u043b\u043a\u0430.",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01",
    "\u6211\u4eca\u5929\u8d2d\u4e70\u4e863\u4e2a\u82f9\u679c\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3001\u30ab\u30bf\u30ab\u30ca\uff76\uff80\uff76\uff85",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u0627\u0644\u0633\u0651\u064e\u0644\u064e\u0627\u0645\u064f \u0639\u064e\u0644\u064e\u064a\u0652",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u05d1\u05b0\u05bc\u05e8\u05b5\u05d0\u05e9\u05b4\u05c1\u05d9\u05ea",
    "abc \u202e\u05d0\u05d1\u05d2\u202c def",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u10d2\u10d0\u10db\u10d0\u10e0\u10ef\u10dd\u10d1\u10d0",
    "\u0531\u0580\u0587 \u0570\u0561\u0575\u0565\u0580\u0565\u0576",
    "\u12a0\u121b\u122d\u129b \u1230\u120b\u121d",
    "\u0bb5\u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd",
    "Ti\u1ebfng Vi\u1ec7t c\u00f3 d\u1ea5u",
    "\u0130stanbul \u0131\u011f\u0131r I\u0307",
    "\ufb01nd o\ufb03ce \ufdfa \u01c5",
    "\uff26\uff55\uff4c\uff4c\uff57\uff49\uff44\uff54\uff48",
    "\U00010330\U00010331 \U0001d4d7\U0001d4ee\U0001d4f5\U0001d4f5\U0001d4f8 \U00020000",
    "mixed\u4e2d\u6587English\u65e5\u672c\u8a9e\ud55c\uad6d\uc5b4\u0440\u0443\u0441",
    "\u00ab Bonjour \u00bb \u00a1Hola! \u00bfQu\u00e9?",
    "\u2500\u2502\u250c\u2510\u2588\u2591 \u2713\u2717 \u2605",
]
CONTROL = [
    "\x00",
    "a\x00b",
    "\x01\x02\x03\x04\x05\x06\x07\x08",
    "a\x04b\x13c\x1dd",
    "\x7f\x80\x9f",
    "\x1f\x1e\x1d\x1c",
    "a\u00adb",
    "\u200e\u200f\u2066x\u2069",
    "\ufffd\ufffe\uffff",
    "\U000e0001 \U000f0000 \U00100000 \U0010ffff",
    "\U00040000\U0008ffff\U000bfffd",
    "\ue000\uf8ff",
]
SPECIAL = [
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>",
    "<|im_start|><|im_end|>",
    "text <|im_end|> text",
    "text<|im_end|>text",
    "<|endoftext|>",
    "< |im_end| > <|im_end| <|im_en",
    "<bos>Hello<eos>",
    " <bos> <eos> <pad> <unk>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<repo_name>a/b<file_sep>x.py\n",
    "<unused0><unused99> <mask> [multimodal]",
    "<start_of_image><end_of_image>",
    "<0x0A><0x41> <0xZZ>",
    "<s></s><b>bold</b><i>x</i>",
]
STRINGS = PLAIN + SPACES + NUMBERS + CODE + EMOJI + SCRIPTS + CONTROL + SPECIAL


def with_pre(content: bytes, pre: str) -> bytes:
    """The file with another `tokenizer.ggml.pre`; good for `vocab_only`, since its tensors may end up misaligned."""
    head = struct.pack("<Q", 18) + b"tokenizer.ggml.pre" + struct.pack("<I", 8)
    at = content.index(head) + len(head)
    (length,) = struct.unpack_from("<Q", content, at)
    value = pre.encode()
    return content[:at] + struct.pack("<Q", len(value)) + value + content[at + 8 + length :] + bytes(64)


def spm_vocabulary() -> dict[str, list]:
    """<unk>, <s>, </s>, the bytes, two user-defined tokens, and frequent pieces of the strings; best scores first."""
    pieces = Counter(
        piece
        for text in STRINGS
        for word in re.findall(r"\S+|\s", text.replace(" ", " \u2581"))
        for size in range(1, 9)
        for piece in {word[at : at + size] for at in range(len(word) - size + 1)}
    )
    frequent = sorted((p for p, n in pieces.items() if n > 2 or (len(p) == 1 and n > 1)), key=lambda p: (-pieces[p], p))
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["  ", "<b>"]
    types = [2, 3, 3] + [6] * 256 + [4, 4]
    pairs = [p for p in frequent if p not in tokens and p.strip(" ") and "\0" not in p]
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(len(pairs))]
    return {"tokens": tokens + pairs, "types": types + [1] * len(pairs), "scores": scores}


def write_spm(path: Path, vocabulary: dict[str, list], *, prefix: bool) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for key, value in (("context_length", 8), ("embedding_length", 32), ("block_count", 1)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_head_count(1)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_scores(vocabulary["scores"])
    writer.add_token_types(vocabulary["types"])
    writer.add_add_space_prefix(prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def record(path: Path) -> dict[str, list[list[int]]]:
    from llama_cpp import Llama

    model = Llama(str(path), vocab_only=True, verbose=False)
    return {
        kind: [model.tokenize(text.encode(), add_bos=False, special=special) for text in STRINGS]
        for kind, special in (("plain", False), ("special", True))
    }


def main() -> None:
    import llama_cpp

    assert len(STRINGS) == len(set(STRINGS)) == 200, (len(STRINGS), len(set(STRINGS)))
    name, path = sys.argv[1], Path(*sys.argv[2:])
    how = f"llama-cpp-python {llama_cpp.__version__}, vocab_only=True, add_bos=False; see record_tokenizer_ids.py"
    content: dict = {"file": path.name, "recorded_with": how, "strings": STRINGS, "ids": {}}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "vocabulary.gguf"
        if name == "smollm2":
            for pre in PRES:
                copy.write_bytes(with_pre(path.read_bytes(), pre))
                content["ids"][pre] = record(copy)
        elif name == "spm":
            content |= spm_vocabulary()
            for kind in ("prefix", "no prefix"):
                write_spm(copy, content, prefix=kind == "prefix")
                content["ids"][kind] = record(copy)
        else:
            content["ids"]["default"] = record(path)
    lines = json.dumps(content, separators=(",", ":")).replace("],[", "],\n[")
    Path(__file__).with_name(f"tokenizer_ids_{name}.json").write_text(lines + "\n")


if __name__ == "__main__":
    main()
