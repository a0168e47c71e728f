"""Chat templates render as in transformers, and what goes into them is checked."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

import pytest

from chats import (
    BYE,
    CHATML,
    CHATS,
    GEMMA,
    HELLO,
    HI,
    QWEN,
    TEMPLATES,
    WEATHER,
)
from handloom.errors import ChatTemplateError, InvalidParam, InvalidPrompt
from handloom.text.chat import ChatLimits, ChatRenderer, choose_template
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import SETTINGS, tiny, wrap


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(wrap(tiny("sentencepiece_prefix_space"), **SETTINGS["sentencepiece_prefix_space"]))


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer()


def both(tokenizer: Tokenizer, template: str, chat: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
    """What we render and what transformers does; an error of the template counts as the word "refused"."""
    tokenizer.chat_template = template
    try:
        ours = tokenizer.render_chat(chat, **options)
    except ChatTemplateError:
        ours = "refused"
    options.setdefault("add_generation_prompt", not options.get("continue_final_message", False))
    try:
        theirs = tokenizer.hf.apply_chat_template(chat, tokenize=False, **options)
    except Exception:
        theirs = "refused"
    return ours, theirs


# As in transformers ------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(tokenizer: Tokenizer, name: str, chat: int) -> None:
    for options in (
        {},
        {"add_generation_prompt": False},
        {"tools": [WEATHER]},
        {"enable_thinking": False, "x": [1, {}]},
    ):
        ours, theirs = both(tokenizer, TEMPLATES[name], CHATS[chat], **options)
        assert ours == theirs
    assert any(t != "refused" for t in (ours, theirs)) or (name, chat) in {("llama", 3), ("gemma", 3)}


@pytest.mark.parametrize("name", ["chatml", "llama", "gemma", "mistral"])
@pytest.mark.parametrize("ending", ["The answer", "The answer ", "  two\n\n", "The [INST]  "])
def test_continuing_the_final_message_is_that_of_transformers(tokenizer: Tokenizer, name: str, ending: str) -> None:
    for content in ([{"type": "text", "text": "one"}, {"type": "text", "text": ending}], ending):
        chat = [HI, {"role": "assistant", "content": content}]
        ours, theirs = both(tokenizer, TEMPLATES[name], chat, continue_final_message=True)
        assert ours == theirs
    assert ours.rstrip().endswith(ending.strip())


def test_ids_are_those_of_transformers_and_bos_is_not_doubled(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = GEMMA
    ids = tokenizer.apply_chat_template([HI, HELLO, BYE])
    assert ids == tokenizer.hf.apply_chat_template([HI, HELLO, BYE], add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_second_turn_starts_with_the_ids_of_the_first(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    first = tokenizer.apply_chat_template([HI])
    assert tokenizer.apply_chat_template([HI, HELLO, BYE])[: len(first)] == first


def test_tools_may_be_python_functions(tokenizer: Tokenizer) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: one
            b: other
        """
        return a + b

    ours, theirs = both(tokenizer, QWEN, [HI], tools=[add, WEATHER])
    assert ours == theirs
    assert '"name": "add"' in ours
    with pytest.raises(InvalidParam, match=r"tools\[0\]"):
        tokenizer.apply_chat_template([HI], tools=[lambda x: x])
    with pytest.raises(InvalidParam, match=r"tools\[1\] must be a JSON schema or a function, not str"):
        tokenizer.apply_chat_template([HI], tools=[WEATHER, "weather"])  # type: ignore[list-item]


def test_named_templates_are_chosen_as_in_transformers(tokenizer: Tokenizer) -> None:
    tokenizer.hf.chat_template = {"default": "D", "tool_use": "T", "rag": "R"}
    for tools in (None, [], [WEATHER]):
        assert tokenizer.render_chat([HI], tools=tools) == tokenizer.hf.apply_chat_template(
            [HI], tools=tools, tokenize=False
        )
    with pytest.raises(ChatTemplateError, match=r"none is called 'default'.*\['rag', 'tool_use'\]"):
        choose_template({"tool_use": "T", "rag": "R"}, has_tools=False)


def test_a_missing_template_says_how_to_give_one(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ChatTemplateError, match=r"has no chat template.*tokenizer\.chat_template = "):
        tokenizer.apply_chat_template([HI])
    with pytest.raises(ChatTemplateError, match="must be Jinja source"):
        choose_template(["x"], has_tools=False)


def test_reasoning_is_found_under_each_of_its_names_and_null_is_left_out(renderer: ChatRenderer) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ 'name' in m }}\n{% endfor %}"
    for key in ("reasoning", "thinking", "reasoning_content"):
        message = {"role": "assistant", "content": "", key: "because", "name": None}
        assert renderer.render(template, [message]) == "because|because|False\n"


def test_time_is_the_callers_local_time(renderer: ChatRenderer) -> None:
    text = renderer.render("{{ strftime_now('%Y-%m-%d %H:%M %Z') }}", [HI])
    now = datetime.now()
    assert abs((now - datetime.strptime(text.strip(), "%Y-%m-%d %H:%M")).total_seconds()) < 120


# What comes in is checked ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ("hello", "must be a list of mappings.*not str"),
        ({"role": "user"}, "must be a list of mappings.*not dict"),
        (None, "must be a list of mappings.*missing"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] must be a mapping"),
        ([HI, {"content": "x"}], r"messages\[1\]\['role'\] must be a string, not missing"),
        ([{"role": 3, "content": "x"}], r"\['role'\] must be a string, not int"),
        ([{"role": "user"}], r"\['content'\] must be text or a list of text parts, not missing"),
        ([{"role": "user", "content": 5}], r"\['content'\] must be text or a list of text parts, not int"),
        ([{"role": "user", "content": {"a": 1}}], r"\['content'\] must be text or a list of text parts, not dict"),
        ([{"role": "user", "content": [{"type": "image", "url": "http://x"}]}], r"\['content'\]\[0\] must be .*text"),
        ([{"role": "user", "content": ["x"]}], r"\['content'\]\[0\] must be .*text"),
        ([{"role": "user", "content": "ab\udc80"}], r"messages\[0\]\['content'\]: character 2 is a lone surrogate"),
        ([{"role": "user", "content": "x", "a\ud800": 1}], "key of messages.*lone surrogate"),
        ([{"role": "user", "content": "x", 5: 1}], "key 5 is not a string"),
        ([{"role": "user", "content": "x", "extra": object()}], r"\['extra'\]: object is not text, a number"),
        ([{"role": "user", "content": "x", "extra": float("nan")}], "not a finite number"),
        ([{"role": "user", "content": "x", "extra": 10**400}], "bits; the limit is 1024"),
    ],
)
def test_messages_that_are_none_are_refused_by_place(renderer: ChatRenderer, messages: Any, complaint: str) -> None:
    with pytest.raises(InvalidPrompt, match=complaint):
        renderer.render(CHATML, messages)


def test_deep_and_long_conversations_are_bounded() -> None:
    nested: Any = []
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(InvalidPrompt, match="nested more than 64 deep"):
        ChatRenderer().render(CHATML, [{**HI, "extra": nested}])
    renderer = ChatRenderer(ChatLimits(input_chars=1000))
    for messages in ([{**HI, "content": "x" * 1001}], [HI] * 100, [{**HI, "extra": [0] * 1001}]):
        with pytest.raises(InvalidPrompt, match="longer than the limit of 1000 characters"):
            renderer.render(CHATML, messages)


def test_text_like_values_reach_the_template_as_plain_text(renderer: ChatRenderer) -> None:
    class Role(StrEnum):
        USER = "user"

    class Loud(str):
        def __str__(self) -> str:
            return "LOUD"

    assert (
        renderer.render(
            "{{ messages[0].role }} {{ messages[0].content }}", [{"role": Role.USER, "content": Loud("quiet")}]
        )
        == "user quiet"
    )


@pytest.mark.parametrize(
    "name",
    "messages documents add_generation_prompt bos_token eos_token tokenize chat_template raise_exception namespace "
    "range strftime_now conversation max_length".split(),
)
def test_06_template_variables_cannot_override_reserved_names(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(InvalidParam, match=f"{name!r} is reserved"):
        tokenizer._chat.render(
            CHATML, [HI], special_tokens=tokenizer.hf.special_tokens_map, variables={"fine": 1, name: "evil"}
        )


def test_contradicting_arguments_are_refused(tokenizer: Tokenizer) -> None:
    tokenizer.chat_template = CHATML
    with pytest.raises(InvalidParam, match="exclude each other"):
        tokenizer.apply_chat_template([HI], add_generation_prompt=True, continue_final_message=True)
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ChatTemplateError, match="changes or drops the last message"):
        tokenizer.apply_chat_template([HI, HELLO], continue_final_message=True)
    with pytest.raises(InvalidPrompt, match="has no text"):
        tokenizer.apply_chat_template([HI, {"role": "assistant", "tool_calls": []}], continue_final_message=True)
