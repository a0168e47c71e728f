"""What a request asks for, resolved once: who said it, what it means, whether it is in range.

Priority is that of transformers' `generate`: the caller's options, then a `generation_config` passed along with
them, then the model's generation_config.json, then transformers' global defaults (top_k=50 among them). An option
given as None is, as there, a rule switched off: `top_k=None` samples from the whole vocabulary.

Two things are ours. Whether to sample: see `GenerationParams.do_sample`. And nothing is ignored: an option
of transformers that we do not have raises UnsupportedOption unless its value changes nothing, a contradiction
raises InvalidParam.

This module does not know tokenizers, models or engines, and holds no logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from handloom.errors import InvalidParam, UnsupportedOption
from handloom.sampling.callers_options import StoppingCriterion, read_criteria, refuse_remembering
from handloom.sampling.contrast_options import DolaLayers, is_contrastive, read_contrast
from handloom.sampling.forced_words import Constraint
from handloom.sampling.grammar import Grammar
from handloom.sampling.length_options import read_lengths
from handloom.sampling.options import (
    CALLER,
    LARGEST_FACTOR,
    MODEL,
    Options,
    below_one,
    callables,
    factor,
    flag,
    function,
    integer,
    random_source,
    real,
    zero_or_factor,
)
from handloom.sampling.rng import fresh_seed
from handloom.sampling.search_options import EarlyStopping, read_search
from handloom.sampling.speculation_options import NGRAM, NUM_TOKENS, THRESHOLD, Schedule, read_speculation
from handloom.sampling.structure_options import Compile, read_structure
from handloom.sampling.token_lists import watermarking
from handloom.sampling.token_options import read_token_ids, read_tokens
from handloom.sampling.watermark import SynthID, Watermark
from handloom.text.stop import check_stop_strings

LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

MAX_LOGPROBS = 100
# The options that only sampling has a use for, and the values that ask for nothing.
_KNOBS: dict[str, float | None] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """One request's parameters, resolved and checked. Names and meanings are those of transformers' GenerationConfig.

    Attributes:
        max_new_tokens: at most so many tokens are generated. max_length: the same with the prompt, where the limit was
            said like that: it holds for a prompt that healing makes shorter; else None.
        min_new_tokens, min_length: no end-of-sequence token before so many new, and so many tokens with the prompt.
        do_sample: draw tokens, or take the most likely. An explicit do_sample decides; else temperature=0 is greedy;
            else an explicit temperature, top_k, top_p, min_p or seed, or one of top_h, typical_p, epsilon_cutoff and
            eta_cutoff that is not off, means sampling; else the model's own generation_config.json; else greedy.
            do_sample=False with one of these, the seed excepted, is an error.
        temperature, top_h, top_k, top_p, min_p, typical_p, epsilon_cutoff, eta_cutoff: see
            `handloom.sampling.processors`; used where do_sample is true. Off: 1.0, None, 0, 1.0, None, 1.0, 0.0, 0.0.
        repetition_penalty: over prompt and output. Off: 1.0.
        encoder_repetition_penalty: over the prompt, the other way round. Off: 1.0.
        no_repeat_ngram_size, encoder_no_repeat_ngram_size: no n-gram a second time, or none of the prompt's. Off: 0.
        sequence_bias: (token ids, bias) pairs; the bias goes to the token that completes the sequence.
        bad_words_ids: sequences that are never completed; a single eos among them is left out, as in transformers.
        prefix_allowed_tokens_fn: function(index of the prompt in the call, ids int64 [n]) -> the ids allowed next.
        forced_bos_token_id: the token after a prompt of one; forced_eos_token_id: one of them is the last.
        remove_invalid_values: NaN and infinite scores become finite, and the request goes on.
        exponential_decay_length_penalty: (start, factor), which after `start` new tokens raises the eos more and more.
        suppress_tokens, begin_suppress_tokens: never, and not as the first new token.
        watermarking_config: see `handloom.sampling.watermark`; renormalize_logits: scores are log-probabilities.
        eos_token_id: tokens that end the sequence; one stays in the output. Ids outside the vocabulary
            are refused from the caller and left out from the model's files, for they cannot come up.
        stop_strings: texts that end the output; include_stop_text: keep them in it, as transformers does.
        seed: in [0, 2^64). Same prompt, params and seed: same tokens. Without one, a fresh seed is drawn and stands
            here. rng="torch" does not use it.
        rng: "counter" keys every draw by (seed, position); "torch" draws from torch's global generator with
            torch.multinomial, which gives the very tokens of `generate` for one prompt.
        logprobs, prompt_logprobs: None for none, 0 for the token itself, n for the n most likely too; natural
            logarithms under the raw distribution of the model.
        logits_processor: callables (input_ids [1, n] int64, scores [1, V] float32) -> scores [1, V] float32.
        stopping_criteria: callables (input_ids [1, n], scores) -> bool.
        output_scores, output_logits: keep each step's processed scores, raw logits, float32 [V].
        output_hidden_states, output_attentions, output_past_key_values: keep what each step made in the model, and K
            and V at the end; see `handloom.decoding.internals`.
        custom_decoder: called with (sequence, params, tokenizer), returns the decoder of the request; see
            docs/custom_decoder.md.
        num_return_sequences: outputs of one prompt, which runs once. Needs sampling or beams; at most num_beams of
            these. With sampling, output i draws with `rng.seed_of_sample(seed, i)`; the first as if it were alone.
        num_beams: 1, or beam search over so many sequences; sampled where do_sample is true. See
            `handloom.decoding.beam`, also for length_penalty and early_stopping, which only beam search has a use for.
        num_beam_groups, diversity_penalty, pad_token_id: see `handloom.decoding.group_beam`. Off: 1, 0.0, None.
        force_words_ids: phrases (token ids), each with the others that would do as well; those of `constraints` first.
            See `handloom.decoding.constrained_beam`. At most 1024 ids altogether, none of them an end-of-sequence
            token. What the prompt has counts, as in transformers.
        guidance_scale, negative_prompt_ids: see `handloom.decoding.guided`. Off: 1.0. No ids: the prompt's last token.
            `generate` also takes a text, negative_prompt.
        token_healing: the end of the prompt is cut into tokens anew; see `handloom.decoding.healing`.
        json_schema, regex, grammar, choices: the whole output is one of what the grammar says; see
            `handloom.sampling.grammar`. At most one of them, compiled.
        prompt_lookup_num_tokens, speculation="suffix", assistant_model: who drafts, for speculative decoding; see
            `handloom.decoding.speculative`. max_matching_ngram_size: the longest n-gram that is looked up;
            num_assistant_tokens: at most so many in a draft by a model or "suffix"; num_assistant_tokens_schedule:
            whether that follows what was right; assistant_confidence_threshold: a less likely token ends a draft.
        penalty_alpha: contrastive search over top_k candidates, see `handloom.decoding.contrastive`. Off: 0.0.
        dola_layers: which layers to contrast, "low", "high" or a list; see `handloom.decoding.dola`. Off: ().
        skip_special_tokens: leave special tokens out of the text.
        max_time: seconds after which the sequence ends with the token at hand.
    """

    max_new_tokens: int
    max_length: int | None = None
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], Any] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    watermarking_config: Watermark | SynthID | None = None
    renormalize_logits: bool = False
    eos_token_id: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    include_stop_text: bool = True
    seed: int = 0
    rng: Literal["counter", "torch"] = "counter"
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logits_processor: tuple[LogitsProcessor, ...] = ()
    stopping_criteria: tuple[StoppingCriterion, ...] = ()
    output_scores: bool = False
    output_logits: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    output_past_key_values: bool = False
    custom_decoder: Callable[..., Any] | None = None
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    force_words_ids: tuple[Constraint, ...] = ()
    pad_token_id: int | None = None
    guidance_scale: float = 1.0
    negative_prompt_ids: tuple[int, ...] = ()
    token_healing: bool = False
    json_schema: Grammar | None = None
    regex: Grammar | None = None
    grammar: Grammar | None = None
    choices: Grammar | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = NGRAM
    speculation: Literal["suffix"] | None = None
    assistant_model: Any = None
    num_assistant_tokens: int = NUM_TOKENS
    num_assistant_tokens_schedule: Schedule = "constant"
    assistant_confidence_threshold: float = THRESHOLD
    penalty_alpha: float = 0.0
    dola_layers: DolaLayers = ()
    skip_special_tokens: bool = True
    max_time: float | None = None

    @property
    def structure(self) -> Grammar | None:
        """The grammar of the output, if there is one."""
        return self.json_schema or self.regex or self.grammar or self.choices

    @property
    def min_tokens_to_keep(self) -> int:
        """Tokens that rules of sampling leave at least: under beams one that is no end-of-sequence token."""
        return 1 if self.num_beams == 1 else max(2, len(self.eos_token_id) + 1)


_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(GenerationParams)}
_FIELDS = frozenset(_DEFAULTS) | {"constraints"}
# Options that each stand for themselves, and how they are checked. One that is left out, or None, has its default.
_CHECKS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("top_p", "top_h", "typical_p"), real(0, 1, above=True)),
    "min_p": real(0, 1),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), below_one),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), factor),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), integer(0, 2**31 - 1)),
    **dict.fromkeys(("prefix_allowed_tokens_fn", "custom_decoder"), function),
    "logits_processor": callables,
    **dict.fromkeys(("remove_invalid_values", "renormalize_logits", "include_stop_text", "skip_special_tokens"), flag),
    **dict.fromkeys(("output_scores", "output_logits", "output_hidden_states", "output_attentions"), flag),
    "output_past_key_values": flag,
    "max_time": real(0, LARGEST_FACTOR, above=True),
}


def resolve_params(
    options: Mapping[str, Any],
    *,
    generation_config: Mapping[str, Any],
    prompt_length: int,
    max_context: int,
    vocab_size: int,
    eos_token_id: int | Sequence[int] | None = None,
    compile: Compile | None = None,
) -> GenerationParams:
    """One request's parameters, for a prompt of `prompt_length` tokens.

    `options` are the caller's (with `stop` for stop_strings, `max_length`, `generation_config`); the argument
    `generation_config` is the model's file; `eos_token_id` counts where neither names one; `compile` is
    `Grammars.compile`, None without a tokenizer. With neither
    max_new_tokens nor max_length the limit is 20 new tokens. A limit from the model's file is cut at the
    context; one from the caller that does not fit raises ContextOverflow. Where both are set max_new_tokens counts.

    Raises: InvalidParam, UnsupportedOption, ContextOverflow.
    """
    asked = Options(options, generation_config, _FIELDS)
    lengths = read_lengths(asked, prompt_length, max_context)
    do_sample, temperature = _sampling(asked)
    rng, seed = _random_source(asked)
    logprobs = integer(0, min(MAX_LOGPROBS, vocab_size))
    eos = read_token_ids(asked, "eos_token_id", vocab_size, eos_token_id)
    watermark = asked.read("watermarking_config", watermarking, default=None, off=None)
    search = read_search(asked, do_sample=do_sample, eos=eos, vocab_size=vocab_size)
    if max(search.num_beams, search.num_return_sequences) > 1:
        refuse_remembering(asked.given("logits_processor"))
    if search.num_beams > 1 and isinstance(watermark, SynthID):
        raise UnsupportedOption(
            "watermarking_config: SynthID goes by the tokens of one output, and beside num_beams transformers mixes "
            "those of all beams; use a Watermark, or sample without beams"
        )
    return GenerationParams(
        **{own.name: getattr(lengths, own.name) for own in fields(lengths)},
        do_sample=do_sample,
        temperature=temperature,
        **{
            name: asked.read(name, check, default=_DEFAULTS[name], off=_DEFAULTS[name])
            for name, check in _CHECKS.items()
        },
        top_k=asked.read("top_k", integer(0, 2**31 - 1), default=50, off=0),
        **read_tokens(asked, vocab_size, eos),
        watermarking_config=watermark,
        eos_token_id=eos,
        stop_strings=_stop_strings(asked),
        seed=seed,
        rng=rng,
        logprobs=asked.read("logprobs", logprobs, default=None, off=None),
        prompt_logprobs=asked.read("prompt_logprobs", logprobs, default=None, off=None),
        stopping_criteria=read_criteria(asked, eos),
        **{own.name: getattr(search, own.name) for own in fields(search)},
        **read_structure(asked, compile),
        **read_speculation(asked, torch_draws=do_sample and rng == "torch"),
        **read_contrast(asked, do_sample, search, vocab_size=vocab_size, room=max_context - lengths.max_new_tokens),
    )


def _sampling(asked: Options) -> tuple[bool, float]:
    """(do_sample, temperature)."""
    temperature = asked.read("temperature", zero_or_factor, default=1.0, off=1.0)
    do_sample = asked.read("do_sample", flag, default=False, off=False)
    explicit, knobs = asked.by_caller("do_sample"), _knobs(asked)
    if explicit and not do_sample and knobs:
        raise InvalidParam(f"do_sample=False takes the most likely token and has no use for {', '.join(knobs)}")
    wanted = do_sample if explicit else bool(knobs) or asked.given("seed") is not None
    if temperature > 0:
        return (wanted or do_sample), temperature
    if wanted and (explicit or not asked.by_caller("temperature")):
        where = CALLER if asked.by_caller("temperature") else MODEL
        raise InvalidParam(f"temperature=0 ({where}) means greedy, but sampling is asked for; give a temperature > 0")
    return False, temperature


def _knobs(asked: Options) -> list[str]:
    """The sampling options the caller set; not temperature=0, and not the defaults that a passed config spells out."""
    knobs = []
    for name, default in _KNOBS.items():
        value, source = asked.find(name) or (None, MODEL)
        if value is None or source == MODEL or (name == "temperature" and value == 0):
            continue
        said_aloud = source == CALLER and name in ("temperature", "top_k", "top_p", "min_p")
        if said_aloud or not isinstance(value, int | float) or value != default:
            knobs.append(name)
    return [name for name in knobs if name != "top_k"] if is_contrastive(asked) else knobs


def _random_source(asked: Options) -> tuple[Literal["counter", "torch"], int]:
    """(rng, seed)."""
    rng = asked.read("rng", random_source, default="counter", off="counter")
    seed = asked.read("seed", integer(0, 2**64 - 1), default=None, off=None)
    if rng == "torch":
        if seed is not None:
            raise InvalidParam(
                f"seed={seed} with rng='torch': that generator is global; call torch.manual_seed instead"
            )
        return "torch", 0
    return "counter", fresh_seed() if seed is None else seed


def _stop_strings(asked: Options) -> tuple[str, ...]:
    value = asked.given("stop_strings")
    return () if value is None else tuple(check_stop_strings([value] if isinstance(value, str) else value))
