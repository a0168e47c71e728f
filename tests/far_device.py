"""A GPU for tests without a GPU: tensors that say they are on it, and may not be mixed with those in host memory.

Inside `with FarDevice()` whatever is asked for on "cuda" is made in host memory and says that it is there. As on a
GPU, an operation on tensors of both places is refused, unless one of them is a single number or the operation is a
copy; so are `numpy()` and a NumPy array made of one. What an operation computes is what the CPU computes, at once.
`waits` counts how often the host asked for a value.

Nothing here knows handloom, or how a device orders its work: for that there is late_stream.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CUDA = torch.device("cuda", 0)
WAITS = {
    "item",
    "tolist",
    "nonzero",
    "unique",
    "masked_select",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "argwhere",
}
CROSSING = {"copy_", "__getitem__", "to", "cpu", "index_put_"}
IN_PLACE = {
    f"__i{operation}__" for operation in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor", "pow")
}
REFUSED = {"numpy", "__array__", "__dlpack__"}


class Far(Tensor):
    """A tensor in host memory that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def near(value: Any) -> Any:
    """The same without what it says of its place."""
    if isinstance(value, Far):
        with torch._C.DisableTorchFunctionSubclass():
            return value.as_subclass(Tensor)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        made = [near(each) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return {name: near(each) for name, each in value.items()} if isinstance(value, dict) else value


def far(value: Any) -> Any:
    """The same, every tensor in it on the device."""
    if isinstance(value, Tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return value if isinstance(value, Far) else value.as_subclass(Far)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        made = [far(each) for each in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from tensors(each)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def is_far(device: Any) -> bool:
    return device is not None and not isinstance(device, Tensor | int) and torch.device(device).type == "cuda"


def target_of(args: Any, kwargs: Any) -> Any:
    """The device that `to` is asked for; None where it is asked for a dtype alone."""
    for each in (*args[1:], *kwargs.values()):
        if isinstance(each, (torch.device, str)):
            return torch.device(each)
        if isinstance(each, Tensor):
            return CUDA if isinstance(each, Far) else torch.device("cpu")
    return None


class FarDevice(TorchFunctionMode):
    """waits: how often the host waited for the device."""

    current: FarDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __enter__(self) -> FarDevice:
        FarDevice.current = self
        super().__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        super().__exit__(*why)
        FarDevice.current = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in ("to", "copy_") and is_far(kwargs.get("device")):
            given = [*tensors(args), *tensors({key: each for key, each in kwargs.items() if key != "device"})]
            if any(not isinstance(each, Far) and each.dim() for each in given) and name not in ("tensor", "as_tensor"):
                raise RuntimeError(f"{name} on the device, of a tensor in host memory")
            return far(func(*near(args), **near({**kwargs, "device": "cpu"})))
        return compute(func, args, kwargs)


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    name = getattr(func, "__name__", "")
    if name == "to":
        target = target_of(args, kwargs)
        target = args[0].device if target is None else target
        moved = target.type != args[0].device.type
        words = [torch.device("cpu") if isinstance(each, (torch.device, str)) else near(each) for each in args[1:]]
        named = {key: torch.device("cpu") if key == "device" else near(each) for key, each in kwargs.items()}
        out = func(near(args[0]), *words, **named)
        out = out.clone() if moved else out
        return far(out) if target.type == "cuda" else out
    given = [*tensors(args), *tensors(kwargs)]
    if not any(isinstance(each, Far) for each in given):
        return func(*args, **kwargs)
    if name in REFUSED:
        raise TypeError(f"{name}: can't convert a tensor on {CUDA} to numpy; copy it to host memory first")
    if name == "cpu":
        return near(args[0]).clone()
    if name == "__get__":  # a property
        return far(func(*near(args))) if isinstance(func(*near(args)), Tensor) else func(*near(args))
    close = [each for each in given if not isinstance(each, Far) and each.dim()]
    if (
        close
        and name not in CROSSING
        and not (name == "__setitem__" and isinstance(args[2], Tensor) and is_plain(args[1]))
    ):
        shapes = [tuple(each.shape) for each in close]
        raise RuntimeError(f"{name}: expected all tensors to be on {CUDA}, but those of shapes {shapes} are not")
    if name in ("__getitem__", "index_put_") and not isinstance(args[0], Far):
        raise RuntimeError(f"{name}: a tensor in host memory, and an index on {CUDA}")
    current = FarDevice.current
    waits = name in WAITS or (name == "__getitem__" and any(each.dtype == torch.bool for each in tensors(args[1])))
    if waits and current is not None:
        current.waits += 1
    out = func(*near(args), **near(kwargs))
    if name == "copy_" or (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE:
        return args[0] if isinstance(out, Tensor) else out
    if "out" in kwargs:
        return kwargs["out"]
    return far(out)


def is_plain(index: Any) -> bool:
    """Whether an index takes a view: numbers, slices, None and `...` alone."""
    return not any(True for _ in tensors(index)) and not any(
        isinstance(each, list) for each in (index if isinstance(index, tuple) else (index,))
    )
