"""How far this package's TD-MPC2 is from the authors' own code on the same inputs.

    python benchmarks/faithful.py PATH/TO/tdmpc2 --output faithful.md

``PATH/TO/tdmpc2`` is a checkout of the authors' repository, which needs its requirements (above all
tensordict). Three things are compared, with and without terminations, at 1M and 5M parameters:

- networks, also of images with their random shifts: an agent of theirs is saved by their code, read
  by ``TDMPC2.load_official`` and written again by ``save_official``; the outputs of all three for
  the same inputs,
- updates: a number of gradient steps from the same weights on the same batches,
- plans: several in a row, each warm-started by theirs before, exploring.

Theirs draws random numbers wherever it needs them; for updates and plans each draw is given the
numbers that ours gets. Dropout is off in the updates: it is drawn inside of a vectorised map. Plans
are made in float64: in float32, rounding decides which of hundreds of trajectories of all but equal
value are among the elites, and in which order. What remains is the 1e-9 that theirs adds to sums of
weights. (That the kernels, which are for float32 alone, plan as plain torch does is what the tests
show.)
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

import authors
from machine import command, describe
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.losses import PolicyNoise, UpdateNoise
from tdmpc2_sb3.model.encoders import SHIFT_PAD
from tdmpc2_sb3.planner import PlanNoise, plan, shift_plan
from tdmpc2_sb3.replay.buffer import SequenceBatch

OBSERVATION_DIM = 24
ACTION_DIM = 6
IMAGES = spaces.Box(0, 255, (9, 64, 64), np.uint8)  # three frames of three channels
VECTORS = spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)
ROWS = 64  # of inputs to the networks
TERMINATION_RATE = 0.05
# What theirs logs and what ours calls it.
LOGGED = {
    "total_loss": "train/loss",
    "consistency_loss": "train/consistency_loss",
    "reward_loss": "train/reward_loss",
    "value_loss": "train/value_loss",
    "termination_loss": "train/termination_loss",
    "grad_norm": "train/grad_norm",
    "pi_loss": "train/policy_loss",
    "pi_entropy": "train/policy_entropy",
    "pi_scaled_entropy": "train/policy_scaled_entropy",
    "pi_grad_norm": "train/policy_grad_norm",
    "pi_scale": "train/q_scale",
}


class Task(gym.Env):
    """The spaces that both agents are built for; neither ever steps it."""

    action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def __init__(self, observation_space: spaces.Box):
        self.observation_space = observation_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        raise NotImplementedError

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        raise NotImplementedError


class Pair:
    """An agent of theirs with random weights, and ours with the same.

    :param checkout: of their repository
    :param size: million parameters
    :param episodic: whether there are terminations
    :param space: of the observations
    :param seed: of weights and inputs
    """

    def __init__(
        self,
        checkout: Path,
        size: int,
        episodic: bool,
        space: spaces.Box = VECTORS,
        seed: int = 0,
    ):
        self.space = space
        th.manual_seed(seed)  # theirs draws its weights from it
        settings = {"rho": 0.7, "discount_max": 0.99} if episodic else {}  # theirs for such tasks
        with contextlib.redirect_stdout(io.StringIO()):
            self.theirs = authors.build(
                checkout,
                space.shape,
                ACTION_DIM,
                model_size=size,
                episodic=episodic,
                dropout=0.0,
                **settings,
            )
        self.generator = th.Generator().manual_seed(seed)
        self.ours = self.read()

    def read(self) -> TDMPC2:
        """An agent of ours with the weights that theirs has now."""
        config, file = self.theirs.cfg, io.BytesIO()
        self.theirs.save(file)
        file.seek(0)
        agent = TDMPC2.load_official(
            file,
            Task(self.space),
            device="cpu",
            dropout=config.dropout,
            gamma=self.theirs.discount,
            rho=config.rho,
            horizon=config.horizon,
            batch_size=config.batch_size,
            num_iterations=config.iterations,
            reference_terminations=True,
            entropy="gaussian",  # as in the authors' present code
        )
        model = agent.policy.world_model
        arch = model.architecture
        model.bins = th.linspace(arch.vmin, arch.vmax, arch.num_bins)  # float32 as it is built
        return agent

    def perturb(self, scale: float) -> None:
        """Moves all weights at random, so that heads that start at zero say something."""
        self.change_theirs(lambda value: value + scale * self.normal(*value.shape))
        self.ours = self.read()

    def change_theirs(self, change: Callable[[th.Tensor], th.Tensor]) -> None:
        """Changes every weight of theirs, those of the target Q heads included."""
        state = self.theirs.model.state_dict()
        for name, value in state.items():
            if name.startswith("_detach_Qs_params."):  # the Q heads a second time
                state[name] = state[name.replace("_detach_Qs_params", "_Qs.params")]
            elif isinstance(value, th.Tensor) and not name.startswith("log_std_"):
                state[name] = change(value)
        self.theirs.model.load_state_dict(state)

    def normal(self, *shape: int) -> th.Tensor:
        return th.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int) -> th.Tensor:
        return th.rand(*shape, generator=self.generator)

    def heads(self, count: int) -> th.Tensor:
        return self.ours.policy.world_model.sample_heads(self.generator, rows=count)

    def permutations(self, heads: th.Tensor) -> list[th.Tensor]:
        """Orders of all Q heads whose first two are these."""
        everything = range(self.theirs.cfg.num_q)
        return [
            th.tensor([*chosen, *(each for each in everything if each not in chosen)])
            for chosen in heads.tolist()
        ]


@contextlib.contextmanager
def given(**draws: list[th.Tensor]) -> Iterator[None]:
    """Has functions of torch return these numbers, one after the other, in place of random ones."""

    def by_turns(name: str) -> Any:
        numbers = iter(draws[name])

        def draw(like: Any, *rest: Any, **kwargs: Any) -> th.Tensor:
            number = next(numbers)
            if isinstance(like, th.Tensor) and name == "exponential_":
                return number.reshape(like.shape)
            shape = like.shape if isinstance(like, th.Tensor) else (like, *rest)
            shape = kwargs.get("size", shape)
            assert tuple(number.shape) == tuple(shape), (name, number.shape, shape)
            return number

        return draw

    with contextlib.ExitStack() as stack:
        for name in draws:
            owner = th.Tensor if name == "exponential_" else th
            stack.enter_context(mock.patch.object(owner, name, by_turns(name)))
        yield


class Inputs(NamedTuple):
    """Of all networks."""

    observations: th.Tensor  # [B, O] or [B, C, h, w]
    shifts: th.Tensor  # of images, whole numbers, [B, 2]
    actions: th.Tensor  # [B, A]
    noise: th.Tensor  # of the policy prior, [B, A]


def their_outputs(agent: Any, inputs: Inputs) -> dict[str, th.Tensor]:
    """What the networks of an agent of theirs say, by name."""
    model, inverse = agent.model, authors.module("common.math").two_hot_inv
    actions = inputs.actions
    with given(randint=[inputs.shifts[:, None, None, :].clone()], randn_like=[inputs.noise]):
        z = model.encode(inputs.observations, None)
        action, prior = model.pi(z, None)
    outputs = {
        "latents": z,
        "next latents": model.next(z, actions, None),
        "rewards": inverse(model.reward(z, actions, None), agent.cfg).squeeze(-1),
        "policy's means": prior["mean"],
        "policy's actions": action,
    }
    for name, target in (("Q", False), ("target Q", True)):
        logits = model.Q(z, actions, None, return_type="all", target=target)
        outputs[name] = inverse(logits, agent.cfg).squeeze(-1)
    if agent.cfg.episodic:
        outputs["terminations"] = model.termination(z, None).squeeze(-1)
    return outputs


def our_outputs(agent: TDMPC2, inputs: Inputs) -> dict[str, th.Tensor]:
    """The same of an agent of ours."""
    model, actions = agent.policy.world_model, inputs.actions
    offsets = inputs.shifts.long().flip(1).unsqueeze(0)  # row and column; theirs is x and y
    z = model.encode(inputs.observations, offsets)
    every_head = th.arange(model.architecture.num_q)
    outputs = {
        "latents": z,
        "next latents": model.dynamics.step(model.dynamics.initial_state(z), actions)[0],
        "rewards": model.reward(z, actions),
        "policy's means": model.policy_action(z, None),
        "policy's actions": model.policy_action(z, inputs.noise),
        "Q": model.q_values(z, actions),
        "target Q": model.target_q_values(z, actions, every_head),
    }
    if model.episodic:
        outputs["terminations"] = model.termination_logit(z).sigmoid()
    return outputs


@th.no_grad()
def compare_networks(pair: Pair) -> list[str]:
    """Lines of the table about their agent, ours read from it, and theirs read from ours."""
    pair.perturb(0.05)
    shape = (ROWS, *pair.space.shape)
    images = pair.space.dtype == np.uint8
    inputs = Inputs(
        (256 * pair.uniform(*shape)).to(th.uint8) if images else pair.normal(*shape),
        (pair.uniform(ROWS, 2) * (2 * SHIFT_PAD + 1)).floor(),
        2.0 * pair.uniform(ROWS, ACTION_DIM) - 1.0,
        pair.normal(ROWS, ACTION_DIM),
    )
    theirs = their_outputs(pair.theirs, inputs)
    ours = our_outputs(pair.ours, inputs)
    file = io.BytesIO()
    pair.ours.save_official(file)
    pair.change_theirs(th.zeros_like)
    file.seek(0)
    pair.theirs.load(th.load(file))
    again = their_outputs(pair.theirs, inputs)
    return [
        f"| {name} | {value.abs().max():.3g} | {_largest(value, ours[name]):.1e} "
        f"| {_largest(value, again[name]):.1e} |"
        for name, value in theirs.items()
    ]


def _largest(first: th.Tensor, second: th.Tensor) -> float:
    return float((first - second).abs().max())


def compare_updates(pair: Pair, count: int) -> tuple[float, float]:
    """
    :return: largest relative difference of anything logged, and the weights' difference after all
        updates relative to how far they moved
    """
    horizon, batch = pair.theirs.cfg.horizon, pair.theirs.cfg.batch_size
    start = _weights(pair.ours)
    worst = 0.0
    for _ in range(count):
        observations = pair.normal(horizon + 1, batch, OBSERVATION_DIM)
        actions = 2.0 * pair.uniform(horizon, batch, ACTION_DIM) - 1.0
        rewards = 3.0 * pair.uniform(horizon, batch)
        rate = TERMINATION_RATE if pair.theirs.cfg.episodic else 0.0
        terminations = (pair.uniform(horizon, batch) < rate).float()
        next_action = pair.normal(horizon, batch, ACTION_DIM)
        policy_action = pair.normal(horizon + 1, batch, ACTION_DIM)
        heads = pair.heads(2)
        with given(randn_like=[next_action, policy_action], randperm=pair.permutations(heads)):
            theirs = pair.theirs._update(
                observations, actions, rewards.unsqueeze(-1), terminations.unsqueeze(-1)
            )
        pair.ours.policy.set_training_mode(True)
        ours = pair.ours._update_step(
            SequenceBatch(observations, actions, rewards, terminations),
            UpdateNoise(
                next_action, heads[0], None, PolicyNoise(policy_action, heads[1], None), None, None
            ),
        )
        pair.ours.policy.set_training_mode(False)
        for their_name, our_name in LOGGED.items():
            if our_name in ours:
                first, second = theirs[their_name].mean().item(), ours[our_name].item()
                worst = max(worst, abs(first - second) / abs(first))
    moved = _weights(pair.ours) - start
    return worst, float((_weights(pair.read()) - start - moved).norm() / moved.norm())


def _weights(agent: TDMPC2) -> th.Tensor:
    tensors = agent.policy.world_model.state_dict().values()
    return th.cat([each.flatten() for each in tensors])


@th.no_grad()
def compare_plans(pair: Pair, count: int) -> tuple[float, float]:
    """
    :param pair: in float64
    :param count: of plans
    :return: largest difference of an action, and of a plan's mean
    """
    pair.perturb(0.1)
    planner, model = pair.ours.policy.planner, pair.ours.policy.world_model
    horizon, samples, prior = planner.horizon, planner.num_samples, planner.num_pi_trajs
    iterations = range(planner.num_iterations)
    mean = th.zeros(1, horizon, ACTION_DIM)
    of_action = of_mean = 0.0
    for step in range(count):
        observation = pair.normal(1, OBSERVATION_DIM)
        waiting = -pair.uniform(1, planner.num_elites).log()  # exponential, as theirs draws it
        noise = PlanNoise(
            policy=pair.normal(horizon, 1, prior, ACTION_DIM),
            samples=pair.normal(len(iterations), horizon, 1, samples - prior, ACTION_DIM),
            terminal=pair.normal(len(iterations), 1, samples, ACTION_DIM),
            heads=pair.heads(len(iterations)),
            gumbel=-waiting.log(),
            exploration=pair.normal(1, ACTION_DIM),
            offsets=None,
        )
        draws = given(
            randn_like=[*noise.policy[:, 0], *noise.terminal[:, 0]],
            randn=[*noise.samples[:, :, 0], noise.exploration[0]],
            randperm=pair.permutations(noise.heads),
            exponential_=[waiting],
        )
        # Theirs asks for float32 where it keeps what has ended, and so rounds the discount.
        with draws, mock.patch.object(th, "float32", th.float64):
            action = pair.theirs._plan(observation, t0=step == 0)
        warm = shift_plan(mean, th.tensor([step == 0]))
        ours = plan(model, model.encode(observation), warm, noise, planner, explore=True)
        of_action = max(of_action, _largest(action, ours.action[0]))
        of_mean = max(of_mean, _largest(pair.theirs._prev_mean, ours.mean[0]))
        mean = pair.theirs._prev_mean[None].clone()  # or small differences grow from plan to plan
    return of_action, of_mean


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="of the authors' repository")
    parser.add_argument("--models", type=int, nargs="+", default=[1, 5], help="million parameters")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the updates")
    parser.add_argument("--plans", type=int, default=10)
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    args = parser.parse_args()
    machine = describe("torch", "tensordict", "numpy", "stable-baselines3")
    line = command().replace(str(args.checkout), "PATH/TO/tdmpc2")
    lines = ["# Beside the authors' code", "", f"Command: `{line}`", "", f"Machine: {machine}."]
    kinds = [(size, episodic) for size in args.models for episodic in (False, True)]

    def label(size: int, episodic: bool) -> str:
        return f"{size}M, {'with' if episodic else 'without'} terminations"

    of_networks = [(f"Networks, {label(*kind)}", Pair(args.checkout, *kind)) for kind in kinds]
    of_networks.append(("Networks, 5M, images", Pair(args.checkout, 5, False, IMAGES)))
    for heading, pair in of_networks:
        lines += [
            "",
            f"## {heading}",
            "",
            "| output | largest value | difference: theirs, read by ours "
            "| difference: theirs, written and read again |",
            "|---|---|---|---|",
            *compare_networks(pair),
        ]
    lines += [
        "",
        f"## {args.updates} updates",
        "",
        "| agent | seed | largest relative difference of anything logged "
        "| difference of the weights / how far they moved |",
        "|---|---|---|---|",
    ]
    for kind in kinds:
        for seed in args.seeds:
            pair = Pair(args.checkout, *kind, seed=seed)
            logged, weights = compare_updates(pair, args.updates)
            lines.append(f"| {label(*kind)} | {seed} | {logged:.1e} | {weights:.1e} |")
    lines += [
        "",
        f"## {args.plans} plans in a row, in float64",
        "",
        "| agent | largest difference of an action | of a plan's mean |",
        "|---|---|---|",
    ]
    th.set_default_dtype(th.float64)
    for kind in kinds:
        action, mean = compare_plans(Pair(args.checkout, *kind), args.plans)
        lines.append(f"| {label(*kind)} | {action:.1e} | {mean:.1e} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
