"""`handloom generate`: one prompt in, its continuation out.

This module does not know how text is generated.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handloom.cli import common
from handloom.cli.arguments import Generation, Json, Loading, ModelOption, Quiet
from handloom.errors import InvalidParam

if TYPE_CHECKING:
    from handloom.lm import LM
    from handloom.output import Output

NEW_TOKENS = 256


def generate(
    prompt: Annotated[
        str, typer.Argument(help="Text to continue. - reads it from standard input (UTF-8, less one final newline).")
    ],
    model: ModelOption = None,
    *,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help=f"At most so many. Default: {NEW_TOKENS}, or what the context leaves.",
            show_default=False,
        ),
    ] = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(help="So many outputs, one below the other; with --json each on a line. Default: 1.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message to answer, in the chat format.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt first.")] = False,
    json: Json = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, also of the N most likely at each step.")
    ] = None,
    quiet: Quiet = False,
    asked: Generation,
    loading: Loading,
) -> None:
    """Continue a text (or, with --chat, answer it), writing it as it comes.

    Sampling follows the model's own generation_config.json; without one the most likely token is taken.
    """
    if system is not None and not chat:
        raise typer.BadParameter("a system message needs --chat", param_hint="--system")
    if logprobs is not None and not json:
        raise typer.BadParameter("log-probabilities are written with --json only", param_hint="--logprobs")
    if echo and (json or chat):
        raise typer.BadParameter("the prompt can be written first only for plain text", param_hint="--echo")
    options = asked.options(logprobs=logprobs, max_new_tokens=max_new_tokens, num_return_sequences=num_return_sequences)
    if options.get("prompt_logprobs") is not None and not json:
        raise InvalidParam("--set prompt_logprobs: log-probabilities are written with --json only")
    if prompt == "-":
        with common.waiting("starting", quiet):
            from handloom.text.tokenizer import MAX_TEXT_BYTES
        prompt = common.read_stdin(MAX_TEXT_BYTES)
    options |= common.load_draft(asked, loading, quiet=quiet)
    lm = common.load_model(model, loading, quiet=quiet)
    ids = _chat_ids(lm, prompt, system) if chat else lm.encode(prompt).token_ids
    given = options.get("generation_config", {}) | options
    said = {name for name, value in given.items() if value is not None}
    if "num_return_sequences" not in said:
        options["num_return_sequences"] = 1
    if not said & {"max_new_tokens", "max_length"}:
        options["max_new_tokens"] = max(1, min(NEW_TOKENS, lm.max_context - len(ids)))
    if json:
        for output in _run(lm, ids, options, None):
            common.emit_json(_as_json(lm, prompt, output))
        return
    writer = common.Writer()
    if echo:
        writer.write(prompt)
    first, *others = _run(lm, ids, options, writer)
    common.say(common.summary(first), quiet)
    for output in others:
        writer.write(output.text)
        writer.end_line()
        common.say(common.summary(output), quiet)


def _chat_ids(lm: LM, text: str, system: str | None) -> list[int]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return lm.render_chat([*messages, {"role": "user", "content": text}])


def _run(lm: LM, ids: list[int], options: dict[str, Any], writer: common.Writer | None) -> list[Output]:
    """All outputs; the first one's pieces are written as they come. Raises what `LM.stream` raises."""
    from handloom.collect import Collector
    from handloom.engine import Engine

    collector = Collector(Engine(lm))
    collector.add(ids, **options)
    try:
        for piece in collector.pieces():
            if writer is not None and piece.sample == 0:
                writer.write(piece.text)
            if piece.error is not None:
                raise piece.error
    finally:
        collector.engine.close()
        if writer is not None:
            writer.end_line()
    return collector.outputs


def _as_json(lm: LM, prompt: str, output: Output) -> dict[str, Any]:
    timing = output.timing
    return {
        "model": lm.name,
        "origin": lm.origin,
        "backend": str(lm.backend),
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "prompt": prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "stop_string": output.stop_string,
        "seed": output.seed,
        "score": None if output.beams is None else output.beams.score,
        "drafts": None if output.drafts is None else asdict(output.drafts),
        "logprobs": output.logprobs,
        "top_logprobs": output.top_logprobs,
        "prompt_logprobs": output.prompt_logprobs,
        "prompt_top_logprobs": output.prompt_top_logprobs,
        "timing": {
            "time_to_first_token": timing.time_to_first_token,
            "total": timing.total,
            "prompt_tokens": timing.prompt_tokens,
            "new_tokens": timing.new_tokens,
            "decode_tokens_per_second": timing.decode_tokens_per_second,
        },
    }
