"""`handloom generate`: one prompt in, its continuation out.

This module does not know how text is generated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from handloom.cli import common

if TYPE_CHECKING:
    from handloom.lm import LM
    from handloom.output import Output

NEW_TOKENS = 256


def generate(
    prompt: Annotated[
        str, typer.Argument(help="Text to continue. - reads it from standard input (UTF-8, less one final newline).")
    ],
    model: common.ModelOption = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help=f"At most so many. Default: {NEW_TOKENS}, or what the context leaves.",
            show_default=False,
        ),
    ] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="At least so many.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a message to answer, in the chat format.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    echo: Annotated[bool, typer.Option("--echo", help="Write the prompt first.")] = False,
    json: common.Json = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: log-probabilities, also of the N most likely at each step.")
    ] = None,
    quiet: common.Quiet = False,
    temperature: common.Temperature = None,
    top_k: common.TopK = None,
    top_p: common.TopP = None,
    min_p: common.MinP = None,
    repetition_penalty: common.RepetitionPenalty = None,
    num_beams: Annotated[
        int | None,
        typer.Option(help="Search with so many beams; text comes once it is certain.", rich_help_panel="Sampling"),
    ] = None,
    stop: common.Stop = None,
    seed: common.Seed = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    backend: common.BackendName = "auto",
    quantize: common.Quantize = None,
    max_context: common.MaxContext = None,
    revision: common.Revision = None,
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
    if prompt == "-":
        with common.waiting("starting", quiet):
            from handloom.text.tokenizer import MAX_TEXT_BYTES
        prompt = common.read_stdin(MAX_TEXT_BYTES)
    options = common.given(
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        num_beams=num_beams,
        num_return_sequences=1,
        stop_strings=stop,
        seed=seed,
        logprobs=logprobs,
    )
    wanted = common.ModelOptions(
        model=model,
        device=device,
        dtype=dtype,
        backend=backend,
        quantize=quantize,
        max_context=max_context,
        revision=revision,
    )
    lm = common.load_model(wanted, quiet=quiet)
    ids = _chat_ids(lm, prompt, system) if chat else lm.encode(prompt).token_ids
    room = lm.max_context - len(ids)
    options["max_new_tokens"] = max(1, min(NEW_TOKENS, room)) if max_new_tokens is None else max_new_tokens
    if json:
        common.emit_json(_as_json(lm, prompt, lm.generate(ids, **options)))
        return
    writer = common.Writer()
    if echo:
        writer.write(prompt)
    common.say(common.summary(_stream(lm, ids, options, writer)), quiet)


def _chat_ids(lm: LM, text: str, system: str | None) -> list[int]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    return lm.render_chat([*messages, {"role": "user", "content": text}])


def _stream(lm: LM, ids: list[int], options: dict[str, Any], writer: common.Writer) -> Output:
    """Write the pieces as they come. Raises what `LM.stream` raises."""
    from handloom.collect import Collector
    from handloom.engine import Engine

    collector = Collector(Engine(lm))
    collector.add(ids, **options)
    try:
        for piece in collector.pieces():
            writer.write(piece.text)
            if piece.error is not None:
                raise piece.error
    finally:
        collector.engine.close()
        writer.end_line()
    return collector.outputs[0]


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
        "logprobs": output.logprobs,
        "top_logprobs": output.top_logprobs,
        "timing": {
            "time_to_first_token": timing.time_to_first_token,
            "total": timing.total,
            "prompt_tokens": timing.prompt_tokens,
            "new_tokens": timing.new_tokens,
            "decode_tokens_per_second": timing.decode_tokens_per_second,
        },
    }
