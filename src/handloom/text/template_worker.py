"""The other side of chat.py: a child process that renders chat templates and can be killed.

Run as a script, isolated: `python -I -S template_worker.py FOLDER_WITH_JINJA2 ...`. It reads requests from stdin and
writes answers to stdout until stdin ends. A frame is an 8-byte big-endian length and that many bytes. A request is JSON
(`template`, `context`, `max_output` in characters, `cpu_seconds`). An answer is one status byte and UTF-8: `+` and the
text, `-` and an error message, or `!` and an error message, after which this process ends.

A template is a program written by a stranger. The Jinja sandbox keeps it from Python's internals; the limits set here
bound what the sandbox does not: processor time (a profiling timer whose signal ends the process, even inside one huge
multiplication), memory (address space, on Linux), output, and any new file, socket or process.

This module does not know handloom, models, tokenizers or what a message is. It imports the standard library and jinja2.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template

MEMORY_BYTES = 512 * 2**20
MAX_ERROR_CHARS = 2_000
MAX_CACHED_TEMPLATES = 8


def compile_template(source: str) -> Template:
    """Compile `source` in the environment that chat templates are written for (that of transformers 5.23)."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationTag(Extension):
        """`{% generation %}…{% endgeneration %}` marks what the model said; the text itself is unchanged."""

        tags = {"generation"}  # noqa: RUF012 - the name and type are jinja2's

        def parse(self, parser: Parser) -> nodes.Node:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(lineno)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    def check_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} starts with an underscore")

    class PublicNamespace(Namespace):
        def __init__(self, /, *args: Any, **attributes: Any) -> None:
            names = dict(*args, **attributes)
            for name in names:
                check_public(name)
            super().__init__(names)

        def __setitem__(self, name: str, value: Any) -> None:
            check_public(name)
            super().__setitem__(name, value)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
            raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__} is out of a template's reach")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = PublicNamespace
    return environment.from_string(source)


def render(template: Template, context: dict[str, Any], max_output: int) -> str:
    """The rendered text. Raises ValueError once it is longer than `max_output` characters."""
    parts: list[str] = []
    size = 0
    for part in template.generate(**context):
        size += len(part)
        if size > max_output:
            raise ValueError(f"the rendered text is longer than the limit of {max_output} characters")
        parts.append(part)
    return "".join(parts)


def lock_down() -> None:
    """Give up, for good, what a template must never have. What would open a file later is used once before."""
    render(compile_template("{{ lipsum(1) | wordwrap(9) | pprint | tojson }}"), {}, MAX_ERROR_CHARS)
    answer({"template": "{{ raise_exception(strftime_now('%c')) }}", "context": {}, "max_output": 0}, {})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the parent
    if sys.platform == "win32":
        return
    import resource

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    if sys.platform == "linux":  # macOS has no working limit on address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def cpu_timer(seconds: float) -> None:
    """End this process after `seconds` more of processor time; 0 disarms."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


def answer(request: dict[str, Any], cache: dict[str, Template]) -> bytes:
    """The reply to one request; every failure of the template is a reply too."""
    try:
        source = request["template"]
        if source not in cache:
            if len(cache) >= MAX_CACHED_TEMPLATES:
                cache.clear()
            cache[source] = compile_template(source)
        return b"+" + render(cache[source], request["context"], request["max_output"]).encode()
    except MemoryError:
        return f"!it needs more than the limit of {MEMORY_BYTES >> 20} MiB of memory".encode()
    except Exception as error:
        line = getattr(error, "lineno", None)
        where = f" (template line {line})" if isinstance(line, int) else ""
        message = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS] + where
        return b"-" + message.encode(errors="backslashreplace")


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer until `requests` ends."""
    cache: dict[str, Template] = {}
    while header := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(header, "big")))
        cpu_timer(request["cpu_seconds"])
        reply = answer(request, cache)
        cpu_timer(0)
        answers.write(len(reply).to_bytes(8, "big") + reply)
        answers.flush()
        if reply.startswith(b"!"):
            return  # memory that ran out once is in pieces


if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])
    lock_down()
    serve(sys.stdin.buffer, sys.stdout.buffer)
