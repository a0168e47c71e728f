"""Mixture of experts: the choice of each token's experts, and the sum of what they say.

This module does not know where the experts' scores come from, or on which device an expert lives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from .activation import activate, gated_activation

SCORING_FUNCS = ("softmax", "sigmoid")


class Routing(NamedTuple):
    """How experts are chosen and weighed; the names are those of the checkpoints' config.json.

    top_k: experts per token. scoring_func: "softmax" over all experts or "sigmoid" of each (DeepSeek-V3).
    norm_topk_prob: the weights of the chosen sum to 1. After a softmax that is the softmax over the chosen alone, so
    that it also says what Mixtral and gpt-oss do. correction_bias [E]: added to the scores for the choice, not in the
    weights (Wang et al. 2024). n_group, topk_group: experts come in n_group equal groups, and only the topk_group of
    them whose two best experts sum highest are chosen from (DeepSeek-AI 2024). routed_scaling_factor: a factor of all
    weights.
    """

    top_k: int
    scoring_func: str = "softmax"
    norm_topk_prob: bool = False
    correction_bias: Tensor | None = None
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0


def highest(x: Tensor, count: int) -> Tensor:
    """Where the `count` highest of the last dimension are, highest first; of equals the lowest index.

    (The order in which torch.topk gives equals is unspecified; a stable sort has one.)
    """
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


def route(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Choose each token's experts: logits [N, E] -> (weights [N, top_k] float32, expert_ids [N, top_k] int64).

    Highest score first, of equals the lowest expert. All in float32 (float64 stays float64); models that round the
    weights to the logits' dtype, as Qwen and gpt-oss do, differ by that rounding. With neither bias nor groups the
    choice is made on the logits themselves, whose order the scores keep, but for two that round to the same.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.sigmoid() if routing.scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores
    if routing.correction_bias is not None:
        choice = scores + routing.correction_bias
    elif routing.n_group == 1:
        choice = logits
    if routing.n_group > 1:
        groups = choice.unflatten(-1, (routing.n_group, -1))
        best = highest(groups.topk(2).values.sum(-1), routing.topk_group)
        kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
        choice = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    expert_ids = highest(choice, routing.top_k)
    weights = scores.gather(-1, expert_ids)
    if routing.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * routing.routed_scaling_factor, expert_ids


def moe_mlp(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    gated: bool,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """The weighted sum of what each token's experts make of it (Shazeer et al. 2017): [N, H] -> [N, H].

    Args: x [N, H]; weights [N, k] and expert_ids [N, k] int of `route`; w_up [E, 2 * I (gate rows, then up rows), H] if
    gated, else [E, I, H]; w_down [E, H, I]; b_up [E, 2 * I or I] and b_down [E, H] where the experts have biases.
    A choice whose id is not among 0 .. E - 1 is dropped, and its weight is not read.
    Each product is accumulated in float32; what the activation makes of the first is rounded to x's dtype, the k
    experts are summed in the order of the choices in float32, and that sum is rounded once.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(x.shape, dtype=wide, device=x.device)
    for choice in range(expert_ids.shape[1]):
        for expert in range(len(w_up)):
            rows = (expert_ids[:, choice] == expert).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            up_bias, down_bias = (None if b is None else b[expert].to(wide) for b in (b_up, b_down))
            hidden = F.linear(x[rows].to(wide), w_up[expert].to(wide), up_bias)
            hidden = gated_activation(hidden, activation) if gated else activate(hidden, activation)
            out = F.linear(hidden.to(x.dtype).to(wide), w_down[expert].to(wide), down_bias)
            total[rows] += weights[rows, choice, None] * out
    return total.to(x.dtype)
