"""The file of a policy alone."""

from __future__ import annotations

import io
import pathlib
from typing import Any, TypeVar

import torch as th

from tdmpc2_sb3.saving.archive import read_archive, write_archive
from tdmpc2_sb3.saving.attribute_checks import check_policy_arguments
from tdmpc2_sb3.saving.parameter_checks import check_module
from tdmpc2_sb3.settings import usable_device

#: Under which name a saved policy's arguments stand in its file.
ARGUMENTS = "policy_arguments"

Policy = TypeVar("Policy", bound=Any)


def save(policy: Any, path: str | pathlib.Path | io.BufferedIOBase) -> None:
    """See :meth:`tdmpc2_sb3.policies.TDMPC2Policy.save`."""
    data = {ARGUMENTS: policy._get_constructor_parameters()}
    write_archive(path, data, {"policy": policy.state_dict()})


def load(
    cls: type[Policy], path: str | pathlib.Path | io.BufferedIOBase, device: th.device | str
) -> Policy:
    """See :meth:`tdmpc2_sb3.policies.TDMPC2Policy.load`.

    :param cls: of the policy
    """
    device = usable_device(device)
    data, tensors = read_archive(path, device)
    if ARGUMENTS not in data:
        raise ValueError(
            f"{path!r} holds a whole agent: load it by TDMPC2.load(path) and take its policy."
        )
    arguments: Any = data[ARGUMENTS]
    weights: Any = tensors.get("policy")
    check_policy_arguments(path, arguments, weights)
    try:
        cls.check_weights(
            arguments["observation_space"], arguments["action_space"], arguments, weights
        )
        policy = cls(**arguments)
    except ValueError:
        raise
    except Exception as error:  # whatever wrong arguments lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"{path!r} is damaged, or of another policy than {cls.__name__} "
            f"({reason[:200]}): use another copy."
        ) from error
    check_module(policy, weights, "policy", whole=True)
    policy.load_state_dict(weights)
    return policy.to(device)
