"""What several tests share: tiny sizes, toy environments, and a plain TD-MPC2 written down twice.

:class:`PlainModel` computes a world model's outputs from its state dict with ``nn.functional``
alone, straight from the specification: none of the package's arithmetic is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from gymnasium import spaces

TINY = {
    "latent_dim": 16,
    "enc_dim": 32,
    "mlp_dim": 32,
    "num_enc_layers": 2,
    "num_q": 3,
    "num_samples": 32,
    "num_elites": 8,
    "num_pi_trajs": 4,
    "num_iterations": 2,
    "batch_size": 8,
    "learning_starts": 20,
    "buffer_size": 1000,
    "compile": False,
    "device": "cpu",
    "seed": 0,
}


class PointEnv(gym.Env):
    """A point on a line that should come to 0.5: quick, exact, with every kind of observation.

    :param limit: steps after which an episode is truncated
    :param edge: the point's distance from 0 beyond which an episode terminates
    :param bounds: of the action
    :param kind: "vector", "matrix", "image" or "dict"
    """

    def __init__(
        self,
        limit: int = 10,
        edge: float = math.inf,
        bounds: tuple[float, float] = (-1.0, 1.0),
        kind: str = "vector",
    ):
        self.limit, self.edge, self.bounds, self.kind = limit, edge, bounds, kind
        vector = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        image = spaces.Box(0, 255, (3, 64, 64), np.uint8)
        self.observation_space = {
            "vector": vector,
            "matrix": spaces.Box(-np.inf, np.inf, (3, 1), np.float32),
            "image": image,
            "dict": spaces.Dict({"vector": vector, "picture": image, "more": vector}),
        }[kind]
        self.action_space = spaces.Box(*bounds, (2,), np.float32)
        self.terminates = math.isfinite(edge)
        self.resets: list[int | None] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        super().reset(seed=seed)
        self.resets.append(seed)
        self.position = float(self.np_random.uniform(-0.2, 0.2))
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        low, high = self.bounds
        scaled = 2.0 * (float(action[0]) - low) / (high - low) - 1.0
        self.position += 0.2 * scaled
        self.steps += 1
        terminated = abs(self.position) > self.edge
        truncated = self.steps >= self.limit and not terminated
        reward = 1.0 - abs(self.position - 0.5)
        return self._observe(), reward, terminated, truncated, {}

    def _observe(self):
        vector = np.array([self.position, self.position**2, self.steps / self.limit], np.float32)
        if self.kind == "vector":
            return vector
        if self.kind == "matrix":
            return vector[:, None]
        image = np.zeros((3, 64, 64), np.uint8)
        column = int(np.clip(32 + 20 * self.position, 0, 63))
        image[:, :, column] = 255
        image[0, 0, 0] = self.steps
        if self.kind == "image":
            return image
        return {"vector": vector, "picture": image, "more": -vector}


@pytest.fixture
def point_env() -> type[PointEnv]:
    return PointEnv


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Arguments of an agent so small that a test can train it."""
    return dict(TINY)


@pytest.fixture
def make_agent(tiny) -> Callable[..., Any]:
    """Return a function that builds a tiny agent; its arguments override the tiny ones."""
    from tdmpc2_sb3 import TDMPC2

    def make(env: Any = None, policy: Any = "MlpPolicy", **kwargs: Any) -> Any:
        return TDMPC2(policy, PointEnv() if env is None else env, **{**tiny, **kwargs})

    return make


class PlainModel:
    """TD-MPC2's networks from named tensors, nothing fused, shared or batched.

    :param state: of our world model, with or without gradients
    :param simnorm_dim: V
    :param num_bins: K
    """

    def __init__(self, state: dict[str, th.Tensor], simnorm_dim: int = 8, num_bins: int = 101):
        self.state = state
        self.simnorm_dim = simnorm_dim
        some = state["reward_net.0.weight"]
        self.bins = th.linspace(-10.0, 10.0, num_bins).to(some.dtype)
        self.num_q = state["q_ensemble.layers.0.weight"].shape[0]

    # -- layers

    def simnorm(self, x: th.Tensor) -> th.Tensor:
        groups = [F.softmax(group, dim=-1) for group in x.split(self.simnorm_dim, dim=-1)]
        return th.cat(groups, dim=-1)

    def net(self, prefix: str, x: th.Tensor, simnorm: bool = False, member: int | None = None,
            mask: th.Tensor | None = None) -> th.Tensor:  # fmt: skip
        """Layers ``prefix + "<i>."`` from 0 on: normed Mish ones, the last plain or SimNorm."""

        def get(name: str) -> th.Tensor:
            tensor = self.state[name]
            return tensor if member is None else tensor[member]

        count = len({k[len(prefix) :].split(".")[0] for k in self.state if k.startswith(prefix)})
        for i in range(count):
            layer = f"{prefix}{i}."
            x = F.linear(x, get(layer + "weight"), get(layer + "bias"))
            if i == 0 and mask is not None:
                x = x * mask
            last = i == count - 1
            if last and not simnorm:
                return x
            weight, bias = get(layer + "ln.weight"), get(layer + "ln.bias")
            x = F.layer_norm(x, x.shape[-1:], weight, bias)
            x = self.simnorm(x) if last else F.mish(x)
        return x

    # -- networks

    def encode(self, o: th.Tensor) -> th.Tensor:
        return self.net("encoder.state.net.", o, simnorm=True)

    def next(self, z: th.Tensor, a: th.Tensor) -> th.Tensor:
        return self.net("dynamics.net.", th.cat([z, a], -1), simnorm=True)

    def reward_logits(self, z: th.Tensor, a: th.Tensor) -> th.Tensor:
        return self.net("reward_net.", th.cat([z, a], -1))

    def termination_logit(self, z: th.Tensor) -> th.Tensor:
        return self.net("termination_net.", z).squeeze(-1)

    def q_logits(
        self, z: th.Tensor, a: th.Tensor, head: int, mask: th.Tensor | None = None,
        target: bool = False,
    ) -> th.Tensor:  # fmt: skip
        prefix = "target_q_ensemble.layers." if target else "q_ensemble.layers."
        return self.net(prefix, th.cat([z, a], -1), member=int(head), mask=mask)

    def policy_moments(self, z: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, s = self.net("policy_net.", z).chunk(2, -1)
        return mean, -10.0 + (2.0 - -10.0) / 2.0 * (th.tanh(s) + 1.0)

    def policy_action(self, z: th.Tensor, eps: th.Tensor) -> th.Tensor:
        mean, log_std = self.policy_moments(z)
        return th.tanh(mean + eps * log_std.exp())

    # -- scalars

    def scalar(self, logits: th.Tensor) -> th.Tensor:
        expected = (F.softmax(logits, -1) * self.bins).sum(-1)
        return expected.sign() * (expected.abs().exp() - 1.0)

    def two_hot(self, x: th.Tensor) -> th.Tensor:
        y = x.sign() * (1.0 + x.abs()).log()
        position = (y.clamp(-10.0, 10.0) + 10.0) / (20.0 / (len(self.bins) - 1))
        lower = position.floor().clamp(max=len(self.bins) - 2)
        weights = th.zeros(*x.shape, len(self.bins), dtype=x.dtype)
        weights.scatter_(-1, lower.long().unsqueeze(-1), (1.0 - (position - lower)).unsqueeze(-1))
        weights.scatter_(-1, lower.long().unsqueeze(-1) + 1, (position - lower).unsqueeze(-1))
        return weights

    def cross_entropy(self, logits: th.Tensor, x: th.Tensor) -> th.Tensor:
        return -(self.two_hot(x) * F.log_softmax(logits, -1)).sum(-1)

    def reward(self, z: th.Tensor, a: th.Tensor) -> th.Tensor:
        return self.scalar(self.reward_logits(z, a))

    def q(self, z: th.Tensor, a: th.Tensor, head: int, target: bool = False) -> th.Tensor:
        return self.scalar(self.q_logits(z, a, head, target=target))


@pytest.fixture
def plain_model() -> type[PlainModel]:
    return PlainModel


@pytest.fixture
def roughen() -> Callable[..., None]:
    """Return a function that moves a module's parameters at random, so that no head is zero."""

    def move(module: th.nn.Module, std: float = 0.2, seed: int = 7) -> None:
        generator = th.Generator().manual_seed(seed)
        with th.no_grad():
            for parameter in module.parameters():
                parameter.add_(std * th.randn(parameter.shape, generator=generator))

    return move


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's threads, which the CPU kernels share."""
    before = th.get_num_threads()
    th.set_num_threads(request.param)
    yield request.param
    th.set_num_threads(before)
