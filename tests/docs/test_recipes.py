"""The recipes of docs/architecture.md: their edits, applied to a copy of the packages, and used."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text()
PACKAGES = ("tdmpc2_sb3", "dmc_gym_plugin")
#: The most places that each may take.
PLACES = {
    "Add a loss term": 3,
    "Add a planner option": 3,
    "Add a dynamics kind": 2,
    "Add an environment": 2,
}


class Edit(NamedTuple):
    """One place of a recipe."""

    file: str
    before: str
    after: str


def edits(recipe: str) -> list[Edit]:
    (section,) = re.findall(rf"^### {recipe}\n(.*?)(?=^##)", PAGE, re.S | re.M)
    (diff,) = re.findall(r"^```diff\n(.*?)^```", section, re.S | re.M)
    found = []
    for file, lines in re.findall(r"^@@ (\S+): .* @@\n((?:(?!@@).*\n)*)", diff, re.M):
        marked = [(line[:1] or " ", line[1:] + "\n") for line in lines.splitlines()]
        before = "".join(text for mark, text in marked if mark != "+")
        after = "".join(text for mark, text in marked if mark != "-")
        assert all(mark in " +-" for mark, _ in marked), lines
        found.append(Edit(file, before, after))
    return found


def apply(recipe: str, folder: Path) -> None:
    """Makes a copy of the packages with a recipe's edits."""
    for package in PACKAGES:
        shutil.copytree(
            REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for edit in edits(recipe) if recipe else []:
        path = folder / edit.file
        text = path.read_text() if edit.before else ""
        assert edit.before or not path.exists(), f"{edit.file} is there already"
        places = text.count(edit.before) if edit.before else 1
        assert places == 1, f"{places} places in {edit.file} are\n{edit.before}"
        path.write_text(text.replace(edit.before, edit.after) if edit.before else edit.after)


BEGINNING = """
import csv, io, math, sys
from contextlib import redirect_stdout
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.logger import configure

import tdmpc2_sb3
from tdmpc2_sb3 import TDMPC2, MlpPolicy

reference = sys.argv[1]
assert Path(tdmpc2_sb3.__file__).parents[1] == Path.cwd(), tdmpc2_sb3.__file__
th.set_num_threads(1)
TINY = dict(
    latent_dim=16, enc_dim=32, mlp_dim=32, num_q=2, num_samples=32, num_elites=8, num_pi_trajs=4,
    num_iterations=2, batch_size=8, learning_starts=20, buffer_size=1000, initial_gradient_steps=1,
    device="cpu", seed=0, verbose=1,
)


def train(env=None, **settings):
    '''The agent, the last row of its log, what it printed.'''
    env = gym.make("Pendulum-v1", max_episode_steps=10) if env is None else env
    said = io.StringIO()
    with redirect_stdout(said):
        agent = TDMPC2("MlpPolicy", env, **{**TINY, **settings})
        agent.set_logger(configure("log", ["csv"]))
        agent.learn(40, log_interval=1)
    with open("log/progress.csv") as file:
        *_, row = csv.DictReader(file)
    return agent, row, said.getvalue()


def same_weights(one, other):
    pairs = zip(one.policy.parameters(), other.policy.parameters(), strict=True)
    return all(th.equal(first, second) for first, second in pairs)


def refused(message, **settings):
    try:
        TDMPC2("MlpPolicy", "Pendulum-v1", **settings)
    except ValueError as error:
        assert str(error) == message, error
    else:
        raise AssertionError(message)


"""

UNEDITED = """
train()[0].save(reference)
"""

LOSS = """
from tdmpc2_sb3.losses import LossConfig, model_losses, sample_update_noise, step_weights

without, row, said = train()
assert "train/smoothness_loss" not in row
assert "the plain way" not in said, said
old = TDMPC2.load(reference)
assert old.smoothness_coef == 0.0
assert same_weights(without, old)  # bit for bit what they were without the edits

agent, row, said = train(smoothness_coef=0.5)
assert not same_weights(agent, without)
assert 0.0 < float(row["train/smoothness_loss"]) < 1.0
line = "Gradient steps go the plain way, which is slower: smoothness_coef is not known to "
assert said.count(line) == 1, said

model, batch = agent.policy.world_model, agent.replay_buffer.sample(8)
noise = sample_update_noise(model, 3, 8, th.Generator().manual_seed(0))
weights = step_weights(3, 3, 0.5, True)
given = (model, batch, noise)
plain = model_losses(*given, LossConfig(), weights)
losses = model_losses(*given, LossConfig(smoothness_coef=0.5), weights)
z = [model.encode(batch.observations[0])]
for action in batch.actions:
    z.append(model.dynamics.rollout(model.dynamics.initial_state(z[-1]), action[None])[0])
by_hand = sum(weights[t] * (z[t + 1] - z[t]).square().mean() for t in range(3)).item()
assert math.isclose(losses.terms["smoothness"].item(), by_hand, rel_tol=1e-4)
assert math.isclose((losses.total - plain.total).item(), 0.5 * by_hand, rel_tol=1e-3)

agent.save("agent")
again = TDMPC2.load("agent", gym.make("Pendulum-v1"))
assert again.smoothness_coef == 0.5
agent._means.pop()
agent.train(1, 8)
assert "train/smoothness_loss" in agent._means.pop()
agent.smoothness_coef = 0.0  # amid a run
agent.train(1, 8)
assert "train/smoothness_loss" not in agent._means.pop()
refused("smoothness_coef is 'much': it must be a finite number.", smoothness_coef="much")
"""

OPTION = """
without, _, said = train()
assert "the plain way" not in said, said
old = TDMPC2.load(reference)
assert old.momentum == old.policy.planner.momentum == 0.0
assert same_weights(without, old)
assert without._plan_mean.any()

agent, _, said = train(momentum=1.0)
line = "Plans go the plain way, which is slower: momentum is not known to "
assert said.count(line) == 1, said
assert not agent._plan_mean.any()  # all of the first mean, 0, is kept
assert not same_weights(agent, without)
half, _, _ = train(momentum=0.5)
assert half._plan_mean.any()
assert not same_weights(half, without)

agent.save("agent")
agent.policy.save("policy")
assert TDMPC2.load("agent").policy.planner.momentum == 1.0
assert MlpPolicy.load("policy").planner.momentum == 1.0
agent.momentum = 0.25  # amid a run
assert agent.policy.planner.momentum == 0.25
refused("momentum is 1.5: it must lie in [0, 1].", momentum=1.5)
"""

DYNAMICS = """
agent, row, _ = train(dynamics="linear")
dynamics = agent.policy.world_model.dynamics
assert type(dynamics).__name__ == "LinearDynamics"
assert float(row["train/consistency_loss"]) > 0.0
latent, action = th.rand(5, 16), th.rand(3, 5, 1)
with th.no_grad():
    latents = dynamics.rollout(dynamics.initial_state(latent), action)
    for t in range(3):
        pair = th.cat([latent, action[t]], -1)
        logits = th.nn.functional.layer_norm(
            pair @ dynamics.layer.weight.T + dynamics.layer.bias, (16,),
            dynamics.layer.ln.weight, dynamics.layer.ln.bias,
        )
        latent = logits.view(5, 2, 8).softmax(-1).view(5, 16)
        th.testing.assert_close(latents[t], latent, rtol=1e-4, atol=1e-5)

fresh = TDMPC2("MlpPolicy", gym.make("Pendulum-v1"), **{**TINY, "dynamics": "linear"})
moved = zip(dynamics.parameters(), fresh.policy.world_model.dynamics.parameters(), strict=True)
assert not any(th.equal(one, other) for one, other in moved)
agent.save("agent")
observation = np.zeros(3, np.float32)
expected, _ = agent.predict(observation, deterministic=True)
assert np.array_equal(TDMPC2.load("agent").predict(observation, deterministic=True)[0], expected)
"""

ENVIRONMENT = """
import dmc_gym_plugin
from dmc_gym_plugin.__main__ import main

env = gym.make("DMC/walker-crouch-v0", action_repeat=50)
env.reset(seed=0)
height = env.unwrapped.physics.torso_height
one_step = gym.make("DMC/walker-crouch-v0")
one_step.reset(seed=0)
seen = []
for _ in range(40):
    _, reward, *_ = one_step.step(np.ones(6, np.float32))
    above = max(0.0, one_step.unwrapped.physics.torso_height() - 0.7) / 0.5
    assert math.isclose(reward, math.exp(math.log(0.1) * above**2), abs_tol=1e-9)
    seen.append(reward)
assert max(seen) > min(seen)
agent, row, _ = train(env)
assert agent.num_timesteps == 40 and agent._n_updates > 10
assert math.isfinite(float(row["rollout/ep_rew_mean"]))
said = io.StringIO()
with redirect_stdout(said):
    main(["list", "extended"])
assert "DMC/walker-crouch-v0" in said.getvalue()
(line,) = [each for each in said.getvalue().splitlines() if "crouch" in each]
assert line.split()[1:] == ["24", "6", "0.025", "1000"]
"""

PROGRAMS = dict(zip(PLACES, (LOSS, OPTION, DYNAMICS, ENVIRONMENT), strict=True))


def run(folder: Path, program: str, reference: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGINNING + program, str(reference)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An agent of the packages as they are."""
    folder = tmp_path_factory.mktemp("unedited")
    apply("", folder)
    run(folder, UNEDITED, folder / "agent.zip")
    return folder / "agent.zip"


def test_there_is_a_recipe_for_each() -> None:
    assert re.findall(r"^### (Add .*)$", PAGE, re.M) == list(PLACES)


@pytest.mark.parametrize("recipe", PLACES)
def test_few_places_are_touched(recipe: str, tmp_path: Path) -> None:
    made = edits(recipe)
    assert 1 <= len(made) <= PLACES[recipe]
    assert len({edit.file for edit in made}) <= 2
    apply(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", PLACES)
def test_the_edits_are_all_there_is_to_it(recipe: str, tmp_path: Path, reference: Path) -> None:
    apply(recipe, tmp_path)
    run(tmp_path, PROGRAMS[recipe], reference)


def test_the_page_names_every_room() -> None:
    package = REPOSITORY / "tdmpc2_sb3"
    rooms = sorted(path.parent.name for path in package.glob("*/__init__.py"))
    named = re.findall(r"`(\w+)/`", PAGE)
    assert sorted({name for name in named if (package / name).is_dir()}) == rooms
    for path in package.glob("*.py"):
        assert path.name in ("__init__.py", "callbacks.py") or f"`{path.name}`" in PAGE, path.name
