"""A sequence in a file: its token ids and the K and V of what is computed, so that it goes on where it stopped.

The file is safetensors: `token_ids` [n] int64 (-1 for an embedded one), `layers.{i}.k` and `.v` [num_cached,
num_kv_heads, head_dim] in the cache's dtype and, where there are any, `embeddings` [e, hidden_size], `logits`
[vocab_size] float32 after the last token and `evicted` [r, 2] int64, the ranges of computed tokens that are not among
the cached ones. Its metadata holds the format's version, a fingerprint of the model and a
CRC-32 of all tensors' bytes in that order (the layers last).

The CRC finds damage; it is no signature. Whoever can write the file can put any K and V into it, which then decide what
is generated from this sequence, and nothing else.

This module does not know how a sequence came about or what is done with it afterwards.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from handloom.cache.pages import PagePool
from handloom.cache.sequence import PLACEHOLDER, Sequence
from handloom.checkpoint.json_object import quote
from handloom.checkpoint.quantization import QuantizedMatrix
from handloom.checkpoint.safetensors import READABLE, SafetensorsFile
from handloom.errors import CheckpointError, ContextOverflow
from handloom.model.transformer import Transformer

FORMAT, VERSION = "handloom sequence", "1"
SAMPLED_VALUES = 64
_STORAGE = {dtype: storage for storage, dtype in READABLE.items()}
_WRITE_BUFFER = 1 << 20

Ranges = tuple[tuple[int, int], ...]


class Fingerprint(NamedTuple):
    """SHA-256 of what a model is declared to be, and of samples of its weights, in hexadecimal."""

    spec: str
    weights: str


def fingerprint(transformer: Transformer) -> Fingerprint:
    """What tells two models apart without reading all of their weights.

    weights: of every weight its name, shape, dtype and the bytes of its first, middle and last SAMPLED_VALUES values.
    Equal fingerprints mean the same architecture, loaded in the same dtype, equal in all those samples: another
    checkpoint, a fine-tune or a merge of one differs somewhere there. An edit made elsewhere on purpose is not seen.
    """
    digest = hashlib.sha256()
    for name, weight in _tensors(transformer):
        digest.update(f"{name} {list(weight.shape)} {weight.dtype}\n".encode())
        flat = weight.detach().reshape(-1)
        middle = flat.numel() // 2
        samples = torch.cat((flat[:SAMPLED_VALUES], flat[middle : middle + SAMPLED_VALUES], flat[-SAMPLED_VALUES:]))
        digest.update(_bytes(samples))
    spec = json.dumps(_declared(transformer.spec), sort_keys=True)
    return Fingerprint(hashlib.sha256(spec.encode()).hexdigest(), digest.hexdigest())


def _tensors(transformer: Transformer) -> list[tuple[str, Tensor]]:
    """The model's weights by name, quantised ones by their planes."""
    tensors: dict[str, Tensor] = {}
    for name, weight in transformer.weights.items():
        if isinstance(weight, QuantizedMatrix):
            for i, segment in enumerate(weight.segments):
                tensors |= {f"{name}.{i}.{segment.format.name}.{plane}": values for plane, values in segment.planes()}
        else:
            tensors[name] = weight
    return sorted(tensors.items())


def _declared(value: Any) -> Any:
    """A spec as JSON without the fields that are at their defaults, so that a field added later changes nothing."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if _says(value, field)}
        return {name: _declared(own) for name, own in fields.items()}
    return [_declared(item) for item in value] if isinstance(value, tuple) else value


def _says(value: Any, field: dataclasses.Field[Any]) -> bool:
    return bool(field.default is dataclasses.MISSING or getattr(value, field.name) != field.default)


# Writing ---------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """One tensor of the file, and its content in pieces."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]


def save_sequence(
    path: str | os.PathLike[str], sequence: Sequence, transformer: Transformer, *, name: str, logits: Tensor | None
) -> None:
    """Write a sequence; a file that was there is replaced once the new one is whole.

    K and V go from their pages to the file without a copy (from a GPU: page run by page run). name: the model's, for
    messages; logits [vocab_size]: those after the last token, if they are known. Nothing is flushed to the disk beyond
    what closing a file does. Raises OSError where the file cannot be written, leaving what was there.
    """
    path = Path(path)
    entries = list(_entries(sequence, logits))
    header = _header(entries, {**fingerprint(transformer)._asdict(), "model": name})
    part = path.with_name(f".{path.name}.{os.getpid()}-{id(sequence):x}.part")
    try:
        with part.open("xb", buffering=_WRITE_BUFFER) as file:
            _write(file, header, entries)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _entries(sequence: Sequence, logits: Tensor | None) -> Iterator[_Entry]:
    ids = torch.tensor(sequence.token_ids, dtype=torch.int64, device="cpu")
    evicted = torch.tensor(sequence.evicted, dtype=torch.int64, device="cpu") if sequence.evicted else None
    extra = {"embeddings": sequence.embeddings, "logits": logits, "evicted": evicted}
    for name, tensor in {"token_ids": ids, **extra}.items():
        if tensor is not None:
            tensor = tensor if tensor.dtype in _STORAGE else tensor.float()
            yield _Entry(name, tensor.dtype, tuple(tensor.shape), [tensor])
    for i, layer in enumerate(sequence.pool.layers):
        for kind, pages in zip("kv", layer, strict=True):
            shape = (sequence.num_cached, *pages.shape[2:])
            yield _Entry(f"layers.{i}.{kind}", pages.dtype, shape, _runs(sequence, sequence.num_cached, pages))


def _runs(sequence: Sequence, num_tokens: int, pages: Tensor) -> list[Tensor]:
    """Views [run, num_kv_heads, head_dim] of its first num_tokens cached tokens, touching pages taken together."""
    page_size, slots = sequence.pool.page_size, pages.flatten(0, 1)
    spans: list[list[int]] = []
    for at, page in enumerate(sequence.page_table[: -(-num_tokens // page_size)]):
        first, count = page * page_size, min(page_size, num_tokens - at * page_size)
        if spans and spans[-1][1] == first:
            spans[-1][1] += count
        else:
            spans.append([first, first + count])
    return [slots[first:end] for first, end in spans]


def _header(entries: Iterable[_Entry], model: dict[str, str]) -> bytes:
    """Length and JSON header of the file, its CRC still zero."""
    # the CRC comes first, so that _write finds it
    content: dict[str, Any] = {"__metadata__": {"crc32": f"{0:08x}", "format": FORMAT, "version": VERSION, **model}}
    at = 0
    for entry in entries:
        end = at + entry.dtype.itemsize * math.prod(entry.shape)
        content[entry.name] = {"dtype": _STORAGE[entry.dtype], "shape": entry.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, header: bytes, entries: Iterable[_Entry]) -> None:
    file.write(header)
    crc = 0
    for entry in entries:
        for piece in entry.pieces:
            data = _bytes(piece)
            crc = zlib.crc32(data, crc)
            file.write(data)
    file.seek(header.index(b'"crc32":"') + len(b'"crc32":"'))
    file.write(f"{crc:08x}".encode())


def _bytes(tensor: Tensor) -> memoryview:
    """Its bytes; a contiguous tensor on the CPU is not copied."""
    data: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


# Reading ---------------------------------------------------------------------------------------


def restore_sequence(
    path: str | os.PathLike[str], pool: PagePool, transformer: Transformer, max_context: int
) -> tuple[Sequence, Tensor | None]:
    """A sequence from its file, and the logits [vocab_size] after its last token if they were saved.

    Everything the file says is checked against the model and the pool before anything of it is allocated. Raises
    CheckpointError (not such a file, damaged, another version or another model's), ContextOverflow, OutOfPages.
    """
    file = SafetensorsFile(Path(path))
    try:
        _check_model(file, transformer)
        length, evicted = _check_tensors(file, pool, transformer, max_context)
        return _read(file, pool, transformer, length, evicted)
    finally:
        file.close()


def _check_model(file: SafetensorsFile, transformer: Transformer) -> None:
    found = {key: file.metadata.get(key) for key in ("format", "version", "model", *Fingerprint._fields)}
    if found["format"] != FORMAT:
        raise CheckpointError(f"{file.path}: not a saved sequence; one is written by sequence.save(path)")
    if found["version"] != VERSION:
        raise CheckpointError(
            f"{file.path}: version {quote(found['version'])} of the format, and this handloom reads version "
            f"{VERSION}; save the sequence again with this one"
        )
    for what, own in fingerprint(transformer)._asdict().items():
        if found[what] != own:
            raise CheckpointError(
                f"{file.path}: saved from another model, named {quote(found['model'])}: its {what} "
                f"{'is' if what == 'spec' else 'are'} not this model's; load that model in the same dtype"
            )


def _check_tensors(
    file: SafetensorsFile, pool: PagePool, transformer: Transformer, max_context: int
) -> tuple[int, Ranges]:
    """(tokens, evicted ranges) of a file whose tensors are those of this model."""
    spec = transformer.spec
    length, num_cached = _length(file, "token_ids"), _length(file, "layers.0.k")
    if length > max_context:
        raise ContextOverflow(
            f"{file.path}: {length} tokens, and the context holds {max_context}; load the model with a larger "
            "max_context"
        )
    embedded = file.tensors.get("embeddings")
    num_embedded = _length(file, "embeddings") if embedded is not None else 0
    expected: dict[str, tuple[str, tuple[int, ...]]] = {"token_ids": ("I64", (length,))}
    evicted = _evicted(file, length)
    if evicted:
        expected["evicted"] = ("I64", (len(evicted), 2))
    num_computed = num_cached + sum(stop - start for start, stop in evicted)
    if max(num_computed, num_embedded) > length or (evicted and evicted[-1][1] > num_computed):
        raise CheckpointError(
            f"{file.path}: {num_computed} computed, {num_embedded} embedded of {length} tokens, evicted {evicted}"
        )
    if embedded is not None:
        storage = embedded.storage if embedded.storage in ("F64", "F32", "F16", "BF16") else "F32"
        expected["embeddings"] = (storage, (num_embedded, spec.hidden_size))
    if "logits" in file.tensors and num_computed == length:
        expected["logits"] = ("F32", (spec.vocab_size,))
    for i, layer in enumerate(pool.layers):
        for kind, pages in zip("kv", layer, strict=True):
            expected[f"layers.{i}.{kind}"] = (_STORAGE[pages.dtype], (num_cached, *pages.shape[2:]))
    for name in sorted(expected.keys() ^ file.tensors.keys()):
        raise CheckpointError(
            f"{file.path}: tensor {quote(name)} is {'missing' if name in expected else 'not expected'} in a sequence "
            f"of {num_computed} computed tokens of this model"
        )
    for name, (storage, shape) in expected.items():
        info = file.tensors[name]
        if (info.storage, info.shape) != (storage, shape):
            raise CheckpointError(
                f"{file.path}: tensor {name} is {info.storage} {list(info.shape)}; expected {storage} {list(shape)}"
            )
    return length, evicted


def _evicted(file: SafetensorsFile, length: int) -> Ranges:
    """The ranges that a file says were evicted: in order, apart, within its tokens."""
    if "evicted" not in file.tensors:
        return ()
    info = file.tensors["evicted"]
    if info.storage != "I64" or len(info.shape) != 2 or info.shape[1] != 2 or not 0 < info.shape[0] <= length:
        raise CheckpointError(f"{file.path}: tensor evicted is {info.storage} {list(info.shape)}; expected I64 [r, 2]")
    ranges = torch.empty(info.shape, dtype=torch.int64, device="cpu")
    file.read_into("evicted", ranges)
    at = 0
    for start, stop in ranges.tolist():
        if not at <= start < stop <= length:
            raise CheckpointError(f"{file.path}: evicted tokens {start} to {stop} after {at}, of {length} tokens")
        at = stop + 1
    return tuple((start, stop) for start, stop in ranges.tolist())


def _length(file: SafetensorsFile, name: str) -> int:
    if name not in file.tensors or not file.tensors[name].shape:
        raise CheckpointError(f"{file.path}: tensor {name} is missing or has no length")
    return file.tensors[name].shape[0]


def _read(
    file: SafetensorsFile, pool: PagePool, transformer: Transformer, length: int, evicted: Ranges
) -> tuple[Sequence, Tensor | None]:
    crc = 0

    def read(name: str, out: Tensor) -> Tensor:
        nonlocal crc
        file.read_into(name, out)
        crc = zlib.crc32(_bytes(out), crc)
        return out

    ids = read("token_ids", torch.empty(length, dtype=torch.int64, device="cpu")).tolist()
    read_whole = {
        name: read(name, torch.empty(info.shape, dtype=READABLE[info.storage], device="cpu"))
        for name, info in ((name, file.tensors.get(name)) for name in ("embeddings", "logits", "evicted"))
        if info is not None
    }
    embeddings, logits = read_whole.get("embeddings"), read_whole.get("logits")
    _check_ids(file, ids, embeddings, transformer.spec.vocab_size)
    embedded = 0 if embeddings is None else len(embeddings)
    sequence = Sequence(pool, ids[embedded:], None if embeddings is None else embeddings.to(pool.device))
    num_cached = _length(file, "layers.0.k")
    try:
        sequence.grow(num_cached)
        for i, layer in enumerate(pool.layers):
            for kind, pages in zip("kv", layer, strict=True):
                runs = _runs(sequence, num_cached, pages)
                if len(runs) == 1 and pages.device.type == "cpu":
                    read(f"layers.{i}.{kind}", runs[0])
                    continue
                staged = read(
                    f"layers.{i}.{kind}", torch.empty((num_cached, *pages.shape[2:]), dtype=pages.dtype, device="cpu")
                )
                for run, values in zip(runs, staged.split([len(run) for run in runs]), strict=True):
                    run.copy_(values)
        if f"{crc:08x}" != file.metadata.get("crc32"):
            raise CheckpointError(
                f"{file.path}: its bytes do not have the CRC-32 they were written with; it is damaged"
            )
    except BaseException:
        sequence.free()
        raise
    sequence.evicted = evicted
    sequence.num_computed = num_cached + sequence.num_evicted
    return sequence, None if logits is None else logits.to(pool.device)


def _check_ids(file: SafetensorsFile, ids: list[int], embeddings: Tensor | None, vocab_size: int) -> None:
    embedded = 0 if embeddings is None else len(embeddings)
    for at, token_id in enumerate(ids):
        if not (token_id == PLACEHOLDER if at < embedded else 0 <= token_id < vocab_size):
            raise CheckpointError(f"{file.path}: token {at} is {token_id}; ids go from 0 to {vocab_size - 1}")
    if embeddings is not None and not bool(torch.isfinite(embeddings).all()):
        raise CheckpointError(f"{file.path}: its embeddings hold NaN or infinity")
