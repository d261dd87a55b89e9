"""torch's Adam, with a step for all parameters at once on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch as th
from torch.optim.adam import adam

from tdmpc2_sb3.kernels import AdamArrays, adam_step, usable_arrays


class Adam(th.optim.Adam):
    """``torch.optim.Adam`` whose state and results are the same, up to rounding.

    torch's step takes an array after the other and wakes its threads for each; with some fifty
    small ones that takes longer than the arithmetic. What has no kernel (other devices, settings
    such as weight decay, a parameter's first step) is left to torch.
    """

    _arrays: AdamArrays | None = None  # of the last step

    def parameters(self) -> list[th.nn.Parameter]:
        """Those of all groups, in their order."""
        return [each for group in self.param_groups for each in group["params"]]

    def take_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Goes on with other parameters; those that it has already keep their state.

        :param groups: "params" of each, and settings that differ from the first group's so far
        """
        parameters = {id(each) for group in groups for each in group["params"]}
        if [*map(id, self.parameters())] == [id(p) for group in groups for p in group["params"]]:
            return
        settings = {key: value for key, value in self.param_groups[0].items() if key != "params"}
        self.param_groups = [{**settings, **group} for group in groups]
        for each in [each for each in self.state if id(each) not in parameters]:
            del self.state[each]

    @th.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """See :meth:`torch.optim.Adam.step`."""
        first, *others = self.param_groups
        alike = all(
            each["betas"] == first["betas"] and each["eps"] == first["eps"] for each in others
        )
        found = self._find() if closure is None and alike else None
        if found is None:
            result = super().step(closure)
            if th.get_default_dtype() is not th.float32:  # which torch counts steps in
                for state in self.state.values():
                    state["step"] = state["step"].float()
            return result
        arrays, rates = found
        adam_step(arrays, rates, first["betas"], first["eps"])
        return None

    @th.no_grad()
    def step_unless(self, failed: th.Tensor, rates: Sequence[th.Tensor]) -> None:
        """A step that is taken or not without anyone waiting for the device to know.

        :param failed: 1 if no parameter may change, else 0, [], float32
        :param rates: learning rates of the groups, [] each, instead of their own
        """
        for group, rate in zip(self.param_groups, rates, strict=True):
            beta1, beta2 = group["betas"]
            parameters: list[th.Tensor] = []
            gradients: list[th.Tensor] = []
            averages: list[th.Tensor] = []
            squares: list[th.Tensor] = []
            maxima: list[th.Tensor] = []
            steps: list[th.Tensor] = []
            arrays = (parameters, gradients, averages, squares, maxima, steps)
            has_complex = self._init_group(group, *arrays)
            adam(
                parameters,
                gradients,
                averages,
                squares,
                maxima,
                steps,
                fused=True,
                found_inf=failed,
                has_complex=has_complex,
                amsgrad=group["amsgrad"],
                beta1=beta1,
                beta2=beta2,
                lr=rate,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=group["maximize"],
            )

    def _find(self) -> tuple[AdamArrays, list[float]] | None:
        """Arrays and learning rates of the parameters that have gradients; None if torch has to
        take the step."""
        arrays: list[tuple[th.Tensor, ...]] = []
        rates = []
        for group in self.param_groups:
            rate = group["lr"]
            plain = not (group["weight_decay"] or group["amsgrad"] or group["maximize"])
            if not plain or not isinstance(rate, float):
                return None
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state.get(parameter)
                if not state:
                    return None
                arrays.append(
                    (parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"])
                )
                rates.append(rate)
        if not arrays:  # all are frozen
            return None
        if self._arrays is None or not self._arrays.are(arrays):
            if not usable_arrays([each for of_one in arrays for each in of_one]):
                return None
            self._arrays = AdamArrays(arrays)
        return self._arrays, rates
