"""A hostile chat template ends in a typed error, and the next good one renders."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from chats import (
    HI,
)
from handloom.errors import ChatTemplateError
from handloom.text import template_worker
from handloom.text.chat import ChatLimits, ChatRenderer


@pytest.fixture(scope="module")
def renderer() -> ChatRenderer:
    return ChatRenderer()


@pytest.fixture(scope="module")
def impatient() -> ChatRenderer:
    return ChatRenderer(ChatLimits(cpu_seconds=0.3))


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
