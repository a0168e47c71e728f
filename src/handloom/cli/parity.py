"""`handloom parity`: this checkpoint, on this machine, in handloom and in transformers: tokens, logits, speed.

Both get the same token ids, handloom's own, so that what is compared is the model and the choice of tokens.

This module does not know how anything is compared or measured.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handloom.cli import common
from handloom.cli.arguments import BackendName, Device, Dtype, Json, Loading, ModelArgument, Quiet, Revision
from handloom.errors import InvalidParam, InvalidPrompt

if TYPE_CHECKING:
    from rich.table import Table

    from handloom.checkpoint.types import Checkpoint
    from handloom.lm import LM
    from handloom.measure.parity import PromptParity
    from handloom.measure.peer import Transformers

PROMPTS = (
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "In 1969, 12,345 people walked to the",
    "El perro corre por el parque y",
    "Water boils at 100 °C; ice melts at",
)
SPEED_PROMPT, SPEED_NEW, SPEED_ROUNDS = 128, 32, 3
MAX_PROMPTS, MAX_FILE_BYTES = 1000, 1 << 20


def parity(
    model: ModelArgument = None,
    prompts: Annotated[
        Path | None, typer.Option(help="UTF-8 file with a prompt on each line; default: six built-in ones.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="For each prompt.", min=1)] = 48,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Time both, in turn.")] = True,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; default: as many as PyTorch takes.", min=1, show_default=False)
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    device: Device = "auto",
    dtype: Dtype = "float32",
    backend: BackendName = "auto",
    revision: Revision = None,
) -> None:
    """Compare a checkpoint in handloom and in transformers: greedy tokens, logits, speed.

    The exit status is 1 unless every prompt's tokens are equal (or two choices tie where they part) and the
    logits agree. Without a tokenizer, a line of --prompts is token ids.
    """
    lines = _read_lines(prompts) if prompts is not None else None
    with common.waiting("starting", quiet):
        import torch

        from handloom.checkpoint import open_checkpoint
        from handloom.measure import parity as comparing
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model, revision=revision)
    checkpoint.close()
    path = str(checkpoint.path)  # both read the very same files
    lm = common.load_model(path, Loading(device=device, dtype=dtype, backend=backend), quiet=quiet)
    ids = [lm.encode(prompt).token_ids for prompt in _prompts(lm, lines)]
    peer = common.load_peer(checkpoint.path, lm, quiet=quiet)
    with common.waiting(f"generating {max_new_tokens} tokens for each of {len(ids)} prompts, twice", quiet):
        found = comparing.compare(lm, peer, ids, max_new_tokens)
    report = _report(checkpoint, lm, found)
    if speed:
        with common.waiting("timing both, in turn", quiet):
            report["speed"] = _speed(lm, peer)
    if json:
        common.emit_json(report, indent=2)
    else:
        _show(lm, report)
    if not report["parity"]:
        raise typer.Exit(1)


# Prompts ---------------------------------------------------------------------------------------


def _read_lines(file: Path) -> list[str]:
    """The lines that are not blank. Raises InvalidParam, InvalidPrompt."""
    if not file.is_file():
        raise InvalidParam(f"--prompts {file}: there is no such file")
    if (size := file.stat().st_size) > MAX_FILE_BYTES:
        raise InvalidParam(f"--prompts {file} has {size} bytes; the limit is {MAX_FILE_BYTES}")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidPrompt(f"--prompts {file} is not UTF-8 text: {error}") from None
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if not 1 <= len(lines) <= MAX_PROMPTS:
        raise InvalidParam(f"--prompts {file} has {len(lines)} prompts; expected 1 to {MAX_PROMPTS}, one on each line")
    return lines


def _prompts(lm: LM, lines: list[str] | None) -> list[Any]:
    """What is handed to `lm.encode`: texts, or token ids where there is no tokenizer. Raises InvalidPrompt."""
    if lm.tokenizer is not None:
        return list(lines or PROMPTS)
    if lines is None:
        from handloom.measure.speed import random_ids

        return [random_ids(lm.spec.vocab_size, 4 + 7 * i, seed=i) for i in range(len(PROMPTS))]
    try:
        return [[int(word) for word in line.split()] for line in lines]
    except ValueError as error:
        raise InvalidPrompt(f"this checkpoint has no tokenizer, so --prompts holds token ids: {error}") from None


# Results ---------------------------------------------------------------------------------------


def _report(checkpoint: Checkpoint, lm: LM, found: list[PromptParity]) -> dict[str, Any]:
    """Everything but the speed, as plain JSON."""
    import torch

    from handloom import machine
    from handloom.measure.parity import tolerances

    worst = max(found, key=lambda one: one.logits_difference)
    return {
        "model": checkpoint.name,
        "origin": checkpoint.origin,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "backend": lm.backend.name,
        "threads": torch.get_num_threads(),
        "versions": machine.versions(),
        "tolerances": tolerances(lm.dtype),
        "prompts": [asdict(one) | {"text": lm.decode(one.ours) if lm.tokenizer else None} for one in found],
        "largest_logits_difference": worst.logits_difference,
        "parity": all(one.ok for one in found),
    }


def _speed(lm: LM, peer: Transformers) -> dict[str, Any]:
    """Both engines' rates over the same random prompt, timed in turn."""
    from handloom import machine
    from handloom.measure import speed, stats

    new_tokens = min(SPEED_NEW, lm.max_context // 2)
    ids = speed.random_ids(lm.spec.vocab_size, min(SPEED_PROMPT, lm.max_context - new_tokens - 1))
    runs = stats.interleave(
        {
            "handloom": lambda: speed.run(lm, [ids], new_tokens + 1),
            "transformers": lambda: peer.run([ids], new_tokens + 1),
        },
        rounds=SPEED_ROUNDS,
    )
    rates = {
        "prefill": {name: stats.summarize([run.prefill_rate for run in taken]).p50 for name, taken in runs.items()},
        "decode": {name: stats.summarize([run.decode_rate for run in taken]).p50 for name, taken in runs.items()},
    }
    return {
        "prompt_tokens": len(ids),
        "new_tokens": new_tokens,
        "rounds": SPEED_ROUNDS,
        "machine_busy": machine.is_busy(),
        "unit": "tokens per second, median",
        **{what: rate | {"ratio": rate["handloom"] / rate["transformers"]} for what, rate in rates.items()},
    }


def _show(lm: LM, report: dict[str, Any]) -> None:
    common.show_table(_prompt_table(lm, report))
    if "speed" in report:
        common.show_table(_speed_table(report["speed"]))
    versions, limits = report["versions"], report["tolerances"]
    verdict = "in parity" if report["parity"] else "NOT in parity"
    print(
        f"{verdict}: {report['model']}, {report['dtype']} on {report['device']}, {report['backend']} backend, against "
        f"transformers {versions['transformers']} (torch {versions['torch']}). Largest logit difference "
        f"{report['largest_logits_difference']:.1e} of the largest logit; allowed {limits['logits']:g}, and "
        f"{limits['tie']:g} between the scores of a tie."
    )


def _prompt_table(lm: LM, report: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("prompt", "new", "tokens", "logits", "output", box=box.SIMPLE_HEAD, pad_edge=False)
    for one in report["prompts"]:
        text = str(one["ours"]) if one["text"] is None else one["text"]
        start = common.printable(" ".join(text.split()))[:48]
        tokens, logits = _verdict(one), f"{one['logits_difference']:.1e}"
        table.add_row(f"{one['prompt_tokens']} tokens", str(len(one["ours"])), tokens, logits, start)
    return table


def _verdict(one: dict[str, Any]) -> str:
    at = one["mismatch"]
    if at is None:
        return "equal"
    a, b = (tokens[at] if at < len(tokens) else "nothing" for tokens in (one["ours"], one["theirs"]))
    if one["tied"]:
        return f"equal up to {at}, then a tie: {a} or {b} (scores within {one['score_gap']:.0e})"
    return f"DIFFERENT from {at} on: {a}, transformers has {b} (scores {one['score_gap']:.0e} apart)"


def _speed_table(speed: dict[str, Any]) -> Table:
    from rich import box
    from rich.table import Table

    prompt, new = speed["prompt_tokens"], speed["new_tokens"]
    table = Table("tok/s", "handloom", "transformers", "ratio", box=box.SIMPLE_HEAD, pad_edge=False)
    for what, name in (("prefill", f"prompt of {prompt}"), ("decode", f"{new} new after it")):
        rate = speed[what]
        table.add_row(name, f"{rate['handloom']:.1f}", f"{rate['transformers']:.1f}", f"{rate['ratio']:.2f}×")
    if speed["machine_busy"]:
        table.caption = "other programs were using the machine"
    return table
