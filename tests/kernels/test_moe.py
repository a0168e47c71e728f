"""moe.py: exact, complete, as transformers' blocks, and independent of the other tokens, few or many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from handloom_kernels import moe as kernels
from handloom_kernels import moe_routing, reference
from handloom_kernels.checks import KernelError
from handloom_kernels.reference import GATED_ACTIVATIONS, Routing
from kernel_testing import DEVICE, DTYPES, ON_GPU, assert_as_exact_as, assert_rows_do_not_depend_on_company, draw


def some_experts(
    tokens: int,
    experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    dtype: torch.dtype = torch.float32,
    gated: bool = True,
    biases: bool = False,
    activation: str = "silu",
) -> tuple[Any, ...]:
    """The arguments of moe_mlp."""
    weights, expert_ids = reference.route(draw(tokens, experts), Routing(top_k, norm_topk_prob=True))
    rows = 2 * inner if gated else inner
    w_up = draw(experts, rows, hidden, dtype=dtype, scale=hidden**-0.5)
    w_down = draw(experts, hidden, inner, dtype=dtype, scale=inner**-0.5)
    given = (draw(experts, rows, dtype=dtype), draw(experts, hidden, dtype=dtype)) if biases else (None, None)
    return draw(tokens, hidden, dtype=dtype), weights, expert_ids, w_up, w_down, activation, gated, *given


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (63, 5), (100, 63), (16, 130)])
@pytest.mark.parametrize("tokens", [1, 7, 60])
def test_moe_mlp(tokens: int, hidden: int, inner: int, dtype: torch.dtype) -> None:
    args = some_experts(tokens, 4, 2, hidden, inner, dtype)
    assert_as_exact_as(reference.moe_mlp, *args, ours=kernels.moe_mlp(*args))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tokens", [3, 40])
def test_with_and_without_biases_and_gates(tokens: int, biases: bool, gated: bool) -> None:
    for dtype in DTYPES:
        args = some_experts(tokens, 3, 2, 40, 50, dtype, gated, biases)
        assert_as_exact_as(reference.moe_mlp, *args, ours=kernels.moe_mlp(*args))


@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_activations(activation: str) -> None:
    args = some_experts(4, 5, 3, 40, 24, biases=True, activation=activation)
    assert_as_exact_as(reference.moe_mlp, *args, ours=kernels.moe_mlp(*args))


@pytest.mark.parametrize(("tokens", "experts", "block_m"), [(8, 4, 16), (130, 40, 16), (64, 4, 64), (150, 2, 128)])
def test_every_size_of_tile(tokens: int, experts: int, block_m: int) -> None:
    assert kernels.rows_per_tile(2 * tokens, experts) == block_m
    args = some_experts(tokens, experts, 2, 48, 24)
    assert_as_exact_as(reference.moe_mlp, *args, ours=kernels.moe_mlp(*args))


@pytest.mark.parametrize(("tokens", "experts"), [(1, 3), (16, 3), (17, 3), (33, 5), (70, 5)])
def test_all_tokens_may_choose_one_expert(tokens: int, experts: int) -> None:
    x, weights, expert_ids, *rest = some_experts(tokens, experts, 1, 20, 12)
    args = (x, weights, torch.full_like(expert_ids, 2), *rest)
    assert_as_exact_as(reference.moe_mlp, *args, ours=kernels.moe_mlp(*args))


def test_a_token_may_choose_one_expert_twice() -> None:
    x, weights, _, *rest = some_experts(3, 4, 3, 20, 12)
    expert_ids = torch.tensor([[1, 3, 1], [0, 0, 0], [2, 1, 0]], device=DEVICE)
    args = (x, weights, expert_ids, *rest)
    assert_as_exact_as(reference.moe_mlp, *args, ours=kernels.moe_mlp(*args))


@pytest.mark.parametrize("tokens", [5, 80])
@pytest.mark.parametrize("nobody", [-1, 4, 2**31 - 1])
def test_a_choice_of_no_expert_is_dropped_and_its_weight_not_read(tokens: int, nobody: int) -> None:
    x, weights, expert_ids, *rest = some_experts(tokens, 4, 2, 20, 12, biases=True)
    expert_ids[::2, 0] = nobody
    expert_ids[1] = nobody
    weights[expert_ids == nobody] = math.nan
    args = (x, weights, expert_ids, *rest)
    ours = kernels.moe_mlp(*args)
    assert_as_exact_as(reference.moe_mlp, *args, ours=ours)
    assert (ours[1] == 0).all()


def test_an_expert_that_nobody_chose_is_not_read() -> None:
    x, weights, expert_ids, w_up, w_down, *rest = some_experts(4, 6, 2, 20, 12)
    unused = [expert for expert in range(6) if expert not in expert_ids.tolist()[0] + expert_ids.tolist()[1]]
    w_up[unused], w_down[unused] = math.nan, math.nan
    args = (x[:2], weights[:2], expert_ids[:2], w_up, w_down, *rest)
    assert torch.isfinite(kernels.moe_mlp(*args)).all()


def test_a_token_with_nan_does_not_touch_its_neighbours() -> None:
    x, *rest = some_experts(6, 4, 2, 20, 12)
    right = kernels.moe_mlp(x, *rest)
    x[2] = math.nan
    ours = kernels.moe_mlp(x, *rest)
    assert ours[2].isnan().all()
    assert torch.equal(ours[[0, 1, 3, 4, 5]], right[[0, 1, 3, 4, 5]])


def test_rows_may_lie_apart_and_ids_have_either_size() -> None:
    x, weights, expert_ids, *rest = some_experts(5, 4, 2, 24, 12)
    wide = draw(5, 60)
    wide[:, 20:44] = x
    right = kernels.moe_mlp(x, weights, expert_ids, *rest)
    assert torch.equal(kernels.moe_mlp(wide[:, 20:44], weights, expert_ids.int(), *rest), right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    x, weights, expert_ids, *rest = some_experts(5, 4, 2, 80, 20, dtype, biases=True)
    assert_rows_do_not_depend_on_company(lambda r: kernels.moe_mlp(x[r], weights[r], expert_ids[r], *rest), 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_and_many_tokens_give_a_token_the_same_bits(dtype: torch.dtype) -> None:
    """Tiles of 16, 64 and 128 pairs. (What that assumes of a GPU is said in moe.py.)"""
    hidden, inner = (2048, 768) if ON_GPU else (80, 20)
    x, weights, expert_ids, *rest = some_experts(140, 2, 2, hidden, inner, dtype)
    tiles, results = set(), []
    for count in (1, 8, 60, 140):
        tiles.add(kernels.rows_per_tile(2 * count, 2))
        results.append(kernels.moe_mlp(x[:count], weights[:count], expert_ids[:count], *rest))
    assert tiles == {16, 64, 128}
    for result in results:
        assert torch.equal(result, results[-1][: len(result)])


def halves(interleaved: Tensor) -> Tensor:
    """gpt-oss's gate and up, in turn along the last dimension, as two halves."""
    return torch.cat((interleaved[..., ::2], interleaved[..., 1::2]), dim=-1)


def block(name: str) -> tuple[nn.Module, Any, Any, Routing]:
    """A block of transformers, its router and its experts, and what we call its rule."""
    module: Any
    size: dict[str, Any] = {"hidden_size": 24, "num_experts_per_tok": 3}
    if name == "mixtral":
        module = MixtralSparseMoeBlock(MixtralConfig(**size, num_local_experts=6, intermediate_size=20))
        return module, module.gate, module.experts, Routing(3, norm_topk_prob=True)
    if name == "qwen3_moe":
        module = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**size, num_experts=6, moe_intermediate_size=20))
        return module, module.gate, module.experts, Routing(3)
    if name == "gpt_oss":
        module = GptOssMLP(GptOssConfig(**size, num_local_experts=6, intermediate_size=20))
        return module, module.router, module.experts, Routing(3, norm_topk_prob=True)
    groups = {"n_group": 3, "topk_group": 2, "n_routed_experts": 6, "n_shared_experts": 1}
    module = DeepseekV3MoE(DeepseekV3Config(**size, **groups, moe_intermediate_size=20))
    return module, module.gate, module.experts, Routing(3, "sigmoid", True, None, 3, 2, 2.5)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@torch.no_grad()
def test_as_the_blocks_of_transformers(name: str, implementation: str) -> None:
    module, gate, experts, routing = block(name)
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.normal_(tensor, std=0.5)
    module.to(DEVICE)
    x = draw(5, 24)
    route, moe_mlp = reference.route, reference.moe_mlp
    if implementation == "kernel":
        route, moe_mlp = moe_routing.route, kernels.moe_mlp

    logits = x @ gate.weight.T
    if name == "gpt_oss":
        logits += gate.bias
        w_up, w_down = halves(experts.gate_up_proj).mT.contiguous(), experts.down_proj.mT.contiguous()
        biases = halves(experts.gate_up_proj_bias), experts.down_proj_bias
        ours = moe_mlp(x, *route(logits, routing), w_up, w_down, "swiglu_oss", True, *biases)
        expected = module(x[None])[0][0]
    else:
        if name == "deepseek_v3":
            routing = routing._replace(correction_bias=gate.e_score_correction_bias)
        ours = moe_mlp(x, *route(logits, routing), experts.gate_up_proj, experts.down_proj, "silu", True)
        expected = module(x[None])[0]
        if name == "deepseek_v3":
            ours += module.shared_experts(x)
    assert (ours - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_no_tokens_are_fine() -> None:
    x, weights, expert_ids, *rest = some_experts(2, 4, 2, 8, 4)
    assert kernels.moe_mlp(x[:0], weights[:0], expert_ids[:0], *rest).shape == (0, 8)


def test_what_does_not_fit_is_named() -> None:
    names = ("x", "weights", "expert_ids", "w_up", "w_down", "activation", "gated", "b_up", "b_down")
    good = dict(zip(names, some_experts(2, 4, 2, 8, 6, biases=True), strict=True))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"x": draw(2, 9)}, r"w_down has shape \[4, 8, 6\]; expected \[any, 9, any\]"),
        ({"x": draw(2, 8, dtype=torch.float16)}, "w_down has dtype torch.float32"),
        ({"weights": draw(2, 3)}, r"weights has shape \[2, 3\]; expected \[2, 2\]"),
        ({"weights": draw(2, 2).double()}, "weights has dtype torch.float64"),
        ({"expert_ids": torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)}, "expert_ids has shape"),
        ({"expert_ids": torch.zeros(2, 2, device=DEVICE)}, "expert_ids has dtype torch.float32"),
        ({"w_up": draw(4, 8, 12).mT}, "w_up has strides"),
        ({"gated": False}, r"w_up has shape \[4, 12, 8\]; expected \[4, 6, 8\]"),
        ({"gated": False, "activation": "swiglu_oss"}, "activation is 'swiglu_oss'"),
        ({"activation": "tanh"}, "activation is 'tanh'; there are silu"),
        ({"b_up": draw(4, 6)}, r"b_up has shape \[4, 6\]; expected \[4, 12\]"),
        ({"b_down": draw(5, 8)}, r"b_down has shape \[5, 8\]; expected \[4, 8\]"),
    ]
    for changes, message in wrong:
        with pytest.raises(KernelError, match=message):
            kernels.moe_mlp(**{**good, **changes})
