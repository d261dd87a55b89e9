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
import math
import numbers
import reprlib
import warnings
from collections.abc import Collection
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from dmc_gym_plugin.state_checks import check_keys, check_numbers

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

#: The fields of mjModel that tasks edit, and a state may: quantities, none of which says where
#: MuJoCo reads or writes. Tests compare the list with what every task edits.
EDITED_FIELDS = (
    "body_pos",
    "body_quat",
    "dof_damping",
    "geom_pos",
    "geom_rgba",
    "geom_size",
    "hfield_data",
    "jnt_stiffness",
    "light_pos",
    "mat_rgba",
    "site_pos",
    "site_rgba",
    "site_size",
    "wrap_prm",
)

#: Whole numbers that tasks count by within an episode; all others are settings.
COUNTED_ATTRIBUTES = ("_timeout_progress", "_reward_step_counter", "_state_logic")

#: Attributes that composer tasks have from their first episode or step on only.
LATE_ATTRIBUTES = (
    "_do_time_out",
    "_failure_termination",
    "_first_touch_time",
    "_must_randomize_targets",
    "_second_touch_time",
    "_spawn_position",
    "_target_height",
)

_LATE_NUMBERS = 16  # in such an attribute at most
_MAX_COUNT = 2**31

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
        _check_twister(state)
        random.set_state(state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"The state's random state is {_short(state)}, which numpy refuses ({error!r}); "
            "give what get_state() returned."
        ) from error


def _short(value: Any) -> str:
    """A value in one line: arrays have several."""
    return " ".join(reprlib.repr(value).split())


def _check_twister(state: Any) -> None:
    """Refuse a position behind the table, where numpy would read, and a table of zeros."""
    key, position = state["state"]["key"], state["state"]["pos"]
    words = isinstance(key, np.ndarray) and key.dtype == np.uint32 and key.shape == (624,)
    if not words or not (key[1:].any() or key[0] >> 31):
        raise ValueError("its key is no table of 624 numbers of 32 bits")
    if not isinstance(position, numbers.Integral) or not 0 <= int(position) <= 624:
        raise ValueError(f"its position is {_short(position)}")
    if not isinstance(state["gauss"], (int, float)) or not math.isfinite(state["gauss"]):
        raise ValueError(f"its gauss is {_short(state['gauss'])}")
    has_gauss = state["has_gauss"]
    if not isinstance(has_gauss, (int, np.integer)) or has_gauss not in (0, 1):
        raise ValueError(f"its has_gauss is {_short(has_gauss)}")


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
        check_numbers(f"The state's {name}", state[name], np.float64)
    if np.abs(state["integration"]).max(initial=0.0) > mujoco.mjMAXVAL:
        raise ValueError(
            f"The state's integration holds {np.abs(state['integration']).max():g}, beyond which "
            f"({mujoco.mjMAXVAL:g}) MuJoCo takes a simulation for diverged; use another state."
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
        """Return copies of the fields that differ from the compiled model.

        Those of :data:`EDITED_FIELDS`; a field that a program edited besides is named in a warning.
        """
        edits, others = {}, []
        for name, compiled in self._compiled.items():
            value = getattr(model, name)
            if name in DRAWN_FIELDS or not np.array_equal(value, compiled):
                if name in EDITED_FIELDS:
                    edits[name] = value.copy()
                else:
                    others.append(name)
        if others:
            warnings.warn(
                f"The model's {', '.join(others)} differ from the compiled ones: no task edits "
                "them and no state holds them; edit them again after set_state().",
                stacklevel=2,
            )
        return edits

    def check(self, edits: Any) -> None:
        """Refuse edits of another model.

        :raises ValueError: if no task edits a field, or it has another shape or numbers that are
            not finite
        """
        editable = [name for name in EDITED_FIELDS if name in self._compiled]
        check_keys("The state's model", edits, (), editable)
        for name, edit in edits.items():
            own = self._compiled[name].shape
            if np.shape(edit) != own:
                raise ValueError(
                    f"The state's model field {name} has shape {np.shape(edit)}, but this task has "
                    f"{own}; use a state of the same task."
                )
            check_numbers(f"The state's model field {name}", edit, self._compiled[name].dtype)
        if "wrap_prm" in edits:
            # A tendon's other parameters are divisors and, as floats, indices of sites.
            kept = self._compiled["wrap_type"] != mujoco.mjtWrap.mjWRAP_JOINT
            if not np.array_equal(edits["wrap_prm"][kept], self._compiled["wrap_prm"][kept]):
                raise ValueError(
                    "The state's model field wrap_prm differs beyond the coefficients of joints, "
                    "which no task does; give what get_state() returned."
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


def check_attributes(obj: Any, attributes: Any, late: Collection[str] = ()) -> None:
    """Refuse attributes that :func:`copy_attributes` cannot have returned for such a task.

    What an episode changes may differ from this task's, its settings may not.

    :param late: names that may be there although the task has no such attribute yet
    :raises ValueError: in one sentence
    """
    own = copy_attributes(obj)
    required = () if late else own
    check_keys("The state's task", attributes, required, (*own, *late))
    for name, value in attributes.items():
        if not (_is_small(value) if name in late else _fits(name, value, own)):
            known = reprlib.repr(own[name]) if name in own else "a number"
            raise ValueError(
                f"The state's task has {name} = {reprlib.repr(value)}, but this one has {known}; "
                "use a state of the same task, made with the same arguments."
            )


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float, np.integer, np.floating))
    return number and not isinstance(value, bool) and abs(value) <= mujoco.mjMAXVAL


def _is_small(value: Any) -> bool:
    """Say whether it is None, a truth value, or up to a few finite numbers."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf" and value.size <= _LATE_NUMBERS and _is_finite(value)
    return value is None or isinstance(value, bool) or _is_number(value)


def _fits(name: str, value: Any, own: dict[str, Any]) -> bool:
    """Say whether a task that has ``own`` attributes may have this one."""
    mine = own[name]
    if isinstance(mine, np.ndarray):
        same = isinstance(value, np.ndarray) and value.dtype.kind == mine.dtype.kind
        return same and value.shape == mine.shape and _is_finite(value)
    if isinstance(mine, bool):
        return isinstance(value, (bool, np.bool_))
    if name in COUNTED_ATTRIBUTES:
        return isinstance(value, int) and abs(value) < _MAX_COUNT
    if isinstance(mine, float):
        return _is_number(value)
    if mine is None:
        return value is None or _is_number(value)
    return type(value) is type(mine) and bool(value == mine)


def _is_finite(value: NDArray[Any]) -> bool:
    return value.dtype.kind in "biuSU" or bool(np.isfinite(value).all())


def restore_attributes(obj: Any, attributes: dict[str, Any]) -> None:
    """Set the attributes that :func:`copy_attributes` returned."""
    for name, value in attributes.items():
        if isinstance(value, np.ndarray):
            value = value.copy() if value.ndim else value[()]
        setattr(obj, name, value)
