"""A GPU that is not there: tensors without memory that say they are on it, and refuse to be read.

An operation on tensors of two devices is an error, and so is one whose result the host would have to wait
for (``.item()``, ``bool()``, ``nonzero()``). A gradient would ask for a stream of a real GPU: that is what
the device ``meta`` is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


class _ByOperations(TorchFunctionMode):
    """What Python's methods do, by operations alone: a few of the methods would ask for the real GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        instead = {
            Tensor.__getitem__: _indexed,
            Tensor.contiguous: _packed,
            Tensor.__invert__: torch.bitwise_not,
        }
        if func in instead:
            return instead[func](*args)
        return func(*args, **(kwargs or {}))


def _packed(tensor: Tensor) -> Tensor:
    return torch.clone(tensor, memory_format=torch.contiguous_format)


def _indexed(tensor: Tensor, index: Any) -> Tensor:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in [part for part in parts if not isinstance(part, Tensor)]:
        place = next(i for i, part in enumerate(parts) if part is Ellipsis)
        missing = tensor.ndim - sum(part is not None for part in parts) + 1
        parts[place : place + 1] = [slice(None)] * missing
    axis = 0
    for part in parts:
        if isinstance(part, int):
            tensor = tensor.select(axis, part)
            continue
        if part is None:
            tensor = tensor.unsqueeze(axis)
        elif isinstance(part, Tensor):
            tensor = torch.ops.aten.index.Tensor(tensor, [None] * axis + [part])
        elif part != slice(None):
            tensor = torch.ops.aten.slice.Tensor(tensor, axis, part.start, part.stop, part.step or 1)
        axis += 1
    return tensor


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch, precision: str = "fp32") -> Iterator[torch.device]:
    """Within, tensors are fake and nothing is recorded for gradients; under autocast for half precision."""
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    dtype = PRECISIONS[precision]
    with FakeTensorMode(), _ByOperations(), torch.no_grad():
        # The cache of casts would record gradients.
        kind = dtype or torch.bfloat16
        with torch.autocast("cuda", kind, enabled=dtype is not None, cache_enabled=False):
            yield torch.device("cuda", 0)


def moved(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """The module with parameters and buffers that are only said to be on the device; floats of the dtype."""

    def like(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=wanted, device=device)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(like(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = like(buffer)
    return module
