"""From an open checkpoint to a Transformer: every weight read once, straight into its final place.

Weights that the forward pass holds stacked (q, k, v; gate, up) are read part by part into views of one
tensor. Whatever the checkpoint lacks, has too much of, or has in another shape is an error that names it.

Matrices may be held quantised (see `handloom.checkpoint.quantization`): as the checkpoint has them, or made from its
floats a few rows at a time.

This module does not know file formats or how config.json is written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from handloom.checkpoint import memory
from handloom.checkpoint.quantization import FORMATS, Format, QuantizedMatrix, QuantizedRows
from handloom.checkpoint.quantize import GROUPS, Scheme, quantize_rows
from handloom.checkpoint.types import Checkpoint
from handloom.errors import CheckpointError, InvalidParam, OutOfMemory
from handloom.model.families.family import Family, Source
from handloom.model.spec import ModelSpec, Parameter, model_parameters
from handloom.model.transformer import Transformer, hold
from handloom.ops import Backend, Weight
from handloom.ops.cores import usable_memory

READERS = 2
ROOM = 32  # rows of a matrix are rounded up to it, so that it can be laid out in its own memory; see Backend.take
Progress = Callable[[int, int], None]


def load_transformer(
    checkpoint: Checkpoint,
    family: Family,
    spec: ModelSpec,
    backend: Backend,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: Scheme | Literal["keep"] | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """Read all weights of a checkpoint in `dtype` onto `device`.

    quantize: how matrices (but the positions') are held instead, where their numbers come from whatever the checkpoint
    has; "keep": those that it has in `quantization.FORMATS` as they are. progress(bytes read so far, bytes in all) is
    called after each weight. Raises CheckpointError for missing, unexpected or misshapen tensors and weights that
    cannot be quantised, InvalidParam for a group that does not divide the rows, OutOfMemory if the weights cannot fit.
    """
    prefix = _prefix(checkpoint, family)
    spec = _settle_head(checkpoint, spec, prefix, family)
    sources = dict(_sources(family, spec, prefix))
    parameters = model_parameters(spec)
    _check_names(checkpoint, family, sources)
    _check_shapes(checkpoint, sources, parameters)
    formats = {name: _formats(checkpoint, name, sources[name], p, quantize) for name, p in parameters.items()}
    _check_memory(checkpoint, parameters, formats, dtype, device)
    sizes = {name: _nbytes(p, formats[name], dtype) for name, p in parameters.items()}
    memory.trim()
    region = memory.Region()
    weights: dict[str, Weight] = {}
    done = 0

    def read(name: str) -> int:
        weight = _empty(parameters[name], formats[name], dtype, device, region)
        if isinstance(weight, QuantizedMatrix):
            _read_quantized(checkpoint, sources[name], parameters[name], weight, backend, keep=quantize == "keep")
        else:
            _read(checkpoint, sources[name], parameters[name], weight)
        weights[name] = hold(spec, backend, name, weight, own=True)
        return weight.nbytes

    by_formulas = isinstance(quantize, Scheme) and backend.quantize is quantize_rows
    # a second reader would wait for torch's threads, or for Python's lock
    readers = 1 if by_formulas or quantize == "keep" else READERS
    with ThreadPoolExecutor(readers) as pool:
        for nbytes in pool.map(read, sorted(parameters, key=lambda n: -sizes[n])):
            done += nbytes
            if progress is not None:
                progress(done, sum(sizes.values()))
    return Transformer(spec, weights, backend)


def _prefix(checkpoint: Checkpoint, family: Family) -> str:
    """The prefix this checkpoint writes before the names of the base model's weights."""
    written = family.prefixes[0]
    stem = family.model_sources["embed.weight"].names[0].removeprefix(written)
    for prefix in family.prefixes:
        if prefix + stem in checkpoint.tensors:
            return prefix
    raise CheckpointError(f"{checkpoint.name}: there is no tensor {written + stem!r}: not a {family.model_type} model")


def _settle_head(checkpoint: Checkpoint, spec: ModelSpec, prefix: str, family: Family) -> ModelSpec:
    """Untie a head that the checkpoint holds with weights of its own, as transformers does."""
    head = family.model_sources["head.weight"].names[0]
    if not spec.tied_head or head not in checkpoint.tensors:
        return spec
    embed = prefix + family.model_sources["embed.weight"].names[0].removeprefix(family.prefixes[0])
    pair = []
    for name in (embed, head):
        weight = torch.empty(checkpoint.tensors[name].shape, dtype=checkpoint.dtype, device="cpu")
        checkpoint.read_into(name, weight)
        pair.append(weight)
    return spec if torch.equal(*pair) else replace(spec, tied_head=False)


def _sources(family: Family, spec: ModelSpec, prefix: str) -> Iterator[tuple[str, Source]]:
    """Where each of our weights comes from, in this checkpoint's own names."""
    parameters = model_parameters(spec)
    written = dict(family.model_sources)
    for i, layer in enumerate(spec.layers):
        written |= {f"layers.{i}.{name}": source for name, source in family.layer_sources(i, layer).items()}
    for name in parameters:
        source = written[name]
        names = tuple(
            prefix + n.removeprefix(family.prefixes[0]) if n.startswith(family.prefixes[0]) else n for n in source.names
        )
        yield name, replace(source, names=names)


def _check_names(checkpoint: Checkpoint, family: Family, sources: dict[str, Source]) -> None:
    wanted = {name for source in sources.values() for name in source.names}
    missing = sorted(wanted - checkpoint.tensors.keys())
    if missing:
        raise CheckpointError(f"{checkpoint.name}: {_list(missing)} missing, which its config.json calls for")
    head = family.model_sources["head.weight"].names[0]
    ignored = re.compile("|".join((*family.ignored, re.escape(head))))
    extra = sorted(n for n in checkpoint.tensors.keys() - wanted if not ignored.fullmatch(n))
    if extra:
        raise CheckpointError(
            f"{checkpoint.name}: {_list(extra)} not understood; a {family.model_type} model as its config.json "
            "describes it has no such weight"
        )


def _check_shapes(checkpoint: Checkpoint, sources: dict[str, Source], parameters: dict[str, Parameter]) -> None:
    """Before anything is allocated: a config that lies about sizes must not cost memory."""
    for ours, source in sources.items():
        for name, rows in zip(source.names, _parts(parameters[ours], len(source.names)), strict=True):
            shape = (rows, *parameters[ours].shape[1:])
            expected = shape[::-1] if source.transpose else shape
            found = tuple(checkpoint.tensors[name].shape)
            if found != expected:
                raise CheckpointError(
                    f"{checkpoint.name}: tensor {name} has shape {list(found)}; its config.json calls for "
                    f"{list(expected)}"
                )


def _parts(parameter: Parameter, count: int) -> tuple[int, ...]:
    """How many rows of our weight each of the `count` tensors that it is made of fills."""
    return parameter.parts if count > 1 else parameter.shape[:1]


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more} {'are' if len(names) > 1 else 'is'}"


def _check_memory(
    checkpoint: Checkpoint,
    parameters: dict[str, Parameter],
    formats: dict[str, tuple[Format, ...]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    needed = sum(_nbytes(p, formats[name], dtype) for name, p in parameters.items())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else usable_memory()
    if needed > free:
        kept = "quantised, the rest " if any(formats.values()) else ""
        raise OutOfMemory(
            f"{checkpoint.name}: the weights take {needed / 2**30:.2f} GiB {kept}in {dtype}, and {free / 2**30:.2f} "
            f"GiB are free on {device}; use a smaller dtype, quantize, or another device"
        )


def _read(checkpoint: Checkpoint, source: Source, parameter: Parameter, weight: Tensor) -> None:
    """Fill one weight from its one or several tensors."""
    for name, part in zip(source.names, weight.split(_parts(parameter, len(source.names))), strict=True):
        checkpoint.read_into(name, part, transpose=source.transpose)


# Quantised matrices ----------------------------------------------------------------------------


def _formats(
    checkpoint: Checkpoint,
    name: str,
    source: Source,
    parameter: Parameter,
    quantize: Scheme | Literal["keep"] | None,
) -> tuple[Format, ...]:
    """The format of each part of a weight; none where it is held in floats.

    A stacked weight is kept as the checkpoint has it only if all of its parts can be. Raises InvalidParam.
    """
    if quantize is None or len(parameter.shape) != 2 or name == "positions.weight":
        return ()
    if quantize == "keep":
        storages = [checkpoint.tensors[part].storage for part in source.names]
        return tuple(FORMATS[storage] for storage in storages) if FORMATS.keys() >= set(storages) else ()
    scheme = quantize.outer if name in ("embed.weight", "head.weight") else quantize
    format, columns = scheme.format, parameter.shape[1]
    if columns % format.multiple:
        fitting = [group for group in GROUPS if columns % group == 0]
        raise InvalidParam(
            f"quantize is {quantize.name!r}, but rows of {name} have {columns} columns, not a multiple of "
            f"{format.multiple}; "
            + (f"use a group of {' or '.join(map(str, fitting))}" if fitting else "'int8' takes rows of any length")
        )
    return (format,) * len(source.names)


def plan(
    checkpoint: Checkpoint,
    family: Family,
    spec: ModelSpec,
    dtype: torch.dtype,
    quantize: Scheme | Literal["keep"] | None,
) -> dict[str, dict[str, int]]:
    """How load_transformer would hold each weight: bytes by dtype or format. No weight is read; raises as it does."""
    sources, parameters = dict(_sources(family, spec, _prefix(checkpoint, family))), model_parameters(spec)
    _check_names(checkpoint, family, sources)
    planned = {}
    for name, parameter in parameters.items():
        formats, counts = _formats(checkpoint, name, sources[name], parameter, quantize), Counter[str]()
        for format, rows in zip(formats, _parts(parameter, len(formats)), strict=False):
            counts[format.name] += format.nbytes(rows, parameter.shape[1])
        planned[name] = dict(counts) or {str(dtype).removeprefix("torch."): _nbytes(parameter, (), dtype)}
    return planned


def _nbytes(parameter: Parameter, formats: tuple[Format, ...], dtype: torch.dtype) -> int:
    if not formats:
        return parameter.numel * dtype.itemsize
    rows = _parts(parameter, len(formats))
    return sum(format.nbytes(count, parameter.shape[1]) for format, count in zip(formats, rows, strict=True))


def _empty(
    parameter: Parameter, formats: tuple[Format, ...], dtype: torch.dtype, device: torch.device, region: memory.Region
) -> Tensor | QuantizedMatrix:
    """Memory for a weight, on a CPU of the region; neighbours of one format become one segment."""
    if not formats:
        rows, *columns = parameter.shape
        room = -(-rows // ROOM) * ROOM if columns else rows
        if device.type == "cpu":
            return region.empty((room, *columns), dtype)[:rows]
        return torch.empty(room, *columns, dtype=dtype, device=device)[:rows]
    parts = zip(formats, _parts(parameter, len(formats)), strict=True)
    segments = [
        QuantizedRows.empty(format, sum(count for _, count in same), parameter.shape[1], ROOM, region.empty)
        for format, same in groupby(parts, key=lambda part: part[0])
    ]
    return QuantizedMatrix(segments, dtype)


def _read_quantized(
    checkpoint: Checkpoint,
    source: Source,
    parameter: Parameter,
    weight: QuantizedMatrix,
    backend: Backend,
    *,
    keep: bool,
) -> None:
    """Fill one quantised weight from its one or several tensors."""
    for name, part in zip(source.names, weight.split(_parts(parameter, len(source.names))), strict=True):
        if keep:
            checkpoint.read_quantized(name, part, transpose=source.transpose)
            continue
        for rows, values in checkpoint.read_rows(name, transpose=source.transpose):
            first = int(rows[0])
            in_order = torch.equal(rows, torch.arange(first, first + len(rows), device="cpu"))
            made = part.narrow(first, len(rows)) if in_order else part.like(len(rows))
            try:
                backend.quantize(values, made)
            except CheckpointError as error:
                raise CheckpointError(f"{checkpoint.name}: tensor {name} {error}") from None
            if not in_order:
                part.put(rows, made)
