"""A folder's tokenizer as transformers made it, kept, so that the next process need not import transformers.

What is kept is the very `tokenizers.Tokenizer` that `AutoTokenizer` made, written out, and the few settings beside it;
only of tokenizers whose class encodes and decodes as the base class does, and only if what is read back says the same.
Its file is named by a hash of all that decides: the folder's files, the versions of transformers and tokenizers, and
our own reading of the folder. Where transformers has been imported already it is asked anyway: little is gained then,
and the program may have registered a tokenizer of its own.

This module does not know how a folder is read safely (tokenizer_folder.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from handloom import kept
from handloom.errors import TokenizerError
from handloom.text.decoder_stages import cleans_up
from handloom.text.plain_tokenizer import PlainTokenizer
from handloom.text.typed_errors import typed_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_KEPT = 16
"""Files that are kept; the oldest go."""
MAX_BYTES = 128 * 2**20
"""Of a folder's files; larger ones are refused by tokenizer_folder."""
FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TEMPLATES = "additional_chat_templates/*.jinja"
SOURCES = ("kept_tokenizers.py", "plain_tokenizer.py", "tokenizer_folder.py")
ENCODING = (
    "__call__ encode _encode_plus _convert_encoding set_truncation_and_padding decode _decode get_vocab "
    "added_tokens_decoder convert_tokens_to_ids _convert_token_to_id_with_added_voc special_tokens_map"
)
"""What a class must have from the base class."""


def load(folder: Path) -> PreTrainedTokenizerFast | PlainTokenizer:
    """The tokenizer of a model folder. Raises TokenizerError, as `tokenizer_folder.load_fast_tokenizer` does."""
    place = None if "transformers" in sys.modules else _place(folder)
    if place is not None and (data := kept.read(place, "the tokenizer is made")) is not None:
        return unpack(data, folder)
    from handloom.text.tokenizer_folder import load_fast_tokenizer  # transformers, which takes most of a second

    hf = load_fast_tokenizer(folder)
    if place is not None and (data := pack(hf)) is not None and _place(folder) == place:
        kept.write(place, data, "the tokenizer")
        _drop_oldest(place)
    return hf


def pack(hf: PreTrainedTokenizerFast) -> bytes | None:
    """What `unpack` makes the same tokenizer of; None where that would not be the same, or cannot be written out."""
    from transformers import PreTrainedTokenizerFast as Base

    same_code = all(getattr(type(hf), name) is getattr(Base, name) for name in ENCODING.split())
    if not same_code or hf.split_special_tokens or cleans_up(hf):
        return None
    settings = {"special_tokens_map": hf.special_tokens_map, "chat_template": hf.chat_template}
    try:
        with typed_errors(TokenizerError, "cannot be written out"):
            backend = hf.backend_tokenizer.to_str()
            data = json.dumps(settings).encode() + b"\n" + backend.encode()
            plain = unpack(data, Path())
    except TokenizerError:  # a part of it that is written in Python
        return None
    return data if plain.backend_tokenizer.to_str() == _neither_cut_nor_padded(backend) and _same(plain, hf) else None


def unpack(data: bytes, folder: Path) -> PlainTokenizer:
    """The tokenizer that was packed; folder: where transformers finds it."""
    from tokenizers import Tokenizer

    def in_transformers() -> PreTrainedTokenizerFast:
        from handloom.text.tokenizer_folder import load_fast_tokenizer

        return load_fast_tokenizer(folder)

    end = data.index(b"\n")
    return PlainTokenizer(
        Tokenizer.from_buffer(data[end + 1 :]), **json.loads(data[:end]), transformers=in_transformers
    )


def _same(plain: PlainTokenizer, hf: PreTrainedTokenizerFast) -> bool:
    names = "special_tokens_map chat_template bos_token_id eos_token_id pad_token_id"
    return all(getattr(plain, name) == getattr(hf, name) for name in names.split())


def _neither_cut_nor_padded(backend: str) -> str:
    """As PlainTokenizer has it, and transformers when it encodes one text."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(backend)
    made.no_truncation()
    made.no_padding()
    text: str = made.to_str()
    return text


# Where it is kept --------------------------------------------------------------------------------


def _place(folder: Path) -> Path | None:
    """The file in which this folder's tokenizer is kept; None where the folder cannot be read like that."""
    digest = hashlib.sha256()
    for package in ("transformers", "tokenizers"):
        with suppress(metadata.PackageNotFoundError):
            digest.update(metadata.version(package).encode() + b"\0")
    for source in SOURCES:
        digest.update(Path(__file__).with_name(source).read_bytes())
    paths = [path for name in FILES if (path := folder / name).is_file()]
    paths += sorted(path for path in folder.glob(TEMPLATES) if path.is_file())
    try:
        if sum(path.stat().st_size for path in paths) > MAX_BYTES:
            return None
        for path in paths:
            data = path.read_bytes()
            digest.update(f"{path.relative_to(folder)}\0{len(data)}\0".encode("utf-8", "surrogatepass") + data)
    except OSError:
        return None
    return kept.folder() / f"tokenizer-{digest.hexdigest()[:32]}"


def _drop_oldest(place: Path) -> None:
    with suppress(OSError):
        files = sorted(place.parent.glob("tokenizer-*"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in files[MAX_KEPT:]:
            path.unlink()
