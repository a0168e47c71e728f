"""Every mode of generating that transformers has too: what it is asked, and how near the two outputs are.

Cases are counted in three: equal; tied, where at the first token that differs either was right by the tie rule
(SCORES_TOLERANCE); different. `pytest_terminal_summary` in tests/parity/conftest.py tells the sums.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessorList

from grammar_masks import OwnMask
from handloom.output import Output
from healing_oracle import healed
from parity_checks import SCORES_TOLERANCE, Pair, hf_logits

PROPERTY = "parity"
Options = dict[str, Any]


def _lengths(draw: random.Random, vocab_size: int, count: int) -> Options:
    eos = draw.choice((None, draw.sample(range(vocab_size), max(1, vocab_size // 20))))
    return {"max_new_tokens": count, "eos_token_id": eos}


def _rules(draw: random.Random, vocab_size: int) -> Options:
    rules = {
        "repetition_penalty": draw.choice((0.8, 1.2, 2.0)),
        "no_repeat_ngram_size": draw.choice((2, 3)),
        "min_new_tokens": draw.randint(1, 6),
        "suppress_tokens": draw.sample(range(vocab_size), 20),
        "bad_words_ids": [[token] for token in draw.sample(range(vocab_size), 20)],
    }
    return {name: value for name, value in rules.items() if draw.random() < 0.35}


def _knobs(draw: random.Random) -> Options:
    knobs = {
        "temperature": draw.choice((0.5, 1.0, 2.0)),
        "top_k": draw.choice((0, 5, 40)),
        "top_p": draw.choice((0.6, 0.95)),
        "min_p": draw.choice((0.01, 0.2)),
        "typical_p": 0.8,
    }
    return {"do_sample": True, **{name: value for name, value in knobs.items() if draw.random() < 0.5}}


def _beams(draw: random.Random) -> Options:
    beams = draw.randint(2, 4)
    return {
        "num_beams": beams,
        "num_return_sequences": draw.randint(1, beams),
        "length_penalty": draw.choice((-0.5, 0.0, 1.0, 2.0)),
        "early_stopping": draw.choice((True, False, "never")),
    }


def _structure(draw: random.Random) -> Options:
    (name, value) = draw.choice(list(STRUCTURES.items()))
    return {name: value}


STRUCTURES: Options = {
    "regex": r"[a-zA-Z ,']{4,40}\.",
    "choices": ["yes", "no", "not at all", " it was", "It is", "ja, 日本語 🙂"],
    "json_schema": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "grammar": 'start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[0-9]{1,3}/\n',
}


@dataclass(frozen=True)
class Mode:
    """added: options of both, given a source of randomness; own: what only handloom is told; rules: whether penalties
    and bans come beside; heals: whether the prompt's end is healed first."""

    added: Callable[[random.Random], Options] = lambda draw: {}
    own: Callable[[Pair], Options] = lambda pair: {}
    rules: bool = True
    heals: bool = False


def _torch_draws(pair: Pair) -> Options:
    return {"rng": "torch"}


MODES: dict[str, Mode] = {
    "greedy": Mode(),
    "sampling": Mode(_knobs, _torch_draws),
    "several samples": Mode(lambda draw: {**_knobs(draw), "num_return_sequences": draw.randint(2, 4)}, _torch_draws),
    "beam search": Mode(_beams),
    "beam sampling": Mode(lambda draw: {**_knobs(draw), **_beams(draw)}, _torch_draws),
    "guidance": Mode(lambda draw: {"guidance_scale": draw.choice((0.5, 1.7, 3.0))}),
    "prompt lookup": Mode(own=lambda pair: {"prompt_lookup_num_tokens": 5}),
    "suffix automaton": Mode(own=lambda pair: {"speculation": "suffix"}),
    "draft model": Mode(own=lambda pair: {"assistant_model": pair.lm(dtype="bfloat16"), "num_assistant_tokens": 5}),
    "structure": Mode(_structure, rules=False),
    "sampled structure": Mode(lambda draw: {**_knobs(draw), **_structure(draw)}, _torch_draws, rules=False),
    "token healing": Mode(own=lambda pair: {"token_healing": True}, heals=True),
}


def compare(pair: Pair, mode: str, prompt: list[int], seed: int, *, new_tokens: int = 16) -> Counter[str]:
    """How many outputs of one prompt are "equal", "tied" and "different"."""
    draw, vocab_size = random.Random(f"{mode} {seed}"), pair.hf.config.vocab_size
    how = MODES[mode]
    options = _lengths(draw, vocab_size, new_tokens)
    options |= (_rules(draw, vocab_size) if how.rules else {}) | how.added(draw)
    if STRUCTURES.keys() & options.keys():
        options["eos_token_id"] = [pair.tokens.eos_token]  # any other may be a text that the grammar cannot do without
    torch.manual_seed(seed)
    ours = pair.lm().generate([prompt], **options, **how.own(pair))
    if how.heals:
        prompt = healed(prompt, pair.token_bytes, lambda kept: hf_logits(pair.hf, kept)[-1])
        if any(output.prompt_token_ids != prompt for output in ours):
            return Counter(different=len(ours))
    torch.manual_seed(seed)
    result = pair.hf.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt)),
        pad_token_id=vocab_size - 1,
        output_scores=True,
        return_dict_in_generate=True,
        **{"do_sample": False, **_theirs(pair, prompt, options)},
    )
    assert len(ours) == len(result.sequences), (mode, options)
    rows = enumerate(zip(ours, result.sequences[:, len(prompt) :].tolist(), strict=True))
    ends = set(options["eos_token_id"] or ())
    return Counter(_verdict(output, tokens, ends, row, result) for row, (output, tokens) in rows)


def _theirs(pair: Pair, prompt: list[int], options: Options) -> Options:
    """The options for transformers, which has no grammars: a processor with llguidance's own mask is one."""
    rest = {name: value for name, value in options.items() if name not in STRUCTURES}
    masks = [
        OwnMask(len(prompt), name, options[name], options["eos_token_id"], pair.tokens)
        for name in options.keys() - rest.keys()
    ]
    return {**rest, "logits_processor": LogitsProcessorList(masks)} if masks else rest


def _verdict(output: Output, theirs: list[int], ends: set[int], row: int, result: Any) -> str:
    if output.beams is not None:
        expected = float(result.sequences_scores[row])
        near = abs(output.beams.score - expected) <= SCORES_TOLERANCE * (1 + abs(expected))
        theirs = theirs[: int((result.beam_indices[row] >= 0).sum())]
        return "equal" if near and output.token_ids == theirs else "tied" if near else "different"
    ours, end = output.token_ids, next((at for at, token in enumerate(theirs, 1) if token in ends), len(theirs))
    theirs = theirs[:end]  # what comes after is padding
    if ours == theirs:
        return "equal"
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return "different"
    scores = result.scores[at][row]
    tie = torch.isclose(scores[ours[at]], scores[theirs[at]], rtol=SCORES_TOLERANCE, atol=SCORES_TOLERANCE)
    return "tied" if tie else "different"
