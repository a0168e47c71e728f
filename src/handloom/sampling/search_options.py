"""How many outputs one prompt has, and how many beams look for them: checked together.

This module does not know how a search goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from handloom.errors import InvalidParam, UnsupportedOption
from handloom.sampling.forced_words import Constraint, constraints, forced_words
from handloom.sampling.options import LARGEST_FACTOR, Expected, Options, integer, real
from handloom.sampling.structure_options import STRUCTURES

MAX_SEQUENCES = 1024  # outputs or beams of one prompt
LARGEST_PENALTY = 50.0  # a length to this power stays a float
EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True, slots=True)
class Search:
    """See `GenerationParams`."""

    num_return_sequences: int
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    num_beam_groups: int
    diversity_penalty: float
    force_words_ids: tuple[Constraint, ...]
    pad_token_id: int | None


def read_search(asked: Options, *, do_sample: bool, eos: tuple[int, ...], vocab_size: int) -> Search:
    """These options. Raises InvalidParam, UnsupportedOption where they, or others beside them, contradict."""
    count = integer(1, MAX_SEQUENCES)
    beams = asked.read("num_beams", count, default=1, off=1)
    groups, diversity = 1, 0.0
    if beams > 1 or asked.by_caller("num_beam_groups") or asked.by_caller("diversity_penalty"):
        groups = asked.read("num_beam_groups", count, default=1, off=1)
        diversity = asked.read("diversity_penalty", real(0, LARGEST_FACTOR), default=0.0, off=0.0)
    search = Search(
        asked.read("num_return_sequences", count, default=1, off=1),
        beams,
        asked.read("length_penalty", real(-LARGEST_PENALTY, LARGEST_PENALTY), default=1.0, off=1.0),
        asked.read("early_stopping", _early_stopping, default=False, off=False),
        groups,
        diversity,
        (
            *asked.read("constraints", constraints(vocab_size, eos), default=(), off=()),
            *asked.read("force_words_ids", forced_words(vocab_size, eos), default=(), off=()),
        ),
        _padding(asked, vocab_size, eos) if groups > 1 else None,
    )
    outputs = search.num_return_sequences
    if beams == 1:
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if asked.by_caller(name) and getattr(search, name) != neutral:
                raise InvalidParam(f"{name}={getattr(search, name)!r} is about beam search; give num_beams too")
        if outputs > 1 and not do_sample:
            raise InvalidParam(
                f"num_return_sequences={outputs}: the most likely tokens are the same each time; sample, or give "
                "num_beams"
            )
    else:
        if outputs > beams:
            raise InvalidParam(f"num_return_sequences={outputs} is more than num_beams={beams}; raise num_beams")
        if max(2, len(eos) + 1) > vocab_size:
            raise InvalidParam(f"num_beams={beams}: a vocabulary of {vocab_size} has too few tokens that go on")
    _check_groups(search)
    if search.force_words_ids or groups > 1:
        _check_beside(asked, "num_beam_groups" if groups > 1 else "force_words_ids", do_sample=do_sample)
    if max(outputs, beams) > 1 and asked.given("prompt_logprobs") is not None:
        raise UnsupportedOption(
            "prompt_logprobs beside num_return_sequences or num_beams: ask for them in a request of their own, or use "
            "`lm.score`"
        )
    penalty = asked.given("encoder_repetition_penalty")
    if max(outputs, beams) > 1 and penalty not in (None, 1.0):
        raise UnsupportedOption(
            f"encoder_repetition_penalty={penalty!r} beside num_return_sequences or num_beams: transformers applies it "
            "to one of them only; use repetition_penalty, or several requests"
        )
    return search


def _check_groups(search: Search) -> None:
    groups, beams = search.num_beam_groups, search.num_beams
    if search.force_words_ids and beams == 1:
        raise InvalidParam("force_words_ids and constraints are about beam search; give num_beams too")
    if search.force_words_ids and groups > 1:
        raise InvalidParam(f"num_beam_groups={groups} beside force_words_ids or constraints: give one of them")
    if beams % groups:
        raise InvalidParam(f"num_beam_groups={groups} must divide num_beams={beams}")
    if (groups > 1) != (search.diversity_penalty > 0):
        raise InvalidParam(
            f"num_beam_groups={groups} and diversity_penalty={search.diversity_penalty:g}: groups above 1 need a "
            "penalty above 0, or they would all find the same, and the penalty is about groups"
        )


def _check_beside(asked: Options, name: str, *, do_sample: bool) -> None:
    """What a search in groups or for words does not go together with."""
    if do_sample:
        raise InvalidParam(
            f"{name} looks for the most likely and draws nothing; leave out do_sample, seed and the like"
        )
    if asked.given("stop_strings"):
        raise UnsupportedOption(
            f"stop_strings beside {name}: in transformers they end such a search only where every beam has one at its "
            "end at once, and stay in the middle of outputs; use eos_token_id, or cut the text"
        )
    for structure in STRUCTURES if name == "force_words_ids" else ():
        if asked.given(structure) is not None:
            raise UnsupportedOption(
                f"{structure} beside force_words_ids, which proposes its phrases wherever the output is: put them into "
                f"the {structure}"
            )


def _padding(asked: Options, vocab_size: int, eos: tuple[int, ...]) -> int | None:
    """What transformers pads with: pad_token_id, or else the first end-of-sequence token."""
    pad = asked.read("pad_token_id", integer(-(2**63)), default=None, off=None)
    if pad is not None and not 0 <= pad < vocab_size:
        if asked.by_caller("pad_token_id"):
            raise InvalidParam(f"pad_token_id={pad} must be in [0, {vocab_size}), the vocabulary")
        return None  # a file's that cannot come up
    return next(iter(eos), None) if pad is None else pad


def _early_stopping(value: Any) -> EarlyStopping:
    if isinstance(value, bool):
        return value
    if value == "never":
        return "never"
    raise Expected("True, False or 'never'")
