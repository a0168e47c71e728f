"""What may be handed in as a prompt, checked and turned into a cache sequence.

This module does not know how a prompt is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handloom.cache.pages import PagePool
from handloom.cache.sequence import Sequence
from handloom.checkpoint.json_object import quote
from handloom.errors import ContextOverflow, InvalidParam, InvalidPrompt
from handloom.sampling.callers_options import refuse_remembering
from handloom.sampling.options import is_integer, said
from handloom.text.tokenizer import Tokenizer

MAX_PROMPTS = 65536
PROMPT_OPTIONS = ("inputs", "input_ids", "inputs_embeds")
"""What transformers' `generate` calls its prompts."""

Prompt = str | Seq[int] | Tensor | np.ndarray[Any, Any]


def to_sequence(
    prompt: Any,
    pool: PagePool,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    hidden_size: int,
    max_context: int,
    bos: int | None,
) -> Sequence:
    """A new, uncomputed sequence from text, token ids [n] or embeddings [n, hidden_size].

    An empty text starts from BOS where there is one. Raises InvalidPrompt, ContextOverflow.
    """
    if isinstance(prompt, np.ndarray):
        prompt = _from_numpy(prompt)
    if isinstance(prompt, Tensor):
        _check_values(prompt)
    if isinstance(prompt, Tensor) and prompt.dim() == 2 and not (prompt.is_floating_point() or prompt.is_complex()):
        raise InvalidPrompt(
            f"a tensor of shape {list(prompt.shape)} with integers looks like a batch of token ids; pass it as "
            "input_ids=ids, beside its attention_mask, or one prompt as ids[0]"
        )
    if isinstance(prompt, Tensor) and prompt.dim() == 2:
        _check_length(prompt, max_context)
        return Sequence(pool, embeddings=check_embeddings(prompt, hidden_size).to(pool.device))
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidPrompt("this checkpoint has no tokenizer: pass token ids instead of text")
        prompt = tokenizer.encode(prompt)
    _check_length(prompt, max_context)
    ids = check_token_ids(prompt, vocab_size)
    if not ids and bos is not None:
        ids = check_token_ids([bos], vocab_size)
    if not ids:
        raise InvalidPrompt("the prompt is empty, and this model has no BOS token to start from")
    return Sequence(pool, ids)


def _check_values(tensor: Tensor) -> None:
    if tensor.is_meta:
        raise InvalidPrompt("the tensor is on the meta device: it has a shape, but no values")
    if tensor.is_nested:
        raise InvalidPrompt("the tensor is a nested one; pass a list of tensors, its unbind()")


def _check_length(prompt: Any, max_context: int) -> None:
    """Raises ContextOverflow, before each of very many ids is looked at."""
    count = len(prompt) if isinstance(prompt, Seq) or (isinstance(prompt, Tensor) and prompt.dim()) else 0
    if count > max_context:
        raise ContextOverflow(
            f"the prompt has {count} tokens and the context holds {max_context}; shorten the prompt, or load the model "
            "with a larger max_context"
        )


def check_token_ids(prompt: Any, vocab_size: int) -> list[int]:
    """A list of ids in [0, vocab_size). Raises InvalidPrompt naming the first that is not."""
    if isinstance(prompt, Tensor):
        if prompt.layout != torch.strided or prompt.dim() != 1 or prompt.is_floating_point() or prompt.is_complex():
            raise InvalidPrompt(
                f"a tensor prompt is token ids [n] (integers) or embeddings [n, hidden_size] (floats); this one is "
                f"{prompt.dtype} {list(prompt.shape)}"
            )
        prompt = prompt.tolist()
    if not isinstance(prompt, Seq) or isinstance(prompt, bytes | bytearray):
        raise InvalidPrompt(f"a prompt is text, token ids or embeddings, not {type(prompt).__name__}{_way_out(prompt)}")
    for at, token_id in enumerate(prompt):
        if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
            way_out = _way_out(token_id) if isinstance(token_id, Mapping) else ""
            raise InvalidPrompt(f"token {at} of the prompt is {type(token_id).__name__}, not an integer id{way_out}")
        if not 0 <= token_id < vocab_size:
            raise InvalidPrompt(f"token {at} of the prompt is {quote(token_id)}; ids go from 0 to {vocab_size - 1}")
    return [int(token_id) for token_id in prompt]


def _way_out(value: Any) -> str:
    if isinstance(value, Mapping) and "role" in value:
        return ": messages go to lm.chat(messages), or to generate as lm.render_chat(messages)"
    if isinstance(value, Mapping):
        return ": pass its text or its token ids, or what a tokenizer returns, with input_ids"
    if isinstance(value, Iterator | set | frozenset):
        return ": make a list of prompts of it"
    return " (a list that is not all token ids is taken as a list of prompts)"


def check_embeddings(values: Tensor, hidden_size: int) -> Tensor:
    """A copy of dense, finite, floating values [n > 0, hidden_size]. Raises InvalidPrompt."""
    if values.layout != torch.strided or not values.is_floating_point():
        raise InvalidPrompt(f"prompt embeddings must be a dense float tensor, not {values.layout} {values.dtype}")
    if values.dim() != 2 or values.shape[0] == 0 or values.shape[1] != hidden_size:
        raise InvalidPrompt(f"prompt embeddings have shape {list(values.shape)}; expected [n > 0, {hidden_size}]")
    if not bool(torch.isfinite(values).all()):
        raise InvalidPrompt("prompt embeddings hold NaN or infinity")
    return values.detach().clone()


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    if array.dtype.kind not in "iuf":
        raise InvalidPrompt(f"an array prompt must hold integers or floats, not {array.dtype}")
    if isinstance(array, np.ma.MaskedArray):
        raise InvalidPrompt("the array is a masked one; pass what is not masked, its compressed()")
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))


# Calls with one prompt or several --------------------------------------------------------------


def read_call(
    prompts: Any, params: Seq[Mapping[str, Any]] | None, options: Mapping[str, Any], model: Mapping[str, Any]
) -> tuple[list[tuple[Any, dict[str, Any]]], bool]:
    """(each prompt with its options, was it a single one). model: what its generation_config.json says.

    Raises InvalidPrompt, InvalidParam.
    """
    prompts, options = _take_prompts(prompts, options, model)
    items, single = as_list(prompts)
    return list(zip(items, _options_of_each(params, options, items), strict=True)), single


def as_list(prompts: Any) -> tuple[list[Any], bool]:
    """(prompts, was it a single one): text, token ids, tensors, arrays and sequences are single prompts."""
    if not isinstance(prompts, list | tuple) or (prompts and all(isinstance(p, int | np.integer) for p in prompts)):
        return [prompts], True
    if len(prompts) > MAX_PROMPTS:
        raise InvalidParam(f"{len(prompts)} prompts in one call; the limit is {MAX_PROMPTS}: use several calls")
    return list(prompts), False


def _take_prompts(prompts: Any, options: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The prompts of a call, and its other options.

    They are its first argument, or as transformers' `generate` has them: `inputs`, `input_ids` or `inputs_embeds`, with
    an `attention_mask`; or what a tokenizer returns, with these. Ids [batch, n] may be the first argument too.
    """
    options = dict(options)
    if isinstance(prompts, Mapping) and "input_ids" in prompts:
        _check_names(prompts)
        if twice := sorted(prompts.keys() & options.keys()):
            raise InvalidPrompt(f"{twice[0]} stands in the prompt and beside it; give one of them")
        prompts, options = None, {**options, **prompts}
    named = {name: options.pop(name) for name in PROMPT_OPTIONS if name in options}
    given = {"the first argument": prompts, **named}
    first, *others = [name for name, value in given.items() if value is not None] or [""]
    if others:
        raise InvalidPrompt(f"{first} and {others[0]} both are prompts; give one of them")
    if not first:
        raise InvalidPrompt(
            "the first argument is the prompt: text, token ids, embeddings, or a list of these, not NoneType; messages "
            "go to lm.chat"
        )
    values = given[first]
    if prompts is not None and not _is_batch(prompts):
        return prompts, options
    mask = options.pop("attention_mask", None)
    items = _unpadded(first, values, mask)
    if mask is None and isinstance(values, Tensor | np.ndarray):
        _check_no_padding(
            first, torch.as_tensor(values, device="cpu"), (options, options.get("generation_config"), model)
        )
    negative = options.get("negative_prompt_ids")
    if isinstance(negative, Tensor) and negative.dim() == 2 and isinstance(items, list) and len(negative) == len(items):
        options["negative_prompt_ids"] = list(negative)  # as those of the prompts, a row for each
    return items, options


def _is_batch(prompts: Any) -> bool:
    """Whether these are token ids [batch, n] in one tensor or array, as `generate` of transformers takes them first."""
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 2 and prompts.dtype.kind in "iu"
    return isinstance(prompts, Tensor) and prompts.dim() == 2 and not prompts.is_floating_point()


def _unpadded(name: str, values: Any, mask: Any) -> Any:
    """One prompt, or the list of a batch's, without what the mask hides. Raises InvalidPrompt."""
    values = _from_numpy(values) if isinstance(values, np.ndarray) else values
    if isinstance(values, Tensor):
        _check_values(values)
        own = 2 if values.is_floating_point() else 1  # dimensions of one prompt
        if values.dim() not in (own, own + 1):
            raise InvalidPrompt(
                f"{name} has the shape {list(values.shape)}; expected [batch, n], or with embeddings 3-D"
            )
        is_batch = values.dim() > own
        if is_batch and mask is None and own == 1 and len(values) > 1:
            raise InvalidPrompt(
                f"{name} is a batch of {len(values)}: give its attention_mask too, or padding could not be told from "
                "the prompts (or give these as a list of lists)"
            )
    elif isinstance(values, list | tuple):
        is_batch = not all(isinstance(value, int | np.integer) for value in values)
    else:
        raise InvalidPrompt(
            f"{name} is {type(values).__name__}; expected token ids or embeddings of a batch of prompts"
        )
    if mask is None:
        return list(values) if is_batch else values
    if isinstance(mask, Tensor):
        _check_values(mask)
    rows, flags = (values, mask) if is_batch else ([values], [mask])
    if not isinstance(flags, list | tuple | Tensor | np.ndarray) or len(flags) != len(rows):
        raise InvalidPrompt(f"attention_mask does not have a row for each of the {len(rows)} prompts of {name}")
    kept = [_seen(row, flag, at) for at, (row, flag) in enumerate(zip(rows, flags, strict=True))]
    return kept if is_batch else kept[0]


def _check_no_padding(name: str, values: Tensor, places: Seq[Any]) -> None:
    """Raises InvalidPrompt for token ids, without a mask, among which transformers would find padding and mask it."""
    pad, eos = (said(option, places) for option in ("pad_token_id", "eos_token_id"))
    ends = eos if isinstance(eos, list | tuple) else [eos]
    if not values.is_floating_point() and is_integer(pad) and pad not in ends and bool((values == pad).any()):
        raise InvalidPrompt(
            f"{name} holds pad_token_id={pad}, and padding could not be told from the prompt: give its attention_mask "
            "too, of ones where nothing is padded (or give it as a list)"
        )


def _seen(row: Any, mask: Any, at: int) -> Any:
    """The part of a prompt that its mask [n] of ones and zeros shows."""
    flags = mask.tolist() if isinstance(mask, Tensor | np.ndarray) else mask
    if not isinstance(flags, list | tuple) or not isinstance(row, list | tuple | Tensor) or len(flags) != len(row):
        raise InvalidPrompt(f"row {at} of attention_mask is not as long as the prompt")
    if any(not isinstance(flag, int | float | np.number) or flag not in (0, 1) for flag in flags):
        raise InvalidPrompt(f"row {at} of attention_mask holds something other than 0 and 1")
    places = [i for i, flag in enumerate(flags) if flag]
    if not places:
        raise InvalidPrompt(f"row {at} of attention_mask hides the whole prompt")
    return row[places] if isinstance(row, Tensor) else [row[i] for i in places]


def _options_of_each(
    params: Seq[Mapping[str, Any]] | None, options: Mapping[str, Any], items: Seq[Any]
) -> list[dict[str, Any]]:
    """The options of each prompt: those of all, of which `streamer` may be a list with one for each, and
    `negative_prompt_ids` a list of tensors; then its own. Raises InvalidParam.
    """
    streamer = options.get("streamer")
    streamers = streamer if isinstance(streamer, list | tuple) else [streamer] * len(items)
    if streamer is not None and (len(streamers) != len(items) or (streamers is not streamer and len(items) > 1)):
        count = f"{len(streamers)} streamers" if streamers is streamer else "one streamer"
        raise InvalidParam(f"{count} for {len(items)} prompts; give a list with one for each, or use lm.stream")
    if len(items) > 1:
        refuse_remembering(options.get("logits_processor"))
    shared = [{**options, "streamer": own} for own in streamers]
    negative = options.get("negative_prompt_ids")
    if isinstance(negative, list) and len(negative) == len(items) and all(isinstance(row, Tensor) for row in negative):
        shared = [{**ours, "negative_prompt_ids": row} for ours, row in zip(shared, negative, strict=True)]
    return [{**ours, **own} for ours, own in zip(shared, _own_options(params, items), strict=True)]


def _own_options(params: Seq[Mapping[str, Any]] | None, items: Seq[Any]) -> Seq[Mapping[str, Any]]:
    if params is None:
        return [{}] * len(items)
    if isinstance(params, Mapping | str) or not isinstance(params, Seq):
        raise InvalidParam("params must be a list of dicts, one for each prompt; options of all are arguments")
    if len(params) != len(items):
        raise InvalidParam(f"params has {len(params)} entries for {len(items)} prompts; give one each")
    for own in params:
        if not isinstance(own, Mapping):
            raise InvalidParam(f"params must be a list of dicts of options; it holds {type(own).__name__}")
        _check_names(own)
    return params


def _check_names(options: Mapping[Any, Any]) -> None:
    for name in options:
        if not isinstance(name, str):
            raise InvalidParam(f"options have names, and {type(name).__name__} {quote(name)} is none")
