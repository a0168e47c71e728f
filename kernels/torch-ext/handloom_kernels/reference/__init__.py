"""What every op means, in plain PyTorch.

This is the oracle the Triton kernels and the compiled CPU blocks are tested against, and the text to
read first. It is written for clarity: every formula is the published one, in the order a paper would
give it. Seven blocks make a decoder layer's whole step:

    embed -> [norm_qkv -> attention -> linear_residual -> norm_mlp -> linear_residual] x layers -> lm_head

All token dimensions are ragged: N tokens of S sequences lie end to end, without padding. Only attention and the
page write know where one sequence ends and the next begins.

These modules do not know about models, layers, devices, speed, or who owns a page.
"""

from __future__ import annotations

from .activation import ACTIVATIONS, GATED_ACTIVATIONS, activate, gated_activation
from .attention import gather_pages, merge_attention, paged_attention, shared_prefix_attention
from .head import embed, lm_head, lm_head_choose
from .linear import linear_residual, norm_mlp, norm_qkv
from .moe import SCORING_FUNCS, Routing, moe_mlp, route
from .norm import NORM_KINDS, Norm, add_normalize, normalize, normalize_add
from .pages import copy_pages, quantize_kv, write_pages
from .quantized_linear import (
    QuantizedWeight,
    dequantize_weight,
    pack_codes,
    quantize_weight,
    quantized_linear,
    quantized_norm_mlp,
    quantized_norm_qkv,
    unpack_codes,
)
from .rope import Rotary, qk_norm_rope_write, rotate
from .sampling import (
    Choice,
    Cuts,
    Penalties,
    TokenState,
    adjust_logits,
    count_tokens,
    draw,
    find_cuts,
    gumbel_noise,
    select,
)

__all__ = [
    "ACTIVATIONS",
    "GATED_ACTIVATIONS",
    "NORM_KINDS",
    "SCORING_FUNCS",
    "Choice",
    "Cuts",
    "Norm",
    "Penalties",
    "QuantizedWeight",
    "Rotary",
    "Routing",
    "TokenState",
    "activate",
    "add_normalize",
    "adjust_logits",
    "copy_pages",
    "count_tokens",
    "dequantize_weight",
    "draw",
    "embed",
    "find_cuts",
    "gated_activation",
    "gather_pages",
    "gumbel_noise",
    "linear_residual",
    "lm_head",
    "lm_head_choose",
    "merge_attention",
    "moe_mlp",
    "norm_mlp",
    "norm_qkv",
    "normalize",
    "normalize_add",
    "pack_codes",
    "paged_attention",
    "qk_norm_rope_write",
    "quantize_kv",
    "quantize_weight",
    "quantized_linear",
    "quantized_norm_mlp",
    "quantized_norm_qkv",
    "rotate",
    "route",
    "select",
    "shared_prefix_attention",
    "unpack_codes",
    "write_pages",
]
