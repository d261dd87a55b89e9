"""Exact capture and restoration of a simulation, in plain dictionaries, numbers and arrays.

What makes a MuJoCo simulation continue bit for bit:

- the integration state (positions, velocities, activations, controls, warm start, ...);
- what ``mj_step1`` computes from it: recomputed on restoration, identical to the last bit;
- the acceleration stage of the *previous* step, which sensors and rewards still read: stored;
- the model, which many tasks edit at the start of an episode: stored where it differs from the
  model as compiled;
- the task's attributes and its random state.

Nothing here needs pickle, so a state may be written with ``numpy.savez`` or as JSON and arrays.
"""

from __future__ import annotations

import enum
import reprlib
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from dmc_gym_plugin.state_checks import check_keys

#: Fields of mjData that mj_step1 does not recompute; tests compare every field on all tasks.
ACCELERATION_FIELDS = (
    "act_dot",
    "actuator_force",
    "cacc",
    "cfrc_ext",
    "cfrc_int",
    "qacc",
    "qacc_smooth",
    "qfrc_actuator",
    "qfrc_constraint",
    "qfrc_smooth",
    "sensordata",
)

#: LQR draws these when a model is built, so another instance starts from other values.
DRAWN_FIELDS = ("jnt_stiffness", "dof_damping")

#: Large constant parts of a model that no task edits.
_UNTRACKED_PREFIXES = ("bvh_", "flex", "mesh_", "name_", "names", "oct_", "skin_", "tex_", "text_")

_SIGNATURE = int(mujoco.mjtState.mjSTATE_INTEGRATION)

#: Types of a task's attributes that are part of its state.
_PLAIN = (bool, int, float, str, type(None))


def copy_random_state(random: np.random.RandomState) -> dict[str, Any]:
    """Return the complete state of a random generator (MT19937)."""
    state: dict[str, Any] = dict(random.get_state(legacy=False))
    inner = state["state"]
    state["state"] = {"key": inner["key"].copy(), "pos": int(inner["pos"])}
    return state


def restore_random_state(random: np.random.RandomState, state: Any) -> None:
    """Write what :func:`copy_random_state` returned into a random generator.

    :raises ValueError: if it is something else
    """
    try:
        random.set_state(state)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"The state's random state is {reprlib.repr(state)}, which numpy refuses ({error!r}); "
            "give what get_state() returned."
        ) from error


def random_state_from_seed(seed: int | None) -> np.random.RandomState:
    """Return the generator that dm_control would build from a seed.

    ``RandomState`` takes 32 bits; Gymnasium allows any non-negative integer, so longer seeds go in
    as a list of 32-bit words.
    """
    if seed is None or seed < 2**32:
        return np.random.RandomState(seed)
    words = []
    while seed:
        words.append(seed & 0xFFFFFFFF)
        seed >>= 32
    return np.random.RandomState(words)


def copy_data(model: Any, data: Any) -> dict[str, NDArray[Any]]:
    """Return what is needed to restore an ``mjData``, as new arrays."""
    integration = np.empty(mujoco.mj_stateSize(model, _SIGNATURE), np.float64)
    mujoco.mj_getState(model, data, integration, _SIGNATURE)
    state = {"integration": integration}
    for name in ACCELERATION_FIELDS:
        state[name] = np.array(getattr(data, name))
    return state


def check_data(model: Any, data: Any, state: Any) -> None:
    """Refuse a state that is not one of :func:`copy_data` from the same model.

    :raises ValueError: if it belongs to another model
    """
    check_keys("The state's data", state, ("integration", *ACCELERATION_FIELDS))
    expected = {name: getattr(data, name).size for name in ACCELERATION_FIELDS}
    expected["integration"] = mujoco.mj_stateSize(model, _SIGNATURE)
    for name, size in expected.items():
        if np.size(state[name]) != size:
            raise ValueError(
                f"The state's {name} has {np.size(state[name])} numbers, but this task has {size}; "
                "use a state of the same task."
            )


def restore_data(model: Any, data: Any, state: dict[str, Any]) -> None:
    """Write a state from :func:`copy_data` into an ``mjData`` of the same model."""
    integration = np.asarray(state["integration"], np.float64)
    mujoco.mj_setState(model, data, integration, _SIGNATURE)
    mujoco.mj_step1(model, data)
    # mj_step1 may not touch the warm start, but set the integration part again to be certain.
    mujoco.mj_setState(model, data, integration, _SIGNATURE)
    for name in ACCELERATION_FIELDS:
        np.copyto(getattr(data, name), state[name])


class ModelEdits:
    """Remembers a model as compiled, and finds, stores and restores what was edited since.

    :param model: the ``mjModel``
    """

    def __init__(self, model: Any) -> None:
        self._compiled: dict[str, NDArray[Any]] = {}
        for name in dir(model):
            if name.startswith(("_", *_UNTRACKED_PREFIXES)):
                continue
            value = getattr(model, name)
            if isinstance(value, np.ndarray) and value.size:
                self._compiled[name] = value.copy()

    def copy(self, model: Any) -> dict[str, NDArray[Any]]:
        """Return copies of the fields that differ from the compiled model."""
        edits = {}
        for name, compiled in self._compiled.items():
            value = getattr(model, name)
            if name in DRAWN_FIELDS or not np.array_equal(value, compiled):
                edits[name] = value.copy()
        return edits

    def check(self, edits: Any) -> None:
        """Refuse edits of another model.

        :raises ValueError: if a field is unknown or has another shape
        """
        check_keys("The state's model", edits, (), self._compiled)
        for name, edit in edits.items():
            own = self._compiled[name].shape
            if np.shape(edit) != own:
                raise ValueError(
                    f"The state's model field {name} has shape {np.shape(edit)}, but this task has "
                    f"{own}; use a state of the same task."
                )

    def restore(self, model: Any, edits: dict[str, Any]) -> None:
        """Make the model equal to the one the edits were taken from."""
        for name, compiled in self._compiled.items():
            value = getattr(model, name)
            target = np.asarray(edits.get(name, compiled))
            if not np.array_equal(value, target):
                np.copyto(value, target)


def copy_attributes(obj: Any) -> dict[str, Any]:
    """Return the plain attributes of a task: numbers, strings, None and arrays."""
    found: dict[str, Any] = {}
    for name, value in vars(obj).items():
        if isinstance(value, np.generic | np.ndarray):
            found[name] = np.array(value)
        elif isinstance(value, enum.IntEnum):
            found[name] = int(value)
        elif isinstance(value, _PLAIN):
            found[name] = value
    return found


def restore_attributes(obj: Any, attributes: dict[str, Any]) -> None:
    """Set the attributes that :func:`copy_attributes` returned."""
    for name, value in attributes.items():
        if isinstance(value, np.ndarray):
            value = value.copy() if value.ndim else value[()]
        setattr(obj, name, value)
