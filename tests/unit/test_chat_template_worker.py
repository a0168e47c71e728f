"""The process that renders chat templates: started once, replaced when it dies, apart for each fork."""

from __future__ import annotations

import os
import threading
import time

import pytest

from chats import (
    BYE,
    HELLO,
    HI,
    QWEN,
    SYSTEM,
)
from handloom.errors import ChatTemplateError
from handloom.text.chat import ChatRenderer
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import SETTINGS, tiny, wrap


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(wrap(tiny("sentencepiece_prefix_space"), **SETTINGS["sentencepiece_prefix_space"]))


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer()


def test_the_child_is_started_once_and_gone_with_its_renderer() -> None:
    renderer = ChatRenderer()
    renderer.render("a", [HI])
    worker = renderer._worker
    renderer.render("b", [HI])
    assert worker is not None and renderer._worker is worker
    process = worker._process
    del renderer, worker
    assert process.wait(timeout=10) is not None


def test_a_child_that_was_killed_or_ran_out_of_memory_is_replaced() -> None:
    renderer = ChatRenderer()
    renderer.render("a", [HI])
    assert renderer._worker is not None
    renderer._worker._process.kill()
    renderer._worker._process.wait()
    assert renderer.render("b", [HI]) == "b"
    worker = renderer._worker
    with pytest.raises(ChatTemplateError, match="needs more than the limit of 512 MiB"):
        renderer.render("{{ 'a' * 10**10 }}", [HI])
    assert not worker.usable()
    assert renderer.render("c", [HI]) == "c"


def test_threads_get_their_own_answers(renderer: ChatRenderer) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = renderer.render("{{ messages[0].content }}", [{"role": "user", "content": str(number)}])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(32)}


def test_a_fork_of_this_program_starts_a_child_of_its_own(renderer: ChatRenderer) -> None:
    renderer.render("a", [HI])
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(send, renderer.render("{{ messages[0].role }}", [HI]).encode())
        finally:
            os._exit(0)
    os.close(send)
    os.waitpid(pid, 0)
    assert os.read(receive, 100) == b"user"
    os.close(receive)
    assert renderer.render("still here", [HI]) == "still here"


def test_an_interrupted_render_does_not_confuse_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = ChatRenderer()
    renderer.render("a", [HI])

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("handloom.text.chat._read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            renderer.render("first", [HI])
    assert renderer.render("second", [HI]) == "second"


def test_an_ordinary_render_costs_less_than_a_millisecond(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = QWEN
    chat = [SYSTEM, *[HI, HELLO] * 10, BYE]
    times = []
    for _ in range(50):
        start = time.perf_counter()
        tokenizer.render_chat(chat)
        times.append(time.perf_counter() - start)
    theirs = []
    for _ in range(50):
        start = time.perf_counter()
        tokenizer.hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        theirs.append(time.perf_counter() - start)
    assert min(times) - min(theirs) < 1e-3
