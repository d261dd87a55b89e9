"""Matrix products in float32 on a CPU by whichever of torch's two libraries is faster.

On x86 torch multiplies by MKL, and holds oneDNN beside it, whose products of these sizes are a
tenth faster, and a quarter where a row is no multiple of a cache line (latent and action
together). torch's compiler calls it by an operator of its own, which is used here if it is there
and right.
"""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch as th

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

Product = Callable[..., th.Tensor]
SMALL = 2**24  # multiply-adds; oneDNN lays a weight out anew in every call, which must pay


@functools.cache
def onednn_linear() -> Product | None:
    """x W^T + b by oneDNN; None where that is not faster or not there."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        operator = th.ops.mkldnn._linear_pointwise

        def product(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
            return operator(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]

        x, weight, bias = th.ones(32, 3), th.full((5, 3), 2.0), th.ones(5)
        right = bool((product(x, weight, bias) == 7.0).all())
    except (AttributeError, RuntimeError, TypeError):  # an operator without promises
        return None
    return product if right else None


def linear_product(x: th.Tensor, weight: th.Tensor, bias: th.Tensor | None) -> th.Tensor:
    """x W^T + b, without gradients.

    :param x: [B, in]
    :param weight: [out, in]
    :param bias: [out] or None
    """
    fast = onednn_linear() if len(x) * weight.numel() >= SMALL else None
    if fast is not None and x.is_contiguous() and weight.is_contiguous():
        return fast(x, weight, bias)
    return x @ weight.t() if bias is None else th.addmm(bias, x, weight.t())


def grad_input(grad: th.Tensor, weight: th.Tensor) -> th.Tensor:
    """Gradient of :func:`linear_product` by x, grad W.

    :param grad: [B, out]
    :param weight: [out, in]
    """
    fast = onednn_linear() if len(grad) * weight.numel() >= SMALL else None
    # On a cut of columns oneDNN falls back to a loop that is a thousand times slower.
    if fast is not None and weight.is_contiguous():
        return fast(grad, weight.t(), None)
    return grad @ weight


def _count_operations(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def operation_counter() -> FlopCounterMode:
    """torch's counter of operations, which does not know oneDNN's operator by itself."""
    # Not at the top: it imports triton where there is one, whose library crashes the process once
    # a software renderer (Mesa's) has brought its own LLVM.
    from torch.utils.flop_counter import FlopCounterMode

    _register_operator()
    onednn_linear()  # tries itself out at the first call, which is not to be counted
    return FlopCounterMode(display=False)


@functools.cache
def _register_operator() -> None:
    from torch.utils.flop_counter import register_flop_formula

    if hasattr(th.ops.mkldnn, "_linear_pointwise"):
        register_flop_formula(th.ops.mkldnn._linear_pointwise)(_count_operations)
