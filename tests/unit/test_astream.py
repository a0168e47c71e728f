"""`lm.stream` and `lm.astream`: pieces of every prompt and sample, tagged, the same in both."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine, Iterable
from typing import Any, TypeVar

import pytest
import torch

import handloom as hl
from engines import all_free, lm_with
from handloom.errors import EngineError, InvalidParam, RequestFailed
from handloom.output import Output, Piece
from tiny_models import random_ids

T = TypeVar("T")
PROMPTS = [random_ids(i, length) for i, length in enumerate((9, 14, 3))]
EOS = list(range(4, 331, 30))
OPTIONS: list[dict[str, Any]] = [
    {"eos_token_id": []},
    {"num_return_sequences": 3, "seed": 1, "eos_token_id": EOS},
    {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": EOS},
    {"stop": [*"aeiou"], "logprobs": 2},
]


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(main, 20))


async def listed(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


def by_output(pieces: Iterable[Piece]) -> dict[tuple[int, int], list[Piece]]:
    told: dict[tuple[int, int], list[Piece]] = defaultdict(list)
    for piece in pieces:
        told[piece.index, piece.sample].append(piece)
    return told


def assert_tells(pieces: list[Piece], output: Output) -> None:
    assert [piece.token_id for piece in pieces] == [*output.token_ids, None]
    assert "".join(piece.text for piece in pieces) == output.text
    assert [piece.finish_reason for piece in pieces] == [*[None] * len(output.token_ids), output.finish_reason]
    if output.logprobs is not None:
        assert [piece.logprob for piece in pieces[:-1]] == output.logprobs
        assert [piece.top_logprobs for piece in pieces[:-1]] == output.top_logprobs


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("how", ["stream", "astream"])
def test_pieces_of_several_prompts_and_samples_are_those_of_generate(how: str, options: dict[str, Any]) -> None:
    lm, options = lm_with(), {"max_new_tokens": 8, **options}
    count = options.get("num_return_sequences", 1)
    expected = lm.generate(PROMPTS, **options)
    pieces = list(lm.stream(PROMPTS, **options)) if how == "stream" else run(listed(lm.astream(PROMPTS, **options)))
    told = by_output(pieces)
    assert set(told) == {(index, sample) for index in range(3) for sample in range(count)}
    for (index, sample), own in told.items():
        assert_tells(own, expected[index * count + sample])
    assert all_free(lm)


def test_prompts_have_params_of_their_own() -> None:
    lm = lm_with()
    params = [{"max_new_tokens": 4}, {"max_new_tokens": 7}, {"max_new_tokens": 2}]

    async def main() -> list[Piece]:
        return await listed(lm.astream(PROMPTS, params=params, eos_token_id=[]))

    pieces = run(main())
    assert {key[0]: len(own) - 1 for key, own in by_output(pieces).items()} == {0: 4, 1: 7, 2: 2}


def test_one_engine_serves_several_streams_in_the_same_steps() -> None:
    lm, options = lm_with(), {"max_new_tokens": 8, "eos_token_id": []}
    expected = [output.token_ids for output in lm.generate(PROMPTS, **options)]

    async def main() -> list[list[Piece]]:
        async with hl.AsyncEngine(lm) as engine:
            streams = [listed(lm.astream(prompt, engine=engine, **options)) for prompt in PROMPTS]
            told = await asyncio.gather(*streams)
            assert engine.stats().num_finished == 3
            return told

    told = run(main())
    assert [[piece.token_id for piece in pieces[:-1]] for pieces in told] == expected


@pytest.mark.parametrize("how", ["break", "cancel"])
def test_leaving_ends_every_request_and_frees_the_pages(how: str) -> None:
    lm = lm_with()

    def slowly(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return scores

    async def main() -> None:
        pieces = lm.astream(PROMPTS, max_new_tokens=100, eos_token_id=[], logits_processor=[slowly])
        if how == "break":
            async for _ in pieces:
                break
            await pieces.aclose()
        else:
            started = asyncio.Event()

            async def read() -> None:
                async for _ in pieces:
                    started.set()

            task = asyncio.create_task(read())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())
    assert all_free(lm)


def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError


def test_a_prompt_that_fails_tells_it_in_its_last_piece_and_alone_it_raises() -> None:
    lm, options = lm_with(), {"max_new_tokens": 5, "eos_token_id": []}
    params: list[dict[str, Any]] = [{}, {"logits_processor": [fails]}, {}]
    told = by_output(run(listed(lm.astream(PROMPTS, params=params, **options))))
    assert isinstance(told[1, 0][-1].error, RequestFailed)
    for index in (0, 2):
        assert (len(told[index, 0]), told[index, 0][-1].error) == (6, None)
    with pytest.raises(RequestFailed):
        run(listed(lm.astream(PROMPTS[1], **params[1], **options)))
    with pytest.raises(InvalidParam, match="top_k"):
        lm.astream(PROMPTS[1], top_k=-1)
    assert all_free(lm)


def test_a_streamer_that_raises_and_an_engine_that_closes_end_what_they_are_about() -> None:
    lm, options = lm_with(), {"max_new_tokens": 5, "eos_token_id": []}

    class Breaks:
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1:
                raise ZeroDivisionError

        def end(self) -> None:
            raise AssertionError("nothing more is given to a streamer that raised")

    params: list[dict[str, Any]] = [{}, {"streamer": Breaks()}, {}]
    told = by_output(run(listed(lm.astream(PROMPTS, params=params, **options))))
    assert isinstance(told[1, 0][-1].error, RequestFailed)
    assert [len(told[index, 0]) for index in range(3)] == [6, 1, 6]

    async def closing() -> list[Piece]:
        engine = hl.AsyncEngine(lm)
        pieces: list[Piece] = []
        async for piece in lm.astream(PROMPTS, engine=engine, max_new_tokens=100, eos_token_id=[]):
            pieces.append(piece)
            if len(pieces) == 1:
                await engine.aclose()
        return pieces

    told = by_output(run(closing()))
    assert all(isinstance(own[-1].error, EngineError) for own in told.values())
    assert len(told) == 3 and all_free(lm)


def test_a_mistake_of_the_engine_is_told_and_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(*_: object, **__: object) -> AsyncIterator[Any]:
        raise KeyError("lost")
        yield

    monkeypatch.setattr(hl.AsyncEngine, "run", breaks)
    pieces = run(listed(lm_with().astream(PROMPTS, max_new_tokens=2)))
    assert [(piece.index, type(piece.error)) for piece in pieces] == [(i, EngineError) for i in range(3)]
    assert isinstance(pieces[0].error, EngineError) and isinstance(pieces[0].error.__cause__, KeyError)


def test_without_a_thread_a_request_fails_and_a_later_one_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        lm = lm_with()
        async with hl.AsyncEngine(lm) as engine:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", none_left)
                with pytest.raises(EngineError, match="can't start new thread"):
                    await listed(lm.astream(PROMPTS[0], max_new_tokens=2, engine=engine))
            assert len(await listed(lm.astream(PROMPTS[0], max_new_tokens=2, eos_token_id=[], engine=engine))) == 3

    run(main())


@pytest.mark.parametrize(
    "limits", [{"max_waiting": 0}, {"max_events": "8"}, {"max_waiting": 2.5}, {"max_events": True}]
)
def test_limits_of_an_engine_are_integers_from_1(limits: dict[str, Any]) -> None:
    with pytest.raises(InvalidParam, match="both must be 1 or more, and integers"):
        hl.AsyncEngine(lm_with(), **limits)
