"""Points inside the forward pass where a caller can look at values, or change them: names, captures, patches.

Names are TransformerLens', on every family. Where it differs between models, one meaning is chosen: `hook_rot_q` and
`hook_rot_k` are what attention multiplies, normed per head and rotated where the model does that, and are there on
every model; `hook_q` and `hook_k` come before both; `ln_final.hook_normalized` is what the head multiplies, weight and
bias included; outputs of a half layer (`hook_attn_out`, `hook_mlp_out`) are what is added to the residual stream.

A function is called once for each forward pass and each sequence, with the values of the tokens that are computed then:
all of a short prompt, a piece of a long one, one token when decoding. Tokens whose K and V are in the cache already are
not computed, and not seen. The other sequences of the batch are not touched.

This module does not know what a sequence is beyond its length, nor who runs a batch.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from handloom.errors import HandloomError, InvalidParam, RequestFailed
from handloom.model.batch import ForwardBatch
from handloom.model.spec import LayerSpec, ModelSpec

PATTERN = "attn.hook_pattern"
Points = dict[str, tuple[int | str, ...]]


def hook_points(spec: ModelSpec) -> Points:
    """Every point by name, in the order of computing, with the shape of its values for one sequence.

    "n" stands for the tokens of the sequence in this pass, "context" for those it has in the cache then.
    """
    points: Points = {"hook_embed": ("n", spec.hidden_size)}
    for i, layer in enumerate(spec.layers):
        points |= {f"blocks.{i}.{name}": shape for name, shape in _block_points(spec.hidden_size, layer).items()}
    return points | {"ln_final.hook_normalized": ("n", spec.hidden_size)}


def _block_points(hidden_size: int, layer: LayerSpec) -> Points:
    mixer, hidden = layer.mixer, ("n", hidden_size)
    q, kv = ("n", mixer.num_heads, mixer.head_dim), ("n", mixer.num_kv_heads, mixer.head_dim)
    return {
        "hook_resid_pre": hidden,
        "attn.hook_q": q,
        "attn.hook_k": kv,
        "attn.hook_v": kv,
        "attn.hook_rot_q": q,
        "attn.hook_rot_k": kv,
        PATTERN: (mixer.num_heads, "n", "context"),
        "attn.hook_z": q,
        "hook_attn_out": hidden,
        "hook_resid_mid": hidden,
        "mlp.hook_post": ("n", layer.mlp.intermediate_size),
        "hook_mlp_out": hidden,
        "hook_resid_post": hidden,
    }


@dataclass(frozen=True, slots=True)
class At:
    """Where a hook's function is called: the point's name, positions [n] int64 of the tokens, and whose they are."""

    point: str
    positions: Tensor
    sequence: Sized


Function = Callable[[Tensor, At], Tensor | None]


@dataclass(frozen=True, slots=True, eq=False)
class Hook:
    """A function at some points, for one sequence or (None) all. `changes`: it is given a copy, which it may change."""

    points: frozenset[str]
    function: Function
    changes: bool
    sequence: Sized | None


class Hooks:
    """The hooks that are open on one model. Several at one point run in the order in which they were opened."""

    def __init__(self, spec: ModelSpec) -> None:
        self.points = hook_points(spec)
        self.version = 0
        self._open: list[Hook] = []

    def __bool__(self) -> bool:
        return bool(self._open)

    @contextmanager
    def opened(
        self, points: str | Iterable[str], function: Function, *, changes: bool, sequence: Sized | None
    ) -> Iterator[None]:
        """Have the function called at these points (`*` matches any text) while this is open. Raises InvalidParam."""
        hook = Hook(frozenset(self._named(points)), function, changes, sequence)
        self._open.append(hook)
        self.version += 1
        try:
            yield
        finally:
            self._open.remove(hook)
            self.version += 1

    def _named(self, points: str | Iterable[str]) -> Iterator[str]:
        for name in [points] if isinstance(points, str) else points:
            found = fnmatch.filter(self.points, name) if isinstance(name, str) else []
            if not found:
                raise InvalidParam(self._no_such_point(name))
            yield from found

    def _no_such_point(self, name: object) -> str:
        last = max(i for i in range(len(self.points)) if f"blocks.{i}.hook_resid_pre" in self.points)
        return (
            f"there is no hook point {name!r}; lm.hook_points() lists them all, such as 'blocks.{last}.hook_resid_post'"
        )

    def step(
        self, sequences: Sequence[Sized], batch: ForwardBatch, own: Sequence[Hook | None] = ()
    ) -> StepHooks | None:
        """What is to be done in one pass over these sequences, the batch's in order; None for nothing.

        own: a further hook of each, for this pass; the sequence of one with unknown points has an InvalidParam.
        """
        starts, opened = batch.cu_seqlens.tolist(), tuple(self._open)
        visits: dict[str, list[Visit]] = {}
        errors: dict[int, HandloomError] = {}
        for i, (sequence, further) in enumerate(itertools.zip_longest(sequences, own)):
            rows = slice(starts[i], starts[i + 1])
            span = Span(i, rows, batch.positions[rows], sequence)
            hooks = [hook for hook in opened if hook.sequence is None or hook.sequence is sequence]
            if further is not None:
                if unknown := sorted(further.points - self.points.keys()):
                    errors[i] = InvalidParam(self._no_such_point(unknown[0]))
                hooks.append(further)
            for point in {point for hook in hooks for point in hook.points}:
                visits.setdefault(point, []).append(Visit(span, [hook for hook in hooks if point in hook.points]))
        return StepHooks(visits, errors) if visits or errors else None


class Span(NamedTuple):
    """One sequence's rows in a batch: which sequence it is there, its rows, their positions, and itself."""

    which: int
    rows: slice
    positions: Tensor
    sequence: Sized


class Visit(NamedTuple):
    """The hooks of one sequence at one point."""

    span: Span
    hooks: list[Hook]

    @property
    def changes(self) -> bool:
        return any(hook.changes for hook in self.hooks)


class StepHooks:
    """The hooks of one forward pass, by point.

    errors: what went wrong in a hook, by the index of its sequence in the batch. No hook sees that sequence again in
    this pass, and what the pass computes of it is worth nothing; the other rows are what they would have been.
    """

    def __init__(self, visits: Mapping[str, list[Visit]], errors: dict[int, HandloomError]) -> None:
        self._visits = visits
        self.errors = errors

    @property
    def patched(self) -> set[int]:
        """Indices in the batch of the sequences whose values a hook may change."""
        return {visit.span.which for own in self._visits.values() for visit in own if visit.changes}

    def within(self, prefix: str) -> bool:
        """Whether a point whose name begins so is hooked."""
        return any(point.startswith(prefix) for point in self._visits)

    def visit(self, point: str, read: Callable[[Span], Tensor], write: Callable[[Span, Tensor], object]) -> None:
        """Show the point's values of each hooked sequence to its hooks; write back what a patch made of them.

        Where a hook raises, its sequence has a RequestFailed in `errors`; where a patch returns something else than
        such values, an InvalidParam.
        """
        for visit in self._visits.get(point, ()):
            span = visit.span
            if span.which in self.errors:
                continue
            at, values = At(point, span.positions, span.sequence), read(span)
            try:
                for hook in visit.hooks:
                    values = _after(hook, values, at)
            except HandloomError as error:
                self.errors[span.which] = error
                continue
            if visit.changes:
                write(span, values)

    def rows(self, point: str, values: Tensor) -> None:
        """`visit` for a point whose values lie open: rows of [N, ...], patched in place."""
        self.visit(point, lambda span: values[span.rows], lambda span, new: values[span.rows].copy_(new))


def _after(hook: Hook, values: Tensor, at: At) -> Tensor:
    """The values a hook has seen, or what a patch made of a copy. Raises RequestFailed with the exception as its cause,
    InvalidParam."""
    given = values.clone() if hook.changes else values
    try:
        new = hook.function(given, at)
    except Exception as cause:
        raise RequestFailed(f"the {'patch' if hook.changes else 'hook'} of {at.point} raised {cause!r}") from cause
    if not hook.changes or new is None:
        return given
    if not isinstance(new, Tensor) or new.shape != values.shape:
        what = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise InvalidParam(
            f"the patch of {at.point} returned {what}; expected a tensor {list(values.shape)} like the one it was "
            "given, or None after changing that in place"
        )
    return new.to(values)


# What was seen ---------------------------------------------------------------------------------


class Captured:
    """One sequence's values by point: [n, ...] for all its tokens that were computed, in the order of computing."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Tensor]] = {}
        self._positions: dict[str, list[Tensor]] = {}

    def add(self, at: At, values: Tensor, rows: Tensor | None) -> None:
        """Keep a copy of the values (of these rows only)."""
        dim = _tokens_dim(at.point)
        kept = values.clone() if rows is None else values.index_select(dim, rows)
        self._pieces.setdefault(at.point, []).append(kept)
        self._positions.setdefault(at.point, []).append(at.positions if rows is None else at.positions[rows])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __getitem__(self, point: str) -> Tensor:
        """[n, ...]; patterns are [num_heads, n, context], zero for keys that came later. Raises InvalidParam."""
        pieces = self._of(self._pieces, point)
        width = max(piece.shape[-1] for piece in pieces)
        return torch.cat([F.pad(piece, (0, width - piece.shape[-1])) for piece in pieces], dim=_tokens_dim(point))

    def positions(self, point: str) -> Tensor:
        """Positions [n] int64 of the tokens of `self[point]`; one computed twice stands twice. Raises InvalidParam."""
        return torch.cat(self._of(self._positions, point))

    def _of(self, pieces: dict[str, list[Tensor]], point: str) -> list[Tensor]:
        if point not in pieces:
            raise InvalidParam(f"{point!r} was not captured; captured were: {', '.join(pieces) or 'no points'}")
        return pieces[point]


def _tokens_dim(point: str) -> int:
    return 1 if point.endswith(PATTERN) else 0


class Activations:
    """What a capture saw: `acts[point]` of the only sequence, `acts.of(sequence)[point]` of one of several.

    positions "all": every token that was computed; "last": in each pass only a sequence's last token, so that row i is
    what the i-th new token was chosen from. Values stay on the model's device until this object goes.
    """

    def __init__(self, positions: Literal["all", "last"] = "all") -> None:
        if positions not in ("all", "last"):
            raise InvalidParam(f"positions is {positions!r}; expected 'all' or 'last'")
        self._last_only = positions == "last"
        self._in_order: list[Captured] = []
        self._by_sequence: WeakKeyDictionary[Sized, Captured] = WeakKeyDictionary()

    def add(self, values: Tensor, at: At) -> None:
        """The hook's function."""
        rows = None
        if self._last_only:
            rows = (at.positions == len(at.sequence) - 1).nonzero().flatten()
            if not len(rows):
                return
        if at.sequence not in self._by_sequence:
            self._in_order.append(self._by_sequence.setdefault(at.sequence, Captured()))
        self._by_sequence[at.sequence].add(at, values, rows)

    def __len__(self) -> int:
        """Sequences seen."""
        return len(self._in_order)

    def of(self, sequence: Sized | int) -> Captured:
        """What was seen of a sequence, or of the i-th that ran (the i-th of a list of prompts). Raises InvalidParam."""
        if isinstance(sequence, int):
            if not 0 <= sequence < len(self):
                raise InvalidParam(f"{len(self)} sequences ran while the capture was open; there is no {sequence}")
            return self._in_order[sequence]
        if sequence not in self._by_sequence:
            raise InvalidParam("no token of this sequence was computed while the capture was open")
        return self._by_sequence[sequence]

    def __getitem__(self, point: str) -> Tensor:
        """See Captured. Raises InvalidParam unless exactly one sequence was seen."""
        if len(self) > 1:
            raise InvalidParam(f"{len(self)} sequences were captured; say whose: acts.of(sequence)[{point!r}]")
        return self.of(0)[point]
