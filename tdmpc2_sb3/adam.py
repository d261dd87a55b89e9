"""torch's Adam, with a step for all parameters at once on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch as th

from tdmpc2_sb3.kernels import adam_step, readable


class Adam(th.optim.Adam):
    """``torch.optim.Adam`` whose state and results are the same, up to rounding.

    torch's step takes an array after the other and wakes its threads for each; with some fifty
    small ones that takes longer than the arithmetic. What has no kernel (other devices, settings
    such as weight decay, a parameter's first step) is left to torch.
    """

    @th.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See :meth:`torch.optim.Adam.step`."""
        groups = [_Arrays(self, group) for group in self.param_groups]
        first, *others = self.param_groups
        alike = all(
            each["betas"] == first["betas"] and each["eps"] == first["eps"] for each in others
        )
        if closure is not None or not alike or not all(each.complete for each in groups):
            return super().step(closure)
        lists = [[array for group in groups for array in group.lists[i]] for i in range(5)]
        rates = [group.rate for group in groups for _ in group.lists[0]]
        adam_step(*lists, rates, first["betas"], first["eps"])  # type: ignore[call-arg, arg-type]
        return None


class _Arrays:
    """Parameters, gradients, two running means and steps of one group.

    :param optimizer: whose state is read
    :param group: of its parameters
    """

    def __init__(self, optimizer: th.optim.Adam, group: dict[str, Any]):
        self.rate = group["lr"]
        self.lists: tuple[list[th.Tensor], ...] = ([], [], [], [], [])
        plain = not (group["weight_decay"] or group["amsgrad"] or group["maximize"])
        self.complete = plain and isinstance(self.rate, float)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state.get(parameter)
            if not state:
                self.complete = False
                return
            arrays = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
            if not readable(arrays):
                self.complete = False
                return
            for array, found in zip((*arrays, state["step"]), self.lists, strict=True):
                found.append(array)
