"""SB3's action noises as plain values and back, with the state that they are in."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)

NOISES: dict[str, type[ActionNoise]] = {
    noise.__name__: noise
    for noise in (NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise)
}
_ATTRIBUTES = {
    "NormalActionNoise": {"_mu", "_sigma", "_dtype"},
    "OrnsteinUhlenbeckActionNoise": {
        *("_theta", "_mu", "_sigma", "_dt", "_dtype", "initial_noise", "noise_prev"),
    },
    "VectorizedActionNoise": {"n_envs", "_base_noise", "_noises"},
}


def to_plain(noise: ActionNoise) -> dict[str, Any]:
    """Attributes of a noise by name: numbers, arrays, and the noises of single environments."""
    attributes = dict(vars(noise))
    if "_dtype" in attributes:
        attributes["_dtype"] = np.dtype(attributes["_dtype"]).str
    return attributes


def from_plain(kind: str, attributes: dict[str, Any]) -> ActionNoise:
    """Rebuild what :func:`to_plain` took apart.

    :param kind: name of the class
    :param attributes: of :func:`to_plain`
    :raises KeyError: if there is no such noise
    :raises ValueError: if the attributes are not those of that noise
    """
    if set(attributes) != _ATTRIBUTES[kind]:
        raise ValueError(f"attributes {sorted(attributes)}")
    noise = NOISES[kind].__new__(NOISES[kind])
    vars(noise).update(attributes)
    if "_dtype" in attributes:
        vars(noise)["_dtype"] = np.dtype(attributes["_dtype"])
    return noise


def stream() -> dict[str, Any]:
    """State of the random stream that SB3's noises draw from: NumPy's global one."""
    return np.random.get_state(legacy=False)  # type: ignore[return-value]  # noqa: NPY002


def restore_stream(state: dict[str, Any]) -> None:
    """Takes NumPy's global stream back to a state of :func:`stream`."""
    np.random.set_state(state)  # noqa: NPY002
