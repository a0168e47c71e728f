"""Chat templates render as in transformers, and a hostile one costs a child process, never this one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from datetime import datetime
from enum import StrEnum
from typing import Any

import pytest

from handloom.errors import ChatTemplateError, InvalidParam, InvalidPrompt
from handloom.text import template_worker
from handloom.text.chat import ChatLimits, ChatRenderer, choose_template
from handloom.text.tokenizer import Tokenizer
from tiny_tokenizers import SETTINGS, tiny, wrap

CHATML = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{% endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("only single tool-calls at once") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}
"""

MISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' ~ message.content ~ ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {{- ' ' ~ (message.content if message.content is string else message.content[0].text) ~ eos_token }}
        {%- endgeneration %}
    {%- elif message.role == 'system' %}
        {%- continue %}
    {%- else %}
        {%- break %}
    {%- endif %}
{%- endfor %}
"""

QWEN = """\
{%- macro call(tool_call) -%}
    {{- '\\n<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
    {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
    {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
    {{- '}\\n</tool_call>' }}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}{{- call(tool_call.function or tool_call) }}{%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

ODDS = """\
{% set ns = namespace(found=false) %}
  {% for m in messages %}
  {% if loop.first %}first {% elif loop.last %}last {% endif %}
{{ loop.cycle('odd', 'even') }} {{ m.role|upper }}: {{ m|tojson }} {{ m.content|length }}
{{ m.missing|default('none') }}
  {% set ns.found = ns.found or 'x' in m.content %}
  {% endfor %}
{{ ns.found }} {{ documents is none }} {{ "<b>&'" }} {{ "é🙂"|tojson }}
{{ {'b': 1, 'a': [2, 3.5, none]}|tojson(sort_keys=true) }}
{{ dict(a=1)|tojson(separators=(',', ':')) }} {{ [3, 1, 2]|sort|join(', ') }}
{{ '%s-%d' % ('a', 3) }} {{ "{:>4}".format(7) }}
{{ messages|map(attribute='role')|list|tojson(ensure_ascii=true) }} {{ 10 ** 10 ** 10 }} {{ bos_token }}
"""

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "qwen": QWEN, "odds": ODDS}

HI = {"role": "user", "content": "Hi  <b>&\n there é🙂  "}
HELLO = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello!  "}
BYE = {"role": "user", "content": "x" * 50}
SYSTEM = {"role": "system", "content": " Be brief. "}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"städt": {"type": "string"}}}},
}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {"ä": 1}}}]}
RESULT = {"role": "tool", "content": "sunny"}
CHATS: list[list[dict[str, Any]]] = [
    [HI],
    [SYSTEM, HI],
    [HI, HELLO, BYE],
    [SYSTEM, HI, HELLO, BYE, CALL, RESULT, RESULT],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(wrap(tiny("sentencepiece_prefix_space"), **SETTINGS["sentencepiece_prefix_space"]))


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer()


@pytest.fixture(scope="module")
def impatient() -> ChatRenderer:
    return ChatRenderer(ChatLimits(cpu_seconds=0.3))


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


# A hostile template ------------------------------------------------------------------------------


DOUBLING = "{% set ns = namespace(s='ab') %}{% for i in range(100) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS_TEST = "{% for a in range(99999) if range(99999)|sum == 1 %}{% endfor %}"
TOWER = "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ (10 ** (10 ** 8)) % 7 }}",
        "{{ '%09999999999d' % 1 }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a'|indent(10**10) }}",
        "{{ [1]|tojson(indent=10**10) }}",
        "{{ 1.5|round(10**10, 'ceil') }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ lipsum(n=10**9) }}",
        "{{ range(99999)|batch(10**10, 'x')|list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ [['']]|map(attribute='0.__class__')|list }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ lipsum['__globals__'] }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{x.__globals__}'.format_map({'x': lipsum}) }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update(role='x') %}",
        "{{ self.__dict__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ nothing() }}",
        "{{ messages[99].role }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
        "{{",
        "{{ '\\ud800' }}",
        "{{ 'x' * 20000000 }}",
        "(" * 300_000,
        "{{ " + "(" * 50_000 + " }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{% if x %}" * 20_000,
        DOUBLING,
        LOOPS,
        ENDLESS_TEST,
        TOWER,
    ],
    ids=lambda template: template[:40],
)
def test_05_hostile_template_ends_in_a_typed_error(impatient: ChatRenderer, template: str) -> None:
    start = time.monotonic()
    with pytest.raises(ChatTemplateError):
        impatient.render(template, [HI])
    assert time.monotonic() - start < 10, "processor time is bounded; this is for a busy machine"
    assert impatient.render("{{ messages[0].role }}", [HI]) == "user", "the next good request succeeds"


def test_05_an_endless_template_stops_after_its_processor_time() -> None:
    renderer = ChatRenderer(ChatLimits(cpu_seconds=0.2))
    renderer.render("warm", [HI])
    before = os.times()
    with pytest.raises(ChatTemplateError, match=r"took more than 0\.2 s of processor time"):
        renderer.render(LOOPS, [HI])
    after = os.times()
    children = after.children_user + after.children_system - before.children_user - before.children_system
    assert children < 0.2 + 0.5, "the start of the child (warm) and the loop together"


def test_05_the_wall_clock_ends_what_takes_no_processor_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handloom.text.chat.WORKER", __file__)
    monkeypatch.setattr("handloom.text.chat.START_SECONDS", 0.0)
    start = time.monotonic()
    with pytest.raises(ChatTemplateError, match=r"took more than 0\.5 s|ended the process"):
        ChatRenderer(ChatLimits(cpu_seconds=0.05)).render("x", [HI])
    assert time.monotonic() - start < 20


def test_05_output_is_capped() -> None:
    renderer = ChatRenderer(ChatLimits(output_chars=100))
    assert renderer.render("{{ 'é' * 100 }}", [HI]) == "é" * 100
    for template in ("{{ 'é' * 101 }}", "{% for i in range(101) %}x{% endfor %}"):
        with pytest.raises(ChatTemplateError, match="longer than the limit of 100 characters"):
            renderer.render(template, [HI])


def test_a_template_past_its_size_limit_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match="has 11 characters; the limit is 10"):
        ChatRenderer(ChatLimits(template_chars=10)).render("x" * 11, [HI])


def test_the_templates_own_words_and_line_are_in_the_error(renderer: ChatRenderer) -> None:
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        renderer.render("{{ raise_exception('roles must alternate') }}", [HI])
    with pytest.raises(ChatTemplateError, match="template line 3"):
        renderer.render("a\nb\n{% if %}", [HI])


def test_04_the_child_can_open_nothing() -> None:
    script = (
        "import os, socket, sys\n"
        "sys.path.insert(0, os.path.dirname(sys.argv[1])); sys.path.extend(sys.argv[2:])\n"
        "import template_worker; template_worker.lock_down()\n"
        "for attempt in (lambda: open('/etc/hostname'), lambda: open('/tmp/x', 'w'), socket.socket, os.pipe):\n"
        "    try: attempt(); print('opened')\n"
        "    except OSError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, template_worker.__file__, *sys.path], capture_output=True, text=True
    )
    assert done.stdout.split() == ["refused"] * 4, done.stderr


# The child process -------------------------------------------------------------------------------


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
