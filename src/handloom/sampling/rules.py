"""Every rule that reshapes the scores, in the order of transformers' `generate`, and who has it on.

A caller's processor of the very class that transformers builds for one of the rules before its own stands in for that
rule; the caller's other processors come after those, and before what only sampling does.

This module does not know what a rule does, how a token is drawn, or where a sequence lives.
"""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handloom.errors import GrammarError, HandloomError, NonFiniteLogits, RequestFailed
from handloom.ops.torch_threads import callers_threads
from handloom.sampling import constraints, contrast, grammar, processors, repetition, watermark
from handloom.sampling.memory import Memory
from handloom.sampling.params import GenerationParams, LogitsProcessor


class Row:
    """What the sampler must know of one sequence.

    token_ids: prompt and generated so far. rules: the same object at every step of a request, or they start anew.
    unconditional: what guidance weighs the logits against, logits [V] of any float dtype; early: what early layers
    make of the same token, logits [L, V].
    taken: what other groups of beams have chosen at this step.
    """

    __slots__ = ("early", "params", "prompt_length", "rules", "taken", "token_ids", "unconditional")

    def __init__(
        self, params: GenerationParams, token_ids: Sequence[int], prompt_length: int, rules: RequestRules | None = None
    ) -> None:
        self.params, self.token_ids, self.prompt_length = params, token_ids, prompt_length
        self.rules = RequestRules(params, prompt_length) if rules is None else rules
        self.unconditional: Tensor | None = None
        self.early: Tensor | None = None
        self.taken: Sequence[int] = ()

    @property
    def new_length(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def memory(self) -> Memory:
        return self.rules.memory


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule: `apply(scores [R, V], *columns)` with, for each row, the values of `read`, or `off` where it is off.

    It may return what went wrong, by row.
    """

    option: str
    neutral: Any  # the option's value that switches it off
    stands_in: str | None  # the class of transformers that takes its place; None where none does
    apply: Callable[..., Mapping[int, HandloomError] | None]
    off: tuple[Any, ...]
    read: Callable[[Row], tuple[Any, ...]]
    sampled: bool = False  # only where tokens are drawn
    about_eos: bool = False  # only where there is an end-of-sequence token

    def is_on(self, params: GenerationParams) -> bool:
        if (self.sampled and not params.do_sample) or (self.about_eos and not params.eos_token_id):
            return False
        return bool(getattr(params, self.option) != self.neutral)


def _sampled(option: str, neutral: Any, apply: Callable[..., None]) -> Rule:
    return Rule(option, neutral, None, apply, (neutral,), lambda row: (getattr(row.params, option),), sampled=True)


def _keeping(option: str, neutral: Any, apply: Callable[..., None]) -> Rule:
    """One that leaves at least params.min_tokens_to_keep tokens."""
    return Rule(
        option, neutral, None, processors.keeping(apply), (neutral, 1),
        lambda row: (getattr(row.params, option), row.params.min_tokens_to_keep), sampled=True,
    )  # fmt: skip


def _runs_as_a_callers(scores: Tensor) -> None:
    """Nothing: `RequestRules` puts a processor in the place of this rule."""


def _at_begin(row: Row) -> bool:
    """Whether the row's next token is the first that is free; after a one-token prompt a forced one goes before it."""
    forced = row.prompt_length <= 1 and row.params.forced_bos_token_id is not None
    return row.new_length == int(forced)


BEFORE_THE_CALLERS = (
    Rule("dola_layers", (), None, contrast.dola, (None,), lambda row: (row.early,)),
    Rule(
        "guidance_scale", 1.0, "UnbatchedClassifierFreeGuidanceLogitsProcessor", contrast.guide, (1.0, None),
        lambda row: (row.params.guidance_scale, row.unconditional),
    ),
    Rule(
        "sequence_bias", (), "SequenceBiasLogitsProcessor", constraints.sequence_bias, (None, ()),
        lambda row: (row.memory.biases, row.token_ids),
    ),
    Rule(
        "diversity_penalty", 0.0, None, constraints.diversity_penalty, (0.0, ()),
        lambda row: (row.params.diversity_penalty, row.taken),
    ),
    Rule(
        "encoder_repetition_penalty", 1.0, "EncoderRepetitionPenaltyLogitsProcessor",
        repetition.encoder_repetition_penalty, (1.0, ()),
        lambda row: (row.params.encoder_repetition_penalty, row.memory.prompt_seen),
    ),
    Rule(
        "repetition_penalty", 1.0, "RepetitionPenaltyLogitsProcessor", repetition.repetition_penalty, (1.0, ()),
        lambda row: (row.params.repetition_penalty, row.memory.seen),
    ),
    Rule(
        "no_repeat_ngram_size", 0, "NoRepeatNGramLogitsProcessor", repetition.forbid, ((),),
        lambda row: (row.memory.repeating(),),
    ),
    Rule(
        "encoder_no_repeat_ngram_size", 0, "EncoderNoRepeatNGramLogitsProcessor", repetition.forbid, ((),),
        lambda row: (row.memory.repeating_prompt(),),
    ),
    Rule(
        "bad_words_ids", (), "NoBadWordsLogitsProcessor", constraints.sequence_bias, (None, ()),
        lambda row: (row.memory.bad_words, row.token_ids),
    ),
    Rule(
        "min_length", 0, "MinLengthLogitsProcessor", constraints.min_length, (0, 0, ()),
        lambda row: (row.params.min_length, len(row.token_ids), row.params.eos_token_id), about_eos=True,
    ),
    Rule(
        "min_new_tokens", 0, "MinNewTokensLengthLogitsProcessor", constraints.min_length, (0, 0, ()),
        lambda row: (row.params.min_new_tokens, row.new_length, row.params.eos_token_id), about_eos=True,
    ),
    Rule(
        "prefix_allowed_tokens_fn", None, "PrefixConstrainedLogitsProcessor", _runs_as_a_callers, (), lambda row: (),
    ),
    Rule(
        "forced_bos_token_id", None, "ForcedBOSTokenLogitsProcessor", constraints.forced_bos_token_id, (None, 0),
        lambda row: (row.params.forced_bos_token_id, len(row.token_ids)),
    ),
    Rule(
        "forced_eos_token_id", (), "ForcedEOSTokenLogitsProcessor", constraints.forced_eos_token_id, ((), 0),
        lambda row: (row.params.forced_eos_token_id, row.params.max_new_tokens - row.new_length),
    ),
    Rule(
        "remove_invalid_values", False, "InfNanRemoveLogitsProcessor", constraints.remove_invalid_values, (False,),
        lambda row: (True,),
    ),
    Rule(
        "exponential_decay_length_penalty", None, "ExponentialDecayLengthPenalty",
        constraints.exponential_decay_length_penalty, (None, 0, ()),
        lambda row: (row.params.exponential_decay_length_penalty, row.new_length, row.params.eos_token_id),
    ),
    Rule(
        "suppress_tokens", (), "SuppressTokensLogitsProcessor", repetition.forbid, ((),),
        lambda row: (row.memory.suppressed,),
    ),
    Rule(
        "begin_suppress_tokens", (), "SuppressTokensAtBeginLogitsProcessor", constraints.begin_suppress_tokens,
        ((), False), lambda row: (row.memory.begin_suppressed, _at_begin(row)),
    ),
)  # fmt: skip
AFTER_THE_CALLERS = (
    Rule(
        "structure", None, None, grammar.constrain, (None, ()),
        lambda row: (row.memory.matcher, row.params.eos_token_id),
    ),
    _sampled("temperature", 1.0, processors.temperature),
    _sampled("top_h", None, processors.top_h),
    _keeping("top_k", 0, processors.top_k),
    _keeping("top_p", 1.0, processors.top_p),
    _keeping("min_p", None, processors.min_p),
    _keeping("typical_p", 1.0, processors.typical_p),
    _keeping("epsilon_cutoff", 0.0, processors.epsilon_cutoff),
    _keeping("eta_cutoff", 0.0, processors.eta_cutoff),
    Rule(
        "watermarking_config", None, None, watermark.apply_watermarks, (None, None, ()),
        lambda row: (row.params.watermarking_config, row.memory.synthid, row.token_ids),
    ),
    Rule("renormalize_logits", False, None, processors.renormalize_logits, (False,), lambda row: (True,)),
)  # fmt: skip


FORBIDDING = frozenset(
    "sequence_bias no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids min_length min_new_tokens "
    "prefix_allowed_tokens_fn forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens".split()
)
"""Rules that leave out tokens a grammar may need."""


class RequestRules:
    """The rules of one request: which are on, whose processor stands in for one, and what they remember.

    active: option -> the caller's processor that stands in for it, or None for ours; own: the caller's other
    processors, each once, in order; shapes: whether the token may be another than that of the highest logit; reports:
    whether more than the token is wanted.
    """

    def __init__(self, params: GenerationParams, prompt_length: int) -> None:
        self.memory = Memory(params, prompt_length)
        on = [rule for rule in (*BEFORE_THE_CALLERS, *AFTER_THE_CALLERS) if rule.is_on(params)]
        self.active: dict[str, LogitsProcessor | None] = {rule.option: None for rule in on}
        option_of = {rule.stands_in: rule.option for rule in on if rule.stands_in is not None}
        self.own: list[LogitsProcessor] = []
        for processor in params.logits_processor:
            kind = type(processor)
            option = option_of.get(kind.__name__) if kind.__module__.startswith("transformers.generation.") else None
            if option is not None and self.active[option] is None:
                self.active[option] = processor
            elif processor not in self.own and processor not in self.active.values():
                self.own.append(processor)
        allowed = params.prefix_allowed_tokens_fn
        if allowed is not None and self.runs("prefix_allowed_tokens_fn"):
            self.active["prefix_allowed_tokens_fn"] = constraints.OnlyAllowed(allowed)
        self.shapes = params.do_sample or bool(self.active) or bool(self.own)
        self.reports = params.logprobs is not None or params.output_scores or params.output_logits

    def fork(self) -> RequestRules:
        """The rules of a sequence that goes on from one of these: the same, and a memory of its own."""
        other = copy.copy(self)
        other.memory = self.memory.fork()
        return other

    @property
    def fits_grammar(self) -> bool:
        """Whether the grammar allows what its matcher was shown last."""
        return self.memory.matcher is None or self.memory.matcher.fits

    def runs(self, option: str) -> bool:
        """Whether a rule is on, and ours."""
        return option in self.active and self.active[option] is None


def apply_rules(scores: Tensor, rows: Sequence[Row]) -> list[HandloomError | None]:
    """Every rule of every row, into `scores` [R, V] float32; returns what went wrong in a row."""
    errors: list[HandloomError | None] = [None] * len(rows)
    for row in rows:
        row.memory.follow(row.token_ids)
    active = set().union(*(row.rules.active for row in rows))
    for rule in BEFORE_THE_CALLERS:
        if rule.option not in active:
            continue
        _apply(rule, scores, rows, errors)
        for at, row in enumerate(rows):
            stand_in = row.rules.active.get(rule.option)
            if stand_in is not None:
                _call([stand_in], scores, rows, at, errors)
    for at, row in enumerate(rows):
        _call(row.rules.own, scores, rows, at, errors)
    for rule in AFTER_THE_CALLERS:
        if rule.option in active:
            _apply(rule, scores, rows, errors)
    return errors


def nothing_left(row: Row) -> HandloomError:
    """What to say of a row whose scores the rules have all made -inf."""
    at, matcher = len(row.token_ids), row.memory.matcher
    since = f"position {at}, after {row.new_length} new ones"
    if matcher is None:
        return NonFiniteLogits(
            f"the processed scores for the token at position {at} are all -inf: nothing is left to choose; check the "
            "logits processors"
        )
    option = matcher.grammar.option
    if not matcher.fits:
        return GrammarError(f"{option} does not allow the {row.new_length} tokens that the output has so far")
    active = row.rules.active
    others = [option for option in active if option in FORBIDDING]
    if "min_new_tokens" in active and "min_length" in active:  # which it implies
        others.remove("min_length")
    others += ["logits_processor"] * bool(row.params.logits_processor)
    if others:
        return GrammarError(
            f"{option} and {', '.join(others)} leave no token for {since}: each forbids what the other allows; leave "
            "one of them out"
        )
    return GrammarError(
        f"{option} leaves no token for {since}: nothing fits it, or no token of this vocabulary does, or the model "
        "gives those that do a score of -inf"
    )


def _apply(rule: Rule, scores: Tensor, rows: Sequence[Row], errors: list[HandloomError | None]) -> None:
    """Our own rule, for the rows that have it on and nothing in its place."""
    on = [at for at, row in enumerate(rows) if errors[at] is None and row.rules.runs(rule.option)]
    if on:
        values = [rule.off] * len(rows)
        for at in on:
            values[at] = rule.read(rows[at])
        for at, error in (rule.apply(scores, *zip(*values, strict=True)) or {}).items():
            errors[at] = error


def _call(
    chosen: Iterable[LogitsProcessor], scores: Tensor, rows: Sequence[Row], at: int, errors: list[HandloomError | None]
) -> None:
    """Run processors of the caller's on row `at` of `scores`, in place, until one fails; that goes into `errors`."""
    for processor in chosen:
        if errors[at] is None:
            errors[at] = _run(processor, rows[at], scores[at : at + 1])


def _run(processor: LogitsProcessor, row: Row, scores: Tensor) -> RequestFailed | None:
    """Run a processor of the caller's on `scores` [1, V], in place; returns what it did wrong."""
    is_ours = isinstance(processor, constraints.OnlyAllowed)  # where it fails, it has changed nothing
    own = scores if is_ours else scores.clone()
    try:
        with callers_threads(), torch.no_grad():
            result: object = processor(row.memory.input_ids().to(scores.device), own)
    except Exception as cause:
        error = RequestFailed(f"{_shown(processor)} raised {cause!r}")
        error.__cause__ = cause
        return error
    if not isinstance(result, Tensor):
        return RequestFailed(f"{_shown(processor)} must return a tensor of scores, not {type(result).__name__}")
    if (result.shape, result.dtype, result.device) != (scores.shape, scores.dtype, scores.device):
        found = f"{list(result.shape)} {result.dtype} on {result.device}"
        wanted = f"{list(scores.shape)} {scores.dtype} on {scores.device}"
        return RequestFailed(f"{_shown(processor)} must return scores {wanted}, and returned {found}")
    if result is not scores:
        scores.copy_(result.detach())
    return None


def _shown(processor: LogitsProcessor) -> str:
    return f"the logits processor {reprlib.repr(processor)}"
