"""The grid of a study, read from YAML; every mistake in it is one sentence."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tdmpc2_sb3.study import checks

#: Settings of a run, allowed for the study, for a task and for an arm; the last one named wins.
RUN_KEYS = ("steps", "seeds", "eval_freq", "eval_episodes", "save_freq")
TOP_KEYS = (
    "name", "arms", "tasks", *RUN_KEYS, "threads", "device", "storage", "logs", "results", "curve",
    "at_frames", "contrasts", "beside",
)  # fmt: skip
ARM_KEYS = ("algo", "params", "conf_file", "tasks", *RUN_KEYS)
TASK_KEYS = ("floor", "range", "references", *RUN_KEYS)
CURVES = ("evaluation", "training")
SUITE_RANGE = (0.0, 1000.0)  # of a suite task's return


class Arm(NamedTuple):
    """What is compared with others.

    :param name: of the arm, fit for a file's name
    :param algo: the zoo's name of the algorithm
    :param params: hyperparameters that differ from the YAML's
    :param conf_file: the zoo's `--conf-file`, None for the algorithm's own
    """

    name: str
    algo: str
    params: dict[str, Any]
    conf_file: str | None


class Task(NamedTuple):
    """An environment and how its returns are judged.

    :param env: its id
    :param floor: the return whose first crossing is reported, None for none
    :param low: the return that counts as 0
    :param high: the return that counts as 1
    :param references: returns of others by name, to be drawn: at some frames, or (None) as a line
    """

    env: str
    floor: float | None
    low: float
    high: float
    references: tuple[tuple[str, int | None, float], ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether its training episodes are judged as the suite's whole ones."""
        return (self.low, self.high) == SUITE_RANGE

    @property
    def name(self) -> str:
        """The environment's name in file names."""
        return self.env.replace("/", "-")


class Cell(NamedTuple):
    """One run of the grid.

    :param steps: agent steps
    :param eval_freq: agent steps between evaluations, None for the zoo's
    :param save_freq: agent steps between models that are kept, None for none
    """

    arm: Arm
    task: Task
    seed: int
    steps: int
    eval_freq: int | None
    eval_episodes: int
    save_freq: int | None = None

    @property
    def name(self) -> str:
        """Of the cell, fit for a file's name."""
        return f"{self.arm.name}_{self.task.name}_seed{self.seed}"

    @property
    def title(self) -> str:
        """Of the cell, as it is printed."""
        return f"{self.arm.name}, {self.task.env}, seed {self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """What a run must have been made with to count for this cell."""
        return {
            "algo": self.arm.algo,
            "params": self.arm.params,
            "conf_file": self.arm.conf_file,
            "env": self.task.env,
            "seed": self.seed,
            "steps": self.steps,
            "eval_freq": self.eval_freq,
            "eval_episodes": self.eval_episodes,
        }

    @property
    def key(self) -> str:
        """Of the cell in a storage: other settings make another cell."""
        text = json.dumps(self.settings, sort_keys=True)
        return f"{self.name} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Plan:
    """A study.

    :param file: the YAML; runs are made in its folder, to which all paths of a study are relative
    :param cells: in the order in which they are run
    :param threads: of each run
    :param curve: which returns the area and the curves are made of
    :param at_frames: frames at which the report gives the return
    :param contrasts: by name, weights of arms whose sum is estimated: an interaction of two factors
        is {a2b2: 1, a1b2: -1, a2b1: -1, a1b1: 1}
    :param beside: files of studies whose evaluations are drawn beside this one's
    """

    file: Path
    name: str
    arms: tuple[Arm, ...]
    tasks: tuple[Task, ...]
    cells: tuple[Cell, ...]
    threads: int
    device: str
    storage: str
    logs: str
    results: str
    curve: str
    at_frames: tuple[int, ...]
    contrasts: dict[str, dict[str, float]]
    beside: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """In which the runs are made."""
        return self.file.parent

    @property
    def results_folder(self) -> Path:
        """Of the CSV files and the report."""
        return self.folder / self.results


class _Loader(yaml.SafeLoader):
    """1e-4 is a number, as in YAML 1.2 and in Python; PyYAML alone takes it for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_plan(path: str | Path) -> Plan:
    """Read a study.

    :raises ValueError: if there is no such file, or a key or value in it is wrong
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ValueError(f"There is no file '{path}': name the YAML file of a study.")
    try:
        content = yaml.load(file.read_text(), Loader=_Loader)  # a safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no YAML: {' '.join(str(error).split())}.") from error
    try:
        return _plan(file, content)
    except ValueError as error:
        raise ValueError(f"'{path}': {error}") from None


def _plan(file: Path, content: Any) -> Plan:
    top = checks.mapping(content, "the study", TOP_KEYS)
    name = checks.name(top.get("name", file.stem), "name")
    tasks = _tasks(top.get("tasks"))
    arms = checks.mapping(top.get("arms"), "arms")
    if not arms:
        raise ValueError("'arms' is empty: name at least one.")
    cells, made = [], []
    for arm_name, given in arms.items():
        own = checks.mapping(given, f"arm '{arm_name}'", ARM_KEYS)
        arm = _arm(checks.name(arm_name, "an arm"), own)
        made.append(arm)
        for place, task_name in enumerate(_chosen(own.get("tasks"), tasks, arm.name)):
            task, of_task = tasks[task_name]
            cells += _cells(arm, task, {**top, **of_task, **own}, (place, len(made)))
    cells.sort(key=lambda pair: pair[0])
    defaults = {"storage": f"logs/{name}/cells.log", "logs": f"logs/{name}", "results": name}
    texts = {key: checks.text(top.get(key, value), key) for key, value in defaults.items()}
    curve = top.get("curve", CURVES[0])
    if curve not in CURVES:
        raise ValueError(f"'curve' is {curve!r}: it must be one of {', '.join(CURVES)}.")
    return Plan(
        file=file,
        name=name,
        arms=tuple(made),
        tasks=tuple(task for task, _ in tasks.values()),
        cells=tuple(cell for _, cell in cells),
        threads=checks.count(top.get("threads", 1), "threads"),
        device=checks.text(top.get("device", "auto"), "device"),
        curve=curve,
        at_frames=tuple(checks.counts(top.get("at_frames", []), "at_frames")),
        contrasts=_contrasts(top.get("contrasts"), arms),
        beside=_beside(top.get("beside", [])),
        **texts,
    )


def _tasks(given: Any) -> dict[str, tuple[Task, dict[str, Any]]]:
    """Every task by its id, with its own settings."""
    if isinstance(given, list):
        given = {checks.text(each, "a task"): {} for each in given}
    tasks = {}
    for env, value in checks.mapping(given, "tasks").items():
        own = checks.mapping(value, f"task '{env}'", TASK_KEYS)
        limits = own.get("range", list(SUITE_RANGE))
        if not (
            isinstance(limits, list) and len(limits) == 2 and all(map(checks.is_number, limits))
        ):
            raise ValueError(f"'range' of '{env}' is {limits!r}: it must be [low, high].")
        low, high = map(float, limits)
        if low >= high:
            raise ValueError(f"'range' of '{env}' is {limits!r}: low must be below high.")
        floor = own.get("floor")
        if floor is not None and not checks.is_number(floor):
            raise ValueError(f"'floor' of '{env}' is {floor!r}: it must be a return.")
        env = checks.text(env, "a task")
        references = _references(own.get("references"), env)
        tasks[env] = (
            Task(env, None if floor is None else float(floor), low, high, references),
            own,
        )
    if not tasks:
        raise ValueError("'tasks' is empty: name at least one, such as DMC/walker-walk-v0.")
    return tasks


def _references(given: Any, env: str) -> tuple[tuple[str, int | None, float], ...]:
    found = []
    for name, value in checks.mapping(given, f"'references' of '{env}'").items():
        frames, height = value if isinstance(value, list) and len(value) == 2 else (None, value)
        if not checks.is_number(height) or not (frames is None or checks.is_number(frames)):
            raise ValueError(
                f"reference '{name}' of '{env}' is {value!r}: it must be a return, or "
                "[frames, return]."
            )
        found.append((checks.text(name, "a reference"), frames, float(height)))
    return tuple(found)


def _beside(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list):
        raise ValueError(f"'beside' is {given!r}: it must be a list of studies' files.")
    return tuple(checks.text(each, "a study of 'beside'") for each in given)


def _arm(name: str, own: Mapping[str, Any]) -> Arm:
    params = checks.mapping(own.get("params"), f"'params' of arm '{name}'")
    for key, value in params.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise ValueError(f"'params' of arm '{name}' has {key!r}: no hyperparameter's name.")
        if not checks.is_plain(value):
            raise ValueError(
                f"'{key}' of arm '{name}' is {value!r}: give text, finite numbers, true, false, "
                "null, or lists and mappings of them."
            )
    conf_file = own.get("conf_file")
    return Arm(
        name,
        checks.text(own.get("algo", "tdmpc2"), f"'algo' of arm '{name}'"),
        dict(params),
        None if conf_file is None else checks.text(conf_file, f"'conf_file' of arm '{name}'"),
    )


def _contrasts(given: Any, arms: Iterable[str]) -> dict[str, dict[str, float]]:
    found = {}
    for name, value in checks.mapping(given, "contrasts").items():
        weights = checks.mapping(value, f"contrast '{name}'", list(arms))
        numbers = list(weights.values())
        if not weights or not all(map(checks.is_number, numbers)) or abs(sum(numbers)) > 1e-9:
            raise ValueError(
                f"contrast '{name}' is {value!r}: give arms their weights, which sum to 0."
            )
        found[checks.text(name, "a contrast")] = {arm: float(w) for arm, w in weights.items()}
    return found


def _chosen(asked: Any, tasks: Mapping[str, Any], arm: str) -> Iterable[str]:
    if asked is None:
        return tasks
    if not isinstance(asked, list) or not asked:
        raise ValueError(f"'tasks' of arm '{arm}' is {asked!r}: it must be a list of tasks.")
    for each in asked:
        if each not in tasks:
            raise ValueError(
                f"arm '{arm}' has the task {each!r}, which is not among the study's tasks"
                f"{checks.closest(each, tasks)}."
            )
    return [each for each in tasks if each in asked]


def _cells(
    arm: Arm, task: Task, settings: Mapping[str, Any], place: tuple[int, int]
) -> list[tuple[tuple[int, int, int], Cell]]:
    """The cells of an arm on a task, each with its place: seeds are the outer loop."""
    where = f"of arm '{arm.name}' on '{task.env}'"
    if "steps" not in settings:
        raise ValueError(f"'steps' {where} is missing: give the agent steps of a run.")
    seeds = checks.counts(settings.get("seeds", [1]), f"seeds {where}", least=0)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"'seeds' {where} is {seeds!r}: it must be a list without repetition.")
    eval_freq = settings.get("eval_freq")
    if eval_freq is not None and eval_freq != -1:
        eval_freq = checks.count(eval_freq, f"eval_freq {where}")
    steps = checks.count(settings["steps"], f"steps {where}")
    episodes = checks.count(settings.get("eval_episodes", 10), f"eval_episodes {where}")
    save_freq = settings.get("save_freq")
    if save_freq is not None:
        save_freq = checks.count(save_freq, f"save_freq {where}")
    return [
        ((number, *place), Cell(arm, task, seed, steps, eval_freq, episodes, save_freq))
        for number, seed in enumerate(seeds)
    ]
