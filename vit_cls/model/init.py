"""Building a model without drawing weights that are about to be replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class SkipInit(TorchFunctionMode):
    """Let no in-place function change a tensor: for building on the ``meta`` device, where nothing is.

    Half of the time of building a skeleton goes into drawing weights that do not exist.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call ``func``, unless it would change its first argument in place."""
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        kwargs = kwargs or {}
        changed = args[0] if args else kwargs.get("tensor")  # as torch.nn.init passes it on
        if in_place and isinstance(changed, Tensor):
            return changed
        return func(*args, **kwargs)
