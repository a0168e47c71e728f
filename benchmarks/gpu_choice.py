"""The suite `sampling`: what choosing the tokens of a step costs, beside torch's ways and the time to read the scores.

Not the model's head, which is a kernel case of its own. Times are those of kernel_clock.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common import Results, add_use
from contenders import OURS
from handloom.ops import Chooser, choose_backend
from kernel_cases.selection import by_sort, by_topk
from kernel_clock import Clock

if TYPE_CHECKING:
    from gpu import Session

Calls = dict[str, Callable[[], object]]


def measure(session: Session) -> None:
    """Greedy, drawn, and drawn after top-k 50 and top-p 0.9, with log-probabilities, of random scores."""
    small, backend = session.arguments.small, session.arguments.backend
    chooser = choose_backend(session.device, backend, {64}).chooser
    clock, results = Clock(session.device), session.results("sampling", f"backend {backend}")
    vocabularies, rows = ((512,), (1, 3)) if small else ((32768, 131072, 262144), (1, 8, 64, 512))
    for vocab_size in vocabularies:
        for count in rows:
            scores = 3 * torch.randn(count, vocab_size, device=session.device)
            for way, calls in ways(chooser, scores).items():
                name = f"{way} {count} x {vocab_size}"
                session.case(results, name, partial(_choice, session, clock, results, name, scores, calls))


def _choice(session: Session, clock: Clock, results: Results, name: str, scores: Tensor, calls: Calls) -> None:
    for call in calls.values():
        call()
    for peer, (us, _) in zip(calls, clock.in_turn(list(calls.values())), strict=True):
        seconds = [each / 1e6 for each in us]
        results.add(peer, name, "choice", "us", us)
        results.add(peer, name, "chosen", "tok/s", [len(scores) / s for s in seconds])
        add_use(results, peer, name, seconds, scores.nbytes, 0, session.rates)


def ways(chooser: Chooser, scores: Tensor) -> dict[str, Calls]:
    """{how: {who: call}}; torch's way is transformers': processors, softmax, multinomial."""
    rows = len(scores)
    seeds, positions = (torch.arange(rows, device=scores.device) for _ in range(2))
    temperature, top_p = (torch.full((rows,), value, device=scores.device) for value in (0.8, 0.9))
    top_k = torch.full((rows,), 50, dtype=torch.int32, device=scores.device)

    def drawn(scores: Tensor, chosen_from: Tensor) -> tuple[Tensor, Tensor]:
        chosen = chosen_from.softmax(-1).multinomial(1)
        return chosen, scores.log_softmax(-1).gather(1, chosen)

    def most_likely() -> tuple[Tensor, Tensor]:
        chosen = scores.argmax(-1, keepdim=True)
        return chosen, scores.log_softmax(-1).gather(1, chosen)

    def cut() -> object:
        cuts = chooser.find_cuts(scores, temperature, top_k, top_p, None)
        return chooser.draw(scores, seeds, positions, temperature, cuts=cuts)

    return {
        "greedy": {OURS: lambda: chooser.draw(scores, None, None), "torch": most_likely},
        "drawn": {
            OURS: lambda: chooser.draw(scores, seeds, positions, temperature),
            "torch": lambda: drawn(scores, scores / 0.8),
        },
        "top-k, top-p": {OURS: cut, "torch": lambda: drawn(scores, by_sort(by_topk(scores / 0.8, 50), 0.9))},
    }
