"""Grammars that should do harm, compiled and followed; prints what became of each as JSON. A test runs it."""

from __future__ import annotations

import json
import random
import resource
import threading
import time
from typing import Any

import numpy as np

from handloom.errors import GrammarError, InvalidParam
from handloom.sampling.grammar import Grammars
from handloom.sampling.options import Options, show
from handloom.sampling.structure_options import read_structure
from handloom.text.tokenizer import Tokenizer
from tiny_models import VOCAB_SIZE, tiny_tokenizer


def items(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = {"items": inner}
    return inner


def chain(count: int, link: Any) -> Any:
    definitions = {f"d{i}": link({"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$defs": {**definitions, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def rules(count: int, rule: str, name: str = "r") -> str:
    own = [f"{name}{i}: " + rule.replace("NEXT", f"{name}{i + 1}") for i in range(count)]
    return "\n".join([*own, f'{name}{count}: "a"', f"start: {name}0"])


deep = {}
for _ in range(3000):
    deep = {"items": deep}
ATTACKS = [
    ("json_schema", chain(1000, lambda ref: ref)),
    ("json_schema", chain(20000, lambda ref: ref)),
    ("json_schema", chain(900, lambda ref: items(3, ref))),
    ("json_schema", chain(60, lambda ref: items(90, ref))),
    ("json_schema", deep),
    ("json_schema", json.dumps({"a": 1})[:-1] + ', "b": ' + "[" * 5000 + "]" * 5000 + "}"),
    ("json_schema", {"$ref": "http://127.0.0.1:1/x.json"}),
    ("json_schema", {"$ref": "file:///etc/passwd"}),
    ("json_schema", {"$ref": "#"}),
    ("json_schema", {"type": "string", "minLength": 10**9}),
    ("json_schema", {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}}),
    ("json_schema", {"type": "integer", "minimum": 1, "maximum": 10**4000}),
    ("json_schema", {"type": "integer", "maximum": 10**5000}),
    ("json_schema", {"type": "number", "multipleOf": 1e-300}),
    ("json_schema", {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(9)]} for i in range(9)]}),
    ("json_schema", {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
    ("json_schema", {"type": "string", "pattern": "a*" * 5000}),
    ("json_schema", {"enum": ["x" * 60000]}),
    ("json_schema", {"x-guidance": {"whitespace_pattern": "a*" * 5000}, "type": "object"}),
    ("json_schema", {"patternProperties": {"a*" * 5000: {}}}),
    ("json_schema", {"type": "string", "format": "no such"}),
    ("regex", "(a+)+b"),
    ("regex", "a*" * 4096),
    ("regex", "a?" * 4096),
    ("regex", r"\p{L}*" * 1365),
    ("regex", "(" * 4000 + ")" * 4000),
    ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    ("regex", "(a|b)*a(a|b){4000}"),
    ("regex", ".*a.{5000}"),
    ("regex", "(?i)" + "[a-z]*x" * 1100),
    ("regex", r"(a)\1"),
    ("regex", "(?<=a)b"),
    ("regex", "a{99999999999}"),
    ("regex", "\x00"),
    ("regex", r"\xff"),
    ("grammar", rules(1000, "NEXT")[:16000]),
    ("grammar", rules(900, "NEXT")),
    ("grammar", rules(330, "(" * 16 + "NEXT" + ")" * 16)),
    ("grammar", rules(700, '"x"* NEXT? "y"+')),
    ("grammar", rules(700, '"x"* NEXT? "y"+', "R")),
    ("grammar", 'start: start start | "a" |'),
    ("grammar", 'start: s\ns: s s s s | "a" | ""'),
    ("grammar", "start: " + "(" * 4000),
    ("grammar", "start: " + '"a"? ' * 3000),
    ("grammar", "T: " + "A* " * 5000 + '\nA: "a"\nstart: T'),
    ("grammar", "start: start"),
    ("grammar", "start: @nothing"),
    ("grammar", '%import os.path\nstart: "a"'),
    ("grammar", "start: <[0-330]>"),
    ("grammar", "start: <nobody>"),
    ("grammar", 'start: %json {"$ref": "http://127.0.0.1:1/"}'),
    ("grammar", "\x00" * 99),
    ("grammar", "%llguidance {"),
    ("grammar", "start: /a/ " * 1200),
    ("choices", [f"choice {i}" for i in range(8192)]),
    ("choices", ["x" * 100000]),
    ("choices", ["y" * i for i in range(500)]),
    ("choices", ["a"] * 9000),
    ("choices", [""]),
    ("choices", ["\x00", "\x7f", '"', "\\"]),
]
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
grammars = Grammars(Tokenizer(tiny_tokenizer()), VOCAB_SIZE)
names = frozenset({"json_schema", "regex", "grammar", "choices"})


def attack(option: str, value: Any) -> str:
    try:
        read = read_structure(Options({option: value}, {}, names), grammars.compile)
    except InvalidParam as error:
        assert str(error).startswith(option) and len(str(error)) < 700, str(error)[:900]
        return "refused"
    matcher, rng, ids = read[option].start(), random.Random(1), list[int]()
    words = np.empty(matcher.num_words, dtype=np.int32)
    for _ in range(60):
        try:
            matcher.fill(words, ())
        except GrammarError as error:
            assert str(error).startswith(option) and len(str(error)) < 700, str(error)[:900]
            return "gave up"
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist()
        assert matcher.fits or not ids
        if not allowed:
            break
        ids.append(rng.choice(allowed))
        matcher.follow(ids)
    matcher.fork().follow(ids[:3])
    return "works"


results = []
for option, value in ATTACKS:
    started = time.perf_counter()
    results.append((option, show(value), attack(option, value), round(time.perf_counter() - started, 2)))
print(json.dumps({"results": results, "threads": threading.active_count(), "stack": threading.stack_size()}))
