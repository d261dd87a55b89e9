"""What each latent dynamics costs: parameters, multiply-adds and planning latency, as a table.

    python -m tdmpc2_sb3.compare_dynamics --env DMC/walker-walk-v0

Every row is a fresh agent that differs from the others in its dynamics and horizon alone. Weights
do not matter for the cost, so nothing is trained. The kinds are timed in turns, so that a change
of the machine's load meets all of them alike.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from torch import nn

from tdmpc2_sb3.fast.torch_compile import Compiled
from tdmpc2_sb3.kernels.products import operation_counter
from tdmpc2_sb3.model.dynamics import DYNAMICS
from tdmpc2_sb3.policies import TDMPC2Policy
from tdmpc2_sb3.tdmpc2 import TDMPC2

WARM_UP_CALLS = 2


class Cost(NamedTuple):
    """One row: a kind of dynamics at one horizon. Times are medians, in milliseconds."""

    dynamics: str
    horizon: int
    parameters: int  # of the dynamics
    rollout_multiply_adds: int  # of all N samples over the horizon, once
    plan_multiply_adds: int  # of a whole plan
    rollout_ms: float
    plan_ms: float
    plan_p95_ms: float


def count_parameters(module: nn.Module) -> int:
    """Number of trained scalars."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def count_multiply_adds(function: Callable[[], object]) -> int:
    """Multiply-adds of the matrix products and convolutions that a call makes.

    Counted while it runs, so that any dynamics, a third party's too, is counted alike.
    """
    with operation_counter() as counter:
        function()
    return counter.get_total_flops() // 2


def time_in_turns(
    functions: Sequence[Callable[[], object]], repeats: int, device: th.device
) -> list[np.ndarray]:
    """Milliseconds of every call, [repeats] for each function; the first calls are not counted."""
    times = [np.empty(repeats) for _ in functions]
    for function in functions:
        for _ in range(WARM_UP_CALLS):
            function()
    for repeat in range(repeats):
        for function, out in zip(functions, times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            function()
            _synchronize(device)
            out[repeat] = 1e3 * (time.perf_counter() - start)
    return times


def _synchronize(device: th.device) -> None:
    if device.type == "cuda":
        th.cuda.synchronize(device)
    elif device.type == "mps":
        th.mps.synchronize()


class _Arm:
    """An untrained agent and the two calls that are measured on it."""

    def __init__(self, env: gym.Env, kind: str, horizon: int, compile: bool, settings: dict):
        entries = isinstance(env.observation_space, gym.spaces.Dict)
        policy = "MultiInputPolicy" if entries else "MlpPolicy"
        agent = TDMPC2(
            policy, env, dynamics=kind, horizon=horizon, compile=compile, **settings
        )  # fmt: skip
        assert isinstance(agent.policy, TDMPC2Policy)
        self.device, self.policy = agent.device, agent.policy
        self.policy.set_training_mode(False)
        self.dynamics = agent.policy.world_model.dynamics
        self.observation, _ = self.policy.obs_to_tensor(env.reset(seed=0)[0])
        self.generator = th.Generator(self.device).manual_seed(0)
        with th.no_grad():
            offsets = self.policy.world_model.encoder.sample_offsets(1, self.generator)
            self.latent = self.policy.world_model.encode(self.observation, offsets).unsqueeze(1)
        shape = (horizon, 1, agent.num_samples, self.policy.world_model.action_dim)
        self.actions = 2 * th.rand(shape, device=self.device, dtype=th.float32) - 1
        self._rollout = Compiled(self._eager_rollout, compile)
        self.mean = self.policy.zero_plan(1)
        self.start = th.ones(1, dtype=th.bool, device=self.device)

    def _eager_rollout(self, latent: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return self.dynamics.rollout(self.dynamics.initial_state(latent), actions)

    @th.no_grad()
    def rollout(self) -> th.Tensor:
        return self._rollout(self.latent, self.actions)

    def plan(self) -> object:
        policy = self.policy
        return policy.plan(self.observation, self.mean, self.start, self.generator, explore=True)


def compare(
    env: gym.Env,
    kinds: Sequence[str] = ("mlp", "ssm"),
    horizons: Sequence[int] = (3, 5, 10),
    repeats: int = 10,
    compile: bool = False,
    **settings: Any,
) -> list[Cost]:
    """The cost of each kind of dynamics at each horizon.

    :param env: whose spaces size the agents
    :param kinds: keys of :data:`tdmpc2_sb3.model.dynamics.DYNAMICS`
    :param horizons: H
    :param repeats: timed calls
    :param compile: whether rollout and plan are compiled (minutes) before they are timed
    :param settings: further arguments of :class:`TDMPC2`
    :raises ValueError: if a kind is not registered
    """
    for kind in kinds:
        if kind not in DYNAMICS:
            raise ValueError(f"dynamics {kind!r} is not registered: use some of {list(DYNAMICS)}.")
    rows = []
    for horizon in horizons:
        arms = [_Arm(env, kind, horizon, False, settings) for kind in kinds]
        counts = [(count_multiply_adds(arm.rollout), count_multiply_adds(arm.plan)) for arm in arms]
        if compile:
            arms = [_Arm(env, kind, horizon, True, settings) for kind in kinds]
        device = arms[0].device
        rollouts = time_in_turns([arm.rollout for arm in arms], repeats, device)
        plans = time_in_turns([arm.plan for arm in arms], repeats, device)
        for kind, arm, count, rollout, plan in zip(
            kinds, arms, counts, rollouts, plans, strict=True
        ):
            rows.append(
                Cost(
                    kind,
                    horizon,
                    count_parameters(arm.dynamics),
                    *count,
                    float(np.median(rollout)),
                    float(np.median(plan)),
                    float(np.percentile(plan, 95)),
                )
            )
    return rows


def format_table(rows: Sequence[Cost]) -> str:
    """The rows as aligned text, each with its ratio to the first kind at the same horizon."""
    lines = [
        f"{'':10}{'':>4}{'dynamics':>12}{'multiply-adds, M':>24}{'rollout':>20}{'plan':>30}",
        f"{'dynamics':10}{'H':>4}{'parameters':>12}{'rollout':>12}{'plan':>12}"
        f"{'ms':>11}{'ratio':>9}{'median ms':>12}{'95% ms':>9}{'ratio':>9}",
    ]
    first: dict[int, Cost] = {}
    for row in rows:
        base = first.setdefault(row.horizon, row)
        lines.append(
            f"{row.dynamics:10}{row.horizon:>4}{row.parameters:>12,}"
            f"{row.rollout_multiply_adds / 1e6:>12,.0f}{row.plan_multiply_adds / 1e6:>12,.0f}"
            f"{row.rollout_ms:>11.2f}{row.rollout_ms / base.rollout_ms:>9.2f}"
            f"{row.plan_ms:>12.2f}{row.plan_p95_ms:>9.2f}{row.plan_ms / base.plan_ms:>9.2f}"
        )
    return "\n".join(lines)


def write_csv(rows: Sequence[Cost], path: Path) -> None:
    """One line a row, columns as in :class:`Cost`."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Cost._fields)
        writer.writerows(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tdmpc2_sb3.compare_dynamics", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--env", default="DMC/walker-walk-v0", help="environment id")
    parser.add_argument("--dynamics", nargs="+", default=["mlp", "ssm"], help="kinds, base first")
    parser.add_argument("--horizons", nargs="+", type=int, default=[3, 5, 10])
    parser.add_argument("--model-size", type=int, default=5, help="million parameters: 1, 5, ...")
    parser.add_argument("--repeats", type=int, default=10, help="timed calls")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile first (takes minutes)")
    parser.add_argument("-o", "--output", type=Path, help="also write the table as CSV")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; prints the table."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.threads is not None:
        th.set_num_threads(options.threads)
    import dmc_gym_plugin  # noqa: F401  registers DMC/ ids, also without the start-up hook

    try:
        env = gym.make(options.env)
        rows = compare(
            env,
            options.dynamics,
            options.horizons,
            options.repeats,
            options.compile,
            model_size=options.model_size,
            device=options.device,
        )
    except (ValueError, gym.error.Error) as error:
        parser.error(str(error))
    print(
        f"{options.env}, {options.model_size}M, {'compiled' if options.compile else 'eager'}, "
        f"torch {th.__version__}, {th.get_num_threads()} thread(s), median of {options.repeats}"
    )
    print(format_table(rows))
    if options.output is not None:
        write_csv(rows, options.output)


if __name__ == "__main__":
    main()
