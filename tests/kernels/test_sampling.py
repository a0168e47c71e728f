"""sampling.py: every rule alone and together, the engine's bits where it has the rule, and the state they read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from handloom.sampling import repetition
from handloom_kernels import reference
from handloom_kernels import sampling as kernels
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import Penalties, TokenState
from kernel_testing import DEVICE, DTYPES, assert_as_exact_as, draw

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter

SMALL = {"BLOCK": 64, "CHUNK": 16, "num_warps": 1}


def floats(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def state_of(sequences: int, vocab_size: int, prompt: int = 0, answer: int = 0) -> TokenState:
    """A state in which each sequence has some random tokens."""
    seen = torch.zeros(sequences, -(-vocab_size // 32), dtype=torch.int32, device=DEVICE)
    state = TokenState(seen, torch.zeros(sequences, vocab_size, dtype=torch.int32, device=DEVICE))
    for count, generated in ((prompt, False), (answer, True)):
        rows = torch.arange(sequences).repeat_interleave(count).to(DEVICE)
        kernels.count_tokens(state, rows, torch.randint(vocab_size, (len(rows),)).to(DEVICE), generated)
    return state


def bitmask(allowed: Tensor) -> Tensor:
    """[R, V] bool as int32 words."""
    padded = torch.nn.functional.pad(allowed.long(), (0, -allowed.shape[1] % 32)).unflatten(1, (-1, 32))
    words = (padded << torch.arange(32, device=DEVICE)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def lists(rows: int, size: int, vocab_size: int) -> Tensor:
    """[rows, size] distinct token ids, some of them none, one past the vocabulary."""
    ids = torch.stack([torch.randperm(vocab_size)[:size] for _ in range(rows)])
    ids[:, ::5] = -1
    ids[0, -1] = vocab_size
    return ids.to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 31, 63, 100, 1000])
def test_everything_at_once(vocab_size: int, dtype: torch.dtype) -> None:
    rows, size = 3, min(20, vocab_size)
    logits = draw(rows, vocab_size, dtype=dtype, scale=3)
    state = state_of(rows, vocab_size, prompt=10, answer=15)
    penalties = Penalties(floats(1.3, 1.0, 0.8), floats(0.5, 0.0, -0.2), floats(0.0, 1.5, -0.7))
    allowed = bitmask(torch.rand(rows, vocab_size, device=DEVICE) > 0.2)
    bias_ids, ban_ids = lists(rows, size, vocab_size), lists(rows, size, vocab_size).to(torch.int32)
    args = logits, state, penalties, bias_ids, draw(rows, size), ban_ids, allowed
    blocks = {**SMALL, "BLOCK": 256} if vocab_size == 1000 else SMALL
    ours, expected = kernels.adjust_logits(*args, blocks=blocks), reference.adjust_logits(*args)
    assert ours.dtype == torch.float32
    assert torch.equal(ours == -torch.inf, expected == -torch.inf)
    alive = expected > -torch.inf
    torch.testing.assert_close(ours[alive], expected[alive], rtol=2**-22, atol=2**-20)
    assert torch.equal(ours, expected), "nothing is fused: the very bits"


def test_repetition_penalty_has_the_bits_of_transformers_and_of_the_engine() -> None:
    logits = draw(3, 100, scale=4)
    token_ids = torch.randint(100, (3, 40)).to(DEVICE)
    token_ids[:, 20:] = token_ids[:, :20]  # many twice: the penalty is applied once
    values = [1.3, 1.0, 0.7]
    state = TokenState(torch.zeros(3, 4, dtype=torch.int32, device=DEVICE))
    kernels.count_tokens(state, torch.arange(3, device=DEVICE).repeat_interleave(40), token_ids.flatten())
    ours = kernels.adjust_logits(logits, state, Penalties(floats(*values)), blocks=SMALL)
    for row, value in enumerate(values):
        theirs = RepetitionPenaltyLogitsProcessor(value)(token_ids[row : row + 1], logits[row : row + 1])
        assert torch.equal(ours[row], theirs[0])
    engine = logits.cpu()
    repetition.repetition_penalty(engine, values, token_ids.tolist())
    assert torch.equal(ours.cpu(), engine)


@pytest.mark.parametrize("name", Penalties._fields)
def test_each_penalty_alone_against_float64(name: str) -> None:
    logits, state = draw(2, 100, scale=3), state_of(2, 100, prompt=20, answer=30)
    penalties = Penalties(**{name: floats(1.5, 0.75)})
    ours = kernels.adjust_logits(logits, state, penalties, blocks=SMALL)
    assert_as_exact_as(reference.adjust_logits, logits, state, penalties, ours=ours)
    assert not torch.equal(ours, logits)


def test_frequency_and_presence_count_the_answer_and_not_the_prompt() -> None:
    state = state_of(1, 64)
    zero = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    kernels.count_tokens(state, zero, torch.tensor([3, 3, 5, 6], device=DEVICE), generated=False)
    kernels.count_tokens(state, zero, torch.tensor([5, 5, 5, 7], device=DEVICE))
    logits = torch.zeros(1, 64, device=DEVICE)
    ours = kernels.adjust_logits(logits, state, Penalties(None, floats(0.5), floats(2.0)))
    assert ours[0].nonzero()[:, 0].tolist() == [5, 7]
    assert ours[0, [5, 7]].tolist() == [-3.5, -2.5]


def test_nothing_asked_is_a_float32_copy() -> None:
    logits = draw(2, 100, dtype=torch.float16)
    assert torch.equal(kernels.adjust_logits(logits, blocks=SMALL), logits.float())
    assert torch.equal(kernels.adjust_logits(logits, state_of(2, 100), Penalties(), blocks=SMALL), logits.float())


def test_a_grammar_and_bans_win_over_any_bias() -> None:
    logits = draw(2, 70)
    logits[0, 4] = -torch.inf
    only = torch.zeros(2, 70, dtype=torch.bool, device=DEVICE)
    only[0, [0, 4, 31, 32, 69]] = True
    only[1, 40] = True
    ids = torch.tensor([[4, 31, 33], [40, 41, -1]], device=DEVICE)
    bias = torch.tensor([[torch.inf, 5.0, torch.inf], [1.0, 2.0, 3.0]], device=DEVICE)
    bans = torch.tensor([[69], [-1]], device=DEVICE)
    ours = kernels.adjust_logits(logits, None, None, ids, bias, bans, bitmask(only), blocks=SMALL)
    assert torch.equal(ours, reference.adjust_logits(logits, None, None, ids, bias, bans, bitmask(only)))
    assert (ours[0] > -torch.inf).nonzero()[:, 0].tolist() == [0, 31, 32]
    assert ours[1, 40] == logits[1, 40] + 1


def test_a_list_longer_than_a_chunk_reaches_every_tile() -> None:
    logits = draw(2, 200)
    ids, bans, bias = lists(2, 90, 200), lists(2, 50, 200), draw(2, 90)
    ours = kernels.adjust_logits(logits, None, None, ids, bias, bans, blocks=SMALL)
    assert torch.equal(ours, reference.adjust_logits(logits, None, None, ids, bias, bans))


def test_bans_that_fill_a_tile_stand_twice_or_name_nothing() -> None:
    logits = draw(2, 300)
    bans = torch.cat((torch.arange(64, 128), torch.arange(100, 140), torch.tensor([299, 300, 2**31 - 1, -(2**31)])))
    bans = bans.expand(2, -1).to(DEVICE, torch.int32).contiguous()
    for blocks in (SMALL, {**SMALL, "CHUNK": 256}):
        ours = kernels.adjust_logits(logits, ban_ids=bans, blocks=blocks)
        assert torch.equal(ours, reference.adjust_logits(logits, ban_ids=bans))
        assert (ours[0] == -torch.inf).nonzero()[:, 0].tolist() == [*range(64, 140), 299]


def test_a_token_with_a_bias_and_a_ban_is_banned() -> None:
    logits, ids = draw(1, 100), torch.tensor([[70, 3]], device=DEVICE)
    bias = torch.tensor([[torch.inf, 2.0]], device=DEVICE)
    ours = kernels.adjust_logits(logits, bias_ids=ids, bias=bias, ban_ids=ids[:, :1].contiguous(), blocks=SMALL)
    assert ours[0, 70] == -torch.inf
    assert ours[0, 3] == logits[0, 3] + 2
    none = ids[:, :0]
    empty = kernels.adjust_logits(logits, bias_ids=none, bias=bias[:, :0], ban_ids=none, blocks=SMALL)
    assert torch.equal(empty, logits)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_of_the_state_in_any_order(dtype: torch.dtype) -> None:
    logits, state = draw(3, 100), state_of(5, 100, prompt=10, answer=10)
    rows = torch.tensor([4, 0, 4], dtype=dtype, device=DEVICE)
    penalties = Penalties(floats(2, 2, 3), floats(1, 1, 1))
    ours = kernels.adjust_logits(logits, state, penalties, rows=rows, blocks=SMALL)
    assert_as_exact_as(reference.adjust_logits, logits, state, penalties, None, None, None, None, rows, ours=ours)


def test_rows_that_lie_apart() -> None:
    wide = draw(3, 200, scale=3)
    state, penalties = state_of(3, 100, answer=20), Penalties(floats(2, 2, 3))
    ours = kernels.adjust_logits(wide[:, 50:150], state, penalties, blocks=SMALL)
    assert torch.equal(ours, kernels.adjust_logits(wide[:, 50:150].contiguous(), state, penalties, blocks=SMALL))


def test_a_row_does_not_depend_on_its_company() -> None:
    logits, state, r = draw(4, 150), state_of(4, 150, answer=40), floats(1.1, 1.2, 1.3, 1.4)
    ids, bias = lists(4, 20, 150), draw(4, 20)

    def run(rows: slice) -> Tensor:
        mine = TokenState(*(each[rows] for each in state))
        penalties = Penalties(r[rows], r[rows], r[rows])
        return kernels.adjust_logits(logits[rows], mine, penalties, ids[rows], bias[rows], blocks=SMALL)

    everything = run(slice(0, 4))
    for part in (slice(0, 1), slice(1, 3), slice(3, 4), slice(0, 4)):
        assert torch.equal(run(part), everything[part])


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_count_tokens(counted: bool, generated: bool) -> None:
    def fresh() -> TokenState:
        seen = torch.zeros(3, 4, dtype=torch.int32, device=DEVICE)
        return TokenState(seen, torch.zeros(3, 100, dtype=torch.int32, device=DEVICE) if counted else None)

    ours, expected = fresh(), fresh()
    rows = torch.randint(-1, 3, (300,)).to(DEVICE)
    token_ids = torch.randint(-1, 60, (300,), dtype=torch.int32).to(DEVICE) * 2  # many twice, some past 100
    kernels.count_tokens(ours, rows, token_ids, generated, blocks={"BLOCK": 128})
    reference.count_tokens(expected, rows, token_ids, generated)
    assert torch.equal(ours.seen, expected.seen)
    if ours.counts is not None and expected.counts is not None:
        assert torch.equal(ours.counts, expected.counts)
        assert bool(ours.counts.any()) == generated


def test_no_rows_are_fine() -> None:
    assert kernels.adjust_logits(draw(0, 8)).shape == (0, 8)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    kernels.count_tokens(state_of(1, 8), none, none)


def test_what_does_not_fit_is_named() -> None:
    logits, state, one = draw(2, 40), state_of(2, 40), floats(1, 1)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"logits": logits.double()}, "logits has dtype torch.float64"),
        ({"penalties": Penalties(one)}, "penalties need a state"),
        ({"state": TokenState(state.seen), "penalties": Penalties(None, one)}, r"need state\.counts"),
        ({"state": TokenState(state.seen[:1]), "penalties": Penalties(one)}, r"state\.seen has shape \[1, 2\]"),
        ({"state": state, "penalties": Penalties(one[:1])}, r"penalties\.repetition has shape \[1\]; expected \[2\]"),
        ({"state": state, "penalties": Penalties(one), "rows": one}, "rows has dtype torch.float32"),
        ({"bias_ids": ids}, "bias_ids and bias come together"),
        ({"bias_ids": ids, "bias": one}, r"bias has shape \[2\]; expected \[2, 3\]"),
        ({"ban_ids": one}, "ban_ids has dtype torch.float32"),
        ({"allowed": state.seen[:, :1]}, r"allowed has shape \[2, 1\]; expected \[2, 2\]"),
    ]
    for given, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.adjust_logits(**{"logits": logits, **given})
    with pytest.raises(KernelError, match="2 words for 100 tokens"):
        kernels.count_tokens(TokenState(state.seen, torch.zeros(2, 100, device=DEVICE)), ids[0], ids[0])
    with pytest.raises(KernelError, match=r"token_ids has shape \[2, 3\]"):
        kernels.count_tokens(state, ids[0], ids)
