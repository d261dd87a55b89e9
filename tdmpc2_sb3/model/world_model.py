"""The world model: encoder, latent dynamics, reward, termination, Q ensemble and policy prior.

Shapes: ``...`` leading axes, O observation, A action, Z latent, K bins, Q heads.
"""

from __future__ import annotations

import copy
import math
import numbers
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from torch import nn

from tdmpc2_sb3.kernels import Dropped, predicted_simplices
from tdmpc2_sb3.model.discrete_regression import make_bins, two_hot_inverse
from tdmpc2_sb3.model.dynamics import DYNAMICS, LatentDynamics
from tdmpc2_sb3.model.encoders import Encoder, Observation, flatten_vectors
from tdmpc2_sb3.model.layers import MLP, QEnsemble
from tdmpc2_sb3.model.operations import LOG_STD_MAX, LOG_STD_MIN, SQUASH_EPSILON


class Architecture(NamedTuple):
    """Sizes of a world model; the defaults are the paper's 5M single-task model."""

    latent_dim: int = 512
    enc_dim: int = 256
    mlp_dim: int = 512
    num_enc_layers: int = 2
    num_q: int = 5
    simnorm_dim: int = 8
    num_bins: int = 101
    vmin: float = -10.0
    vmax: float = 10.0
    dropout: float = 0.01


# million parameters -> sizes (TD-MPC2, table 8)
MODEL_SIZES: dict[int, dict[str, int]] = {
    1: {"enc_dim": 256, "mlp_dim": 384, "latent_dim": 128, "num_enc_layers": 2, "num_q": 2},
    5: {"enc_dim": 256, "mlp_dim": 512, "latent_dim": 512, "num_enc_layers": 2, "num_q": 5},
    19: {"enc_dim": 1024, "mlp_dim": 1024, "latent_dim": 768, "num_enc_layers": 3, "num_q": 5},
    48: {"enc_dim": 1792, "mlp_dim": 1792, "latent_dim": 768, "num_enc_layers": 4, "num_q": 5},
    317: {"enc_dim": 4096, "mlp_dim": 4096, "latent_dim": 1376, "num_enc_layers": 5, "num_q": 8},
}


class PolicySample(NamedTuple):
    """A draw from the policy prior."""

    action: th.Tensor  # a = tanh(u), [..., A]
    mean: th.Tensor  # tanh of the Gaussian's mean, [..., A]
    log_prob: th.Tensor  # of a, [...]
    gaussian_log_prob: th.Tensor  # of u, before squashing, [...]


class WorldModel(nn.Module):
    """All networks of TD-MPC2 and their target copies (TD-MPC2, section 3.1).

    :param observation_space: what the encoder reads
    :param action_dim: A
    :param architecture: sizes
    :param dynamics: key of :data:`tdmpc2_sb3.model.dynamics.DYNAMICS`
    :param dynamics_kwargs: further arguments of that dynamics
    :param episodic: whether there is a termination head
    :param normalize_images: as of :class:`tdmpc2_sb3.model.encoders.Encoder`
    :raises ValueError: if the sizes do not fit together or the dynamics is unknown
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_dim: int,
        architecture: Architecture,
        dynamics: str = "mlp",
        dynamics_kwargs: dict[str, Any] | None = None,
        episodic: bool = False,
        normalize_images: bool = True,
    ):
        super().__init__()
        check_architecture(architecture)
        if dynamics not in DYNAMICS:
            raise ValueError(
                f"dynamics is {dynamics!r}: no such latent dynamics, use one of {sorted(DYNAMICS)} "
                "or register your own in tdmpc2_sb3.model.dynamics.DYNAMICS."
            )
        arch = architecture
        self.observation_space = observation_space
        self.action_dim = action_dim
        self.architecture = arch
        self.normalize_images = normalize_images
        self.encoder = Encoder(
            observation_space,
            arch.enc_dim,
            arch.latent_dim,
            arch.num_enc_layers,
            arch.simnorm_dim,
            normalize_images,
        )
        self.dynamics: LatentDynamics = DYNAMICS[dynamics](
            arch.latent_dim, action_dim, arch.mlp_dim, arch.simnorm_dim, **(dynamics_kwargs or {})
        )
        hidden = [arch.mlp_dim, arch.mlp_dim]
        pair_dim = arch.latent_dim + action_dim
        self.reward_net = MLP(pair_dim, hidden, arch.num_bins)
        nn.init.zeros_(self.reward_net[-1].weight)  # type: ignore[arg-type]
        self.termination_net = MLP(arch.latent_dim, hidden, 1) if episodic else None
        self.policy_net = MLP(arch.latent_dim, hidden, 2 * action_dim)
        self.q_ensemble = QEnsemble(arch.num_q, pair_dim, arch.mlp_dim, arch.num_bins, arch.dropout)
        self.target_q_ensemble = copy.deepcopy(self.q_ensemble).requires_grad_(False)
        self.register_buffer(
            "bins", make_bins(arch.num_bins, arch.vmin, arch.vmax), persistent=False
        )
        heads = range(arch.num_q)
        pairs = [(one, other) for one in heads for other in heads if one != other]
        self.register_buffer("head_pairs", th.tensor(pairs or [(0, 0)]), persistent=False)

    bins: th.Tensor
    head_pairs: th.Tensor  # of different Q heads; the only one twice if there is one

    @property
    def episodic(self) -> bool:
        """Whether the model predicts terminations."""
        return self.termination_net is not None

    def parameter_groups(
        self, enc_lr_scale: float
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The present parts' parameters with their learning rates' scales: those that the world
        model's losses train, and those that the policy prior's loss trains.

        :param enc_lr_scale: the encoder's learning rate relative to the others'
        """
        scale = self.dynamics.lr_scale
        slow = list(self.dynamics.slow_parameters())
        slow_ids = {id(parameter) for parameter in slow}
        dynamics = [p for p in self.dynamics.parameters() if id(p) not in slow_ids]
        heads = [*self.reward_net.parameters(), *self.q_ensemble.parameters()]
        if self.termination_net is not None:
            heads += self.termination_net.parameters()
        groups = [{"params": list(self.encoder.parameters()), "lr_scale": enc_lr_scale}]
        if scale == 1.0:  # one group, as in the files of models that were saved before
            groups.append({"params": dynamics + heads, "lr_scale": 1.0})
        else:
            groups.append({"params": heads, "lr_scale": 1.0})
            groups.append({"params": dynamics, "lr_scale": scale})
        if slow:
            groups.append({"params": slow, "lr_scale": scale * self.dynamics.SLOW_LR_SCALE})
        return groups, [{"params": list(self.policy_net.parameters()), "lr_scale": 1.0}]

    def encode(self, observation: Observation, offsets: th.Tensor | None = None) -> th.Tensor:
        """z = h(o).

        :param observation: [..., O], or images, or a dict of entries
        :param offsets: random shifts of images, see :meth:`Encoder.sample_offsets`
        :return: [..., Z]
        """
        return self.encoder(self._flat(observation), offsets)  # type: ignore[no-any-return]

    def observation_rows(self, observation: Observation) -> th.Tensor:
        """What the state encoder reads of an observation, [..., O], without images."""
        return self.encoder.state.cast(self.encoder.vectors(self._flat(observation)))

    def _flat(self, observation: Observation) -> Observation:
        return flatten_vectors(observation, self.observation_space, self.normalize_images)

    def latent_simplices(self) -> int:
        """Of how many simplices (see :func:`tdmpc2_sb3.kernels.on_simplices`) every latent is
        known to consist; 0 if it may be something else."""
        dynamics, encoder = self.dynamics.as_kernel(), self.encoder.as_kernel()
        if dynamics is None or encoder is None:
            return 0
        return min(predicted_simplices(dynamics), encoder[-1].count_simplices())

    def reward_logits(self, z: th.Tensor, a: th.Tensor) -> th.Tensor:
        """R(z, a) as logits over bins, [..., K]; the leading axes of z may broadcast."""
        return self.reward_net.forward_pair(z, a)

    def reward(self, z: th.Tensor, a: th.Tensor) -> th.Tensor:
        """R(z, a) as a scalar, [...]."""
        return two_hot_inverse(self.reward_logits(z, a), self.bins)

    def termination_logit(self, z: th.Tensor) -> th.Tensor:
        """Logit of the probability that the episode ended on reaching z, [...].

        :raises RuntimeError: if the model has no termination head
        """
        if self.termination_net is None:
            raise RuntimeError("This world model has no termination head: build it episodic.")
        return self.termination_net(z).squeeze(-1)  # type: ignore[no-any-return]

    def policy(self, z: th.Tensor, noise: th.Tensor) -> PolicySample:
        """A draw of the policy prior with its log-probabilities.

        :param z: [..., Z]
        :param noise: standard normal, [..., A]
        """
        mean, log_std = self._policy_moments(z)
        action = _squashed_draw(mean, log_std, noise)
        gaussian = (-0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)).sum(-1)
        log_prob = gaussian - th.log(th.relu(1.0 - action.square()) + SQUASH_EPSILON).sum(-1)
        return PolicySample(action, th.tanh(mean), log_prob, gaussian)

    def policy_action(self, z: th.Tensor, noise: th.Tensor | None) -> th.Tensor:
        """An action of the policy prior, [..., A]; the squashed mean where noise is None."""
        mean, log_std = self._policy_moments(z)
        return th.tanh(mean) if noise is None else _squashed_draw(mean, log_std, noise)

    def _policy_moments(self, z: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, s = self.policy_net(z).chunk(2, dim=-1)
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (th.tanh(s) + 1.0)
        return mean, log_std

    def q_logits(
        self,
        z: th.Tensor,
        a: th.Tensor,
        heads: th.Tensor | None = None,
        dropped: Dropped | None = None,
        frozen: bool = False,
    ) -> th.Tensor:
        """Logits of the chosen Q heads, [Q', ..., K]; see :meth:`QEnsemble.forward`."""
        return self.q_ensemble(  # type: ignore[no-any-return]
            z, a, heads, dropped, frozen
        )

    def q_values(
        self,
        z: th.Tensor,
        a: th.Tensor,
        heads: th.Tensor | None = None,
        dropped: Dropped | None = None,
    ) -> th.Tensor:
        """Scalars of the chosen Q heads, [Q', ...]."""
        return two_hot_inverse(self.q_logits(z, a, heads, dropped), self.bins)

    def target_q_values(self, z: th.Tensor, a: th.Tensor, heads: th.Tensor) -> th.Tensor:
        """Scalars of the chosen target Q heads, [Q', ...]."""
        return two_hot_inverse(self.target_q_ensemble(z, a, heads), self.bins)

    def sample_heads(self, generator: th.Generator, rows: int = 1) -> th.Tensor:
        """Two different random Q heads a row (the only one twice if num_q is 1), [rows, 2]."""
        number = th.randint(
            len(self.head_pairs), (rows,), generator=generator, device=generator.device
        )
        return self.head_pairs.index_select(0, number)


def _squashed_draw(mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor) -> th.Tensor:
    """a = tanh(u) of the Gaussian draw u, [..., A]; noise is standard normal."""
    return th.tanh(mean + noise * log_std.exp())


def check_architecture(arch: Architecture) -> None:
    """
    :raises ValueError: naming the size that is out of range
    """
    for name in ("latent_dim", "enc_dim", "mlp_dim", "num_enc_layers", "num_q", "simnorm_dim"):
        value = getattr(arch, name)
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} is {value!r}: it must be a whole number.")
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1.")
    if arch.latent_dim % arch.simnorm_dim:
        raise ValueError(
            f"latent_dim is {arch.latent_dim}: it must be a multiple of simnorm_dim, "
            f"{arch.simnorm_dim}."
        )
    if not 0.0 <= arch.dropout < 1.0:
        raise ValueError(f"dropout is {arch.dropout}: it must lie in [0, 1).")


def resolve_architecture(model_size: int, sizes: dict[str, Any]) -> Architecture:
    """The sizes of ``model_size`` with explicit ones on top.

    :param model_size: million parameters, a key of :data:`MODEL_SIZES`
    :param sizes: fields of :class:`Architecture`; None means "from model_size"
    :raises ValueError: if there is no such size
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(
            f"model_size is {model_size!r}: choose one of {list(MODEL_SIZES)} (million parameters) "
            "and change single sizes by latent_dim, enc_dim, mlp_dim, num_enc_layers, num_q."
        )
    explicit = {name: value for name, value in sizes.items() if value is not None}
    return Architecture(**{**MODEL_SIZES[model_size], **explicit})
