"""From a prompt and options to a decoder, everything checked.

This module does not know the scheduler, or when a request runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from handloom.cache.sequence import Sequence
from handloom.decoding.decoder import Decoder
from handloom.decoding.draft_model import check_assistant
from handloom.decoding.modes import MODES, RequestDecoder, make_decoder
from handloom.engine.guarded import Custom, Guarded
from handloom.engine.model import Model
from handloom.errors import InvalidParam, InvalidPrompt, UnsupportedOption
from handloom.sampling.grammar import Complete
from handloom.sampling.params import GenerationParams, resolve_params


def resolve(model: Model, sequence: Sequence, options: dict[str, Any]) -> GenerationParams:
    """A request's parameters. Raises InvalidPrompt, InvalidParam, UnsupportedOption, ContextOverflow."""
    if not len(sequence):
        raise InvalidPrompt("the sequence is empty; append a token to it first")
    spec = model.transformer.spec
    params = resolve_params(
        _with_ids(model, options),
        generation_config=model.generation_config,
        prompt_length=len(sequence),
        max_context=model.max_context,
        vocab_size=spec.vocab_size,
        # as in transformers, a generation_config.json that names no eos means that there is none
        eos_token_id=() if model.generation_config else spec.eos_token_ids,
        compile=None if model.grammars is None else model.grammars.compile,
    )
    if params.structure is not None and not params.eos_token_id:
        end = Complete(params.structure, len(sequence) - sequence.num_embeddings)
        params = replace(params, stopping_criteria=(*params.stopping_criteria, end))
    if params.stop_strings and model.tokenizer is None:
        raise InvalidPrompt("stop_strings need a tokenizer, and this checkpoint has none; stop on eos_token_id")
    if params.prompt_logprobs is not None and sequence.num_embeddings:
        raise UnsupportedOption("prompt_logprobs need token ids, and the prompt begins with embeddings")
    over_prompt = params.encoder_repetition_penalty != 1.0 or params.encoder_no_repeat_ngram_size > 0
    if over_prompt and sequence.num_embeddings:
        raise UnsupportedOption(
            "encoder_repetition_penalty and encoder_no_repeat_ngram_size are about the prompt's token ids, and "
            "this prompt begins with embeddings; leave them out"
        )
    if params.guidance_scale != 1.0 and not params.negative_prompt_ids and len(sequence) == sequence.num_embeddings:
        raise UnsupportedOption(
            "guidance_scale leads away from the prompt's last token, and this prompt ends with embeddings; give "
            "negative_prompt_ids"
        )
    if params.assistant_model is not None:
        check_assistant(params.assistant_model, sequence, spec.vocab_size, model.tokenizer)
    if params.prompt_logprobs is not None and sequence.private and sequence.num_computed:
        raise UnsupportedOption(
            "prompt_logprobs compute the prompt again, and this sequence has K and V that would be forgotten; "
            "pass its token_ids instead"
        )
    return params


def _with_ids(model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """The options with negative_prompt, a text, as negative_prompt_ids. Raises InvalidParam, InvalidPrompt."""
    text = options.get("negative_prompt")
    options = {name: value for name, value in options.items() if name != "negative_prompt"}
    if text is None:
        return options
    if not isinstance(text, str):
        raise InvalidParam(f"negative_prompt is {type(text).__name__}, not a text; pass ids as negative_prompt_ids")
    if options.get("negative_prompt_ids") is not None:
        raise InvalidParam("negative_prompt and negative_prompt_ids are two ways to say one thing; give one")
    return {**options, "negative_prompt_ids": model.encode(text).token_ids}


def prepare(model: Model, prompt: Any, options: dict[str, Any], cache_salt: str = "") -> RequestDecoder | Custom:
    """The decoder of a request, checked and not queued yet. Arguments and errors are those of `Engine.add_request`."""
    if not isinstance(cache_salt, str):
        raise InvalidParam(f"cache_salt is {cache_salt!r}; expected a text, the same for requests that may share")
    if not isinstance(prompt, Sequence):
        sequence = model.encode(prompt)
        sequence.salt = cache_salt
        return _decoder(model, sequence, resolve(model, sequence, options), owns_sequence=True)
    if cache_salt != prompt.salt and cache_salt:
        raise InvalidParam("a sequence has its own salt; leave cache_salt out, or pass the sequence's token_ids")
    if prompt.pool is not model.pool:
        raise InvalidPrompt("the sequence lives in the cache of another model; pass its token_ids instead")
    return _decoder(model, prompt, resolve(model, prompt, options), owns_sequence=False)


def _decoder(
    model: Model, sequence: Sequence, params: GenerationParams, *, owns_sequence: bool
) -> RequestDecoder | Custom:
    if params.custom_decoder is None:
        return make_decoder(sequence, params, model.tokenizer, model.transformer, owns_sequence=owns_sequence)
    if not owns_sequence:
        raise UnsupportedOption("custom_decoder: a sequence goes on in place, in one way; pass its token_ids")
    return Custom(sequence, params, model)


def guarded(model: Model, decoder: Decoder) -> Decoder:
    """The decoder, if it is one of handloom's; else one around it that keeps its mistakes from others."""
    if type(decoder) in MODES or isinstance(decoder, Guarded):
        return decoder
    return Guarded(decoder, model)
