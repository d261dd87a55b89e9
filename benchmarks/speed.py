"""Milliseconds to plan an action, to make an update and of a whole agent step, and their share of
the machine's peak.

    python benchmarks/speed.py
    python benchmarks/speed.py --models 1 5 --authors PATH/TO/tdmpc2 --output speed.md
    python benchmarks/speed.py --models zoo 5 --dynamics mlp ssm --device cuda
    python benchmarks/speed.py --models zoo 5 --num-envs 1 16 --threads 2

Everything measured takes turns within a round, so that a busy machine slows all alike; times are
medians over the rounds and ratios are medians of the ratios within a round. The peak is that of
512 x 512 x 512 float32 products in the same rounds, by torch or by this package, whichever is
faster in the round; operations are those of matrix products, as torch counts them. A whole step
(``loop``) is acting, storing and learning on an environment that costs nothing, by as many updates
as the setting asks for: two a step in the zoo's YAML, one in the reference. ``--num-envs`` measures
it with several environments: at the same update ratio, and (``sparse``) with one update every four
steps. ``--authors`` runs a checkout of the authors' repository beside ours, its device changed to
this one as it is imported (it needs their requirements, above all tensordict). ``--jax`` does the
same with a checkout of tdmpc2-jax at 5M, whose planning and updates are compiled (it needs jax,
flax, optax, jaxtyping and einops). ``--torchrl`` does it with TorchRL's, where that is installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
import yaml
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

import authors
import torchrl_peer
from machine import command, describe
from tdmpc2_sb3 import TDMPC2
from tdmpc2_sb3.kernels import Layer, fixed_weights, networks
from tdmpc2_sb3.kernels.products import operation_counter

OBSERVATION_DIM = 24  # walker-walk's
ACTION_DIM = 6
EPISODE_STEPS = 500
PEAK_SIZE = 512
PEAKS = ("peak by torch", "peak by kernels")
LOOP_STEPS = 4  # timed at once
SPARSE_RATIO = 4  # steps for each update
PAUSE = 0.2  # seconds, in which the last one's threads go to sleep
OTHERS = ("authors'", "JAX port's", "TorchRL's")
ZOO_YAML = Path(__file__).parents[1] / "hyperparams" / "tdmpc2.yml"
ZOO_ENTRY = "DMC/walker-walk-v0"
NOT_ARGUMENTS = (
    "policy", "n_timesteps", "eval_freq", "env_kwargs", "train_env_kwargs", "callback",
    "buffer_size",
)  # fmt: skip


class Contender(NamedTuple):
    """Something timed."""

    name: str
    run: Callable[[], object]
    flops: int | None = None
    repeats: int = 1  # of what is named in one run


class ConstantTask(gym.Env):
    """Walker-walk's spaces without its physics: only the learner's time is measured."""

    observation_space = spaces.Box(-np.inf, np.inf, (OBSERVATION_DIM,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)
    terminates = False
    max_episode_steps = EPISODE_STEPS

    def __init__(self) -> None:
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return self._observe(), 0.5, False, self.steps >= EPISODE_STEPS, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.standard_normal(OBSERVATION_DIM).astype(np.float32)


def settings_of(model: str) -> dict[str, Any]:
    """Constructor arguments: the paper's for a model size, or walker-walk's in the zoo's YAML."""
    if model != "zoo":
        return {"model_size": int(model)}
    entry = yaml.safe_load(ZOO_YAML.read_text())[ZOO_ENTRY]
    return {key: value for key, value in entry.items() if key not in NOT_ARGUMENTS}


def build(
    model: str, dynamics: str, args: argparse.Namespace, num_envs: int = 1, **changes: Any
) -> TDMPC2:
    """An agent with a filled buffer and nonzero heads."""
    settings = {
        **settings_of(model),
        "learning_starts": 2 * EPISODE_STEPS * num_envs,
        "initial_gradient_steps": 1,
        **changes,
    }
    if args.horizon is not None:
        settings["horizon"] = args.horizon
    agent = TDMPC2(
        "MlpPolicy",
        DummyVecEnv([ConstantTask] * num_envs),
        dynamics=dynamics,
        compile=args.compile,
        device=args.device,
        seed=0,
        **settings,
    )
    agent.learn(2 * EPISODE_STEPS * num_envs)
    return agent


def loop_contenders(model: str, dynamics: str, args: argparse.Namespace) -> list[Contender]:
    """Whole agent steps with each number of environments."""
    ratio = settings_of(model).get("gradient_steps", 1)
    contenders = []
    for num_envs in args.num_envs:
        wanted = {"": ratio * num_envs}
        if num_envs >= SPARSE_RATIO:
            wanted[", sparse"] = num_envs // SPARSE_RATIO
        for suffix, gradient_steps in wanted.items():
            agent = build(model, dynamics, args, num_envs, gradient_steps=gradient_steps)
            steps = max(LOOP_STEPS, num_envs)

            def run(agent: TDMPC2 = agent, steps: int = steps) -> None:
                agent.learn(steps, reset_num_timesteps=False)
                synchronize(agent.device)

            run()
            envs = "" if args.num_envs == [1] else f", {num_envs} envs{suffix}"
            name = f"loop ({model}, {dynamics}{envs})"
            # A CUDA graph's operations are seen when it is recorded alone.
            flops = None if agent.device.type == "cuda" else count_flops(run)
            contenders.append(Contender(name, run, flops, steps))
    return contenders


def synchronize(device: th.device) -> None:
    if device.type == "cuda":
        th.cuda.synchronize()
    elif device.type == "mps":
        th.mps.synchronize()


def count_flops(run: Callable[[], object]) -> int:
    with operation_counter() as counter:
        run()
    return int(counter.get_total_flops())


def our_contenders(model: str, dynamics: str, args: argparse.Namespace) -> list[Contender]:
    agent = build(model, dynamics, args)
    observation = np.random.default_rng(0).standard_normal((1, OBSERVATION_DIM), np.float32)
    state = agent.predict(observation)[1]

    def plan() -> None:
        agent.predict(observation, state, np.array([False]))
        synchronize(agent.device)

    def update() -> None:  # as many as take one step of the policy prior among them
        agent.train(gradient_steps=agent.policy_delay, batch_size=agent.batch_size)
        synchronize(agent.device)

    label = f"{model}, {dynamics}"
    contenders = []
    for what, run, repeats in (("plan", plan, 1), ("update", update, agent.policy_delay)):
        run()  # whatever is set up at the first call
        contenders.append(Contender(f"{what} ({label})", run, count_flops(run), repeats))
    return contenders


def authors_contenders(model: str, args: argparse.Namespace) -> list[Contender]:
    """Planning and updating of the authors' agent with the same sizes and data shapes."""
    agent = authors.build(
        Path(args.authors),
        (OBSERVATION_DIM,),
        ACTION_DIM,
        EPISODE_STEPS,
        int(model),
        args.device,
        compile=args.compile,
    )
    batch, horizon = agent.cfg.batch_size, agent.cfg.horizon
    generator = th.Generator().manual_seed(0)
    data = (
        th.randn(horizon + 1, batch, OBSERVATION_DIM, generator=generator),
        th.rand(horizon, batch, ACTION_DIM, generator=generator) * 2 - 1,
        th.rand(horizon, batch, 1, generator=generator),
        th.zeros(horizon, batch, 1),
    )
    device = th.device(args.device)
    data = tuple(each.to(device) for each in data)
    observation = th.randn(OBSERVATION_DIM, generator=generator)

    def plan() -> None:
        agent.act(observation, t0=False, eval_mode=False)
        synchronize(device)

    def update() -> None:
        agent._update(*data)
        synchronize(device)

    update()
    return [
        Contender(f"authors' plan ({model})", plan),
        Contender(f"authors' update ({model})", update),
    ]


def torchrl_contenders(model: str, args: argparse.Namespace) -> list[Contender]:
    """Planning and updating of TorchRL's agent with the same sizes and data shapes."""
    agent = build(model, "mlp", args)
    contenders = []
    functions = torchrl_peer.plan_and_update(agent, OBSERVATION_DIM, ACTION_DIM)
    for what, function in zip(("plan", "update"), functions, strict=True):

        def run(function: Callable[[], object] = function) -> None:
            function()
            synchronize(agent.device)

        run()
        contenders.append(Contender(f"TorchRL's {what} ({model})", run))
    return contenders


def jax_contenders(args: argparse.Namespace) -> list[Contender]:
    """Planning and updating of the JAX port's 5M agent, by the settings of its own file."""
    sys.path.insert(0, args.jax)
    import flax.linen
    import jax
    import optax
    from flax.training.train_state import TrainState

    port = importlib.import_module("tdmpc2_jax")
    activations = importlib.import_module("tdmpc2_jax.common.activations")
    layer = importlib.import_module("tdmpc2_jax.networks").NormedLinear
    config = yaml.safe_load((Path(args.jax) / "tdmpc2_jax" / "config.yaml").read_text())
    of_encoder, of_model = config["encoder"], authors.numbers(config["world_model"])
    of_agent = authors.numbers(config["tdmpc2"])
    of_model.pop("dtype")
    first, second, key = jax.random.split(jax.random.PRNGKey(0), 3)
    simnorm = functools.partial(activations.simnorm, simplex_dim=of_model["simnorm_dim"])
    module = flax.linen.Sequential(
        [
            layer(of_encoder["encoder_dim"], activation=activations.mish),
            layer(of_model["latent_dim"], activation=simnorm),
        ]
    )
    rng = np.random.default_rng(0)
    observation = rng.standard_normal((1, OBSERVATION_DIM), np.float32)
    encoder = TrainState.create(
        apply_fn=module.apply,
        params=module.init(first, observation)["params"],
        tx=optax.chain(
            optax.clip_by_global_norm(of_model["max_grad_norm"]),
            optax.adam(float(of_encoder["learning_rate"])),
        ),
    )
    model = port.WorldModel.create(action_dim=ACTION_DIM, encoder=encoder, key=second, **of_model)
    agent = port.TDMPC2.create(world_model=model, **of_agent)
    steps, rows = of_agent["horizon"], of_agent["batch_size"]
    flags = np.zeros((steps, rows), bool)
    data = (
        rng.standard_normal((steps, rows, OBSERVATION_DIM), np.float32),
        rng.uniform(-1, 1, (steps, rows, ACTION_DIM)).astype(np.float32),
        rng.uniform(0, 1, (steps, rows)).astype(np.float32),
        rng.standard_normal((steps, rows, OBSERVATION_DIM), np.float32),
        flags,
        flags,
    )
    _, last_plan = agent.act(observation, None, key=key)

    def plan() -> None:
        jax.block_until_ready(agent.act(observation, last_plan, key=key))

    def update() -> None:
        jax.block_until_ready(agent.update(*data, key=key))

    plan()
    update()
    return [Contender("JAX port's plan (5)", plan), Contender("JAX port's update (5)", update)]


def measure(contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of what every contender names, in every round."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            time.sleep(PAUSE)
            start = time.perf_counter()
            contender.run()
            times[contender.name].append((time.perf_counter() - start) / contender.repeats)
    return times


def peak_contenders(device: th.device) -> list[Contender]:
    first, second = th.randn(2, PEAK_SIZE, PEAK_SIZE, device=device)
    repeats = 8 if device.type == "cpu" else 200

    def by_torch() -> None:
        for _ in range(repeats):
            first @ second
        synchronize(device)

    @fixed_weights()
    def by_kernels() -> None:
        for _ in range(repeats):
            networks(first, None, [Layer(second, None)])

    flops = 2 * PEAK_SIZE**3 * repeats
    contenders = [Contender(PEAKS[0], by_torch, flops)]
    if device.type == "cpu":
        contenders.append(Contender(PEAKS[1], by_kernels, flops))
    return contenders


def report(contenders: list[Contender], times: dict[str, list[float]], heading: str) -> str:
    peaks = [each for each in contenders if each.name in PEAKS]
    assert peaks[0].flops is not None
    rounds = zip(*(times[each.name] for each in peaks), strict=True)
    peak_rates = [peaks[0].flops / min(seconds) for seconds in rounds]
    lines = [
        heading,
        "",
        f"Peak of float32 matrix products: {statistics.median(peak_rates) / 1e9:.0f} GFLOP/s",
        "",
        "| what | median ms | best ms | GFLOP | share of peak |",
        "|---|---|---|---|---|",
    ]
    for contender in contenders[len(peaks) :]:
        seconds = times[contender.name]
        row = f"| {contender.name} | {1e3 * statistics.median(seconds):.1f} "
        row += f"| {1e3 * min(seconds):.1f} "
        if contender.flops is None:
            row += "| | |"
        else:
            share = statistics.median(
                contender.flops / contender.repeats / each / rate
                for each, rate in zip(seconds, peak_rates, strict=True)
            )
            row += f"| {contender.flops / contender.repeats / 1e9:.2f} | {share:.0%} |"
        lines.append(row)
    for owner in OTHERS:
        lines += ratios(contenders, times, owner)
    return "\n".join(lines) + "\n"


def ratios(contenders: list[Contender], times: dict[str, list[float]], owner: str) -> list[str]:
    """Another code's time over ours, for plan, update and both."""
    lines = []
    names = {contender.name for contender in contenders}
    models = {name.split("(")[1][:-1] for name in names if name.startswith(owner)}
    for model in sorted(models):
        pairs = {
            what: [
                (theirs, ours)
                for theirs, ours in zip(
                    times[f"{owner} {what} ({model})"],
                    times[f"{what} ({model}, mlp)"],
                    strict=True,
                )
            ]
            for what in ("plan", "update")
        }
        both = [
            (first[0] + second[0], first[1] + second[1])
            for first, second in zip(pairs["plan"], pairs["update"], strict=True)
        ]
        for what, values in (*pairs.items(), ("plan + update", both)):
            ratio = statistics.median(theirs / ours for theirs, ours in values)
            lines.append(f"| {what} | {model} | {ratio:.2f} |")
    if lines:
        header = ["", f"| {owner} time / ours | model | median ratio |", "|---|---|---|"]
        lines = header + lines
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["zoo", "1", "5"], help="million parameters, or 'zoo'"
    )
    parser.add_argument("--dynamics", nargs="+", default=["mlp"], help="mlp, ssm, ...")
    parser.add_argument("--horizon", type=int, help="steps of the plan (default: the setting's)")
    parser.add_argument(
        "--num-envs", type=int, nargs="+", default=[1], help="of the whole step's measurement"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    parser.add_argument("--authors", help="a checkout of the authors' repository")
    parser.add_argument("--jax", help="a checkout of tdmpc2-jax")
    parser.add_argument("--torchrl", action="store_true", help="TorchRL's agent too")
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    args = parser.parse_args()
    th.set_num_threads(args.threads)
    others = ("torchrl-nightly", "tensordict-nightly") if args.torchrl else ()
    others += ("jax", "flax") if args.jax else ()
    packages = ("torch", "numpy", "stable-baselines3", "gymnasium", *others)
    machine = describe(*packages, threads=args.threads)

    contenders = peak_contenders(th.device(args.device))
    for model in args.models:
        for dynamics in args.dynamics:
            contenders += our_contenders(model, dynamics, args)
            contenders += loop_contenders(model, dynamics, args)
        if args.authors and model != "zoo":
            contenders += authors_contenders(model, args)
        if args.torchrl and model != "zoo":
            contenders += torchrl_contenders(model, args)
        if args.jax and model == "5":
            contenders += jax_contenders(args)
    measure(contenders, 2)  # warm
    line = command()
    if args.authors:
        line = line.replace(args.authors, "PATH/TO/tdmpc2")
    if args.jax:
        line = line.replace(args.jax, "PATH/TO/tdmpc2-jax")
    heading = f"# Speed of planning and learning\n\nCommand: `{line}`\n\nMachine: {machine}."
    text = report(contenders, measure(contenders, args.rounds), heading)
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
