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

from handloom.errors import ContextOverflow, InvalidParam
from handloom.sampling.options import (
    CALLER,
    LARGEST_FACTOR,
    MODEL,
    Options,
    callables,
    factor,
    flag,
    integer,
    is_integer,
    random_source,
    real,
    show,
    zero_or_factor,
)
from handloom.sampling.rng import fresh_seed
from handloom.text.stop import check_stop_strings

LogitsProcessor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
StoppingCriterion = Callable[..., Any]

DEFAULT_NEW_TOKENS = 20
MAX_LOGPROBS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """One request's parameters, resolved and checked. Names and meanings are those of transformers' GenerationConfig.

    Attributes:
        max_new_tokens: at most so many tokens are generated.
        min_new_tokens, min_length: no end-of-sequence token before so many new, and so many tokens with the prompt.
        do_sample: draw tokens, or take the most likely. An explicit do_sample decides; else temperature=0 is greedy;
            else an explicit temperature, top_k, top_p, min_p or seed means sampling; else the model's own
            generation_config.json; else greedy. do_sample=False with one of the first four is an error.
        temperature, top_k, top_p, min_p: see `handloom.sampling.processors`; used where do_sample is true.
            Off: 1.0, 0, 1.0, None.
        repetition_penalty: over prompt and output. Off: 1.0.
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
        skip_special_tokens: leave special tokens out of the text.
        max_time: seconds after which the sequence ends with the token at hand.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    min_length: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
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
    skip_special_tokens: bool = True
    max_time: float | None = None


_FIELDS = frozenset(field.name for field in fields(GenerationParams)) | {"max_length"}


def resolve_params(
    options: Mapping[str, Any],
    *,
    generation_config: Mapping[str, Any],
    prompt_length: int,
    max_context: int,
    vocab_size: int,
    eos_token_id: int | Sequence[int] | None = None,
) -> GenerationParams:
    """One request's parameters, for a prompt of `prompt_length` tokens.

    `options` are the caller's (with `stop` for stop_strings, `max_length`, `generation_config`); the argument
    `generation_config` is the model's file; `eos_token_id` counts where neither names one. With neither
    max_new_tokens nor max_length the limit is 20 new tokens. A limit from the model's file is cut at the
    context; one from the caller that does not fit raises ContextOverflow. Where both are set max_new_tokens counts.

    Raises: InvalidParam, UnsupportedOption, ContextOverflow.
    """
    asked = Options(options, generation_config, _FIELDS)
    new_tokens, min_new_tokens, min_length = _lengths(asked, prompt_length, max_context)
    do_sample, temperature = _sampling(asked)
    rng, seed = _random_source(asked)
    logprobs = integer(0, min(MAX_LOGPROBS, vocab_size))
    return GenerationParams(
        max_new_tokens=new_tokens,
        min_new_tokens=min_new_tokens,
        min_length=min_length,
        do_sample=do_sample,
        temperature=temperature,
        top_k=asked.read("top_k", integer(0, 2**31 - 1), default=50, off=0),
        top_p=asked.read("top_p", real(0, 1, above=True), default=1.0, off=1.0),
        min_p=asked.read("min_p", real(0, 1), default=None, off=None),
        repetition_penalty=asked.read("repetition_penalty", factor, default=1.0, off=1.0),
        eos_token_id=_eos(asked, eos_token_id, vocab_size),
        stop_strings=_stop_strings(asked),
        include_stop_text=asked.read("include_stop_text", flag, default=True, off=True),
        seed=seed,
        rng=rng,
        logprobs=asked.read("logprobs", logprobs, default=None, off=None),
        prompt_logprobs=asked.read("prompt_logprobs", logprobs, default=None, off=None),
        logits_processor=asked.read("logits_processor", callables, default=(), off=()),
        stopping_criteria=asked.read("stopping_criteria", callables, default=(), off=()),
        output_scores=asked.read("output_scores", flag, default=False, off=False),
        output_logits=asked.read("output_logits", flag, default=False, off=False),
        skip_special_tokens=asked.read("skip_special_tokens", flag, default=True, off=True),
        max_time=asked.read("max_time", real(0, LARGEST_FACTOR, above=True), default=None, off=None),
    )


def _lengths(asked: Options, prompt_length: int, max_context: int) -> tuple[int, int, int]:
    """(max_new_tokens, min_new_tokens, min_length)."""
    room = max_context - prompt_length
    if room < 1:
        raise ContextOverflow(
            f"the prompt has {prompt_length} tokens and the context holds {max_context}: no token can be generated; "
            "shorten the prompt, or load the model with a larger context"
        )
    name, new_tokens = "max_new_tokens", asked.read("max_new_tokens", integer(1), default=None, off=None)
    total = asked.read("max_length", integer(1), default=None, off=None)
    if new_tokens is None and total is not None:
        name, new_tokens = "max_length", total - prompt_length
        if new_tokens < 1:
            raise InvalidParam(
                f"max_length={show(total)} counts the prompt, which has {prompt_length} tokens: no token is left to "
                "generate; raise it, or give max_new_tokens"
            )
    if new_tokens is None:
        new_tokens = min(DEFAULT_NEW_TOKENS, room)
    elif new_tokens > room and asked.by_caller(name):
        raise ContextOverflow(
            f"{prompt_length} prompt tokens and {show(new_tokens)} new ones exceed the context of {max_context}; "
            f"max_new_tokens can be at most {room} for this prompt"
        )
    new_tokens = min(new_tokens, room)
    min_new = asked.read("min_new_tokens", integer(0), default=None, off=None)
    min_total = asked.read("min_length", integer(0), default=0, off=0)
    name = "min_length" if min_new is None else "min_new_tokens"
    if min_new is not None:
        min_total = prompt_length + min_new
    if min_total > prompt_length + new_tokens and asked.by_caller(name):
        raise InvalidParam(
            f"{name} asks for {show(min_total)} tokens with the prompt, and at most {prompt_length + new_tokens} "
            f"can come; lower it, or raise max_new_tokens={new_tokens}"
        )
    return new_tokens, min_new or 0, min_total


def _sampling(asked: Options) -> tuple[bool, float]:
    """(do_sample, temperature)."""
    temperature = asked.read("temperature", zero_or_factor, default=1.0, off=1.0)
    do_sample = asked.read("do_sample", flag, default=False, off=False)
    explicit, knobs = asked.by_caller("do_sample"), _knobs(asked)
    if explicit and not do_sample and knobs:
        raise InvalidParam(f"do_sample=False takes the most likely token and has no use for {', '.join(knobs)}")
    seed, _ = asked.find("seed") or (None, CALLER)
    wanted = do_sample if explicit else bool(knobs) or seed is not None
    if temperature > 0:
        return (wanted or do_sample), temperature
    if wanted and (explicit or not asked.by_caller("temperature")):
        where = CALLER if asked.by_caller("temperature") else MODEL
        raise InvalidParam(f"temperature=0 ({where}) means greedy, but sampling is asked for; give a temperature > 0")
    return False, temperature


def _knobs(asked: Options) -> list[str]:
    """The sampling options the caller set; not temperature=0, and not the defaults that a passed config spells out."""
    knobs = []
    for name, default in (("temperature", 1.0), ("top_k", 50), ("top_p", 1.0), ("min_p", None)):
        value, source = asked.find(name) or (None, MODEL)
        if value is None or source == MODEL or (name == "temperature" and value == 0):
            continue
        if source == CALLER or not isinstance(value, int | float) or value != default:
            knobs.append(name)
    return knobs


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


def _eos(asked: Options, last_resort: int | Sequence[int] | None, vocab_size: int) -> tuple[int, ...]:
    value, source = asked.find("eos_token_id") or (last_resort, MODEL)
    ids = [value] if is_integer(value) else [] if value is None else value
    if not isinstance(ids, list | tuple) or any(not is_integer(id_) for id_ in ids):
        raise InvalidParam(f"eos_token_id={show(value)} ({source}) must be a token id or a list of them")
    if source != MODEL and any(not 0 <= id_ < vocab_size for id_ in ids):
        raise InvalidParam(f"eos_token_id={show(value)} ({source}): ids must be in [0, {vocab_size}), the vocabulary")
    return tuple(dict.fromkeys(int(id_) for id_ in ids if 0 <= id_ < vocab_size))


def _stop_strings(asked: Options) -> tuple[str, ...]:
    value, _ = asked.find("stop_strings") or (None, "")
    return () if value is None else tuple(check_stop_strings([value] if isinstance(value, str) else value))
