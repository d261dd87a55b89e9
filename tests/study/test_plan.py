"""The grid of a study: its order, what wins over what, and a sentence for every mistake."""

from __future__ import annotations

import re
import shlex

import pytest

from tdmpc2_sb3.study import runs
from tdmpc2_sb3.study.plan import read_plan

WALKER, HOPPER = "DMC/walker-walk-v0", "DMC/hopper-hop-v0"


def test_seeds_are_the_outer_loop_and_arms_of_a_task_stand_together(study):
    plan = study(arms={"a": None, "b": None}, tasks=[WALKER, HOPPER], seeds=[7, 8])
    assert [(cell.seed, cell.task.env, cell.arm.name) for cell in plan.cells] == [
        (7, WALKER, "a"),
        (7, WALKER, "b"),
        (7, HOPPER, "a"),
        (7, HOPPER, "b"),
        (8, WALKER, "a"),
        (8, WALKER, "b"),
        (8, HOPPER, "a"),
        (8, HOPPER, "b"),
    ]


def test_an_arms_setting_wins_over_a_tasks_and_that_over_the_studys(study):
    plan = study(
        arms={"a": None, "b": {"steps": 5, "tasks": [HOPPER]}},
        tasks={WALKER: {"seeds": [3]}, HOPPER: {"steps": 7, "floor": 50, "range": [0, 600]}},
        seeds=[1, 2],
    )
    assert {(c.arm.name, c.task.env, c.seed, c.steps) for c in plan.cells} == {
        ("a", WALKER, 3, 100),
        ("a", HOPPER, 1, 7),
        ("a", HOPPER, 2, 7),
        ("b", HOPPER, 1, 5),
        ("b", HOPPER, 2, 5),
    }
    hopper = plan.tasks[1]
    assert (hopper.floor, hopper.low, hopper.high) == (50.0, 0.0, 600.0)


def test_the_command_is_the_zoos_and_its_parameters_keep_their_types(study):
    params = {"entropy": "squashed", "learning_rate": 1e-4, "env_kwargs": {"action_repeat": 2}}
    arms = {"a": {"params": params}}
    plan = study(arms=arms, seeds=[101], eval_freq=50, save_freq=30, threads=2, device="cpu")
    assert shlex.join(runs.train_arguments(plan, plan.cells[0])) == (
        "-m rl_zoo3.train --algo tdmpc2 --env DMC/walker-walk-v0 --seed 101 -n 100 --eval-freq 50 "
        "--eval-episodes 10 --save-freq 30 --num-threads 2 --device cpu -f logs/mini/a/seed101 "
        "-params "
        """'entropy:'"'"'squashed'"'"'' learning_rate:0.0001 """
        """'env_kwargs:{'"'"'action_repeat'"'"': 2}'"""
    )


def test_numbers_without_a_point_in_yaml_are_numbers(tmp_path):
    file = tmp_path / "study.yml"
    file.write_text(
        "arms: {a: {params: {learning_rate: 3e-4, text: 1e-4x}}}\n"
        "tasks: [Pendulum-v1]\nsteps: 100\n"
    )
    plan = read_plan(file)
    assert plan.arms[0].params == {"learning_rate": 0.0003, "text": "1e-4x"}
    assert (plan.name, plan.results, plan.logs) == ("study", "study", "logs/study")


def test_other_settings_make_another_cell_in_a_storage(study):
    before, same = study(steps=100).cells[0], study(steps=100).cells[0]
    longer = study(steps=101).cells[0]
    assert before.key == same.key != longer.key
    assert before.name == longer.name == "a_DMC-walker-walk-v0_seed1"


MISTAKES = [
    ({"contrasts": {"c": {"a": 1, "z": -1}}}, "contrast 'c' has the unknown key 'z'"),
    ({"contrasts": {"c": {"a": 1}}}, "contrast 'c' is {'a': 1}: give arms their weights, which"),
    ({"stepps": 3}, "unknown key 'stepps' (did you mean 'steps'?)"),
    ({"arms": {"a": {"alg": "sac"}}}, "arm 'a' has the unknown key 'alg' (did you mean 'algo'?)"),
    ({"tasks": {WALKER: {"flor": 1}}}, f"task '{WALKER}' has the unknown key 'flor'"),
    ({"arms": {}}, "'arms' is empty"),
    ({"tasks": []}, "'tasks' is empty"),
    ({"steps": 0}, f"'steps of arm 'a' on '{WALKER}'' is 0: it must be a whole number"),
    ({"steps": True}, "is True: it must be a whole number"),
    ({"seeds": [1, 1]}, "is [1, 1]: it must be a list without repetition"),
    ({"seeds": 3}, "is 3: it must be a list of whole numbers"),
    ({"threads": "two"}, "'threads' is 'two': it must be a whole number of at least 1"),
    ({"curve": "both"}, "'curve' is 'both': it must be one of evaluation, training"),
    ({"arms": {"a": {"tasks": [HOPPER]}}}, f"arm 'a' has the task '{HOPPER}', which is not among"),
    ({"arms": {"a/b": None}}, "an arm is 'a/b': it names files"),
    ({"arms": {"a": {"params": {"x": float("inf")}}}}, "'x' of arm 'a' is inf"),
    ({"arms": {"a": {"params": {"x y": 1}}}}, "'params' of arm 'a' has 'x y'"),
    ({"tasks": {WALKER: {"range": [5, 1]}}}, "low must be below high"),
    ({"tasks": {WALKER: {"floor": "high"}}}, "'floor' of 'DMC/walker-walk-v0' is 'high'"),
]


@pytest.mark.parametrize(("content", "sentence"), MISTAKES)
def test_a_mistake_is_one_sentence(study, content, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        study(**content)
    assert "\n" not in str(error.value)


def test_no_file_and_no_yaml(tmp_path):
    with pytest.raises(ValueError, match="There is no file"):
        read_plan(tmp_path / "none.yml")
    (tmp_path / "bad.yml").write_text("arms: [")
    with pytest.raises(ValueError, match="is no YAML"):
        read_plan(tmp_path / "bad.yml")


def test_names_that_the_zoo_does_not_know(study):
    with pytest.raises(ValueError, match="'algo' of arm 'a' is 'tdmpc3': the zoo has"):
        runs.check_names(study(arms={"a": {"algo": "tdmpc3"}}))
    with pytest.raises(ValueError, match="There is no environment 'DMC/walker-wlak-v0'"):
        runs.check_names(study(tasks=["DMC/walker-wlak-v0"]))
