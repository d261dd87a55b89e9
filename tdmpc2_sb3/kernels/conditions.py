"""When kernels can work on tensors, and by how many threads."""

from __future__ import annotations

import torch as th

from tdmpc2_sb3.kernels.library import library

PARALLEL_FROM = 32768  # elements; waking a second thread costs more than fewer would save


def usable(x: th.Tensor) -> bool:
    """Whether the kernels can work on this tensor here and now."""
    return (
        x.dtype is th.float32
        and x.is_cpu
        and not th.compiler.is_compiling()
        and library() is not None
    )


def threads_for(num_elements: int) -> int:
    """Threads for an operation on that many elements."""
    return th.get_num_threads() if num_elements >= PARALLEL_FROM else 1


def records_gradients(*tensors: th.Tensor | None) -> bool:
    """Whether autograd is to know of an operation on these."""
    return th.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
