"""Where transformers' modules have the values of our hook points, and forward hooks to see and change them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import handloom as hl
from parity_checks import Pair, hf_logits

TOLERANCE = 2e-5  # of the largest value at a point


LLAMA = {
    "hook_embed": ("model.embed_tokens", "out"),
    "hook_resid_pre": ("model.layers.{i}", "in"),
    "attn.hook_q": ("model.layers.{i}.self_attn.q_proj", "out"),
    "attn.hook_k": ("model.layers.{i}.self_attn.k_proj", "out"),
    "attn.hook_v": ("model.layers.{i}.self_attn.v_proj", "out"),
    "attn.hook_z": ("model.layers.{i}.self_attn.o_proj", "in"),
    "hook_attn_out": ("model.layers.{i}.self_attn.o_proj", "out"),
    "hook_resid_mid": ("model.layers.{i}.post_attention_layernorm", "in"),
    "mlp.hook_post": ("model.layers.{i}.mlp.down_proj", "in"),
    "hook_mlp_out": ("model.layers.{i}.mlp", "out"),
    "hook_resid_post": ("model.layers.{i}", "out"),
    "ln_final.hook_normalized": ("model.norm", "out"),
}
GEMMA = {
    **LLAMA,
    "hook_attn_out": ("model.layers.{i}.post_attention_layernorm", "out"),
    "hook_resid_mid": ("model.layers.{i}.pre_feedforward_layernorm", "in"),
    "hook_mlp_out": ("model.layers.{i}.post_feedforward_layernorm", "out"),
}
GPT2 = {
    "hook_embed": ("transformer.wte", "out"),
    "hook_resid_pre": ("transformer.h.{i}", "in"),
    "attn.hook_q": ("transformer.h.{i}.attn.c_attn", "out 0"),
    "attn.hook_k": ("transformer.h.{i}.attn.c_attn", "out 1"),
    "attn.hook_v": ("transformer.h.{i}.attn.c_attn", "out 2"),
    "attn.hook_z": ("transformer.h.{i}.attn.c_proj", "in"),
    "hook_attn_out": ("transformer.h.{i}.attn.c_proj", "out"),
    "hook_resid_mid": ("transformer.h.{i}.ln_2", "in"),
    "mlp.hook_post": ("transformer.h.{i}.mlp.c_proj", "in"),
    "hook_mlp_out": ("transformer.h.{i}.mlp", "out"),
    "hook_resid_post": ("transformer.h.{i}", "out"),
    "ln_final.hook_normalized": ("transformer.ln_f", "out"),
}
PLACES = {"llama": LLAMA, "gpt2": GPT2, "gemma3_text": GEMMA}
NO_PLACE = {"attn.hook_rot_q", "attn.hook_rot_k", "attn.hook_pattern"}  # inside a module of transformers


def place(lm: hl.LM, point: str) -> tuple[str, str]:
    """The module of transformers that has this point's values, and where: "in", "out", or a third of "out"."""
    _, i, name = point.split(".", 2) if point.startswith("blocks.") else ("", "", point)
    module, side = PLACES[lm.spec.model_type][name]
    return module.format(i=i), side


def changing(function: Callable[[Tensor], Tensor], side: str) -> Callable[[Tensor], Tensor]:
    """The function on the side's third of a tensor."""
    if len(side.split()) == 1:
        return function

    def on_third(x: Tensor) -> Tensor:
        thirds = list(x.chunk(3, dim=-1))
        thirds[int(side[-1])] = function(thirds[int(side[-1])])
        return torch.cat(thirds, dim=-1)

    return on_third


@contextmanager
def hooked(module: Module, side: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A forward hook of torch's that puts function(value) in the place of a module's input or output."""
    function = changing(function, side)

    def before(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (function(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": function(kwargs["hidden_states"])}

    def after(_: Module, __: Any, out: Any) -> Any:
        return (function(out[0]), *out[1:]) if isinstance(out, tuple) else function(out)

    if side == "in":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def theirs(pair: Pair, lm: hl.LM, ids: list[int]) -> dict[str, Tensor]:
    """transformers' values at every point it has a place for, [n, ...] in our shapes."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for point, shape in lm.hook_points().items():
            if point.split(".", 2)[-1] in NO_PLACE:
                continue
            module, side = place(lm, point)

            def look(x: Tensor, point: str = point, shape: tuple[Any, ...] = shape) -> Tensor:
                seen[point] = x[0].reshape(len(ids), *shape[1:])
                return x

            stack.enter_context(hooked(pair.hf.get_submodule(module), side, look))
        hf_logits(pair.hf, ids)
    return seen


def assert_close(ours: Tensor, expected: Tensor, what: str) -> None:
    assert ours.shape == expected.shape, what
    delta = (ours - expected).abs().max() / expected.abs().max()
    assert delta <= TOLERANCE, f"{what}: {delta:.3g} of the largest value"
