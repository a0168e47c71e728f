"""What commands take: options that several of them have, declared once, and what was given of them.

A command takes a whole set of options as one argument, annotated with a dataclass such as `Loading`; `guarded` shows
typer an option for each of its fields, and hands the command an instance. Options of `LM.generate` that are asked for
seldom need no line here: `--set NAME=VALUE` gives any of them.

This module does not know what options of generation there are, which values they may have, or what they do.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from handloom.cli.common import complain, decode_input
from handloom.errors import HandloomError, InvalidParam

MAX_FILE_BYTES = 1 << 20
_APART = ("settings", "draft_model", "draft_quantize")  # of Generation, what is no option of `LM.generate`
MODEL_HELP = (
    "A folder, a .gguf file, a model on the Hub ('org/name', 'org/name:file.gguf') or a shipped one. "
    "Default: $HANDLOOM_MODEL, else SmolLM2-135M-Instruct."
)

ModelArgument = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=MODEL_HELP, show_default=False)]
ModelOption = Annotated[str | None, typer.Option("--model", "-m", help=MODEL_HELP, rich_help_panel="Model")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel="Model")]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.", rich_help_panel="Model")
]
Quantize = Annotated[
    str | None,
    typer.Option(
        help="Hold matrices as int8, int4, int8:64, int4-sym:32, … (bits, zero points or not, columns per scale). "
        "Default: as the file has them.",
        rich_help_panel="Model",
        show_default=False,
    ),
]
BackendName = Annotated[str, typer.Option("--backend", help="What computes the model.", rich_help_panel="Model")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel="Model")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, and nothing else there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on standard error but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def _option(panel: str, help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


_model = functools.partial(_option, "Model")
_sampling = functools.partial(_option, "Sampling")
_structure = functools.partial(_option, "Structure: what the whole output must be")
_contrast = functools.partial(_option, "Search and contrast")
_speculation = functools.partial(_option, "Speculation: the same tokens, sooner")
_rest = functools.partial(_option, "All the rest")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How a model is loaded; the fields are arguments of `LM.from_pretrained`."""

    device: Device = "auto"
    dtype: Dtype = "auto"
    backend: BackendName = "auto"
    quantize: Quantize = None
    max_context: Annotated[int | None, _model("Tokens a sequence may have; default: the model's own.")] = None
    kv_cache_tokens: Annotated[int | None, _model("Tokens the KV cache holds.")] = None
    gpu_memory_fraction: Annotated[
        float | None, _model("Instead: how much of a GPU's memory may be in use; the cache takes what is left.")
    ] = None
    revision: Revision = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What may be asked of `LM.generate`; a field that has the name of an option is that option."""

    temperature: Annotated[
        float | None, _sampling("0 is greedy; any other value samples. Default: as the model says.")
    ] = None
    top_k: Annotated[int | None, _sampling("Sample from the k most likely; 0: all.")] = None
    top_p: Annotated[float | None, _sampling("… from the most likely that make up p.")] = None
    min_p: Annotated[float | None, _sampling("… from those above p times the most likely.")] = None
    repetition_penalty: Annotated[float | None, _sampling("Above 1: tokens seen before get less likely.")] = None
    seed: Annotated[int | None, _sampling("Same seed, same tokens. Implies sampling. Default: a fresh one.")] = None
    stop: Annotated[list[str] | None, _sampling("End at this text; may be given several times.")] = None
    min_new_tokens: Annotated[int | None, _sampling("At least so many.")] = None
    token_healing: Annotated[bool, _sampling("The end of the prompt is cut into tokens anew.", "--token-healing")] = (
        False
    )
    json_schema: Annotated[
        str | None, _structure("JSON of this schema: a file, or text that begins with {.", "--json-schema")
    ] = None
    regex: Annotated[str | None, _structure("What this regular expression matches.")] = None
    grammar: Annotated[str | None, _structure("What the Lark grammar in this file allows.")] = None
    choices: Annotated[list[str] | None, _structure("One of these texts: --choices yes --choices no.")] = None
    num_beams: Annotated[int | None, _contrast("Search with so many beams; text comes once it is certain.")] = None
    length_penalty: Annotated[float | None, _contrast("Of beams: above 0 longer ones, below 0 shorter ones.")] = None
    guidance_scale: Annotated[float | None, _contrast("Above 1: away from the negative prompt.")] = None
    negative_prompt: Annotated[
        str | None, _contrast("What guidance leads away from; default: the prompt's last token.")
    ] = None
    penalty_alpha: Annotated[float | None, _contrast("Contrastive search; 0.6 with --top-k 4 is usual.")] = None
    dola_layers: Annotated[str | None, _contrast("DoLa: low, high, or layers, as [2,4].")] = None
    prompt_lookup_num_tokens: Annotated[
        int | None, _speculation("Draft up to so many of what followed the last words before.")
    ] = None
    speculation: Annotated[str | None, _speculation("suffix: draft by the longest ending seen before.")] = None
    draft_model: Annotated[str | None, _speculation("A smaller model that drafts, with the same tokenizer.")] = None
    draft_quantize: Annotated[str | None, _speculation("--quantize of that one.")] = None
    num_assistant_tokens: Annotated[int | None, _speculation("Most tokens of a draft by a model or suffix.")] = None
    generation_config: Annotated[
        str | None, _rest("Options from a file such as generation_config.json; the others win over it.")
    ] = None
    settings: Annotated[
        list[str] | None,
        _rest(
            "Any option of docs/generate.md, the value in JSON: --set no_repeat_ngram_size=3 "
            "--set 'suppress_tokens=[1,2]'; may be given several times.",
            "--set",
        ),
    ] = None

    def options(self, **others: Any) -> dict[str, Any]:
        """The options that were given, and `others` that are not None; files are read.

        A draft model is not among them. Raises InvalidParam, InvalidPrompt for a file that is not UTF-8.
        """
        found = {name: value for name, value in others.items() if value is not None}
        for name in [one.name for one in fields(self) if one.name not in _APART]:
            value = getattr(self, name)
            if value is not None and value is not False and value != []:
                found[name] = _READERS[name](value) if name in _READERS else value
        for name, value in _assigned(self.settings or []).items():
            if name in found:
                raise InvalidParam(f"--set {name}=… and --{name.replace('_', '-')} say one thing twice; give one")
            if name.startswith("output_") and value:
                raise InvalidParam(f"--set {name}: the tensors that it keeps are not written; use it from Python")
            found[name] = value
        if self.draft_model is not None and found.get("assistant_model") is not None:
            raise InvalidParam("--set assistant_model: an option on the command line is no model; leave it out")
        if self.draft_quantize is not None and self.draft_model is None:
            raise InvalidParam(f"--draft-quantize {self.draft_quantize[:40]} is about a --draft-model; give that too")
        return found


# Values ----------------------------------------------------------------------------------------


def _assigned(assignments: list[str]) -> dict[str, Any]:
    """Option -> value. Raises InvalidParam."""
    found: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not name:
            raise InvalidParam(f"--set {text[:80]!r}: expected NAME=VALUE, as in --set no_repeat_ngram_size=3")
        if name in found:
            raise InvalidParam(f"--set {name} is given twice; give it once")
        found[name] = _value(value)
    return found


def _value(text: str) -> Any:
    """What the text means in JSON, or is in Python (True, False, None); else the text."""
    known = {"True": True, "False": False, "None": None}
    if text in known:
        return known[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _file(option: str, path: str) -> str:
    if not Path(path).is_file():
        raise InvalidParam(f"{option} {path[:200]!r}: there is no such file")
    with Path(path).open("rb") as file:
        return decode_input(file.read(MAX_FILE_BYTES + 1), MAX_FILE_BYTES, what=f"{option} {path}")


def _schema(value: str) -> str:
    return value if value.lstrip().startswith("{") else _file("--json-schema", value)


def _config(path: str) -> dict[str, Any]:
    try:
        config = json.loads(_file("--generation-config", path))
    except (ValueError, RecursionError) as error:
        raise InvalidParam(f"--generation-config {path[:200]!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InvalidParam(f"--generation-config {path[:200]!r} is not a JSON object")
    return config


_READERS: Mapping[str, Callable[[str], Any]] = {
    "json_schema": _schema,
    "grammar": functools.partial(_file, "--grammar"),
    "dola_layers": _value,
    "generation_config": _config,
}


# Commands --------------------------------------------------------------------------------------


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer sees it: an option for each field of an argument that is a dataclass, and --debug.

    An error that says what is wrong is one line and exit status 1, Ctrl-C is 130. A closed pipe is left to typer, which
    ends quietly.
    """
    hints = get_type_hints(command, include_extras=True)
    sets = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    @functools.wraps(command)
    def run(*, debug: bool = False, **options: Any) -> None:
        for name, kind in sets.items():
            options[name] = kind(**{one.name: options.pop(one.name) for one in fields(kind)})  # type: ignore[operator]
        try:
            command(**options)
        except (HandloomError, OSError) as error:
            if debug or isinstance(error, BrokenPipeError):
                raise
            complain(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    shown: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        kind = sets.get(parameter.name)
        shown += [_keyword(parameter.name, hints[parameter.name], parameter.default)] if kind is None else _of(kind)
    shown.append(_keyword("debug", Debug, False))
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in shown} | {"return": None}
    run.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    return run


def _of(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [_keyword(one.name, hints[one.name], one.default) for one in fields(kind)]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
