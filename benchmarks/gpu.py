"""The suites of a GPU, on random weights in the shapes of real models made on the spot (random_llama.py).

    python benchmarks/gpu.py latency batch prefill throughput sampling load memory --shapes 1b 8b 0.6b
    python -m benchmarks.report benchmarks/results/gpu.jsonl --pictures benchmarks/results/gpu

latency     one request: time to the first token, time per token
batch       the same for 1 to 256 rows
prefill     prompts of 128 to 8192 tokens, alone and four at once
throughput  nano-vllm's 256 requests of 100 to 1024 tokens in and out, all at once
sampling    the choice of tokens alone: vocabularies of 32k to 256k, 1 to 512 rows
load        a checkpoint in a fresh process: seconds to load and to a first token; memory to there and in a batch
memory      who holds it when a batch needs most, in a fresh process: weights, KV pool, graphs, workspace, other

Everybody runs in turn on the same weights and prompts, greedily, without eos; every output's length is checked.
Of handloom: steps that are captured, and launched kernel by kernel. Peers: plain (gpt-fast's recipe, plain_torch.py),
dynamic and static (transformers' generate with either cache; static is compiled on a GPU), torch (handloom on
PyTorch's operators), continuous (transformers' continuous batching, in `throughput`). MBU and MFU: bytes and operations
that the work needs, over the time, against what this run measured and what is nominal. The host's share: of decoding,
the time in which the host did not just wait for the device. Before anything is timed handloom's logits and tokens are
compared with transformers'. A case that fails is a row that says why, and does not keep the next from being measured;
the rows of a case are written together; --resume skips what the table has of this revision, --seconds ends the run
before the next case.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import transformers

import common
import gpu_choice
import gpu_loading
import gpu_memory
import gpu_serving
import handloom as hl
import report_gpu
from common import Rates, Results, add_use
from contenders import (
    COMPILED,
    LAUNCHED,
    OURS,
    PEERS,
    Failures,
    Handloom,
    Prompts,
    contenders,
    in_turn,
    same_tokens,
)
from handloom import machine
from handloom.loading import DTYPES, PAGE_SIZE
from handloom.measure import limits
from handloom.measure.peer import Transformers
from handloom.measure.speed import random_ids
from kernel_report import FAILED
from random_llama import SHAPES, as_transformers, make
from step_parts import step_parts


class Session:
    """One run of some suites: what it was asked for, the machine's rates, the table, and what went wrong."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.started = arguments, time.monotonic()
        self.device, self.dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
        self.rates = Rates.measure(self.dtype, self.device)
        self.failures, self.not_reached = Failures(), list[str]()
        self.rows: list[report_gpu.Row] = []
        kept = report_gpu.read(arguments.output) if arguments.resume and arguments.output.is_file() else []
        mine = self.results("", "").labels
        same = ("device", "dtype", "revision")
        self.done: set[tuple[str, str, str]] = set()
        for row in kept:
            if all(row[key] == mine[key] for key in same):
                key = row["suite"], row["model"], row["case"]
                again = (row["peer"], row["metric"]) == (OURS, FAILED)
                (self.done.discard if again else self.done.add)(key)

    def results(self, suite: str, model: str) -> Results:
        return common.open_results(f"gpu {suite}", self.arguments.output, self.device, self.dtype, model=model)

    def case(self, results: Results, name: str, measure: Callable[[], None]) -> bool:
        """Measure a case, unless the table has it or the time is over. False: it failed."""
        suite, model = results.labels["suite"], results.labels["model"]
        if (suite, model, name) in self.done:
            return True
        if time.monotonic() - self.started > self.arguments.seconds:
            self.not_reached.append(f"{suite}: {model}: {name}")
            return True
        before, failed = len(results.rows), len(self.failures.found)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with results.together():
            try:
                measure()
            except (Exception, SystemExit) as error:
                self.failures.add(f"{suite}: {model}: {name}", OURS, error)
            if self.device.type == "cuda" and len(results.rows) > before:
                peak = torch.cuda.max_memory_reserved(self.device) / 2**20
                results.add("all", name, "peak memory", "MiB", [peak])
            for failure in self.failures.found[failed:]:
                results.add(failure.who, name, FAILED, "", [1], why=failure.why)
        self.rows += results.rows[before:]
        gc.collect()
        return len(self.failures.found) == failed


# Latency, batch, prefill -----------------------------------------------------------------------


def generation(session: Session, suite: str, cases: Sequence[tuple[int, int, int]]) -> None:
    """Cases (rows, prompt, new tokens) of each shape, after tokens and logits have been compared with transformers'."""
    arguments = session.arguments
    tokens = max(rows * (prompt + new + 2 * PAGE_SIZE) for rows, prompt, new in cases)
    for shape in arguments.shapes:
        results = session.results(suite, f"llama {shape}, random")
        names = {case: f"{case[0]} x pp{case[1]}" + (f" + tg{case[2]}" if case[2] > 1 else "") for case in cases}
        if all((f"gpu {suite}", results.labels["model"], name) in session.done for name in names.values()):
            continue
        lm = make(shape, session.dtype, session.device, arguments.backend, tokens)
        session.rates.tell(results)
        session.rows += results.rows
        everybody = set(arguments.peers) & {*PEERS, "torch"}
        if session.case(results, "answers", partial(check_answers, lm, results)):
            for at, (case, name) in enumerate(names.items()):
                compiled = suite == "latency" and at == 0 and shape in arguments.compiled_for
                wanted = everybody if compiled else everybody - COMPILED
                session.case(results, name, partial(generation_case, session, lm, results, name, case, wanted))
        del lm
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()


def check_answers(lm: hl.LM, results: Results) -> None:
    """Tokens are transformers' or tie with them, logits are close, and captured steps choose as others do.

    Raises SystemExit.
    """
    ids, new = random_ids(lm.spec.vocab_size, 8, 1), 8
    ours = Handloom(lm, None)([ids], new)
    found = common.check_same_tokens(lm, Transformers(as_transformers(lm)), ids, new)
    results.add(OURS, "answers", "difference of logits", "%", [100 * found.logits_difference])
    flown = contenders(lm, 1, len(ids) + new, ())[OURS]([ids], new)
    if flown.tokens != ours.tokens:
        raise SystemExit(f"captured steps chose {flown.tokens}, others {ours.tokens}")


def generation_case(
    session: Session, lm: hl.LM, results: Results, name: str, sizes: tuple[int, int, int], wanted: set[str]
) -> None:
    rows, prompt, new = sizes
    prompts: Prompts = [random_ids(lm.spec.vocab_size, prompt, seed) for seed in range(rows)]
    who = contenders(lm, rows, prompt + new, wanted)
    ours = who[OURS]
    if new == 1:
        del who[LAUNCHED]
    taken = in_turn(name, who, prompts, new, session.arguments.rounds, session.failures)
    spec, rates = lm.spec, session.rates
    weights = machine.weight_bytes_per_token(lm, lm.dtype)
    context = prompt + new // 2
    moved = weights + rows * machine.kv_bytes_read(spec, lm.dtype, context)
    flops = rows * limits.decode_flops(spec, context)
    for peer, runs in taken.items():
        results.add(peer, name, "TTFT", "ms", [1e3 * each.run.first for each in runs])
        if new == 1:
            seconds = [each.run.first for each in runs]
            results.add(peer, name, "prefill", "tok/s", [rows * prompt / s for s in seconds])
            add_use(results, peer, name, seconds, weights, rows * limits.prefill_flops(spec, prompt), rates)
            continue
        seconds = [each.step for each in runs]
        results.add(peer, name, "TPOT", "ms", [1e3 * s for s in seconds])
        results.add(peer, name, "decode", "tok/s", [rows / s for s in seconds])
        add_use(results, peer, name, seconds, moved, flops, rates)
        if shares := [100 * each.host for each in runs if each.host is not None]:
            results.add(peer, name, "host's share", "%", shares)
        if OURS in taken and peer != OURS:
            equal = same_tokens(taken[OURS][0].tokens, runs[0].tokens)
            results.add(peer, name, "tokens as handloom's", "%", [equal])
    if new == 1:
        fastest = max(rows * limits.prefill_flops(spec, prompt) / rates.matmul, weights / rates.bandwidth)
        results.add("limit", name, "prefill", "tok/s", [rows * prompt / fastest])
        return
    results.add("limit", name, "decode", "tok/s", [rows / max(moved / rates.bandwidth, flops / rates.matmul)])
    assert isinstance(ours, Handloom) and ours.graphs is not None
    results.add(OURS, name, "captured in", "s", [ours.graphs.warm_up_seconds])
    add_parts(lm, results, name, rows, context, [each.step for each in taken.get(OURS, [])])


def add_parts(lm: hl.LM, results: Results, name: str, rows: int, context: int, steps: Sequence[float]) -> None:
    """Kernels per step, and the microseconds of each part; on a GPU also those of a captured step in none of them."""
    kernels, parts = step_parts(lm, rows, context)
    if kernels:
        results.add(OURS, name, "kernels per step", "", [kernels])
        if steps:
            parts["between kernels"] = max(0.0, min(steps) - sum(parts.values()))
    for part, seconds in parts.items():
        results.add(OURS, name, f"part: {part}", "us", [1e6 * seconds])


# The command -----------------------------------------------------------------------------------


def run_suite(suite: str, session: Session) -> None:
    arguments = session.arguments
    small = arguments.small
    if suite == "latency":
        generation(session, suite, [(1, 8, 6)] if small else [(1, 128, 128), (1, 4096, 64)])
    elif suite == "batch":
        prompt, new = (8, 6) if small else (128, 128)
        generation(session, suite, [(rows, prompt, new) for rows in arguments.batch])
    elif suite == "prefill":
        alone, at_once = ((16,), (8,)) if small else ((128, 512, 2048, 8192), (512, 2048))
        generation(session, suite, [(1, n, 1) for n in alone] + [(4, n, 1) for n in at_once])
    elif suite == "throughput":
        gpu_serving.measure(session)
    elif suite == "sampling":
        gpu_choice.measure(session)
    elif suite == "load":
        gpu_loading.measure(session)
    else:
        gpu_memory.measure(session)


SUITES = ("latency", "batch", "prefill", "throughput", "sampling", "load", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=SUITES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--shapes", nargs="+", default=["8b", "0.6b", "1b"], choices=list(SHAPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--peers", nargs="*", default=[*PEERS, "torch", "continuous"])
    parser.add_argument(
        "--compiled-for", nargs="*", default=["1b", "tiny"], help="shapes with peers that compile, in `latency`"
    )
    parser.add_argument("--batches", nargs="*", type=int, default=[], help="throughput: transformers' padded batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--resume", action="store_true", help="keep what the table has of this revision")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--output", type=Path, default=common.RESULTS / "gpu.jsonl")
    arguments = parser.parse_args()
    if unknown := set(arguments.peers) - {*PEERS, "torch", "continuous"}:
        parser.error(
            f"--peers: there is no {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}, torch, continuous"
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    session = Session(arguments)
    try:
        for suite in arguments.suites:
            run_suite(suite, session)
    finally:  # also when interrupted
        print(report_gpu.markdown(session.rows), report_gpu.in_short(session.rows), sep="\n", end="")
        print(*(f"failed: {each}\n" for each in session.failures.found), sep="", end="")
        print(
            *(f"no time for {each}: go on with --resume\n" for each in session.not_reached), sep="", end="", flush=True
        )
    sys.exit(1 if session.failures.found or session.not_reached else 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
