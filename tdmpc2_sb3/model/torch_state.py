"""What of torch's modes, and of conversions of the networks, keeps them from computing."""

from __future__ import annotations

import torch as th
from torch import nn


def wrong_type(module: nn.Module) -> str | None:
    """Which parameter is no float32 one, with the remedy; None if all are.

    :param module: a policy or a part of it
    """
    for name, parameter in module.named_parameters():
        if parameter.dtype is not th.float32:
            return (
                f"The policy's {name} is {parameter.dtype}, but TDMPC2 computes in float32: call "
                "model.policy.float()."
            )
    return None


def hindrance(module: nn.Module, device: th.device) -> str | None:
    """Why no gradient steps can be made, with the remedy; None if they can.

    :param module: the policy
    :param device: of the algorithm
    """
    if th.is_inference_mode_enabled():
        return "Inside torch.inference_mode() nothing learns: call learn() outside of it."
    if th.is_autocast_enabled(device.type):
        return "Inside torch.autocast nothing learns, only in float32: call learn() outside of it."
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_inference():
            return (
                f"The policy's {name} was made inside torch.inference_mode() and cannot learn: "
                "build or load the model outside of it."
            )
        if tensor.device.type != device.type:
            return (
                f"The policy's {name} is on {tensor.device}, but the model on {device}: save the "
                "model and load it with device=..., which moves all of it."
            )
    return wrong_type(module)
