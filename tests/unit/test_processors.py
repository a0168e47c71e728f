"""Every rule alone, and all together, against the LogitsProcessor classes of transformers: equal to the last bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation import logits_process as hf
from transformers.generation.utils import GenerationMixin

from handloom.sampling import constraints, repetition
from handloom.sampling import processors as ours

INF = torch.inf


def random_scores(rows: int, vocab_size: int, seed: int, *, ties: bool = False, holes: bool = False) -> torch.Tensor:
    """Logits as a model gives them; with `ties` rounded to few values, with `holes` partly -inf."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, vocab_size, generator=generator) * 4
    if ties:
        scores = (scores * 2).round() / 2
    if holes:
        scores[torch.rand(rows, vocab_size, generator=generator) < 0.7] = -INF
        scores[:, 0] = 0.5
    return scores


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.view(torch.int32), right.view(torch.int32))


CASES = [
    {"vocab_size": 1},
    {"vocab_size": 2, "ties": True},
    {"vocab_size": 97},
    {"vocab_size": 97, "ties": True, "holes": True},
    {"vocab_size": 5003, "holes": True},
    {"vocab_size": 262144, "ties": True},
]

WARPERS: list[tuple[Any, Any, list[Any]]] = [
    (ours.temperature, hf.TemperatureLogitsWarper, [0.3, 0.7, 1.7, 100.0]),
    (ours.top_k, hf.TopKLogitsWarper, [1, 2, 50, 10**6]),
    (ours.top_p, hf.TopPLogitsWarper, [1e-9, 0.1, 0.5, 0.9, 0.999]),
    (ours.min_p, hf.MinPLogitsWarper, [0.0, 0.01, 0.3, 1.0]),
    (ours.top_h, hf.TopHLogitsWarper, [1e-6, 0.3, 0.7, 1.0]),
    (ours.typical_p, hf.TypicalLogitsWarper, [1e-6, 0.2, 0.9, 0.999]),
    (ours.epsilon_cutoff, hf.EpsilonLogitsWarper, [1e-9, 3e-4, 0.1, 0.9]),
    (ours.eta_cutoff, hf.EtaLogitsWarper, [1e-9, 3e-4, 0.1, 0.9]),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("rule", "reference", "values"), WARPERS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_rule_gives_the_bits_of_transformers_with_a_value_of_its_own_in_each_row(rule, reference, values, case):
    scores = random_scores(len(values), seed=1, **case)
    mine = scores.clone()
    rule(mine, values)
    for row, value in enumerate(values):
        assert same_bits(mine[row : row + 1], reference(value)(None, scores[row : row + 1]))
    for value in values:
        mine = scores.clone()
        rule(mine, [value] * len(values))
        assert same_bits(mine, reference(value)(None, scores))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("rule", "reference", "values"),
    [warper for warper in WARPERS if warper[0] not in (ours.temperature, ours.top_h)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rule_leaves_at_least_as_many_tokens_as_it_has_to_keep_those_of_transformers(rule, reference, values, case):
    keeps = [1, 2, 3, 9]
    strict = [(value, keep) for value in (min(values), max(values)) for keep in keeps]
    scores = random_scores(len(strict), seed=8, **case)
    mine = scores.clone()
    ours.keeping(rule)(mine, [value for value, _ in strict], [keep for _, keep in strict])
    for row, (value, keep) in enumerate(strict):
        one = scores[row : row + 1]
        fits = min(keep, case["vocab_size"])  # transformers fails where it has to keep more than there are
        assert same_bits(mine[row : row + 1], reference(value, min_tokens_to_keep=fits)(None, one))


@pytest.mark.parametrize(
    ("rule", "on", "off"),
    [
        (ours.temperature, 0.5, 1.0),
        (ours.top_k, 3, 0),
        (ours.top_p, 0.5, 1.0),
        (ours.min_p, 0.3, None),
        (ours.top_h, 0.5, None),
        (ours.typical_p, 0.3, 1.0),
        (ours.epsilon_cutoff, 0.1, 0.0),
        (ours.eta_cutoff, 0.1, 0.0),
        (ours.renormalize_logits, True, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_rows_where_a_rule_is_off_keep_every_bit(rule, on, off):
    scores = random_scores(6, 301, seed=2, holes=True)
    scores[1] = -INF
    scores[3, 5], scores[3, 6] = -0.0, 1e-42
    mine = scores.clone()
    rule(mine, [on, off, on, off, off, on])
    for row in (1, 3, 4):
        assert same_bits(mine[row], scores[row])
    assert not same_bits(mine[0], scores[0])
    mine = scores.clone()
    rule(mine, [off] * 6)
    assert same_bits(mine, scores)


@pytest.mark.parametrize(
    "rule",
    [ours.top_k, ours.top_p, ours.min_p, ours.top_h, ours.typical_p, ours.epsilon_cutoff, ours.eta_cutoff],
)
def test_a_row_with_nothing_left_or_not_a_number_harms_no_other_row(rule):
    scores = random_scores(4, 64, seed=3)
    scores[1], scores[2, 7] = -INF, torch.nan
    mine, alone = scores.clone(), scores[[0, 3]].clone()
    rule(mine, [1 if rule is ours.top_k else 0.4] * 4)
    rule(alone, [1 if rule is ours.top_k else 0.4] * 2)
    assert same_bits(mine[[0, 3]], alone)
    assert bool((mine[1] == -INF).all())
    assert bool(mine[2].isnan().any())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_renormalised_scores_have_the_bits_of_transformers_and_a_row_with_nothing_left_stays(case):
    scores = random_scores(6, seed=4, **case)
    scores[1], scores[2, 0], scores[3, -1], scores[4, 0] = -INF, -INF, INF, torch.nan
    for on in ([True] * 6, [True, True, True, True, True, False]):
        mine = scores.clone()
        ours.renormalize_logits(mine, on)
        for row in (0, 2, 3, 4, 5):
            if on[row] and bool((scores[row] > -INF).any() | scores[row].isnan().any()):
                assert same_bits(mine[row], hf.LogitNormalization()(None, scores[row : row + 1])[0])
            else:
                assert same_bits(mine[row], scores[row])
        assert same_bits(mine[1], scores[1])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kept", [1, 2, 50, 600])
def test_top_p_over_few_survivors_sorts_them_alone_and_has_the_bits_of_the_full_sort(kept, ties, monkeypatch):
    scores = random_scores(40, 5003, seed=kept, ties=ties)
    ours.top_k(scores, [kept] * 40)
    ps = torch.linspace(0.02, 0.98, 40).tolist()
    expected = torch.cat([hf.TopPLogitsWarper(p)(None, scores[row : row + 1]) for row, p in enumerate(ps)])
    rows_sorted: list[int] = []
    full_sort = ours._cut_all
    monkeypatch.setattr(ours, "_cut_all", lambda part, mass: rows_sorted.append(len(part)) or full_sort(part, mass))
    ours.top_p(scores, ps)
    assert same_bits(scores, expected)
    if not ties:
        assert rows_sorted == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_repetition_penalty_gives_the_bits_of_transformers(case):
    scores = random_scores(4, seed=5, **case)
    vocab_size, penalties = case["vocab_size"], [1.3, 1.0, 0.8, 2.5]
    generator = torch.Generator().manual_seed(6)
    sequences = [torch.randint(0, vocab_size + 3, (length,), generator=generator).tolist() for length in (1, 7, 40, 90)]
    mine = scores.clone()
    repetition.repetition_penalty(mine, penalties, sequences)
    for row, (penalty, sequence) in enumerate(zip(penalties, sequences, strict=True)):
        one = scores[row : row + 1]
        if penalty != 1.0:
            inside = [token for token in sequence if token < vocab_size]  # older versions fail on ids outside
            one = hf.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([inside], dtype=torch.int64), one)
        assert same_bits(mine[row : row + 1], one)


def test_minimum_lengths_mask_the_end_tokens_as_transformers_does():
    scores = random_scores(5, 50, seed=7)
    minimums, lengths, eos = [5, 5, 0, 9, 9], [4, 5, 1, 8, 2], [(3,), (3,), (3,), (1, 49), ()]
    mine, new = scores.clone(), scores.clone()
    constraints.min_length(mine, minimums, lengths, eos)
    constraints.min_length(new, minimums, lengths, eos)
    for row, (minimum, length, ids) in enumerate(zip(minimums, lengths, eos, strict=True)):
        input_ids, one = torch.zeros(1, length, dtype=torch.int64), scores[row : row + 1]
        assert same_bits(mine[row : row + 1], hf.MinLengthLogitsProcessor(minimum, list(ids))(input_ids, one))
        after_prompt = torch.zeros(1, length + 11, dtype=torch.int64)
        reference = hf.MinNewTokensLengthLogitsProcessor(11, minimum, list(ids))
        assert same_bits(new[row : row + 1], reference(after_prompt, one))


@dataclasses.dataclass
class Options:
    """What one row asks for; the names are those of GenerationConfig."""

    repetition_penalty: float
    min_length: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float | None


@st.composite
def options(draw: st.DrawFn) -> Options:
    def sometimes(off: Any, value: st.SearchStrategy[Any]) -> Any:
        return draw(st.one_of(st.just(off), value))

    return Options(
        repetition_penalty=sometimes(1.0, st.floats(0.5, 2.0)),
        min_length=sometimes(0, st.integers(1, 20)),
        min_new_tokens=sometimes(0, st.integers(1, 8)),
        temperature=sometimes(1.0, st.floats(0.1, 5.0)),
        top_k=sometimes(0, st.integers(1, 70)),
        top_p=sometimes(1.0, st.floats(0.01, 0.99)),
        min_p=sometimes(None, st.floats(0.0, 1.0)),
    )


class NoModel(GenerationMixin):
    """As much of a model as `_get_logits_processor` reads."""

    class Config:
        is_encoder_decoder = False

    config = Config()


def transformers_order(row: Options, prompt_length: int, eos: list[int]) -> hf.LogitsProcessorList:
    config = GenerationConfig(do_sample=True, num_beams=1, **dataclasses.asdict(row))
    config._eos_token_tensor = torch.tensor(eos)
    return NoModel()._get_logits_processor(config, input_ids_seq_length=prompt_length, device="cpu")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(options(), min_size=1, max_size=4),
    vocab_size=st.sampled_from([4, 64, 1000]),
    seed=st.integers(0, 2**31),
    ties=st.booleans(),
    holes=st.booleans(),
)
def test_rules_in_any_combination_give_the_bits_of_transformers_list(rows, vocab_size, seed, ties, holes):
    scores = random_scores(len(rows), vocab_size, seed, ties=ties, holes=holes)
    generator = torch.Generator().manual_seed(seed)
    prompt_length, eos = 5, [1, 3]
    sequences = torch.randint(0, vocab_size, (len(rows), prompt_length + 4), generator=generator)
    mine, length = scores.clone(), sequences.shape[1]
    everyone = [eos] * len(rows)
    repetition.repetition_penalty(mine, [row.repetition_penalty for row in rows], sequences.tolist())
    constraints.min_length(mine, [row.min_length for row in rows], [length] * len(rows), everyone)
    constraints.min_length(mine, [row.min_new_tokens for row in rows], [length - prompt_length] * len(rows), everyone)
    ours.temperature(mine, [row.temperature for row in rows])
    ours.top_k(mine, [row.top_k for row in rows])
    ours.top_p(mine, [row.top_p for row in rows])
    ours.min_p(mine, [row.min_p for row in rows])
    for index, row in enumerate(rows):
        expected = transformers_order(row, prompt_length, eos)(sequences[index : index + 1], scores[index : index + 1])
        assert same_bits(mine[index : index + 1], expected)
