"""`handloom score`: how likely a model finds a text, and what holding it in fewer bits costs.

This module does not know how anything is computed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from handloom.cli import common
from handloom.cli.arguments import Json, Loading, ModelOption, Quiet


def score(
    text: Annotated[
        str | None,
        typer.Argument(
            metavar="[TEXTFILE]",
            help="A file in UTF-8; - for standard input. With --perplexity by default a text that is bundled.",
            show_default=False,
        ),
    ] = None,
    model: ModelOption = None,
    *,
    perplexity: Annotated[
        bool, typer.Option("--perplexity", help="Score a text of any length, in windows that overlap by half.")
    ] = False,
    window: Annotated[int, typer.Option(help="Tokens of a window.", min=2)] = 512,
    against: Annotated[
        bool,
        typer.Option("--against-floats", help="Also score with the weights in float32: what quantisation costs."),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    loading: Loading,
) -> None:
    """Score a text: its log-likelihood as one sequence, or with --perplexity the model's perplexity on it."""
    if against and not perplexity:
        raise typer.BadParameter("it compares perplexities: add --perplexity", param_hint="--against-floats")
    if text is None and not perplexity:
        raise typer.BadParameter("give a file, or - for standard input; only --perplexity has a bundled text")
    with common.waiting("starting", quiet or json):
        from handloom.measure.perplexity import BUNDLED
        from handloom.text.tokenizer import MAX_TEXT_BYTES
    content = common.read_stdin(MAX_TEXT_BYTES) if text == "-" else _read(Path(text or BUNDLED), MAX_TEXT_BYTES)
    name = str(text) if text else "bundled: A. N. Whitehead, An Introduction to Mathematics (1911)"
    found = {"text": name} | (
        _perplexity(model, loading, content, window, against, quiet)
        if perplexity
        else _score(model, loading, content, quiet)
    )
    if json:
        common.emit_json(found)
    else:
        common.show_table(common.facts({key.replace("_", " "): _word(key, value) for key, value in found.items()}))


def _read(path: Path, max_bytes: int) -> str:
    with path.open("rb") as file:
        return common.decode_input(file.read(max_bytes + 1), max_bytes, what=str(path))


def _score(model: str | None, loading: Loading, text: str, quiet: bool) -> dict[str, Any]:
    lm = common.load_model(model, loading, quiet=quiet)
    score = lm.score(text)
    return {
        "held": _held(lm),
        "tokens": len(score.token_ids),
        "log_likelihood": score.total,
        "perplexity": score.perplexity,
    }


def _perplexity(
    model: str | None, loading: Loading, text: str, window: int, against: bool, quiet: bool
) -> dict[str, Any]:
    from dataclasses import replace

    from handloom.measure.perplexity import agreement, perplexity

    lm = common.load_model(model, loading, quiet=quiet)
    window = min(window, lm.max_context)
    with common.waiting("scoring", quiet):
        own = perplexity(lm, text, window=window)
    found = {"held": _held(lm), "tokens": own.tokens, "window": window, "perplexity": own.value}
    if not against:
        return found
    del lm
    floats = common.load_model(model, replace(loading, dtype="float32", quantize=None), quiet=quiet)
    with common.waiting("scoring with float32", quiet):
        other = perplexity(floats, text, window=window)
    return found | {
        "perplexity_in_float32": other.value,
        "cost": own.value / other.value - 1,
        "same_likeliest_token": agreement(own, other),
    }


def _held(lm: Any) -> str:
    return ", ".join(f"{common.size(nbytes)} {name}" for name, nbytes in lm.held.items())


def _word(key: str, value: Any) -> str:
    if key in ("cost", "same_likeliest_token"):
        return f"{value:+.2%}" if key == "cost" else f"{value:.1%}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
