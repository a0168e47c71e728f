"""The seam between the model and whoever computes it: the only importer of `handloom_kernels`.

A backend is a module (or object) with the functions of `Ops`, which mean exactly what
`handloom_kernels.reference` says. It is chosen once, when a model is loaded, by name or by device;
a backend that cannot be used is an error, never a silent change to another.

This module does not know about models, sequences or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from handloom.checkpoint.quantization import QuantizedMatrix, QuantizedRows
from handloom.checkpoint.quantize import quantize_rows
from handloom.errors import UnsupportedOption
from handloom.ops import torch_ops
from handloom.ops.panels import Panels
from handloom.ops.quantized_panels import QuantizedPanels
from handloom_kernels import reference
from handloom_kernels.checks import INTERPRETED
from handloom_kernels.reference import Choice, Cuts, Norm, Rotary, normalize, rotate

__all__ = [
    "BACKENDS",
    "QUANTIZED",
    "Backend",
    "Norm",
    "Ops",
    "Panels",
    "QuantizedPanels",
    "Rotary",
    "Weight",
    "choose_backend",
    "matrix",
    "normalize",
    "rotate",
]

Weight = Tensor | QuantizedMatrix | Panels | QuantizedPanels
"""A linear's weight [M, K] as its backend holds it (`Backend.hold`)."""

KVPages = Sequence[tuple[Tensor, Tensor]]


def matrix(weight: Weight) -> Tensor:
    """The weight as a plain tensor [M, K], made anew where it is held otherwise."""
    return weight if isinstance(weight, Tensor) else weight.matrix()


class Ops(Protocol):
    """The fused blocks of a decoder step; shapes and meaning stand in `handloom_kernels.reference`."""

    def embed(
        self, input_ids: Tensor, weight: Weight, scale: float, positions: Tensor, position_weight: Tensor | None
    ) -> Tensor: ...

    def norm_qkv(
        self,
        hidden: Tensor,
        norm: Norm,
        weight: Weight,
        bias: Tensor | None,
        q_norm: Norm | None,
        k_norm: Norm | None,
        rotary: Rotary | None,
        k_pages: Tensor,
        v_pages: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor: ...

    def paged_attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        page_table: Tensor,
        cu_seqlens: Tensor,
        context_lens: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        *,
        query_lens: Sequence[int],
    ) -> Tensor: ...

    def linear_residual(
        self, x: Tensor, weight: Weight, bias: Tensor | None, post_norm: Norm | None, residual: Tensor
    ) -> Tensor: ...

    def norm_mlp(
        self, hidden: Tensor, norm: Norm, weight: Weight, bias: Tensor | None, activation: str, gated: bool
    ) -> Tensor: ...

    def lm_head(self, hidden: Tensor, norm: Norm, weight: Weight, softcap: float | None) -> Tensor: ...


class Chooser(Protocol):
    """The choice of tokens without a word to the host; what is meant stands in `handloom_kernels.reference`."""

    def find_cuts(
        self,
        scores: Tensor,
        temperature: Tensor | None = None,
        top_k: Tensor | None = None,
        top_p: Tensor | None = None,
        min_p: Tensor | None = None,
    ) -> Cuts: ...

    def draw(
        self,
        scores: Tensor,
        seeds: Tensor | None,
        positions: Tensor | None,
        temperature: Tensor | None = None,
        greedy: Tensor | None = None,
        logits: Tensor | None = None,
        cuts: Cuts | None = None,
        top_n: int = 0,
    ) -> Choice: ...


Compute = Callable[[Ops, Sequence[Rotary], KVPages], Tensor]
"""A model's step as a function of the ops to call, the rotations and the pages."""


class Program(Protocol):
    """A model's whole step in one call, with the very results of its ops one by one."""

    def run(self, compute: Compute, batch: Any, rotaries: Callable[[Tensor], list[Rotary]], kv: KVPages) -> Tensor:
        """One step of a `HostBatch` of token ids: K and V into their pages, logits [R, vocab_size] float32.

        compute: the model's code, always the same, which is called where a program is yet to be recorded; rotaries: of
        positions int64 [N], asked of more of them than the step has, and seldom; kv: kept for the steps that follow,
        and never to be changed.
        """
        ...


def _as_it_is(weight: Weight) -> Weight:
    return weight


@dataclass(frozen=True, slots=True)
class Backend:
    """What computes the model, and why it was chosen; `str(backend)` is what a user is told.

    hold: a linear's weight in the form that this backend's ops read, which takes its place; take: the
    same in the weight's own memory where that goes. quantize: float rows to codes, see
    `handloom.checkpoint.quantize.quantize_rows`. program: makes an empty Program for a model; None where steps run op
    by op. chooser: of tokens, where the device chooses by itself; capturable: whether neither the ops nor it ever ask
    the device for a value.
    """

    name: str
    ops: Ops
    reason: str
    hold: Callable[[Any], Weight] = _as_it_is
    take: Callable[[Any], Weight] = _as_it_is
    quantize: Callable[[Tensor, QuantizedRows], None] = quantize_rows
    program: Callable[[], Program] | None = None
    chooser: Chooser = cast(Chooser, reference)  # noqa: RUF009
    capturable: bool = False

    @property
    def quantized(self) -> Literal["computed", "expanded", "no"]:
        """What it does with quantised matrices; see QUANTIZED."""
        return QUANTIZED.get(self.name, "no")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


MAX_TRITON_HEAD_DIM = 256
BACKENDS = {
    "cpu": "compiled blocks for the CPU",
    "reference": "plain formulas in PyTorch, the oracle: slow",
    "torch": "PyTorch's own fused operators and BLAS",
    "triton": "the fused Triton kernels of handloom_kernels",
}


QUANTIZED: dict[str, Literal["computed", "expanded"]] = {"cpu": "computed", "torch": "expanded"}
"""Backends that take quantised matrices: they compute on them, or make them floats at each use, which is slow."""


def choose_backend(device: torch.device, name: str = "auto", head_dims: Collection[int] = ()) -> Backend:
    """Pick a backend for a device and a model with heads of these sizes.

    Raises UnsupportedOption for a name that is not in BACKENDS, or that cannot run there or with that model.
    """
    if name == "auto":
        if device.type == "cpu":
            return _cpu(device, "the default on cpu")
        return Backend("torch", cast(Ops, torch_ops), f"{BACKENDS['torch']}; the default on {device.type}")
    if name not in BACKENDS:
        raise UnsupportedOption(f"backend {name!r} does not exist; choose 'auto' or one of {', '.join(BACKENDS)}")
    if name == "cpu":
        return _cpu(device, "asked for by name")
    why = f"{BACKENDS[name]}; asked for by name"
    plain = {"reference": reference, "torch": torch_ops}
    if name in plain:
        return Backend(name, cast(Ops, plain[name]), why)
    ops = _triton_ops(device, head_dims)
    return Backend(name, ops, why, chooser=cast(Chooser, ops), capturable=True)


def _cpu(device: torch.device, why: str) -> Backend:
    if device.type != "cpu":
        raise UnsupportedOption(f"backend 'cpu' runs on a CPU and the model is on {device}; choose 'torch'")
    from handloom.ops import cpu

    cpu.require()
    units = ", VNNI for weights in fewer bits" if cpu.compiled.has_words() else ""
    units = ", AMX for weights in bfloat16 and in fewer bits" if cpu.matrix_units.usable() else units
    program = cast(Callable[[], Program], cpu.Program)
    return Backend(
        "cpu", cast(Ops, cpu), f"{BACKENDS['cpu']}{units}; {why}", cpu.hold, cpu.take, cpu.quantize_rows, program
    )


Perturb = Callable[[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]
"""Scores [R, V] with Gumbel noise added, by floors [R] and keys [R, 3]: see `handloom.ops.cpu.perturb`."""


def perturb_on_cpu() -> Perturb | None:
    """`cpu.perturb`, in a process that has compiled code in memory because a model of that backend was loaded."""
    from handloom.ops import cpu

    return cpu.perturb if cpu.is_loaded() else None


def _triton_ops(device: torch.device, head_dims: Collection[int]) -> Ops:
    for head_dim in head_dims:
        if head_dim % 2 or head_dim > MAX_TRITON_HEAD_DIM:
            raise UnsupportedOption(
                f"this model has heads of {head_dim} dimensions; 'triton' takes even numbers up to "
                f"{MAX_TRITON_HEAD_DIM}; choose 'torch'"
            )
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        raise UnsupportedOption(
            f"backend 'triton' needs a GPU and the model is on {device}; choose 'torch', or set TRITON_INTERPRET=1 "
            "before Python starts to let Triton's interpreter run the kernels on the CPU, thousands of times slower"
        )
    if device.type == "cuda" and device.index not in (None, 0):
        raise UnsupportedOption(
            f"backend 'triton' runs on the first GPU that a process sees, and the model is on {device}; start it with "
            f"CUDA_VISIBLE_DEVICES={device.index} and choose device='cuda', or choose 'torch'"
        )
    try:
        from handloom.ops.triton_ops import TritonOps
    except ImportError as error:
        raise UnsupportedOption(f"backend 'triton' needs the package triton: {error}; choose 'torch'") from error
    return cast(Ops, TritonOps(device))
