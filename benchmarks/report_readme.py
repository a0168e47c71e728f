"""What the README says of speed, the picture beside it, and the tables of all results: from the rows alone.

    python -m benchmarks.report --readme

Each line of the README's table is of one run, the newest in which handloom and another engine were measured on a quiet
machine; rows of handloom alone are in the tables of results only.
This module does not know how anything was measured; words stand here, figures in results/*.jsonl.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report_gpu
from report import LIMIT, OURS, Row, markdown, newest, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = RESULTS / "speed.svg"
BEGIN = "<!-- made by `python -m benchmarks.report --readme`; the words: benchmarks/report_readme.py -->"
END = "<!-- end -->"
MODEL = "SmolLM2-135M-Instruct-fp32"
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "8 bits", "int4": "4 bits"}
KINDS = (("tg", 1), ("tg", 8), ("pp", 1))
"""Kinds of cases of `handloom bench cpu`, and prompts at once."""
NAMES = {
    OURS: ("handloom", "#0072b2"),
    "transformers": ("transformers", "#e69f00"),
    "llama.cpp": ("llama.cpp", "#009e73"),
    "llama.cpp-plain": ("llama.cpp", "#009e73"),
    "ctranslate2": ("CTranslate2", "#cc79a7"),
    "openvino": ("OpenVINO", "#56b4e9"),
    "onnxruntime": ("ONNX Runtime", "#999999"),
}
"""Shown as, and its colour: Okabe and Ito's, which the colour-blind tell apart."""
INK = "#222222"
ELSEWHERE = "cpu_without_amx"
"""Rows of `handloom bench cpu` on another machine: a sentence, and tables of results."""
SUITES = ("cpu", "cpu_vs_transformers", "throughput", "modes", "beams", "speculation", "rules", "grammar")


@dataclass(frozen=True)
class Line:
    """A case of one run: tokens of each prompt, or new ones, prompts at once, and the row of each engine and limit."""

    precision: str
    kind: str
    tokens: int
    batch: int
    rows: dict[str, Row]

    @property
    def name(self) -> str:
        if self.kind == "pp":
            return f"a prompt of {self.tokens}"
        return f"{self.tokens} new tokens" if self.batch == 1 else f"{self.tokens} new for each of {self.batch}"

    @property
    def limit(self) -> float:
        return float(self.rows[LIMIT]["p50"])


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """What the README shows of `handloom bench cpu`, by precision. Raises SystemExit where there is nothing."""
    rows = [row for row in rows if row["suite"] == "cpu" and row["model"] == MODEL]
    found = []
    for precision in PRECISIONS:
        for kind, batch in KINDS:
            runs: dict[str, dict[str, Row]] = {}
            for row in rows:
                if row["dtype"] == precision and re.fullmatch(rf"{kind}\d+ b{batch}", row["case"]):
                    runs.setdefault(row["time"], {})[row["peer"]] = row
            whole = [at for at, who in runs.items() if {OURS, LIMIT} < {*who} and not who[OURS]["machine_busy"]]
            if whole:
                run = runs[max(whole)]
                tokens = int(run[OURS]["case"].removeprefix(kind).split()[0])
                found.append(Line(precision, kind, tokens, batch, run))
    if not found:
        raise SystemExit(f"no rows of {MODEL} beside other engines in results/cpu.jsonl")
    return found


def shown(lines: Sequence[Line]) -> list[str]:
    """The engines that were measured, in the order of NAMES."""
    measured = {peer for line in lines for peer in line.rows}
    return [peer for peer in NAMES if peer in measured]


def three(value: float) -> str:
    """Three figures, and all of those before the point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def between(values: Iterable[float]) -> str:
    ordered = sorted(values)
    low, high = f"{ordered[0]:.1f}", f"{ordered[-1]:.1f}"
    return low if low == high else f"{low}–{high}"


# Words -----------------------------------------------------------------------------------------


def section(rows: list[Row], elsewhere: list[Row]) -> str:
    """The README's section, from rows of all suites of the CPU, and of `handloom bench cpu` on another machine."""
    lines = lines_of(rows)
    words = [_about(lines, rows), _elsewhere(lines_of(elsewhere)), _starts(rows), _requests(rows), _beams(rows), MADE]
    about, *others = [textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False) for text in words]
    return "\n\n".join([about, _table(lines), _picture_tag(lines), *others])


MADE = (
    "`handloom bench cpu` made the rows of the table, `python benchmarks/cpu_vs_transformers.py`, `throughput.py "
    "--batches 16 32 --prefix-rounds 3` and `beams.py` the others. All tables, each with its commands and versions: "
    "[benchmarks/results](benchmarks/results/README.md); how they are measured: [benchmarks](benchmarks/README.md)."
)


def _about(lines: Sequence[Line], rows: Iterable[Row]) -> str:
    ours = lines[0].rows[OURS]
    versions = {
        NAMES[peer][0]: row["version"].partition("-")[0]
        for line in lines
        for peer, row in line.rows.items()
        if peer not in (OURS, LIMIT)
    }
    roofs = {(row["dtype"], row["metric"]): row for row in _machine(rows, lines)}
    read = between(row["p50"] for (_, metric), row in roofs.items() if metric == "read bandwidth")
    products = ", ".join(
        f"{precision} {roofs[precision, 'matrix product']['p50'] / 1e3:.2f}"
        for precision in PRECISIONS
        if (precision, "matrix product") in roofs
    )
    device, engines = ours["device"].replace("(R)", ""), ", ".join(map(" ".join, versions.items()))
    text = (
        f"{MODEL.removesuffix('-fp32')} on {device}: tokens per second, medians of {ours['n']}, all engines of a line "
        f"in one run, in turn; {engines}. The limit is what the machine allowed in that run: a step's bytes at "
        f"{read} GB/s, or its operations at the rate of a large matrix product ({products} TFLOP/s), whichever "
        "takes longer; in brackets handloom's share of it; bold is the fastest."
    )
    if any(row["p50"] > line.limit for line in lines for row in line.rows.values()):
        text += " That product was one of float32, which the processor's matrix units pass."
    if "llama.cpp-plain" in shown(lines):
        text += " llama.cpp is without its AMX code, which crashed here."
    return text


def _elsewhere(lines: Sequence[Line]) -> str:
    cases: dict[str, list[str]] = {}
    for line in lines:
        best = max(row["p50"] for peer, row in line.rows.items() if peer not in (OURS, LIMIT))
        told = f"{PRECISIONS[line.precision]} {three(line.rows[OURS]['p50'])} ({three(best)})"
        cases.setdefault(line.name, []).append(told)
    device, told = lines[0].rows[OURS]["device"], "; ".join(f"{name}: {', '.join(own)}" for name, own in cases.items())
    return f"**Without AMX**, on {device}, in the same way; in brackets the fastest other engine. {told}."


def _machine(rows: Iterable[Row], lines: Sequence[Line]) -> list[Row]:
    """The machine's limits in the runs of these lines."""
    runs = {line.rows[OURS]["time"] for line in lines}
    return [row for row in rows if row["suite"] == "cpu" and row["case"] == "machine" and row["time"] in runs]


def _table(lines: Sequence[Line]) -> str:
    """Bold is the fastest of a line."""
    peers = shown(lines)
    out = [f"| weights | | {' | '.join(NAMES[peer][0] for peer in peers)} | limit |"]
    out.append("|---|---" + "|---:" * (len(peers) + 1) + "|")
    last = ""
    for line in lines:
        best = max(row["p50"] for peer, row in line.rows.items() if peer != LIMIT)
        cells = [PRECISIONS[line.precision] if line.precision != last else "", line.name]
        for peer in peers:
            value = line.rows[peer]["p50"] if peer in line.rows else None
            text = "" if value is None else f"**{three(value)}**" if value == best else three(value)
            cells.append(text + (f" ({100 * value / line.limit:.0f}%)" if peer == OURS and value else ""))
        out.append(f"| {' | '.join([*cells, three(line.limit)])} |")
        last = line.precision
    return "\n".join(out)


def _picture_tag(lines: Sequence[Line]) -> str:
    what = f"handloom beside {', '.join(dict.fromkeys(NAMES[peer][0] for peer in shown(lines)[1:]))}"
    return f"![Tokens per second of {what} and the limit]({PICTURE.relative_to(ROOT).as_posix()})"


def _starts(rows: Iterable[Row]) -> str:
    fresh: dict[str, dict[str, dict[str, float]]] = {}
    for (_, case, metric), peers in newest(r for r in rows if r["suite"] == "cpu" and r["model"] == MODEL).items():
        for peer, row in peers.items():
            if case == "process start":
                fresh.setdefault(metric, {}).setdefault(peer, {})[row["dtype"]] = row["p50"]
    seconds = [f"{NAMES[p][0]} {between(of.values())} s" for p, of in fresh["first token"].items()]
    peaks = [
        f"{NAMES[peer][0]} {', '.join(f'{of[p]:.0f}' for p in PRECISIONS if p in of)} MiB"
        for peer, of in fresh["peak memory"].items()
        if {*of} >= {*PRECISIONS}
    ]
    load = {metric: peers for (_, _, metric), peers in newest(_of(rows, "cpu_vs_transformers", "load")).items()}
    first = {who: three(row["p50"]) for who, row in load["load to first token"].items()}
    memory = {who: f"{row['p50']:.0f}" for who, row in load["peak memory of loading"].items()}
    return (
        f"**First token and memory.** From the start of a process to a first token: {', '.join(seconds)}. "
        f"Most memory held until then ({', '.join(PRECISIONS.values())}): {'; '.join(peaks)}. Of the same weights "
        f"in float32, {memory[LIMIT]} MiB: loading adds {memory[OURS]} MiB (transformers {memory['transformers']}, the "
        f"file mapped) and takes with a first token {first[OURS]} s (transformers {first['transformers']})."
    )


def _requests(rows: Iterable[Row]) -> str:
    found = {(case, metric): peers for (_, case, metric), peers in newest(_of(rows, "throughput")).items()}
    (many,) = (case for case, metric in found if metric == "new tokens")
    (prefix,) = (case for case, metric in found if metric == "hit rate")
    ours, best, limit = (found[many, "new tokens"][who]["p50"] for who in (OURS, "transformers", LIMIT))
    hits, on, off, cost = (
        found[prefix, metric][OURS]["p50"]
        for metric in (
            "hit rate", "ttft, prefix cache on", "ttft, prefix cache off", "cost of the prefix cache at 0% hits",
        )
    )  # fmt: skip
    batches = newest(_of(rows, "cpu_vs_transformers")).items()
    ((batch, rates),) = (
        (case, {who: row["p50"] for who, row in peers.items()})
        for (_, case, metric), peers in batches
        if metric == "new tokens"
    )
    return (
        f"**Many requests** (float32). {many.replace('-', '–')}, all at once: {three(ours)} new tokens per second, "
        f"{100 * ours / limit:.0f}% of the limit of {three(limit)} and {ours / best:.2f} times the best of "
        f"transformers' padded batches and continuous batching ({three(best)}). A {batch}: {three(rates[OURS])} per "
        f"second, {100 * rates[OURS] / rates[LIMIT]:.0f}% of the limit of {three(rates[LIMIT])} and "
        f"{rates[OURS] / rates['transformers']:.2f} times transformers ({three(rates['transformers'])}, padded). Where "
        f"{hits:.0f}% of a prompt is cached, its first token comes after {on:.0f} ms instead of {off:.0f}; where "
        f"nothing is, the prefix cache costs {cost:.1f}%."
    ).replace(" -", " −")


def _beams(rows: Iterable[Row]) -> str:
    own = _of(rows, "beams")
    case = max((row for row in own if row["metric"] == "time"), key=lambda row: row["time"])["case"]
    found = {metric: peers for (_, name, metric), peers in newest(own).items() if name == case}
    time, kept = ({who: three(row["p50"]) for who, row in found[metric].items()} for metric in ("time", "K and V"))
    least = f" (the machine needs {three(found['least time'][LIMIT]['p50'])})" if "least time" in found else ""
    return (
        f"**Beams** (float32). {case}: {time[OURS]} s{least} and {kept[OURS]} MiB of K and V; "
        f"transformers {time['transformers']} s and {kept['transformers']} MiB."
    )


def _of(rows: Iterable[Row], suite: str, case: str | None = None) -> list[Row]:
    return [r for r in rows if r["suite"] == suite and r["model"] == MODEL and case in (None, r["case"])]


# The picture -----------------------------------------------------------------------------------


def picture(rows: list[Row], file: Path) -> None:
    """A panel per kind of case: bars of every engine by precision, as high as its share of the limit above them."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines = lines_of(rows)
    peers = shown(lines)
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "handloom", "font.size": 9, "font.family": "sans-serif",
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.edgecolor": "#888888",
    }  # fmt: skip
    with plt.rc_context(style):
        figure, panels = plt.subplots(len(KINDS), 1, figsize=(9, 2.2 * len(KINDS)), layout="constrained")
        for axes, (kind, batch) in zip(panels, KINDS, strict=True):
            _panel(axes, [line for line in lines if (line.kind, line.batch) == (kind, batch)])
        names = {NAMES[peer][0]: plt.Rectangle((0, 0), 1, 1, color=NAMES[peer][1]) for peer in peers}
        names["limit of the machine"] = plt.Line2D([], [], color=INK, linewidth=1.4)
        figure.legend(names.values(), names, loc="outside upper center", ncols=len(names), frameon=False)
        figure.savefig(file, facecolor="white", metadata={"Date": None})
        plt.close(figure)


def _panel(axes: Any, lines: Sequence[Line]) -> None:
    """Tokens per second stand above every bar and at the limit."""
    if not lines:
        return
    groups = [[peer for peer in NAMES if peer in line.rows] for line in lines]
    width = 0.9 / max(map(len, groups))
    top = 1.0
    for at, (line, peers) in enumerate(zip(lines, groups, strict=True)):
        for i, peer in enumerate(peers):
            value = line.rows[peer]["p50"]
            place, share = at + (i - (len(peers) - 1) / 2) * width, value / line.limit
            axes.bar(place, share, 0.92 * width, color=NAMES[peer][1])
            weight, colour = ("bold", INK) if peer == OURS else ("normal", "#555555")
            _label(axes, three(value), place, share, fontweight=weight, color=colour)
            top = max(top, share)
        _label(axes, f"limit {three(line.limit)}", at, 1.0, color=INK)
    axes.axhline(1, color=INK, linewidth=1.4, zorder=0)
    axes.set_xticks(range(len(lines)), [PRECISIONS[line.precision] for line in lines])
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlim(-0.5, len(lines) - 0.5)
    axes.set_title(f"{lines[0].name}: tokens per second", loc="left", fontsize=10, fontweight="bold")
    axes.set_title("heights: share of the limit", loc="right", fontsize=8, color="#555555")


def _label(axes: Any, text: str, x: float, y: float, **style: Any) -> None:
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.annotate(
        text, (x, y), (0, 2.5), textcoords="offset points", ha="center", va="bottom", fontsize=7.5, bbox=behind, **style
    )


# Files -----------------------------------------------------------------------------------------


def all_tables() -> str:
    """results/README.md: the tables of every file of rows that there is."""
    out = ["# Results", "", BEGIN, ""]
    out += ["Medians (p20–p80); the limit is of the same run. How it is measured: [benchmarks](../README.md)."]
    for suite in (SUITES[0], ELSEWHERE, *SUITES[1:]):
        if (file := RESULTS / f"{suite}.jsonl").is_file():
            out += ["", f"## {suite}", "", markdown(read(file)).rstrip()]
    if (file := RESULTS / "gpu.jsonl").is_file():
        out += ["", "## gpu", "", report_gpu.markdown(read(file)).rstrip()]
    return "\n".join(out) + "\n"


def renew(*, check: bool) -> int:
    """Write README.md, its picture and results/README.md; check: nothing. The exit status: 1 if one was out of date."""
    rows = [row for suite in SUITES if (file := RESULTS / f"{suite}.jsonl").is_file() for row in read(file)]
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md has no place for it between {BEGIN} and {END}")
    words = section(rows, read(RESULTS / f"{ELSEWHERE}.jsonl"))
    texts = {readme: f"{before}{BEGIN}\n{words}\n{END}{after}", RESULTS / "README.md": all_tables()}
    stale = [file for file, text in texts.items() if not file.is_file() or file.read_text() != text]
    for file in stale:
        print(f"{file.relative_to(ROOT)}: {'out of date' if check else 'renewed'}")
        if not check:
            file.write_text(texts[file])
    if not check:
        picture(rows, PICTURE)
        print(f"{PICTURE.relative_to(ROOT)}: drawn")
    return 1 if check and stale else 0
