"""What the fast ways to plans and gradients know: which settings, and which parts of a model.

They compute what :mod:`tdmpc2_sb3.planner` and :mod:`tdmpc2_sb3.losses` say, in other words. A
setting or part that was added there alone would be ignored by them; so those that they know are
named here, and whatever else is in use goes the plain way. (CUDA graphs record the plain way.)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tdmpc2_sb3.model.encoders import Encoder
from tdmpc2_sb3.model.layers import MLP, QEnsemble
from tdmpc2_sb3.model.world_model import WorldModel
from tdmpc2_sb3.settings import is_in_use

#: Fields of :class:`tdmpc2_sb3.planner.PlannerConfig` that the search of kernels.c knows.
SEARCH_SETTINGS = frozenset(
    {
        "horizon",
        "num_samples",
        "num_elites",
        "num_pi_trajs",
        "num_iterations",
        "temperature",
        "min_std",
        "max_std",
        "gamma",
    }
)
#: Fields of :class:`tdmpc2_sb3.losses.LossConfig` that the gradients taken by hand know.
GRADIENT_SETTINGS = frozenset(
    {
        "gamma",
        "consistency_coef",
        "reward_coef",
        "value_coef",
        "termination_coef",
        "entropy_coef",
        "entropy",
        "encoded_terminations",
        "td_lambda",
    }
)
_OWN_MODULES = ("tdmpc2_sb3.", "torch.nn.modules.")


def unknown_to_search(model: WorldModel, config: Any) -> list[str]:
    """Settings in use and parts that the search of kernels.c does not know.

    :param model: planned with
    :param config: a :class:`tdmpc2_sb3.planner.PlannerConfig`
    """
    unknown = [*_unknown_settings(config, SEARCH_SETTINGS), *_unknown_networks(model)]
    parts = {"encoder": model.encoder, "dynamics": model.dynamics}
    return [*unknown, *(name for name, part in parts.items() if _is_foreign(part))]


def unknown_to_gradients(model: WorldModel, config: Any) -> list[str]:
    """Settings in use and parts that :mod:`tdmpc2_sb3.fast.gradients` does not know.

    :param model: whose gradients are taken; those of dynamics it does not know autograd takes
    :param config: a :class:`tdmpc2_sb3.losses.LossConfig`
    """
    unknown = [*_unknown_settings(config, GRADIENT_SETTINGS), *_unknown_networks(model)]
    return unknown if type(model.encoder) is Encoder else [*unknown, "encoder"]


def _unknown_settings(config: Any, known: frozenset[str]) -> list[str]:
    return [name for name in config._fields if name not in known and is_in_use(config, name)]


def _unknown_networks(model: WorldModel) -> list[str]:
    """The networks on latents that may compute something else than their layers say."""
    if type(model) is not WorldModel:
        return [f"world model ({type(model).__name__})"]
    found = []
    for name in ("reward_net", "policy_net", "termination_net", "q_ensemble", "target_q_ensemble"):
        part = getattr(model, name)
        known = part.as_kernel() if isinstance(part, (MLP, QEnsemble)) else None
        if part is not None and known is None:
            found.append(name)
    return found


def _is_foreign(part: nn.Module) -> bool:
    """Whether a class of somebody else's is in it."""
    return not all(type(each).__module__.startswith(_OWN_MODULES) for each in part.modules())
