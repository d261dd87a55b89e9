"""DeepMind Control for Gymnasium: importing this package registers the ``DMC/`` environments.

>>> import gymnasium, dmc_gym_plugin
>>> env = gymnasium.make("DMC/walker-walk-v0", action_repeat=2)

MuJoCo and dm_control are imported when the first environment is made, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dmc_gym_plugin.registration import register_all
from dmc_gym_plugin.tasks import env_id

if TYPE_CHECKING:
    from dmc_gym_plugin.environment import DMControlEnv

__all__ = ["DMControlEnv", "env_id", "register_all"]

register_all()


def __getattr__(name: str) -> Any:
    if name == "DMControlEnv":  # lazily: it imports MuJoCo
        from dmc_gym_plugin.environment import DMControlEnv

        return DMControlEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
