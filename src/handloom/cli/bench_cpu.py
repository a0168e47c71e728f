"""`handloom bench cpu`: every precision at several batch sizes, beside its limit and beside other engines.

This module does not know how anything is measured.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handloom.cli import bench_table, common
from handloom.cli.arguments import ModelArgument, Quiet, Revision
from handloom.errors import InvalidParam, RequestFailed

if TYPE_CHECKING:
    from rich.table import Table

    from handloom.checkpoint.types import Checkpoint
    from handloom.measure.cpu_suite import Case, Group, Settings, Tell
    from handloom.measure.results import Results
    from handloom.measure.worker_process import Contender
    from handloom.model.spec import ModelSpec

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformers": ("transformers_engine", {}),
    "llama.cpp": ("llama_cpp_engine", {}),
    "llama.cpp-plain": ("llama_cpp_engine", {"extra_buffers": False}),
    "ctranslate2": ("ctranslate2_engine", {}),
    "openvino": ("openvino_engine", {}),
    "onnxruntime": ("onnxruntime_engine", {}),
}
"""The file of each peer's adapter, and keywords; llama.cpp-plain: weights as the file has them."""
NOTES = (
    "pp: prompts computed and a token chosen for each; tg: tokens from prompts of one token. tok/s of all prompts, of "
    "the whole call: scheduling and greedy choosing are inside, handloom also detokenises; tokenising is not. Same "
    "token ids for all, others in each round, eos ignored, numbers of tokens checked, warm-up left out; medians",
    "%: of the limit, the bytes of a step at the measured read bandwidth (of as many bytes, which a cache may hold) or "
    "its operations at the measured rate of matrix products (the best of float32, for 16 bits also bfloat16, for fewer "
    "also int8), whichever takes longer; bytes of weights and cache as handloom holds them, for every engine",
    "first token: from the start of a process to one token for a short prompt; load: of it, making the model, imports "
    "apart; peak memory: what that process, or the one of all batches, held at most",
    "agree: share of tokens as handloom's, each prompt up to where the two part, where both hold the same weights: of "
    "int8 and int4 each engine makes its own",
)


def cpu(
    model: ModelArgument = None,
    precisions: Annotated[
        str | None,
        typer.Option(
            help="Of fp32,bf16,fp16,int8,int4 and gguf (as the .gguf file has it). Default: all.", show_default=False
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Prompts at once, between commas.")] = "1,4,8,32",
    pp: Annotated[int, typer.Option(help="Tokens of each prompt; 0: leave that test out.", min=0)] = 512,
    tg: Annotated[int, typer.Option(help="Tokens to generate for each; 0: leave that test out.", min=0)] = 128,
    peers: Annotated[
        str, typer.Option(help=f"Of {','.join(PEERS)}, or .py files with an adapter; or none.")
    ] = "transformers,llama.cpp,ctranslate2,openvino,onnxruntime",
    peer_python: Annotated[
        list[str] | None,
        typer.Option(help="The Python that has a peer: NAME=PATH, or PATH for all others.", show_default=False),
    ] = None,
    peer_models: Annotated[
        Path | None,
        typer.Option(help="Folder of the peers' own files, see benchmarks/peer_models.py.", show_default=False),
    ] = None,
    repeat: bench_table.Repeat = 3,
    warmup: Annotated[int, typer.Option(help="Rounds before that, which do not.", min=1)] = 1,
    starts: Annotated[int, typer.Option(help="Fresh processes of each, timed to their first token.", min=0)] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds after which a peer's answer is given up.", min=1)] = 900,
    threads: bench_table.Threads = None,
    output: Annotated[
        Path | None, typer.Option(help="Append the rows to this file, a JSON object per line.", show_default=False)
    ] = None,
    quiet: Quiet = False,
    revision: Revision = None,
) -> None:
    """Measure every precision and batch size on the CPU beside other engines: rates, memory, time to a first token."""
    bench_table.check_output(output)
    sizes = bench_table.sizes("--batch", batch)
    with common.waiting("starting", quiet):
        import torch

        from handloom.checkpoint import open_checkpoint
        from handloom.measure import cpu_suite
        from handloom.measure.results import open_results
        from handloom.model.families import read_config
    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = open_checkpoint(model, revision=revision)
    checkpoint.close()
    spec = read_config(checkpoint.config, checkpoint.name)[1]
    chosen = _precisions(precisions, checkpoint)
    contenders = _contenders(peers, peer_python or [])
    settings = cpu_suite.Settings(
        model=str(checkpoint.path),
        files=None if peer_models is None else str(peer_models),
        threads=torch.get_num_threads(),
        vocab_size=spec.vocab_size,
        cases=_cases(sizes, pp, tg),
        rounds=repeat,
        warmup=warmup,
        starts=starts,
        timeout=timeout,
    )
    _check_room(settings, spec)
    results = open_results("cpu", output, torch.device("cpu"), torch.float32, model=_label(checkpoint))
    results.show = lambda _: None
    results.labels["command"] = shlex.join(["handloom", *sys.argv[1:]])
    groups = _measure(settings, spec, chosen, contenders, results, quiet)
    shown = [contender for contender in contenders if any(contender.name in group.about for group in groups)]
    common.show_table(_rates_table(groups, spec, shown))
    print()
    common.show_table(_starts_table(groups, shown))
    for note in NOTES:
        common.say(f"- {note}", quiet)
    if results.labels["machine_busy"]:
        common.say("Other programs were using the machine: these numbers are too low.", quiet)
    failed = [group.failed[cpu_suite.OURS] for group in groups if cpu_suite.OURS in group.failed]
    if failed:
        raise RequestFailed("; ".join(failed))


def _measure(
    settings: Settings,
    spec: ModelSpec,
    precisions: Sequence[str],
    contenders: Sequence[Contender],
    results: Results,
    quiet: bool,
) -> list[Group]:
    """All groups, their rows added as each is done."""
    from handloom.measure import cpu_suite

    rounds, roofs, groups = settings.warmup + settings.rounds, cpu_suite.Roofs(), []
    runs = len(contenders) * (1 + rounds * len(settings.cases) + settings.starts) + 1
    with _bar(len(precisions) * runs, quiet) as (advance, tell, say):
        for i, precision in enumerate(precisions):
            groups.append(cpu_suite.measure(settings, precision, contenders, roofs, tell, say))
            cpu_suite.add_rows(groups[-1], spec, results)
            advance((i + 1) * runs)
    return groups


# Options ---------------------------------------------------------------------------------------


def _label(checkpoint: Checkpoint) -> str:
    """The Hub's name of a model; of a file or folder the last part."""
    return Path(checkpoint.name).name if Path(checkpoint.name).exists() else checkpoint.name


def _precisions(text: str | None, checkpoint: Checkpoint) -> list[str]:
    """Which to measure, in the order given. Raises InvalidParam."""
    from handloom.checkpoint.quantization import FORMATS

    is_file = checkpoint.path.suffix == ".gguf"
    quantized = is_file and any(info.storage in FORMATS for info in checkpoint.tensors.values())
    known = [*PRECISIONS, *(["gguf"] if quantized else [])]
    chosen = known if text is None else list(dict.fromkeys(text.split(",")))
    for name in chosen:
        if name not in known:
            why = " (gguf: only of a quantised .gguf file)" if name == "gguf" else ""
            raise InvalidParam(f"--precisions {name[:40]!r}: choose of {', '.join(known)}{why}")
    return chosen


def _cases(batches: Sequence[int], pp: int, tg: int) -> list[Case]:
    from handloom.measure.cpu_suite import Case

    if not (pp or tg):
        raise InvalidParam("--pp 0 and --tg 0 leave nothing to measure")
    return [Case(kind, tokens, n) for n in batches for kind, tokens in (("pp", pp), ("tg", tg)) if tokens]


def _check_room(settings: Settings, spec: ModelSpec) -> None:
    longest = max(sum(case.lengths) for case in settings.cases)
    if longest > spec.max_context:
        raise InvalidParam(
            f"a prompt and its new tokens are {longest} together, and this model's context holds {spec.max_context}; "
            "ask for fewer with --pp and --tg"
        )


def _contenders(peers: str, pythons: Sequence[str]) -> list[Contender]:
    """handloom, and the peers. Raises InvalidParam."""
    from handloom.measure.cpu_suite import OURS
    from handloom.measure.worker_process import WORKERS, Contender

    names = [] if peers == "none" else list(dict.fromkeys(peers.split(",")))
    adapters = {}
    for name in names:
        path = WORKERS / f"{PEERS[name][0]}.py" if name in PEERS else Path(name)
        if path.suffix != ".py" or not path.is_file():
            raise InvalidParam(
                f"--peers {name[:80]!r}: choose of {', '.join(PEERS)}, a .py file that is there, or none"
            )
        adapters[name if name in PEERS else path.stem] = path
    having = dict.fromkeys(adapters, sys.executable)
    for text in sorted(pythons, key=lambda text: "=" in text):  # those of one peer last
        name, given, path_ = text.partition("=")
        if given and name not in adapters:
            raise InvalidParam(f"--peer-python {text[:80]!r}: {name[:40]!r} is not one of --peers {peers[:80]}")
        having.update({name: path_} if given else dict.fromkeys(adapters, text))
    return [
        Contender(OURS, WORKERS / "handloom_engine.py"),
        *(Contender(name, path, having[name], PEERS.get(name, ("", {}))[1]) for name, path in adapters.items()),
    ]


# What is shown ---------------------------------------------------------------------------------


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[tuple[Any, Tell, Tell]]:
    """Functions that set how much is done, say what is being done (a step each), and write a line above the bar."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = common.error_console()
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    hidden = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=total)
        yield (
            lambda done: bar.update(task, completed=done),
            lambda what: bar.update(task, advance=1, description=common.printable(what)),
            lambda text: common.say(text, quiet) if hidden else bar.console.print(common.printable(text), style="dim"),
        )


def _rates_table(groups: Sequence[Group], spec: ModelSpec, contenders: Sequence[Contender]) -> Table:
    from rich.table import Table

    from handloom.measure import cpu_suite
    from handloom.measure.stats import percentile

    table = Table("", "test", *(c.name for c in contenders), "limit", title="tok/s (% of the limit)")
    for group in groups:
        table.add_section()
        for i, (case, rates) in enumerate(group.rates.items()):
            most = cpu_suite.limit(group, spec, case)
            cells = []
            for contender in contenders:
                p50 = percentile(rates[contender.name], 50) if contender.name in rates else None
                share = f" ({100 * p50 / most:.0f}%)" if p50 and most else ""
                cells.append("" if p50 is None else f"{p50:.3g}{share}" if p50 < 1000 else f"{p50:.0f}{share}")
            table.add_row("" if i else group.precision, case.name, *cells, f"{most:.0f}" if most else "")
    return table


def _starts_table(groups: Sequence[Group], contenders: Sequence[Contender]) -> Table:
    from rich.table import Table

    from handloom.measure.stats import percentile

    table = Table("", "engine", "held", "first token", "load", "peak memory", "of all", "agree")
    for group in groups:
        table.add_section()
        for contender in contenders:
            name, about = contender.name, group.about.get(contender.name)
            if about is None:
                continue
            found = [percentile(values, 50) for values in zip(*group.starts.get(name, []), strict=True)]
            first = [f"{found[0]:.2f} s", f"{found[1]:.2f} s", common.size(found[2])] if found else ["", "", ""]
            peaks = group.peaks.get(name)
            share = group.agreement.get(name)
            agree = "" if share is None else f"{100 * share:.0f}%"
            table.add_row(
                group.precision,
                name,
                common.printable(str(about.get("held"))[:40]),
                *first,
                common.size(max(peaks.values())) if peaks else "",
                agree,
            )
    return table
