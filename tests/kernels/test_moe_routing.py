"""moe_routing.py: the experts and weights of the reference and of transformers' own routers; pairs sorted by expert."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, Glm4MoeConfig, GptOssConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from handloom_kernels import moe_routing as kernels
from handloom_kernels import reference
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import Routing
from kernel_testing import DEVICE, DTYPES, assert_rows_do_not_depend_on_company, draw

RULES = {
    "softmax": Routing(3),
    "softmax, renormalised": Routing(4, norm_topk_prob=True),
    "sigmoid": Routing(2, "sigmoid", routed_scaling_factor=1.5),
    "sigmoid, renormalised": Routing(4, "sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5),
    "groups": Routing(3, "sigmoid", True, n_group=4, topk_group=2),
    "groups of a softmax": Routing(2, n_group=2, topk_group=1),
}


def separated(rows: int, experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits no two of which are close within a row, so that rounding decides nothing: -4 .. 4 in random order."""
    order = torch.stack([torch.randperm(experts) for _ in range(rows)])
    return (order * (8 / experts) - 4).to(DEVICE, dtype)


def assert_same(ours: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(ours[1], right[1])
    assert ours[0].dtype == right[0].dtype == torch.float32
    assert (ours[0] - right[0]).abs().max() <= 1e-6 * right[0].abs().max()


@pytest.mark.parametrize("experts", [8, 60, 128, 512])
@pytest.mark.parametrize("rule", RULES)
def test_route(rule: str, experts: int) -> None:
    logits = separated(3, experts)
    assert_same(kernels.route(logits, RULES[rule]), reference.route(logits, RULES[rule]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_logits_and_bias_of_any_dtype(rule: str, dtype: torch.dtype) -> None:
    logits = separated(3, 64, dtype)
    routing = RULES[rule]._replace(correction_bias=draw(64, dtype=dtype))
    for given in (RULES[rule], routing):
        assert_same(kernels.route(logits, given), reference.route(logits, given))


@pytest.mark.parametrize("experts", [1, 3, 17])
def test_all_experts_may_be_chosen(experts: int) -> None:
    routing = Routing(min(16, experts), norm_topk_prob=True)
    logits = separated(2, experts)
    assert_same(kernels.route(logits, routing), reference.route(logits, routing))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_of_equals_the_lowest_expert_is_chosen(scoring: str) -> None:
    """Against plain Python. Minus zero equals zero."""
    logits = torch.randint(-2, 2, (8, 40)).to(DEVICE, torch.float32)
    logits[::2] = torch.where(logits[::2] == 0, -0.0, logits[::2])
    for implementation in (reference.route, kernels.route):
        for row, ids in zip(logits.tolist(), implementation(logits, Routing(16, scoring))[1].tolist(), strict=True):
            assert ids == sorted(range(40), key=lambda expert: (-row[expert], expert))[:16]


def test_of_equal_groups_the_lowest_is_chosen() -> None:
    """Against plain Python: 5 groups of 6, scores 0.5 or 0, the bias saying which."""
    choice = torch.randint(0, 3, (30,)).to(DEVICE, torch.float32)
    routing = Routing(6, "sigmoid", correction_bias=choice, n_group=5, topk_group=2)
    values = choice.tolist()
    groups = [range(6 * g, 6 * g + 6) for g in range(5)]
    best = sorted(range(5), key=lambda g: (-sum(sorted(values[e] for e in groups[g])[-2:]), g))[:2]
    expected = sorted((e for g in best for e in groups[g]), key=lambda e: (-values[e], e))[:6]
    for implementation in (reference.route, kernels.route):
        assert implementation(torch.zeros(1, 30, device=DEVICE), routing)[1][0].tolist() == expected


def test_far_apart_logits_are_told_apart_where_their_probabilities_are_not() -> None:
    logits = torch.tensor([[-300.0, 0.0, -400.0, -200.0]], device=DEVICE)
    for implementation in (reference.route, kernels.route):
        weights, expert_ids = implementation(logits, Routing(4, norm_topk_prob=True))
        assert expert_ids.tolist() == [[1, 3, 0, 2]]
        assert weights.tolist() == [[1, 0, 0, 0]]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", RULES)
def test_ids_are_experts_whatever_the_logits(rule: str, value: float) -> None:
    logits = torch.full((1, 20), value, device=DEVICE)
    expert_ids = kernels.route(logits, RULES[rule])[1][0].tolist()
    assert expert_ids == list(range(RULES[rule].top_k))


def router(name: str) -> tuple[nn.Module, Routing]:
    """A router of transformers, and what we call its rule."""
    size: dict[str, Any] = {"hidden_size": 16}
    groups = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5}
    if name == "mixtral":
        return MixtralTopKRouter(MixtralConfig(**size, num_local_experts=8)), Routing(2, norm_topk_prob=True)
    if name == "gpt_oss":
        module = GptOssTopKRouter(GptOssConfig(**size, num_local_experts=32, num_experts_per_tok=4))
        return module, Routing(4, norm_topk_prob=True)
    if name.startswith("qwen3_moe"):
        norm = name.endswith("renormalised")
        config = Qwen3MoeConfig(**size, num_experts=24, num_experts_per_tok=5, norm_topk_prob=norm)
        return Qwen3MoeTopKRouter(config), Routing(5, norm_topk_prob=norm)
    if name == "olmoe":
        return OlmoeTopKRouter(OlmoeConfig(**size, num_experts=24, num_experts_per_tok=8)), Routing(8)
    if name == "deepseek_v3":
        module = DeepseekV3TopkRouter(DeepseekV3Config(**size, n_routed_experts=32, norm_topk_prob=True, **groups))
    else:
        module = Glm4MoeTopkRouter(Glm4MoeConfig(**size, n_routed_experts=32, norm_topk_prob=True, **groups))
    nn.init.normal_(module.e_score_correction_bias, std=0.3)
    bias = module.e_score_correction_bias.to(DEVICE)
    return module, Routing(4, "sigmoid", True, bias, 4, 2, 2.5)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3_moe", "qwen3_moe renormalised", "olmoe", "gpt_oss", "deepseek_v3", "glm4_moe"]
)
def test_as_the_routers_of_transformers(name: str, implementation: str) -> None:
    module, routing = router(name)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        logits, weights, expert_ids = module.to(DEVICE)(draw(5, 16))
    route = reference.route if implementation == "reference" else kernels.route
    ours, ours_ids = route(logits, routing)
    # two of theirs come unsorted
    order, ours_order = expert_ids.argsort(-1), ours_ids.argsort(-1)
    assert torch.equal(expert_ids.gather(-1, order), ours_ids.gather(-1, ours_order))
    torch.testing.assert_close(ours.gather(-1, ours_order), weights.gather(-1, order), rtol=1e-5, atol=1e-7)


def test_rows_may_lie_apart_and_do_not_depend_on_each_other() -> None:
    logits = draw(5, 90)[:, 20:52]
    for rule in RULES.values():
        ours, right = kernels.route(logits, rule), kernels.route(logits.contiguous(), rule)
        assert all(map(torch.equal, ours, right))
    assert_rows_do_not_depend_on_company(lambda rows: kernels.route(logits[rows], RULES["groups"])[0], 5)


def test_no_rows_are_fine() -> None:
    weights, expert_ids = kernels.route(draw(0, 8), Routing(2))
    assert weights.shape == expert_ids.shape == (0, 2)


def test_what_does_not_fit_is_named() -> None:
    wrong: list[tuple[Tensor, Routing, str]] = [
        (draw(2, 8).double(), Routing(2), "logits has dtype torch.float64"),
        (draw(2, 600), Routing(2), "600 experts; this kernel takes 1 to 512"),
        (draw(2, 8), Routing(9), "top_k is 9; 1 to 8 can be chosen"),
        (draw(2, 64), Routing(17), "top_k is 17; 1 to 16 can be chosen"),
        (draw(2, 8), Routing(5, n_group=2, topk_group=1), "top_k is 5; 1 to 4 can be chosen"),
        (draw(2, 8), Routing(0), "top_k is 0"),
        (draw(2, 8), Routing(2, "tanh"), "scoring_func is 'tanh'; there are softmax, sigmoid"),
        (draw(2, 8), Routing(2, n_group=3), "8 experts do not make 3 equal groups"),
        (draw(2, 8), Routing(2, n_group=8, topk_group=4), "8 groups of one expert"),
        (draw(2, 8), Routing(2, n_group=2, topk_group=3), "topk_group is 3; there are 2"),
        (draw(2, 8), Routing(2, correction_bias=draw(7)), r"correction_bias has shape \[7\]; expected \[8\]"),
    ]
    for logits, routing, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.route(logits, routing)


@pytest.mark.parametrize("block_m", [16, 64])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (50, 3, 7), (33, 2, 100), (3000, 3, 3)])
def test_pairs_are_sorted_stably_and_cut_into_tiles(tokens: int, top_k: int, experts: int, block_m: int) -> None:
    """Against plain Python, with choices left out; the last case takes several blocks."""
    expert_ids = torch.randint(-1, experts + 1, (tokens, top_k)).to(DEVICE)
    order, tiles = kernels.sort_pairs(expert_ids, experts, block_m)
    flat = expert_ids.flatten().tolist()
    expected_tiles, expected_order = [], []
    for expert in range(experts):
        pairs = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        for start in range(0, len(pairs), block_m):
            tile = pairs[start : start + block_m]
            expected_tiles.append((expert, len(expected_order), len(tile)))
            expected_order += tile
    assert order[: len(expected_order)].tolist() == expected_order
    filled = len(expected_tiles)
    assert [tuple(row) for row in tiles[:filled].tolist()] == expected_tiles
    assert (tiles[filled:, 2] == 0).all()


def test_pairs_that_cannot_be_sorted_are_refused() -> None:
    expert_ids = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    wrong: list[tuple[tuple[Tensor, int, int], str]] = [
        ((expert_ids.int().float(), 4, 16), "expert_ids has dtype torch.float32"),
        ((expert_ids[0], 4, 16), r"expert_ids has shape \[2\]; expected \[any, any\]"),
        ((expert_ids[:0], 4, 16), "there are 0 pairs"),
        ((torch.zeros(2, 4, dtype=torch.int64, device=DEVICE)[:, ::2], 4, 16), "expert_ids has strides"),
        ((expert_ids, 0, 16), "num_experts is 0; this kernel takes 1 to 512"),
        ((expert_ids, 513, 16), "num_experts is 513"),
        ((expert_ids, 4, 8), "block_m is 8; tiles hold at least 16"),
    ]
    for args, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.sort_pairs(*args)


@pytest.mark.parametrize("block_m", [16, 64])
def test_the_table_of_tiles_has_room_for_the_worst_case_and_for_no_more(block_m: int) -> None:
    for pairs in (1, 15, 16, 17, 100, 257):
        for experts in (1, 2, 8, 50):
            # the most tiles: one pair to each expert but the last, which gets the rest, one more than full tiles
            hit = min(pairs, experts)
            most = hit - 1 + -(-(pairs - hit + 1) // block_m)
            assert kernels.table_size(pairs, experts, block_m) == most
