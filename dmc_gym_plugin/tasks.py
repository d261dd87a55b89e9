"""The static table of tasks: names, groups and registered episode lengths.

Nothing here imports MuJoCo or dm_control, so registering the environments costs next to nothing.
A test compares the table with what the installed dm_control offers.
"""

from __future__ import annotations

import difflib
import importlib.util
from typing import NamedTuple

NAMESPACE = "DMC"

#: Control steps of an episode in every suite task with a time limit.
SUITE_STEPS = 1000

#: dm_control gives the LQR tasks no time limit. Learners need episodes that end, so ours end after
#: this many control steps (30 s) by truncation; ``max_episode_steps=-1`` restores the endless task.
LQR_STEPS = 1000

#: Domain -> tasks of ``dm_control.suite``, in its own spelling.
SUITE: dict[str, tuple[str, ...]] = {
    "acrobot": ("swingup", "swingup_sparse"),
    "ball_in_cup": ("catch",),
    "cartpole": (
        "balance",
        "balance_sparse",
        "swingup",
        "swingup_sparse",
        "two_poles",
        "three_poles",
    ),
    "cheetah": ("run",),
    "dog": ("stand", "walk", "trot", "run", "fetch"),
    "finger": ("spin", "turn_easy", "turn_hard"),
    "fish": ("upright", "swim"),
    "hopper": ("stand", "hop"),
    "humanoid": ("stand", "walk", "run", "run_pure_state"),
    "humanoid_CMU": ("stand", "walk", "run"),
    "lqr": ("lqr_2_1", "lqr_6_2"),
    "manipulator": ("bring_ball", "bring_peg", "insert_ball", "insert_peg"),
    "pendulum": ("swingup",),
    "point_mass": ("easy", "hard"),
    "quadruped": ("walk", "run", "escape", "fetch"),
    "reacher": ("easy", "hard"),
    "stacker": ("stack_2", "stack_4"),
    "swimmer": ("swimmer6", "swimmer15"),
    "walker": ("stand", "walk", "run"),
}


#: The extra tasks of the TD-MPC2 literature; see ``extended.py`` for their rewards.
EXTENDED: dict[str, tuple[str, ...]] = {
    "ball_in_cup": ("spin",),
    "cheetah": ("run_backwards", "run_front", "run_back", "jump"),
    "hopper": ("hop_backwards",),
    "pendulum": ("spin",),
    "reacher": ("three_easy", "three_hard"),
    "walker": ("walk_backwards", "run_backwards"),
}


#: ``dm_control.manipulation``: ``_features`` observes the objects, ``_vision`` a camera.
MANIPULATION: tuple[str, ...] = (
    "lift_brick_features",
    "lift_brick_vision",
    "lift_large_box_features",
    "lift_large_box_vision",
    "place_brick_features",
    "place_brick_vision",
    "place_cradle_features",
    "place_cradle_vision",
    "reach_duplo_features",
    "reach_duplo_vision",
    "reach_site_features",
    "reach_site_vision",
    "reassemble_3_bricks_fixed_order_features",
    "reassemble_3_bricks_fixed_order_vision",
    "reassemble_5_bricks_random_order_features",
    "reassemble_5_bricks_random_order_vision",
    "stack_2_bricks_features",
    "stack_2_bricks_moveable_base_features",
    "stack_2_bricks_moveable_base_vision",
    "stack_2_bricks_vision",
    "stack_2_of_3_bricks_random_order_features",
    "stack_2_of_3_bricks_random_order_vision",
    "stack_3_bricks_features",
    "stack_3_bricks_random_order_features",
    "stack_3_bricks_vision",
)
MANIPULATION_STEPS = 250

#: ``dm_control.locomotion.examples`` -> control steps; they need labmaze.
LOCOMOTION: dict[str, int] = {
    "cmu_humanoid_go_to_target": 1001,
    "cmu_humanoid_heterogeneous_forage": 834,
    "cmu_humanoid_maze_forage": 1001,
    "cmu_humanoid_run_gaps": 1001,
    "cmu_humanoid_run_walls": 1001,
    "rodent_escape_bowl": 1000,
    "rodent_maze_forage": 1500,
    "rodent_run_gaps": 1500,
    "rodent_two_touch": 1500,
}


class TaskInfo(NamedTuple):
    """One row of the table.

    :param domain: dm_control's domain, such as ``walker``
    :param task: the task in it, such as ``walk``
    :param group: ``suite``, ``extended``, ``manipulation`` or ``locomotion``
    :param control_steps: control steps (frames at action repeat 1) until truncation
    """

    domain: str
    task: str
    group: str
    control_steps: int

    @property
    def id(self) -> str:
        """The Gymnasium id."""
        return env_id(self.domain, self.task)


def env_id(domain: str, task: str) -> str:
    """Return the Gymnasium id of a task.

    >>> env_id("walker", "walk")
    'DMC/walker-walk-v0'
    """
    return f"{NAMESPACE}/{domain}-{task}-v0"


def _build_table() -> dict[tuple[str, str], TaskInfo]:
    rows = []
    for domain, names in SUITE.items():
        steps = LQR_STEPS if domain == "lqr" else SUITE_STEPS
        rows += [TaskInfo(domain, name, "suite", steps) for name in names]
    for domain, names in EXTENDED.items():
        rows += [TaskInfo(domain, name, "extended", SUITE_STEPS) for name in names]
    rows += [
        TaskInfo("manipulation", name, "manipulation", MANIPULATION_STEPS) for name in MANIPULATION
    ]
    rows += [TaskInfo("locomotion", name, "locomotion", n) for name, n in LOCOMOTION.items()]
    return {(row.domain, row.task): row for row in rows}


#: (domain, task) -> row, for every task that can be registered.
TASKS: dict[tuple[str, str], TaskInfo] = _build_table()


def has_labmaze() -> bool:
    """Return whether labmaze is installed, without importing it."""
    return importlib.util.find_spec("labmaze") is not None


def find(domain: str, task: str) -> TaskInfo:
    """Return the row of a task.

    :raises ValueError: for an unknown task; the message names the nearest known one
    """
    row = TASKS.get((domain, task))
    if row is None:
        raise ValueError(
            f"Unknown DeepMind Control task {domain}-{task}; did you mean "
            f"{nearest(domain, task)}? `python -m dmc_gym_plugin list` prints all of them."
        )
    if row.group == "locomotion" and not has_labmaze():
        raise ValueError(
            f"{row.id} needs labmaze, which is not installed; run `pip install labmaze` (it has "
            "wheels for Python 3.12 and older)."
        )
    return row


def nearest(domain: str, task: str) -> str:
    """Return the ``domain-task`` in the table whose spelling comes closest."""
    names = [f"{row.domain}-{row.task}" for row in TASKS.values()]
    return difflib.get_close_matches(f"{domain}-{task}", names, n=1, cutoff=0.0)[0]
