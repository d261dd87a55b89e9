"""TD-MPC2's policy: world model, planner, and SB3's ``predict`` with the plan as its state."""

from __future__ import annotations

import io
import pathlib
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import ConstantSchedule
from torch import nn

from tdmpc2_sb3.fast.adam import Adam
from tdmpc2_sb3.fast.ways import Ways
from tdmpc2_sb3.model import integer_actions
from tdmpc2_sb3.model.world_model import WorldModel, resolve_architecture
from tdmpc2_sb3.planner import (
    Plan,
    PlannerConfig,
    automatic_iterations,
    check_planner,
    sample_plan_noise,
    steady_noise,
)
from tdmpc2_sb3.replay.environment_facts import check_action_space
from tdmpc2_sb3.replay.observation_entries import (
    batched,
    check_entries,
    is_image,
)
from tdmpc2_sb3.saving import policy_file
from tdmpc2_sb3.saving.attribute_checks import short
from tdmpc2_sb3.saving.parameter_checks import check_world_model
from tdmpc2_sb3.settings import (
    check_setting,
    refuse_policy_arguments,
)

# Deterministic predictions draw from a generator made anew at each call, of this seed plus the
# plan's age in steps: no two steps of an episode share their random numbers. A seed taken from the
# observation's bits would do so too, but the last bit differs with the number of environments
# planned at once and between machines, and would change every draw.
PREDICTION_SEED = 0

#: Means of the plans [E, H, A], and how many steps ago each began [E]. Without the ages they are 0.
PlanState = tuple[np.ndarray, ...]

SelfTDMPC2Policy = TypeVar("SelfTDMPC2Policy", bound="TDMPC2Policy")

#: Arguments that are sizes of the world model.
SIZES = (
    "latent_dim",
    "enc_dim",
    "mlp_dim",
    "num_enc_layers",
    "num_q",
    "simnorm_dim",
    "num_bins",
    "dropout",
)
#: Which policy each kind of observation takes.
POLICIES = {"vectors": "MlpPolicy", "images": "CnnPolicy", "dictionaries": "MultiInputPolicy"}


class TDMPC2Policy(BasePolicy):
    """World model, planner and optimisers of TD-MPC2.

    :param observation_space: Box (vectors, or images for :class:`CnnPolicy`), Discrete,
        MultiDiscrete or MultiBinary (read one-hot, as SB3's policies do), or Dict of such
    :param action_space: Box with finite bounds; planning happens in [-1, 1]. Of integers every
        value has an equal share of it
    :param lr_schedule: learning rate as a function of the remaining progress
    :param gamma: discount factor
    :param episodic: whether there is a termination head
    :param model_size: million parameters (1, 5, 19, 48 or 317); sets the sizes left at None
    :param latent_dim: Z
    :param enc_dim: width of the state encoder's hidden layers
    :param mlp_dim: width of all other hidden layers
    :param num_enc_layers: layers of the state encoder
    :param num_q: number of Q heads
    :param simnorm_dim: group size of SimNorm
    :param num_bins: bins of the discrete regression
    :param dropout: rate on the Q heads' first layer
    :param dynamics: kind of latent dynamics, a key of :data:`tdmpc2_sb3.model.dynamics.DYNAMICS`;
        None: the policy class's own
    :param dynamics_kwargs: further arguments of that dynamics
    :param horizon: H, steps of the plan
    :param num_samples: N, action sequences evaluated in each iteration
    :param num_elites: best sequences that shape the next iteration
    :param num_pi_trajs: how many of the N come from the policy prior
    :param num_iterations: iterations of MPPI; "auto": 6, or 8 for 20 action dimensions and more
    :param temperature: inverse temperature of the elites' weights
    :param min_std: smallest standard deviation of a plan
    :param max_std: initial and largest standard deviation of a plan
    :param enc_lr_scale: the encoder's learning rate relative to the others'
    :param compile: whether planning is compiled, see
        :func:`tdmpc2_sb3.fast.torch_compile.compiled`; on CUDA it is also recorded as a graph,
        unless this is False
    :param normalize_images: whether images are uint8 and scaled here. If False every Box of three
        axes, (C, h, w), is an image that the environment has scaled
    :param unknown: fields that are added to :class:`tdmpc2_sb3.planner.PlannerConfig`; others are
        refused
    :raises ValueError: naming the argument that is unknown or out of range
    """

    DEFAULT_DYNAMICS = "mlp"
    OBSERVATIONS = ""  # what the policy is for, where it takes not every kind
    scale: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        gamma: float = 0.99,
        episodic: bool = False,
        model_size: int = 5,
        latent_dim: int | None = None,
        enc_dim: int | None = None,
        mlp_dim: int | None = None,
        num_enc_layers: int | None = None,
        num_q: int | None = None,
        simnorm_dim: int | None = None,
        num_bins: int | None = None,
        dropout: float | None = None,
        dynamics: str | None = None,
        dynamics_kwargs: dict[str, Any] | None = None,
        horizon: int = 3,
        num_samples: int = 512,
        num_elites: int = 64,
        num_pi_trajs: int = 24,
        num_iterations: int | str = "auto",
        temperature: float = 0.5,
        min_std: float = 0.05,
        max_std: float = 2.0,
        enc_lr_scale: float = 0.3,
        compile: bool | str = "auto",
        normalize_images: bool = True,
        **unknown: Any,
    ):
        further = {name: unknown.pop(name) for name in PlannerConfig._fields if name in unknown}
        refuse_policy_arguments(unknown)
        super().__init__(
            observation_space,
            action_space,
            normalize_images=normalize_images,
            squash_output=True,
        )
        self._check_observations()
        action_dim = int(np.prod(action_space.shape))
        sizes: dict[str, Any] = {
            "latent_dim": latent_dim,
            "enc_dim": enc_dim,
            "mlp_dim": mlp_dim,
            "num_enc_layers": num_enc_layers,
            "num_q": num_q,
            "simnorm_dim": simnorm_dim,
            "num_bins": num_bins,
            "dropout": dropout,
        }
        sizes = {name: check_setting(name, value) for name, value in sizes.items()}
        self.planner = PlannerConfig(
            horizon=horizon,
            num_samples=num_samples,
            num_elites=num_elites,
            num_pi_trajs=num_pi_trajs,
            num_iterations=automatic_iterations(num_iterations, action_dim),
            temperature=temperature,
            min_std=min_std,
            max_std=max_std,
            gamma=gamma,
            **further,
        )
        dynamics = self.DEFAULT_DYNAMICS if dynamics is None else dynamics
        self._arguments_for_saving = {
            "dynamics": dynamics,
            "dynamics_kwargs": dynamics_kwargs,
            "enc_lr_scale": check_setting("enc_lr_scale", enc_lr_scale),
            "normalize_images": normalize_images,
        }
        self.world_model = WorldModel(
            observation_space,
            action_dim,
            resolve_architecture(check_setting("model_size", model_size), sizes),
            dynamics,
            dynamics_kwargs,
            episodic,
            normalize_images,
        )
        self.register_buffer("scale", th.ones((), dtype=th.float32))  # S, the running scale of Q
        self._make_optimizers(lr_schedule(1.0), enc_lr_scale)
        self._generator: th.Generator | None = None
        self.set_compile(compile)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take the random stream along."""
        generator = self._generator
        # An array: a tensor that ends with the pickling does not reach another process.
        stream = None if generator is None else (generator.device, generator.get_state().numpy())
        return {**self.__dict__, "_generator": stream}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        stream = state["_generator"]
        if stream is not None:
            device, numbers = stream
            self._generator = th.Generator(device)
            self._generator.set_state(th.as_tensor(numbers))

    @property
    def planner(self) -> PlannerConfig:
        """Settings of the planner; others may be assigned at any time."""
        return self._planner

    @planner.setter
    def planner(self, planner: PlannerConfig) -> None:
        self._planner = check_planner(planner)

    def set_compile(self, compile: bool | str) -> None:
        """Sets whether planning is compiled or recorded, see the argument of that name."""
        self._arguments_for_saving["compile"] = check_setting("compile", compile)
        #: Which way plans and gradient steps go.
        self.ways = Ways(self, compile)

    @property
    def enc_lr_scale(self) -> float:
        """The encoder's learning rate relative to the others'."""
        return float(self._arguments_for_saving["enc_lr_scale"])

    def set_enc_lr_scale(self, scale: float) -> None:
        """Sets the encoder's learning rate relative to the others', from the next step on."""
        self._arguments_for_saving["enc_lr_scale"] = scale
        self.model_optimizer.param_groups[0]["lr_scale"] = scale

    @classmethod
    def check_weights(
        cls,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        arguments: dict[str, Any],
        weights: dict[str, Any],
    ) -> None:
        """Compares the sizes that arguments of a file name with the weights that it holds.

        Before anything of these sizes is built. A subclass that makes its networks by itself is
        left alone; :meth:`TDMPC2.set_parameters` compares every tensor later on.

        :param arguments: of the policy
        :param weights: the policy's state dict
        :raises ValueError: if they differ
        """
        if cls.__init__ is not TDMPC2Policy.__init__:
            return
        check_action_space(action_space)
        check_world_model(
            observation_space,
            int(np.prod(action_space.shape or ())),
            resolve_architecture(
                arguments.get("model_size", 5), {name: arguments.get(name) for name in SIZES}
            ),
            (arguments.get("dynamics") or cls.DEFAULT_DYNAMICS, arguments.get("dynamics_kwargs")),
            bool(arguments.get("episodic")),
            bool(arguments.get("normalize_images", True)),
            weights,
        )

    def _check_observations(self) -> None:
        check_entries(self.observation_space)
        found = "vectors"
        if isinstance(self.observation_space, spaces.Dict):
            found = "dictionaries"
        elif is_image(self.observation_space, self.normalize_images):
            found = "images"
        if self.OBSERVATIONS not in ("", found):
            raise ValueError(
                f"{type(self).__name__} is for {self.OBSERVATIONS}, but the observation space is "
                f"{short(self.observation_space, 200)}: use {POLICIES[found]}."
            )

    def _make_optimizers(self, learning_rate: float, enc_lr_scale: float) -> None:
        groups, prior_groups = self.world_model.parameter_groups(enc_lr_scale)
        self.model_optimizer = Adam(groups, lr=learning_rate, fused=True)
        self.prior_optimizer = Adam(prior_groups, lr=learning_rate, eps=1e-5, fused=True)
        self.set_learning_rate(learning_rate)

    @property
    def model_parameters(self) -> list[nn.Parameter]:
        """Those that the world model's losses train, unless they are frozen."""
        return self.model_optimizer.parameters()

    @property
    def prior_parameters(self) -> list[nn.Parameter]:
        """Those that the policy prior's loss trains, unless they are frozen."""
        return self.prior_optimizer.parameters()

    def follow_parts(self) -> None:
        """Has the parameters of parts that were replaced trained in place of the former ones."""
        optimizers = (self.model_optimizer, self.prior_optimizer)
        present = self.world_model.parameter_groups(self.enc_lr_scale)
        for optimizer, groups in zip(optimizers, present, strict=True):
            optimizer.take_groups(groups)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Sets every optimiser group's rate: the given one times the group's own scale."""
        for optimizer in (self.model_optimizer, self.prior_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group["lr_scale"]

    def set_training_mode(self, mode: bool) -> None:
        """Sets the mode of all modules, which takes a visit to each, unless they have it."""
        if any(each.training != mode for each in (self, self.world_model)):
            super().set_training_mode(mode)

    @property
    def generator(self) -> th.Generator:
        """Random stream of predictions that are not deterministic; training has its own."""
        if self._generator is None or self._generator.device != self.device:
            self.seed_predictions(int(np.random.default_rng().integers(2**31)))
            assert self._generator is not None
        return self._generator

    def seed_predictions(self, seed: int) -> None:
        """Starts the random stream of predictions that are not deterministic anew."""
        self._generator = th.Generator(self.device).manual_seed(seed)

    @th.no_grad()
    def plan(
        self,
        observation: PyTorchObs,
        previous_mean: th.Tensor,
        episode_start: th.Tensor,
        generator: th.Generator,
        explore: bool,
        shared_noise: bool = False,
        exploration: th.Tensor | None = None,
    ) -> Plan:
        """Plans one action for every environment.

        :param observation: of E environments
        :param previous_mean: the previous plans' means, [E, H, A]
        :param episode_start: where the previous plan is void, [E], bool
        :param generator: drawn from
        :param explore: whether the plan's spread is added to the action
        :param shared_noise: whether all environments get the same random numbers
        :param exploration: standard normal, times that spread, [E, A]; None to draw it, too
        """
        num_envs = previous_mean.shape[0]
        noise = sample_plan_noise(self.world_model, self.planner, num_envs, generator, shared_noise)
        if exploration is not None:
            noise = noise._replace(exploration=exploration)
        return self.ways.plan(
            observation, previous_mean, episode_start, noise, self.planner, explore
        )

    @th.no_grad()
    def prior_action(
        self,
        observation: PyTorchObs,
        num_envs: int,
        generator: th.Generator,
        deterministic: bool,
        noise: th.Tensor | None = None,
    ) -> th.Tensor:
        """An action of the policy prior alone, [E, A]; its squashed mean if deterministic.

        :param observation: of E environments
        :param num_envs: E
        :param generator: drawn from
        :param deterministic: whether there is no noise
        :param noise: standard normal, [E, A]; None to draw it
        """
        model = self.world_model
        offsets = model.encoder.sample_offsets(1 if deterministic else num_envs, generator)
        if offsets is not None:
            offsets = offsets.expand(-1, num_envs, -1)
        if not deterministic and noise is None:
            shape = (num_envs, model.action_dim)
            device = generator.device
            noise = th.randn(shape, generator=generator, device=device, dtype=th.float32)
        return model.policy_action(model.encode(observation, offsets), noise)

    def zero_plan(self, num_envs: int) -> th.Tensor:
        """The mean of a cold start, [E, H, A]."""
        shape = (num_envs, self.planner.horizon, self.world_model.action_dim)
        return th.zeros(shape, device=self.device, dtype=th.float32)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: PlanState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        use_planner: bool = True,
    ) -> tuple[np.ndarray, PlanState | None]:
        """Acts by planning, warm-started from the previous call's plan.

        Without a state every call is a cold start: correct, but at some loss of return. Pass the
        returned state and SB3's ``episode_start`` on, as ``evaluate_policy`` does.

        :param observation: of one environment or of E
        :param state: the previous call's second result: plan means [E, H, A] and ages [E]
        :param episode_start: [E], bool; a true row is a cold start
        :param deterministic: whether to act without exploration noise. The plan then draws from a
            generator seeded anew at each call by the plan's age: the same observation and state,
            the same action, however many environments are planned at once
        :param use_planner: if False, acts with the policy prior alone and passes the state through
        :return: actions in the action space's bounds, state for the next call
        :raises ValueError: if the observation or the state is of the wrong shape
        """
        self.set_training_mode(False)
        if isinstance(observation, tuple):
            raise ValueError(
                "The observation is a tuple: pass the first item of gymnasium's "
                "`obs, info = env.reset()` alone."
            )
        tensor, vectorized = self.obs_to_tensor(observation)
        num_envs = len(next(iter(tensor.values())) if isinstance(tensor, dict) else tensor)
        if use_planner:
            previous_mean, start, ages = self._read_state(state, episode_start, num_envs)
            result = self._predict_plan(tensor, previous_mean, start, ages, deterministic)
            scaled, state = result.action, (result.mean.cpu().numpy(), ages + 1)
        else:
            generator = self.generator
            if deterministic:
                generator = th.Generator(self.device).manual_seed(PREDICTION_SEED)
            scaled = self.prior_action(tensor, num_envs, generator, deterministic)
        actions = self.unscale(scaled)
        return (actions if vectorized else actions[0]), state

    def _predict_plan(
        self,
        observation: PyTorchObs,
        previous_mean: th.Tensor,
        start: th.Tensor,
        ages: np.ndarray,
        deterministic: bool,
    ) -> Plan:
        if not deterministic:
            return self.plan(observation, previous_mean, start, self.generator, explore=True)
        noise = steady_noise(
            self.world_model, self.planner, ages.tolist(), PREDICTION_SEED, self.device
        )
        return self.ways.plan(observation, previous_mean, start, noise, self.planner, False)

    def obs_to_tensor(
        self, observation: np.ndarray | dict[str, np.ndarray]
    ) -> tuple[PyTorchObs, bool]:
        """Observations as the encoder takes them, see :mod:`tdmpc2_sb3.replay.observation_entries`.

        :param observation: of one environment or of E
        :return: [E, ...] each, and whether there was an axis of environments
        :raises ValueError: if they are none of the observation space
        """
        return batched(observation, self.observation_space, self.device)

    def unscale(self, scaled: th.Tensor) -> np.ndarray:
        """Actions in [-1, 1], [E, A], as actions within the space's bounds, [E, *shape]."""
        assert isinstance(self.action_space, spaces.Box)
        array = scaled.cpu().numpy().reshape(-1, *self.action_space.shape)
        if integer_actions.is_of_integers(self.action_space):
            return self.unscale_action(array)
        # Rounding may step over a bound by an ulp.
        return np.clip(
            self.unscale_action(array), self.action_space.low, self.action_space.high
        ).astype(self.action_space.dtype, copy=False)

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """Actions within the space's bounds as actions in [-1, 1].

        Of integers every value has an equal share of it, whose centre this is.
        """
        if integer_actions.is_of_integers(self.action_space):
            return integer_actions.centres(action, self.action_space)
        return super().scale_action(action)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """Actions in [-1, 1] as actions within the space's bounds; of integers the value in whose
        share they lie."""
        if integer_actions.is_of_integers(self.action_space):
            return integer_actions.values_at(scaled_action, self.action_space)
        return super().unscale_action(scaled_action)

    def _read_state(
        self, state: PlanState | None, episode_start: np.ndarray | None, num_envs: int
    ) -> tuple[th.Tensor, th.Tensor, np.ndarray]:
        """Plan means [E, H, A], whether each is void [E], and the plans' ages [E]."""
        ages = np.zeros(num_envs, dtype=np.int64)
        if state is None:
            start = th.ones(num_envs, dtype=th.bool, device=self.device)
            return self.zero_plan(num_envs), start, ages
        expected = (num_envs, self.planner.horizon, self.world_model.action_dim)
        mean = np.asarray(state[0], dtype=np.float32)
        if mean.shape != expected:
            raise ValueError(
                f"The plan passed as state has shape {mean.shape}, but {expected} (environments, "
                "horizon, action) is needed: pass the state of the previous call, or None."
            )
        if len(state) > 1:
            ages = np.asarray(state[1])
            if ages.shape != (num_envs,) or ages.dtype.kind not in "iu":
                raise ValueError(
                    f"The plans' ages passed as state are {state[1]!r}, but whole numbers of shape "
                    f"{(num_envs,)} are needed: pass the state of the previous call, or None."
                )
        starts = np.zeros(num_envs, dtype=bool) if episode_start is None else episode_start
        starts = np.asarray(starts, dtype=bool).reshape(num_envs)
        return (
            th.as_tensor(mean, device=self.device),
            th.as_tensor(starts, device=self.device),
            np.where(starts, 0, ages),
        )

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """A cold-start plan's action in [-1, 1], [E, A]."""
        num_envs = len(
            next(iter(observation.values())) if isinstance(observation, dict) else observation
        )
        mean, start, ages = self._read_state(None, None, num_envs)
        return self._predict_plan(observation, mean, start, ages, deterministic).action

    def _get_constructor_parameters(self) -> dict[str, Any]:
        sizes = self.world_model.architecture._asdict()
        rates = {group["lr"] / group["lr_scale"] for group in self.prior_optimizer.param_groups}
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": ConstantSchedule(float(rates.pop())),
            "episodic": self.world_model.episodic,
            **{name: sizes[name] for name in SIZES},
            **self.planner._asdict(),
            **self._arguments_for_saving,
        }

    def save(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:  # type: ignore[override]
        """Saves the policy alone, atomically and without pickled code; optimisers are left out.

        :param path: file (``.zip`` is added if it has no suffix), or a binary stream
        :raises TypeError: naming an argument that cannot be written without pickling
        """
        policy_file.save(self, path)

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfTDMPC2Policy],
        path: str | pathlib.Path | io.BufferedIOBase,
        device: th.device | str = "auto",
    ) -> SelfTDMPC2Policy:
        """Loads a policy saved by :meth:`save`; no pickled code is executed.

        :param path: file, or a binary stream
        :param device: where the policy goes
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if it is damaged or holds no policy alone, or there is no such device
        """
        return policy_file.load(cls, path, device)

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(observation, deterministic)


class MlpPolicy(TDMPC2Policy):
    """TD-MPC2 on vector observations, with MLP dynamics."""


class SSMPolicy(TDMPC2Policy):
    """TD-MPC2 with structured state-space dynamics; everything else is shared."""

    DEFAULT_DYNAMICS = "ssm"


class CnnPolicy(TDMPC2Policy):
    """TD-MPC2 on images, with the paper's pixel encoder."""

    OBSERVATIONS = "images"


class MultiInputPolicy(TDMPC2Policy):
    """TD-MPC2 on dictionaries of vectors and images."""

    OBSERVATIONS = "dictionaries"
