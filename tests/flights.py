"""Models whose decode steps run ahead of the host, on the device that late_stream.py plays."""

from __future__ import annotations

from typing import Any

from engines import Results, run
from handloom.engine import Engine
from handloom.engine.graphs import DecodeGraphs
from handloom.engine.stream import Stream
from handloom.lm import LM
from handloom.model.transformer import Transformer
from handloom.ops import choose_backend
from late_stream import LateStream


def flying(lm: LM, stream: Stream | None = None, **limits: int) -> LM:
    """The model, over the same pool, with captured decode steps, computed by the formulas of the reference."""
    transformer = Transformer(lm.spec, {**lm.transformer.weights}, choose_backend(lm.device, "reference"))
    other = LM(transformer, lm.tokenizer, lm.pool, name=lm.name)
    other.graphs = DecodeGraphs(transformer, lm.pool, stream or LateStream(), **limits)
    return other


def tokens_of(lm: LM, requests: list[tuple[list[int], dict[str, Any]]], **limits: Any) -> Results:
    engine = Engine(lm, **limits)
    for prompt, options in requests:
        engine.add_request(prompt, **options)
    return run(engine)


def stream_of(lm: LM) -> LateStream:
    assert lm.graphs is not None and isinstance(lm.graphs.stream, LateStream)
    return lm.graphs.stream
