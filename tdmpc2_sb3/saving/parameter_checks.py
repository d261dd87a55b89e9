"""Whether saved parameters, optimisers and random streams fit the agent that takes them.

torch and the kernels go by the sizes of an agent's own parameters: a moment of one number beside a
weight of a thousand would be read beyond its end. So every tensor is compared with its counterpart
before it is taken over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch as th
from gymnasium import spaces
from torch import nn

from tdmpc2_sb3.model.world_model import Architecture, WorldModel
from tdmpc2_sb3.saving.attribute_checks import short
from tdmpc2_sb3.saving.episode_state import check_episodes
from tdmpc2_sb3.saving.random_streams import checked_stream

_REMEDY = "use another copy or an earlier checkpoint"
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_FLAGS = ("amsgrad", "maximize", "foreach", "fused", "decoupled_weight_decay")
_SCALE = "scale"  # of Q, at least 1


def check_tensor(
    name: str,
    value: Any,
    shape: tuple[int, ...],
    dtype: th.dtype | None = None,
    least: float = -math.inf,
) -> None:
    """Refuse what is no tensor of that shape and type, or holds numbers out of range.

    :param name: how to call it in an error
    :param shape: the only one that fits
    :param dtype: the only one that fits; None: any of floats
    :param least: smallest number that fits
    :raises ValueError: in one sentence
    """
    if not isinstance(value, th.Tensor) or value.layout != th.strided or value.is_meta:
        raise ValueError(f"The saved {name} is {short(value)} and no plain tensor: {_REMEDY}.")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"The saved {name} has the shape {tuple(value.shape)} and this agent's is "
            f"{tuple(shape)}: load it into an agent of the same sizes, or {_REMEDY}."
        )
    kind = value.is_floating_point() if dtype is None else value.dtype == dtype
    if not kind:
        raise ValueError(
            f"The saved {name} is of {value.dtype} where {dtype or 'floats'} are needed: {_REMEDY}."
        )
    if value.is_floating_point() and not bool(th.isfinite(value).all()):
        raise ValueError(f"The saved {name} holds numbers that are not finite: {_REMEDY}.")
    if value.numel() and least > -math.inf and float(value.min()) < least:
        raise ValueError(
            f"The saved {name} holds {float(value.min()):g}, which is below {least:g}: {_REMEDY}."
        )


def check_module(module: nn.Module, state: Any, name: str, whole: bool) -> None:
    """Refuse a state dict whose entries are not those of ``module``.

    :param whole: whether it is all that was saved: every entry is there, and Q's scale is at least
        1, as learning leaves it; what a program puts together may be a part
    :raises ValueError: in one sentence
    """
    own = module.state_dict()
    _check_names(name, state, own, whole)
    for key, value in state.items():
        mine = own[key]
        if not isinstance(mine, th.Tensor):
            continue  # a user's module's extra state
        dtype = None if mine.is_floating_point() else mine.dtype
        least = 1.0 if whole and key == _SCALE and not mine.ndim else -math.inf
        check_tensor(f"{name} {key!r}", value, tuple(mine.shape), dtype, least)


def _check_names(name: str, given: Any, own: Mapping[str, Any], complete: bool) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"The saved {name} is {short(given)} and no state dict: {_REMEDY}.")
    unknown = [key for key in given if key not in own]
    missing = [key for key in own if key not in given] if complete else []
    for problem, keys in (("lacks", missing), ("has the unknown", unknown)):
        if keys:
            raise ValueError(
                f"The saved {name} {problem} entry {short(keys[0])}: load it into an agent of "
                f"the same kind and sizes, or {_REMEDY}."
            )


def check_optimizer(optimizer: th.optim.Optimizer, state: Any, name: str) -> None:
    """Refuse the state of an optimiser of other parameters, or of other shapes.

    :raises ValueError: in one sentence
    """
    own = optimizer.state_dict()
    _check_names(name, state, own, complete=True)
    groups, given = own["param_groups"], state["param_groups"]
    if not isinstance(given, (list, tuple)) or len(given) != len(groups):
        raise ValueError(
            f"The saved {name} has not the {len(groups)} groups of this agent's: {_REMEDY}."
        )
    for mine, theirs in zip(groups, given, strict=True):
        if not isinstance(theirs, dict) or theirs.get("params") != mine["params"]:
            raise ValueError(f"The saved {name} is of other parameters: {_REMEDY}.")
        for key, value in mine.items():
            # torch itself fills in flags, which former versions had not.
            if not isinstance(value, bool | None) and theirs.get(key) is None:
                raise ValueError(f"The saved {name} lacks its {key}: {_REMEDY}.")
        for key, value in theirs.items():
            if key != "params":
                _check_setting(f"{name}'s {key}", str(key), value, mine.get(key))
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    options = [group for group in given for _ in group["params"]]
    of_each = state["state"]
    if not isinstance(of_each, dict):
        raise ValueError(f"The saved {name} is damaged: {_REMEDY}.")
    for index, values in of_each.items():
        if type(index) is not int or not 0 <= index < len(parameters):
            raise ValueError(
                f"The saved {name} is of a parameter {short(index)}, which this agent has not: "
                f"{_REMEDY}."
            )
        if not isinstance(values, dict):
            raise ValueError(f"The saved {name} of parameter {index} is damaged: {_REMEDY}.")
        if isinstance(optimizer, th.optim.Adam):
            _check_moments(
                f"{name} of parameter {index}", parameters[index], values, options[index]
            )
        else:
            _check_others(f"{name} of parameter {index}", parameters[index], values)


def _check_moments(
    name: str, parameter: th.Tensor, values: dict[str, Any], options: dict[str, Any]
) -> None:
    """Adam's: a counter and two or three arrays, all of them or none."""
    if not values:
        return
    names = _MOMENTS if options.get("amsgrad") or "max_exp_avg_sq" in values else _MOMENTS[:2]
    _check_names(name, values, dict.fromkeys((*names, "step")), complete=True)
    for key in names:
        least = -math.inf if key == "exp_avg" else 0.0
        check_tensor(f"{name}: {key}", values[key], tuple(parameter.shape), parameter.dtype, least)
    step = values["step"]
    check_tensor(f"{name}: step", th.tensor(step) if _is_number(step) else step, (), None, 0.0)


def _check_others(name: str, parameter: th.Tensor, values: dict[str, Any]) -> None:
    """Any other optimiser's: nothing larger than the parameter, nothing that is not finite."""
    for key, value in values.items():
        if isinstance(value, th.Tensor):
            if value.numel() > max(parameter.numel(), 1):
                raise ValueError(
                    f"The saved {name}: {key} has the shape {tuple(value.shape)} beside a "
                    f"parameter of {tuple(parameter.shape)}: {_REMEDY}."
                )
            dtype = None if value.is_floating_point() else value.dtype
            check_tensor(f"{name}: {key}", value, tuple(value.shape), dtype)
        else:
            _check_setting(f"{name}: {key}", "", value, None)


def _check_setting(name: str, key: str, value: Any, own: Any) -> None:
    """A setting of a group: a finite number that is not negative, a flag, or betas."""
    if key in ("capturable", "differentiable"):
        fits = value is own or own is None
    elif key in _FLAGS or value is None or isinstance(value, (bool, str)):
        fits = isinstance(value, (bool, str)) or value is None
    elif isinstance(value, th.Tensor):
        fits = value.ndim == 0 and value.is_floating_point() and 0.0 <= float(value) < math.inf
    elif key == "betas":
        fits = isinstance(value, (tuple, list)) and len(value) == 2
        fits = fits and all(_is_number(each) and 0.0 <= each < 1.0 for each in value)
    else:
        fits = _is_number(value) and (0.0 <= value < math.inf)
    if isinstance(own, (int, float, tuple)) and not isinstance(own, bool):
        fits = fits and isinstance(value, (int, float, tuple, list, th.Tensor))
    if not fits:
        raise ValueError(f"The saved {name} is {short(value)}, which is out of range: {_REMEDY}.")


def check_generator(name: str, generator: th.Generator, state: Any) -> None:
    """Refuse what is no state of such a generator.

    :raises ValueError: in one sentence
    """
    own = generator.get_state()
    check_tensor(f"random stream {name!r}", state, tuple(own.shape), th.uint8)
    try:
        th.Generator(generator.device).set_state(state.cpu())
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"The saved random stream {name!r} is damaged ({reason}): {_REMEDY}."
        ) from error


def check_world_model(
    observation_space: spaces.Space,
    action_dim: int,
    architecture: Architecture,
    dynamics: tuple[str, dict[str, Any] | None],
    episodic: bool,
    normalize_images: bool,
    weights: Mapping[str, Any],
) -> None:
    """Refuse sizes of a world model other than those of its saved weights.

    It is built on the meta device, which takes no memory.

    :param dynamics: kind and further arguments
    :param weights: the policy's state dict
    :raises ValueError: in one sentence
    """
    with th.device("meta"):
        model = WorldModel(
            observation_space, action_dim, architecture, *dynamics, episodic, normalize_images
        )
    prefix = "world_model."
    given = {
        key.removeprefix(prefix): value
        for key, value in weights.items()
        if isinstance(key, str) and key.startswith(prefix)
    }
    own = model.state_dict()
    _check_names("world model", given, own, complete=True)
    for key, value in given.items():
        check_tensor(f"weight {key!r}", value, tuple(own[key].shape))


def check_parameters(agent: Any, name: str, state: Any, whole: bool) -> None:
    """Refuse parameters that are not those of an agent's module or optimiser of that name.

    :param agent: that is to take them
    :param name: such as ``policy.model_optimizer``
    :param state: its state dict
    :param whole: see :func:`check_module`
    :raises ValueError: in one sentence
    """
    target = agent
    for part in name.split("."):
        target = getattr(target, part, None)
    if isinstance(target, th.optim.Optimizer):
        check_optimizer(target, state, name)
    elif isinstance(target, nn.Module):
        check_module(target, state, name, whole)


def check_streams(agent: Any, streams: Any, run_state: Any, n_envs: int) -> None:
    """Refuse random streams, plans and episodes of a file that no such agent can have.

    :param agent: that is to take them
    :param streams: tensors by name
    :param run_state: the state of the run besides
    :param n_envs: environments of the saved run
    :raises ValueError: in one sentence
    """
    own = {
        "training": agent._training_generator,
        "predictions": agent.policy.generator,
    }
    _check_names("run_streams", streams, {**own, "plan_mean": 0, "pink_noise": 0}, False)
    for name, generator in own.items():
        check_generator(name, generator, streams.get(name))
    action_dim = agent.policy.world_model.action_dim
    for name, shape in (("plan_mean", (n_envs, None, action_dim)), ("pink_noise", None)):
        value = streams.get(name)
        if value is None:
            continue
        axes = tuple(value.shape) if isinstance(value, th.Tensor) and value.ndim == 3 else ()
        expected = axes if shape is None else (n_envs, axes[1] if axes else 1, action_dim)
        check_tensor(name, value, expected or (n_envs, 1, action_dim), th.float32)
    known = dict.fromkeys(("episodes", "action_space_stream", "noise_stream"))
    if isinstance(run_state, Mapping) and "frozen" in run_state:  # former files lack it
        known["frozen"] = None
    _check_names("run_state", run_state, known, complete=True)
    frozen = run_state.get("frozen", [])
    if not isinstance(frozen, list) or not all(isinstance(name, str) for name in frozen):
        raise ValueError(f"The saved frozen is {short(frozen)} and no list of names: {_REMEDY}.")
    for name in ("action_space_stream", "noise_stream"):
        if run_state[name] is not None:
            kind = "MT19937" if name == "noise_stream" else None
            try:
                checked_stream(run_state[name], kind)
            except ValueError as error:
                raise ValueError(f"The saved {name} is {error}: {_REMEDY}.") from error
    if run_state["action_space_stream"] is None:
        raise ValueError(f"The saved run_state lacks its 'action_space_stream': {_REMEDY}.")
    if run_state["episodes"] is not None:
        check_episodes(run_state["episodes"], n_envs)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
