"""transformers' streamers get from handloom what they get from generate; one that raises fails its request alone."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import handloom as hl
from engines import all_free, lm_with
from handloom.errors import InvalidParam, RequestFailed, UnsupportedOption
from parity_checks import Pair
from tiny_models import random_ids, tiny_tokenizer

PROMPT, OTHER = random_ids(1, 9), random_ids(2, 4)
EOS = list(range(4, 331, 30))
OPTIONS: list[dict[str, Any]] = [
    {"eos_token_id": None},
    {"eos_token_id": EOS},
    {"do_sample": True, "top_k": 40, "eos_token_id": EOS},
    {"stop_strings": [*"aeiou"], "eos_token_id": None},
]


class Records(BaseStreamer):
    """What it was given: the tensors as lists, and None for the end."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        assert value.dtype == torch.int64 and value.device.type == "cpu"
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append(None)


def theirs(pair: Pair, prompt: list[int], streamer: Any, options: dict[str, Any]) -> None:
    tokenizer = {"tokenizer": tiny_tokenizer()} if "stop_strings" in options else {}
    torch.manual_seed(3)
    pair.hf.generate(torch.tensor([prompt]), streamer=streamer, **{"do_sample": False, **options}, **tokenizer)


def ours(pair: Pair, prompt: Any, streamer: Any, options: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    rng = {"rng": "torch"} if options.get("do_sample") else {}
    return pair.lm().generate(prompt, streamer=streamer, **options, **rng)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_streamer_gets_the_prompt_every_token_and_the_end(pair: Pair, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 14, **options}
    expected, given = Records(), Records()
    theirs(pair, PROMPT, expected, options)
    output = ours(pair, PROMPT, given, options)
    assert given.given == expected.given == [[PROMPT], *([token] for token in output.token_ids), None]


@pytest.mark.parametrize("skip", [True, False])
def test_a_text_streamer_prints_what_it_prints_of_generate(
    pair: Pair, skip: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"max_new_tokens": 20, "eos_token_id": EOS}
    theirs(pair, PROMPT, TextStreamer(tiny_tokenizer(), skip_prompt=skip), options)
    expected = capsys.readouterr().out
    ours(pair, PROMPT, TextStreamer(tiny_tokenizer(), skip_prompt=skip), options)
    assert capsys.readouterr().out == expected


def test_a_text_iterator_streamer_is_read_from_another_thread(pair: Pair) -> None:
    options = {"max_new_tokens": 20, "eos_token_id": None}
    expected = TextIteratorStreamer(tiny_tokenizer(), timeout=20)
    theirs(pair, PROMPT, expected, options)
    streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=20)
    thread = threading.Thread(target=ours, args=(pair, PROMPT, streamer, options))
    thread.start()
    assert list(streamer) == list(expected)
    thread.join()


def test_an_async_text_iterator_streamer_is_read_by_a_task(pair: Pair) -> None:
    options = {"max_new_tokens": 20, "eos_token_id": None}
    expected = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=20)
    theirs(pair, PROMPT, expected, options)

    async def main() -> list[str]:
        streamer = AsyncTextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=20)
        running = asyncio.create_task(asyncio.to_thread(ours, pair, PROMPT, streamer, options))
        pieces = [piece async for piece in streamer]
        await running
        return pieces

    assert asyncio.run(main()) == list(expected)


def test_embeddings_are_an_empty_prompt_as_in_generate(pair: Pair) -> None:
    embeddings = pair.hf.get_input_embeddings()(torch.tensor(PROMPT)).detach()
    expected, given = Records(), Records()
    options = {"max_new_tokens": 4, "eos_token_id": None}
    pair.hf.generate(inputs_embeds=embeddings[None], streamer=expected, do_sample=False, **options)
    pair.lm().generate(embeddings, streamer=given, **options)
    assert given.given == expected.given


# Several prompts -------------------------------------------------------------------------------


def test_one_streamer_for_several_is_refused_as_in_generate(pair: Pair) -> None:
    with pytest.raises(ValueError, match="batch size 1"):
        pair.hf.generate(torch.tensor([PROMPT, PROMPT]), streamer=TextStreamer(tiny_tokenizer()), max_new_tokens=2)
    lm = pair.lm()
    with pytest.raises(InvalidParam, match="one streamer for 2 prompts; give a list"):
        lm.generate([PROMPT, OTHER], streamer=Records())
    with pytest.raises(InvalidParam, match="3 streamers for 2 prompts"):
        lm.generate([PROMPT, OTHER], streamer=[Records(), Records(), Records()])
    with pytest.raises(InvalidParam, match="one streamer for 2 outputs"):
        lm.generate(PROMPT, streamer=Records(), num_return_sequences=2, do_sample=True)
    with pytest.raises(InvalidParam, match="with put and end"):
        lm.generate(PROMPT, streamer=print)
    with pytest.raises(UnsupportedOption, match=r"streamer=.*lm\.stream"):
        hl.Engine(lm).add_request(PROMPT, streamer=Records())


@pytest.mark.parametrize("how", ["a list", "params", "stream"])
def test_each_of_several_prompts_has_a_streamer_of_its_own(pair: Pair, how: str) -> None:
    lm, options = pair.lm(), {"max_new_tokens": 5, "eos_token_id": None}
    first, second = Records(), Records()
    if how == "params":
        outputs = lm.generate([PROMPT, OTHER], params=[{"streamer": first}, {"streamer": second}], **options)
    elif how == "a list":
        outputs = lm.generate([PROMPT, OTHER], streamer=[first, second], **options)
    else:
        outputs = lm.generate([PROMPT, OTHER], **options)
        list(lm.stream([PROMPT, OTHER], streamer=[first, second], **options))
    for prompt, streamer, output in zip((PROMPT, OTHER), (first, second), outputs, strict=True):
        assert streamer.given == [[prompt], *([token] for token in output.token_ids), None]


def test_of_beams_it_gets_what_cannot_change_any_more(pair: Pair) -> None:
    streamer = Records()
    output = pair.lm().generate(PROMPT, num_beams=3, streamer=streamer, max_new_tokens=8)
    assert streamer.given == [[PROMPT], *([token] for token in output.token_ids), None]


# What goes wrong -------------------------------------------------------------------------------


class Breaks(Records):
    """Raises when it is given its n-th value."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _count(self) -> None:
        if len(self.given) == self.at:
            self.given.append("raised")
            raise ZeroDivisionError("mine")

    def put(self, value: torch.Tensor) -> None:
        self._count()
        super().put(value)

    def end(self) -> None:
        self._count()
        super().end()


@pytest.mark.parametrize(("at", "kept"), [(0, 0), (1, 0), (3, 2), (6, 5)], ids=["prompt", "first", "third", "end"])
def test_a_streamer_that_raises_ends_its_request_alone(at: int, kept: int) -> None:
    lm, options = lm_with(), {"max_new_tokens": 5, "eos_token_id": None, "output_logits": True}
    plain = lm.generate([PROMPT, OTHER], **options)
    bad, good = Breaks(at), Records()
    outputs = lm.generate([PROMPT, OTHER], streamer=[bad, good], **options)
    assert isinstance(outputs[0].error, RequestFailed)
    assert isinstance(outputs[0].error.__cause__, ZeroDivisionError)
    assert (outputs[0].token_ids, outputs[0].finish_reason) == (plain[0].token_ids[:kept], "error")
    assert bad.given[-1] == "raised", "nothing more was given"
    assert outputs[1].token_ids == plain[1].token_ids
    assert all(torch.equal(a, b) for a, b in zip(outputs[1].logits, plain[1].logits, strict=True))
    assert good.given[-1] is None
    with pytest.raises(RequestFailed, match=r"the streamer .* raised ZeroDivisionError"):
        lm.generate(PROMPT, streamer=Breaks(at), **options)
    assert all_free(lm)


def test_whoever_reads_hears_of_the_end_when_the_loop_is_left_and_where_the_request_fails() -> None:
    lm, streamer = lm_with(), Records()
    for _ in lm.stream(PROMPT, streamer=streamer, max_new_tokens=9, eos_token_id=None):
        if len(streamer.given) == 3:
            break
    assert streamer.given[-1] is None and len(streamer.given) == 4
    assert all_free(lm)

    def fails(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError

    streamer = Records()
    with pytest.raises(RequestFailed):
        lm.generate(PROMPT, streamer=streamer, logits_processor=[fails])
    assert streamer.given == [[PROMPT], None]
