"""TD-MPC2 (Hansen, Su, Wang: TD-MPC2, ICLR 2024, arXiv:2310.16828) as an SB3 algorithm."""

from __future__ import annotations

import copy
import io
import math
import pathlib
import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm, maybe_make_env
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import (
    GymEnv,
    MaybeCallback,
    RolloutReturn,
    Schedule,
    TrainFreq,
    TrainFrequencyUnit,
)
from stable_baselines3.common.utils import (
    get_system_info,
    should_collect_more_steps,
)
from stable_baselines3.common.vec_env import VecEnv
from tqdm import tqdm

from tdmpc2_sb3.callbacks import Forecast, last_checkpoint
from tdmpc2_sb3.losses import LossConfig, sample_update_noise, step_weights
from tdmpc2_sb3.model.integer_actions import is_of_integers
from tdmpc2_sb3.model.pink_noise import PinkNoise, uniform
from tdmpc2_sb3.model.torch_state import hindrance
from tdmpc2_sb3.planner import Plan, PlannerConfig, automatic_iterations, fitted_plan
from tdmpc2_sb3.policies import (
    SIZES,
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    PlanState,
    SSMPolicy,
    TDMPC2Policy,
)
from tdmpc2_sb3.replay.buffer import SequenceReplayBuffer
from tdmpc2_sb3.replay.environment_facts import (
    automatic_settings,
    check_action_space,
    describe_automatic,
    read_facts,
)
from tdmpc2_sb3.replay.normalization import NormalizationBelow
from tdmpc2_sb3.replay.observation_entries import check_entries
from tdmpc2_sb3.saving import (
    agent_file,
    episode_state,
    interrupts,
    log_files,
    official_checkpoint,
    workers,
)
from tdmpc2_sb3.saving.agent_file import unwrapped
from tdmpc2_sb3.saving.archive import read_archive
from tdmpc2_sb3.saving.callback_state import environments_of
from tdmpc2_sb3.saving.parameter_checks import check_parameters
from tdmpc2_sb3.saving.schedules import can_be_written, tabulated
from tdmpc2_sb3.settings import (
    AUTOMATIC,
    SETTINGS,
    FixedSettingError,
    LiveSettings,
    automatic_initial_updates,
    check_setting,
    learn_arguments,
    takes_fields_of,
    usable_device,
    warn_if_nothing_is_learnt,
    whole_number,
)
from tdmpc2_sb3.update import RunningMeans, UpdateStep

SelfTDMPC2 = TypeVar("SelfTDMPC2", bound="TDMPC2")

RHO = 0.5
RHO_EPISODIC = 0.7
SEED_RANGE = 2**31


class TDMPC2(LiveSettings, OffPolicyAlgorithm):
    """Model-based reinforcement learning by planning in the latent space of a learned world model.

    The defaults are the paper's for one task with the 5M model. Steps are the agent's: with an
    action repeat of 2, one step is two frames.

    Arguments are attributes, too: those that the networks and the replay buffer are built with
    stay as they are, all others may be assigned at any time (``model.gamma = 0.95``), also by
    callbacks. Parameters that are frozen, for example by
    ``model.policy.world_model.encoder.requires_grad_(False)``, are not trained; a saved model keeps
    that.

    Fields that are added to :class:`tdmpc2_sb3.losses.LossConfig` or
    :class:`tdmpc2_sb3.planner.PlannerConfig` are further arguments, by keyword.

    :param policy: "MlpPolicy", "SSMPolicy", "CnnPolicy", "MultiInputPolicy" or a policy class
    :param env: environment with a bounded Box action space (of integers every value gets an equal
        share of the planned [-1, 1], and the buffer holds what was planned), or its id
    :param learning_rate: of Adam; may be a function of the remaining progress
    :param buffer_size: steps that the replay buffer holds
    :param learning_starts: steps of random actions before learning; "auto": five episodes, at
        least 1000
    :param batch_size: B, sub-sequences a gradient step
    :param tau: rate at which the target Q heads and the running scale of Q move
    :param gamma: discount factor; "auto": from the episode length
    :param train_freq: steps between updates, or (n, "episode")
    :param gradient_steps: gradient steps an update; -1: as many as steps were collected
    :param action_noise: added to every action after the warm-up, in [-1, 1] units; None: the plan's
        own spread alone explores
    :param exploration_noise: "white": random actions before learning and the noise that explores
        the plan's spread are drawn anew every step, as the reference does; "pink": they are
        correlated over steps, see :class:`tdmpc2_sb3.model.pink_noise.PinkNoise`
    :param replay_buffer_class: :class:`SequenceReplayBuffer` or a subclass
    :param replay_buffer_kwargs: further arguments of the buffer
    :param initial_gradient_steps: gradient steps made at once when learning starts; "auto": one
        for each random step, or fewer if the later steps get fewer
    :param horizon: H, steps of the plan
    :param train_horizon: T, steps of a training sub-sequence; None: as many as the plan's
    :param model_size: million parameters (1, 5, 19, 48 or 317); sets the sizes left at None
    :param latent_dim: Z, a multiple of simnorm_dim
    :param enc_dim: width of the state encoder's hidden layers
    :param mlp_dim: width of all other hidden layers
    :param num_enc_layers: layers of the state encoder
    :param num_q: number of Q heads
    :param simnorm_dim: group size of SimNorm
    :param num_bins: bins of the discrete regression
    :param dropout: rate on the Q heads' first layer
    :param dynamics: "mlp", "ssm" or another registered kind; None: the policy's own
    :param dynamics_kwargs: further arguments of the dynamics
    :param num_samples: N, action sequences evaluated in each iteration of planning
    :param num_elites: best sequences that shape the next iteration
    :param num_pi_trajs: how many of the N come from the policy prior
    :param num_iterations: iterations of planning; "auto": 6, or 8 from 20 action dimensions on
    :param temperature: inverse temperature of the elites' weights
    :param min_std: smallest standard deviation of a plan
    :param max_std: initial and largest standard deviation of a plan
    :param consistency_coef: weight of the latent consistency loss
    :param reward_coef: weight of the reward loss
    :param value_coef: weight of the value loss
    :param termination_coef: weight of the termination loss
    :param entropy_coef: weight of the policy prior's scaled entropy
    :param entropy: "squashed": as in the code that made the published returns; "gaussian": as in
        the authors' code since December 2024, which leaves a policy prior whose actions lie at
        their bounds alone, see :func:`tdmpc2_sb3.losses.scaled_entropy`
    :param rho: decay of the loss over a sub-sequence's steps, rho^t / T; "auto": 0.5 (0.7 if
        episodic) at T = 3, adapted to any other T so that its last step keeps its weight
    :param td_lambda: lambda of the Q heads' targets: 0 bootstraps after one step, as the reference
        does; 1 after the rest of the training sub-sequence
    :param policy_delay: gradient steps of the world model for one of the policy prior, as in TD3
    :param enc_lr_scale: the encoder's learning rate relative to the others'
    :param max_grad_norm: gradients are clipped to this norm
    :param episodic: whether episodes may terminate, which adds a termination head; "auto": asked
        of the environment
    :param reference_terminations: True: learn from terminations as the reference does. False:
        sub-sequences also start at the last steps before one and run past it, and the termination
        head learns from encoded states besides predicted ones
    :param use_planner: if False, the policy prior acts alone; may be changed at any time
    :param compile: True: planning and updates go through ``torch.compile``, which takes minutes at
        the start, and on CUDA become CUDA graphs; "auto": the graphs alone; False: neither. What
        fails is left out with a warning
    :param stats_window_size: episodes that the rollout statistics are averaged over
    :param tensorboard_log: folder of the TensorBoard log, None for none
    :param policy_kwargs: arguments of the policy, over those given here
    :param verbose: 0 silent, 1 information, 2 debugging
    :param seed: of every random stream
    :param device: "auto", "cpu", "cuda", "mps", ...
    :param _init_setup_model: whether to build the networks at once
    :raises ValueError: naming the argument that is out of range
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "SSMPolicy": SSMPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    #: Arguments that the policy is built from; policy_kwargs override them.
    POLICY_ARGUMENTS: ClassVar = (
        *("episodic", "model_size", *SIZES, "dynamics", "dynamics_kwargs"),
        *("enc_lr_scale", "compile", *PlannerConfig._fields),
    )
    policy: TDMPC2Policy

    @takes_fields_of(LossConfig, PlannerConfig, derived=("encoded_terminations",))
    def __init__(
        self,
        policy: str | type[TDMPC2Policy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int | str = "auto",
        batch_size: int = 256,
        tau: float = 0.01,
        gamma: float | str = "auto",
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        exploration_noise: str = "white",
        replay_buffer_class: type[SequenceReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        initial_gradient_steps: int | str = "auto",
        horizon: int = 3,
        train_horizon: int | None = None,
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
        num_samples: int = 512,
        num_elites: int = 64,
        num_pi_trajs: int = 24,
        num_iterations: int | str = "auto",
        temperature: float = 0.5,
        min_std: float = 0.05,
        max_std: float = 2.0,
        consistency_coef: float = 20.0,
        reward_coef: float = 0.1,
        value_coef: float = 0.1,
        termination_coef: float = 1.0,
        entropy_coef: float = 1e-4,
        entropy: str = "squashed",
        rho: float | str = "auto",
        td_lambda: float = 0.0,
        policy_delay: int = 1,
        enc_lr_scale: float = 0.3,
        max_grad_norm: float = 20.0,
        episodic: bool | str = "auto",
        reference_terminations: bool = False,
        use_planner: bool = True,
        compile: bool | str = "auto",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        usable_device(device)
        if env is not None:
            env = maybe_make_env(env, verbose)
            # SB3's own checks name no remedy.
            check_action_space(env.action_space)
            check_entries(env.observation_space)
        elif _init_setup_model:
            raise ValueError("env is None: pass an environment or its id.")
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            buffer_size=buffer_size,
            learning_starts=learning_starts,  # type: ignore[arg-type]
            batch_size=batch_size,
            tau=tau,
            gamma=gamma,  # type: ignore[arg-type]
            train_freq=train_freq,
            gradient_steps=gradient_steps,
            action_noise=action_noise,
            replay_buffer_class=replay_buffer_class,
            replay_buffer_kwargs=replay_buffer_kwargs,
            policy_kwargs=policy_kwargs,
            stats_window_size=whole_number("stats_window_size", stats_window_size, 1),
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            seed=seed,
            support_multi_env=True,
            sde_support=False,
        )
        self.exploration_noise = exploration_noise
        self.initial_gradient_steps = initial_gradient_steps
        self.horizon = horizon
        self.train_horizon = train_horizon
        self.model_size = model_size
        self.latent_dim = latent_dim
        self.enc_dim = enc_dim
        self.mlp_dim = mlp_dim
        self.num_enc_layers = num_enc_layers
        self.num_q = num_q
        self.simnorm_dim = simnorm_dim
        self.num_bins = num_bins
        self.dropout = dropout
        self.dynamics = dynamics
        self.dynamics_kwargs = dynamics_kwargs
        self.num_samples = num_samples
        self.num_elites = num_elites
        self.num_pi_trajs = num_pi_trajs
        self.num_iterations = num_iterations
        self.temperature = temperature
        self.min_std = min_std
        self.max_std = max_std
        self.consistency_coef = consistency_coef
        self.reward_coef = reward_coef
        self.value_coef = value_coef
        self.termination_coef = termination_coef
        self.entropy_coef = entropy_coef
        self.entropy = entropy
        self.rho = rho
        self.td_lambda = td_lambda
        self.policy_delay = policy_delay
        self.enc_lr_scale = enc_lr_scale
        self.max_grad_norm = max_grad_norm
        self.episodic = episodic
        self.reference_terminations = reference_terminations
        self.use_planner = use_planner
        self.compile = compile
        # Progress that outlives learn() and files: continuing repeats no warm-up and no burst.
        self._lifetime_steps = 0
        self._pending_initial_updates: int | None = None  # None: learning has not started
        self._pending_updates = 0  # gradient steps that the latest rollout is still due
        self._rollout_steps = 0  # steps and episodes of a rollout that a checkpoint interrupted
        self._rollout_episodes = 0
        if _init_setup_model:
            with workers.watched([self.env]):
                self._setup_model()
            # Not where a model is loaded: for predictions nothing is stored.
            assert isinstance(self.replay_buffer, SequenceReplayBuffer)
            self.replay_buffer.check_size()

    # -- construction --------------------------------------------------------------------------

    def _setup_model(self) -> None:
        """Checks the settings, resolves the automatic ones and builds buffer and policy.

        Loading and the zoo's overrides set attributes past ``__init__`` and then come here, so
        everything is checked here.
        """
        self._is_set_up = False
        check_action_space(self.action_space)
        self._check_all()
        self._convert_train_freq()
        self._resolve_settings()
        self._check_settings()
        self._setup_lr_schedule()
        if self.replay_buffer is None:
            self.replay_buffer = self._make_buffer()
        # Before the weights are drawn, from SB3's global stream.
        BaseAlgorithm.set_random_seed(self, self.seed)
        arguments = {name: getattr(self, name) for name in self.POLICY_ARGUMENTS}
        policy = self.policy_class(
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            **{**arguments, **self.policy_kwargs},
        )
        if not isinstance(policy, TDMPC2Policy):
            raise ValueError(
                f"policy is {self.policy_class.__name__}: use one of {sorted(self.policy_aliases)} "
                "or a subclass of TDMPC2Policy."
            )
        self.policy = policy.to(self.device)
        self._seed_streams(self.seed)
        self._means = RunningMeans()
        self._plan_mean: th.Tensor | None = None
        self._pink_noise = self._make_pink_noise()
        self._saved_episodes: episode_state.EpisodeStates | None = None
        self._said_plain: set[str] = set()
        self._said_reward = False
        self._known_planner = self.policy.planner
        self._normalization = self._find_normalization()
        self._why_anew: str | None = None  # saved episodes cannot go on
        self._without_run = False  # as of a file saved with resumable=False
        self._update_step = self._make_update_step()
        self._workers = workers.Watch()  # of learn()'s environments
        self._is_set_up = True

    def _setup_lr_schedule(self) -> None:
        if not can_be_written(self.learning_rate):
            tabulated(self.learning_rate, "learning_rate")  # type: ignore[arg-type]  # or it fails
        super()._setup_lr_schedule()

    def _make_pink_noise(self) -> PinkNoise | None:
        if self.exploration_noise != "pink":
            return None
        action_dim = self.policy.world_model.action_dim
        return PinkNoise(self.n_envs, action_dim, self._training_generator)

    def _find_normalization(self) -> NormalizationBelow | None:
        if self.env is None or self._vec_normalize_env is None:
            return None
        return NormalizationBelow(self.env, self._vec_normalize_env)

    def _make_buffer(self) -> SequenceReplayBuffer:
        if self.replay_buffer_class is None:
            self.replay_buffer_class = SequenceReplayBuffer
        buffer = self.replay_buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            **{
                "horizon": self.sequence_length,
                "past_terminations": bool(self.episodic) and not self.reference_terminations,
                **self.replay_buffer_kwargs,
            },
        )
        assert isinstance(buffer, SequenceReplayBuffer)
        return buffer

    def _resolve_settings(self) -> None:
        automatic = [
            name
            for name in ("gamma", "learning_starts", "episodic")
            if getattr(self, name) == "auto"
        ]
        if not automatic:
            return
        if self.env is None:
            raise ValueError(
                f"{', '.join(automatic)} = 'auto' is read from the environment, but env is None: "
                "pass an environment or numbers."
            )
        facts = read_facts(self.env)
        for name, value in automatic_settings(automatic, facts, self.episodic).items():
            setattr(self, name, value)
        if self.verbose >= 1:
            print(describe_automatic({name: getattr(self, name) for name in automatic}, facts))

    def _check_settings(self) -> None:
        """
        :raises ValueError: if settings that are in range one by one do not go with each other
        """
        buffer_class = self.replay_buffer_class
        if buffer_class is not None and not issubclass(buffer_class, SequenceReplayBuffer):
            raise ValueError(
                f"replay_buffer_class is {buffer_class.__name__}: TDMPC2 learns from "
                "sub-sequences, without hindsight relabelling: use SequenceReplayBuffer or a "
                "subclass of it."
            )
        self._check_update_ratio()

    def _check_update_ratio(self) -> None:
        assert isinstance(self.train_freq, TrainFreq)
        if self.n_envs > 1 and self.train_freq.unit == TrainFrequencyUnit.EPISODE:
            raise ValueError(
                f"train_freq counts episodes but there are {self.n_envs} environments: count "
                "steps, or use one environment."
            )

    @property
    def sequence_length(self) -> int:
        """T, steps of a training sub-sequence."""
        given = self.replay_buffer_kwargs.get("horizon", self.train_horizon)
        return self.horizon if given is None else int(given)

    def _loss_settings(self) -> tuple[Any, ...]:
        """What the gradient steps depend on besides the policy."""
        given = {name: getattr(self, name) for name in LossConfig._fields if name in SETTINGS}
        given["gamma"] = self.policy.planner.gamma
        given["encoded_terminations"] = bool(self.episodic) and not self.reference_terminations
        config = LossConfig(**given)
        steps = self.sequence_length
        return config, self.rho, steps, self.tau, self.max_grad_norm, self.compile

    def _make_update_step(self) -> UpdateStep:
        settings = self._loss_settings()
        config, rho, steps, tau, max_grad_norm, compile = settings
        horizon_aware = rho == AUTOMATIC
        if horizon_aware:
            rho = RHO_EPISODIC if self.policy.world_model.episodic else RHO
        step = UpdateStep(
            unwrapped(self.policy),
            config,
            step_weights(steps, steps, float(rho), horizon_aware),
            step_weights(steps + 1, steps, float(rho), horizon_aware),
            tau,
            max_grad_norm,
            compile,
        )
        self._made_update_step = settings, step
        return step

    def _renew_update_step(self) -> None:
        """Makes the gradient steps follow settings and policy, where these have changed."""
        self._follow_planner()
        settings, step = self._made_update_step
        if settings != self._loss_settings() or not step.is_of(unwrapped(self.policy)):
            unwrapped(self.policy).follow_parts()
            self._update_step = self._make_update_step()
            self._say_plain_ways()
        assert isinstance(self.replay_buffer, SequenceReplayBuffer)
        if self.replay_buffer.horizon != self.sequence_length:
            self.replay_buffer.set_horizon(self.sequence_length)

    # -- changes -------------------------------------------------------------------------------

    def _on_change(self, name: str, previous: Any) -> None:
        if name == "policy":
            if unwrapped(self.policy) is not unwrapped(previous):
                self._adopt(unwrapped(self.policy))
            return
        if name == "initial_gradient_steps" and self._pending_initial_updates is not None:
            raise FixedSettingError(
                f"{name} cannot become {self.initial_gradient_steps!r} any more: learning has "
                "begun."
            )
        if name in self.policy_kwargs:  # the assignment takes the argument's place
            kept = {key: value for key, value in self.policy_kwargs.items() if key != name}
            self.__dict__["policy_kwargs"] = kept
        if name in ("gamma", "learning_starts"):
            self._resolve_settings()
        if name in PlannerConfig._fields:
            value = getattr(self, name)
            if name == "num_iterations":
                value = automatic_iterations(value, self.policy.world_model.action_dim)
            self.policy.planner = self.policy.planner._replace(**{name: value})
            self._known_planner = self.policy.planner
        elif name == "learning_rate":
            self._setup_lr_schedule()
        elif name == "train_freq":
            self._convert_train_freq()
            self._check_update_ratio()
        elif name == "enc_lr_scale":
            self.policy.set_enc_lr_scale(self.enc_lr_scale)
        elif name == "compile":
            self.policy.set_compile(self.compile)
        elif name == "exploration_noise" and self.exploration_noise != previous:
            self._pink_noise = self._make_pink_noise()

    def _adopt(self, policy: TDMPC2Policy) -> None:
        """Goes on with another policy, whose arguments become the algorithm's.

        :raises ValueError: if it is none for this environment
        """
        if not isinstance(policy, TDMPC2Policy):
            kind = repr(policy) if isinstance(policy, str) else f"a {type(policy).__name__}"
            raise ValueError(f"policy is {kind}: assign a TDMPC2Policy, such as an MlpPolicy.")
        for name in ("observation_space", "action_space"):
            theirs, ours = getattr(policy, name), getattr(self, name)
            if theirs != ours:
                raise ValueError(
                    f"The policy's {name.replace('_', ' ')} is {theirs}, but that of the "
                    f"environment is {ours}: assign a policy made for it."
                )
        if policy.world_model.episodic != self.episodic:
            raise ValueError(
                f"The policy was made with episodic={policy.world_model.episodic}, but episodic is "
                f"{self.episodic} here: make the model with that of the policy."
            )
        policy.to(self.device)
        arguments = policy._get_constructor_parameters()
        self.__dict__.update(
            {name: arguments[name] for name in arguments.keys() & self.POLICY_ARGUMENTS}
        )
        kept = {key: value for key, value in self.policy_kwargs.items() if key not in arguments}
        self.__dict__.update(policy_kwargs=kept, policy_class=type(policy))
        self._known_planner = policy.planner
        self._plan_mean = None

    def _follow_planner(self) -> None:
        """Takes over settings that were assigned to the policy's planner itself."""
        planner = self.policy.planner
        if planner is self._known_planner:
            return
        before = self._known_planner._asdict()
        changed = {k: v for k, v in planner._asdict().items() if k in SETTINGS and v != before[k]}
        kept = {key: value for key, value in self.policy_kwargs.items() if key not in changed}
        self.__dict__.update(changed, policy_kwargs=kept)
        self._known_planner = planner
        self._say_plain_ways()

    def _say_plain_ways(self) -> None:
        """Says once what keeps plans or gradient steps from the CPU kernels' faster ways."""
        if self.verbose < 1:
            return
        config, *_ = self._loss_settings()
        for line in self.policy.ways.declined(config, self.compile):
            if line not in self._said_plain:
                self._said_plain.add(line)
                print(line)

    def set_random_seed(self, seed: int | None = None) -> None:
        seed = check_setting("seed", seed)
        super().set_random_seed(seed)
        if seed is not None:
            self._seed_streams(seed)

    def _seed_streams(self, seed: int | None) -> None:
        """Gives training, predictions and the buffer's sampling a random stream each."""
        children = np.random.SeedSequence(seed).generate_state(3)
        training, predictions, sampling = (int(child) % SEED_RANGE for child in children)
        self._training_generator = th.Generator(self.device).manual_seed(training)
        self.policy.seed_predictions(predictions)
        assert isinstance(self.replay_buffer, SequenceReplayBuffer)
        self.replay_buffer.seed(sampling)

    # -- learning ------------------------------------------------------------------------------

    def learn(
        self: SelfTDMPC2,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str = "TDMPC2",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfTDMPC2:
        total_timesteps, log_interval = learn_arguments(total_timesteps, log_interval)
        total_timesteps, callback = self._setup_learn(
            total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
        )
        assert self.env is not None
        assert isinstance(self.train_freq, TrainFreq)
        assert isinstance(self.replay_buffer, SequenceReplayBuffer)
        envs = [self.env, *environments_of(callback)]
        with last_checkpoint(callback), workers.watched(envs) as self._workers:
            callback.on_training_start(locals(), globals())
            self._follow_planner()
            self._say_plain_ways()
            warn_if_nothing_is_learnt(
                max(total_timesteps - self.num_timesteps, 0),
                int(self.learning_starts),
                self._lifetime_steps,
                self._needed_steps,
                self.replay_buffer.num_steps,
                self.train_freq,
                self.n_envs,
            )
            self._make_interrupted_updates()
            forecast = Forecast(total_timesteps, self._say)
            random_steps = int(self.learning_starts) - self._lifetime_steps
            if self._n_updates == 0 and 0 < random_steps < total_timesteps - self.num_timesteps:
                self._say(
                    f"The first {random_steps} steps act at random. Soon after them a line tells "
                    "how long the rest takes; the figure to watch is rollout/ep_rew_mean."
                )
            while self.num_timesteps < total_timesteps or self._rollout_is_complete:
                rollout = self.collect_rollouts(
                    self.env,
                    train_freq=self.train_freq,
                    action_noise=self.action_noise,
                    callback=callback,
                    learning_starts=int(self.learning_starts),
                    replay_buffer=self.replay_buffer,
                    log_interval=log_interval,
                )
                if not rollout.continue_training:
                    break
                self._learn_from(rollout)
                if self._n_updates > 0:
                    forecast.after(self.num_timesteps)
            callback.on_training_end()
        return self

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        assert self.env is not None, "You must set the environment before calling learn()"
        hindered = hindrance(unwrapped(self.policy), self.device)
        if hindered is not None:
            raise RuntimeError(hindered)
        if not isinstance(self.replay_buffer, SequenceReplayBuffer):
            raise RuntimeError(
                f"replay_buffer is a {type(self.replay_buffer).__name__}: TDMPC2 learns from "
                "sub-sequences, assign a SequenceReplayBuffer or one of a subclass."
            )
        self.replay_buffer.check_size(RuntimeError)
        if self._without_run:
            self._say(
                "The agent's file holds no run (it was saved with resumable=False): optimisers, "
                "target networks and random streams begin anew."
            )
        self._without_run = False
        going_on = not reset_num_timesteps and self._last_obs is not None
        noise = copy.deepcopy(self.action_noise) if going_on else None
        with workers.watched([self.env]):
            if not going_on:
                self._abandon_episodes()
            elif self._saved_episodes is not None:
                episode_state.restore(self.env, self._saved_episodes)
            self._saved_episodes = None
            result = super()._setup_learn(
                total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar
            )
            log_files.steady_clock(self.env)
        self._started = time.monotonic_ns()
        if self._normalization is not None and not going_on:
            self._last_original_obs = self._normalization.first(self._last_obs)  # type: ignore[arg-type]
        if noise is not None and type(noise) is type(self.action_noise):
            # SB3 resets the noise at each call; within an episode it goes on.
            vars(self.action_noise).update(vars(noise))
        return result

    def _say(self, line: str) -> None:
        if self.verbose >= 1:
            print(line, flush=True)

    def _abandon_episodes(self) -> None:
        """The environments will be reset: what was open is over."""
        assert isinstance(self.replay_buffer, SequenceReplayBuffer)
        closed = self.replay_buffer.close_episodes()
        if closed:
            why = "" if self._why_anew is None else f" ({self._why_anew})"
            self._say(
                f"The environment starts anew: {closed} open episode(s) closed as truncated{why}."
            )
        self._why_anew = None
        self._plan_mean = None
        self._rollout_steps = self._rollout_episodes = 0

    @property
    def _warming_up(self) -> bool:
        return self._lifetime_steps < int(self.learning_starts)

    @property
    def _rollout_is_complete(self) -> bool:
        """Whether a rollout that a checkpoint interrupted lacks only its gradient steps."""
        assert isinstance(self.train_freq, TrainFreq)
        return not should_collect_more_steps(
            self.train_freq, self._rollout_steps, self._rollout_episodes
        )

    def _learn_from(self, rollout: RolloutReturn) -> None:
        """The gradient steps that a finished rollout is due."""
        if not self._has_enough_steps:
            return
        if self._pending_initial_updates is None:
            self._pending_initial_updates = self._count_initial_updates()
        if self._pending_initial_updates > 0:
            self._make_initial_updates()
            return
        steps = self.gradient_steps if self.gradient_steps >= 0 else rollout.episode_timesteps
        self._pending_updates = max(steps, 0)
        self._make_pending_updates()

    @property
    def _has_enough_steps(self) -> bool:
        # A run continued without its buffer acts by its policy until there is enough again.
        assert isinstance(self.replay_buffer, SequenceReplayBuffer)
        return not self._warming_up and self.replay_buffer.num_steps >= self._needed_steps

    @property
    def _needed_steps(self) -> int:
        """Steps in the replay buffer to learn from."""
        assert isinstance(self.replay_buffer, SequenceReplayBuffer)
        enough = min(int(self.learning_starts), self.replay_buffer.buffer_size * self.n_envs // 2)
        return max(enough, (self.sequence_length + 1) * self.n_envs)

    def _make_interrupted_updates(self) -> None:
        """The gradient steps that Ctrl-C kept the run from making."""
        if not self._has_enough_steps:
            return
        if self._pending_initial_updates:
            self._make_initial_updates()
        self._make_pending_updates()

    def _make_pending_updates(self) -> None:
        while self._pending_updates > 0:
            with interrupts.deferred():
                self.train(gradient_steps=1, batch_size=self.batch_size)
                self._pending_updates -= 1

    def _count_initial_updates(self) -> int:
        if self._n_updates > 0:
            return 0
        if self.initial_gradient_steps != AUTOMATIC:
            return int(self.initial_gradient_steps)
        assert isinstance(self.train_freq, TrainFreq)
        return automatic_initial_updates(
            int(self.learning_starts),
            self.gradient_steps,
            self.train_freq,
            self.n_envs,
            self._episode_num,
        )

    def _make_initial_updates(self) -> None:
        """The burst of gradient steps on the random steps, with its progress shown."""
        assert self._pending_initial_updates is not None
        self._say(
            f"Learning starts with {self._pending_initial_updates} gradient steps on the "
            f"{self._lifetime_steps} steps collected so far."
        )
        total, start = self._pending_initial_updates, time.monotonic()
        in_terminal = sys.stderr.isatty()
        with tqdm(
            total=total,
            desc="Initial updates",
            unit="update",
            mininterval=0.5,
            disable=self.verbose < 1 or not in_terminal,
        ) as bar:
            while self._pending_initial_updates > 0:
                with interrupts.deferred():
                    self.train(gradient_steps=1, batch_size=self.batch_size)
                    self._pending_initial_updates -= 1
                bar.update()
                done = total - self._pending_initial_updates
                tenth_is_full = done * 10 // total > (done - 1) * 10 // total
                # A bar is drawn over itself; in a file its drawings would lie side by side.
                if self.verbose >= 1 and not in_terminal and tenth_is_full:
                    elapsed = tqdm.format_interval(time.monotonic() - start)
                    print(f"Initial updates: {done} of {total} after {elapsed}", flush=True)

    def train(self, gradient_steps: int, batch_size: int) -> None:
        """Makes gradient steps on sampled sub-sequences.

        :param gradient_steps: how many
        :param batch_size: B, sub-sequences each
        :raises RuntimeError: if a loss is not finite, naming the gradient step
        """
        assert self.replay_buffer is not None
        self._renew_update_step()
        learning_rate = self.lr_schedule(self._current_progress_remaining)
        self.policy.set_learning_rate(learning_rate)
        for _ in range(gradient_steps):
            self._workers.check()
            batch = self.replay_buffer.sample(batch_size, env=self._normalization)  # type: ignore[arg-type]
            noise = sample_update_noise(
                self.policy.world_model,
                self.sequence_length,
                batch_size,
                self._training_generator,
                with_policy=(self._n_updates + 1) % self.policy_delay == 0,
            )
            try:
                statistics = self._update_step(batch, noise)  # type: ignore[arg-type]
            except RuntimeError as error:
                reason = hindrance(unwrapped(self.policy), self.device) or error
                raise RuntimeError(f"Gradient step {self._n_updates + 1}: {reason}") from error
            self._n_updates += 1
            self._means.add(statistics)
        self.logger.record("train/learning_rate", learning_rate)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def dump_logs(self) -> None:
        for name, value in self._means.pop().items():
            self.logger.record(name, value)
        # SB3 reads the clock of the wall, which may be set back.
        self.start_time = time.time_ns() - (time.monotonic_ns() - self._started)
        super().dump_logs()

    # -- acting --------------------------------------------------------------------------------

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: PlanState | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, PlanState | None]:
        """See :meth:`TDMPC2Policy.predict`; ``use_planner`` chooses planner or policy prior."""
        self._workers.check()  # training's environments, while another one is evaluated in
        return self.policy.predict(
            observation, state, episode_start, deterministic, self.use_planner
        )

    def _sample_action(
        self,
        learning_starts: int,
        action_noise: ActionNoise | None = None,
        n_envs: int = 1,
    ) -> tuple[np.ndarray, np.ndarray]:
        noise = None if self._pink_noise is None else self._pink_noise.draw()
        if self._warming_up and noise is not None:
            scaled = uniform(noise)
            return self.policy.unscale(scaled), scaled.cpu().numpy()
        if self._warming_up and is_of_integers(self.action_space):
            # The buffer holds what was meant within a value's share, as it does of plans.
            shape = (n_envs, self.policy.world_model.action_dim)
            meant = self.action_space.np_random.uniform(-1.0, 1.0, shape).astype(np.float32)
            return self.policy.unscale(th.from_numpy(meant)), meant
        if self._warming_up:
            unscaled = np.array([self.action_space.sample() for _ in range(n_envs)])
            return unscaled, self.policy.scale_action(unscaled).astype(np.float32)
        assert self._last_obs is not None
        try:
            observation, _ = self.policy.obs_to_tensor(self._last_obs)
        except ValueError as error:  # which the zoo would take for a trial to be pruned
            raise RuntimeError(str(error)) from error
        if self.use_planner:
            scaled = self._plan_action(observation, n_envs, noise).action
        else:
            scaled = self.policy.prior_action(
                observation, n_envs, self._training_generator, False, noise
            )
            self._plan_mean = None  # stale once the planner takes over again
        if action_noise is not None:
            # No device has to know double precision.
            added = th.as_tensor(np.asarray(action_noise(), np.float32), device=scaled.device)
            scaled = (scaled + added).clamp(-1.0, 1.0)
        return self.policy.unscale(scaled), scaled.cpu().numpy()

    def _plan_action(self, observation: Any, n_envs: int, exploration: th.Tensor | None) -> Plan:
        """Plans with training's own plan and random stream.

        :param exploration: standard normal, [E, A]; None to draw it
        """
        previous = self._previous_plan(n_envs)
        starts = np.ones(n_envs, dtype=bool)
        if previous is None:
            previous = self.policy.zero_plan(n_envs)
        elif self._last_episode_starts is not None:
            starts = np.asarray(self._last_episode_starts, dtype=bool)
        start = th.as_tensor(starts, device=self.device)
        result = self.policy.plan(
            observation,
            previous,
            start,
            self._training_generator,
            explore=True,
            exploration=exploration,
        )
        self._means.add(
            {
                "planner/value": result.value,
                "planner/elite_value_std": result.elite_std,
                "planner/effective_samples": result.effective_samples,
                "planner/std": result.std,
                "planner/last_mean_change": result.mean_change,
            }
        )
        if not starts.any() and result.mean.shape[1] > 1:
            change = (result.mean[:, :-1] - previous[:, 1:]).square()
            self._means.add({"planner/plan_change": change})
        self._plan_mean = result.mean
        return result

    def _previous_plan(self, n_envs: int) -> th.Tensor | None:
        """The plan's mean, fitted to what is planned now (the horizon may have changed), [E, H, A];
        None if there is none."""
        shape = (n_envs, self.policy.planner.horizon, self.policy.world_model.action_dim)
        mean = self._plan_mean
        if mean is None or mean.shape == shape:
            return mean
        fitted = fitted_plan(mean, *shape)
        if self.verbose >= 1:
            what = "dropped" if fitted is None else "fitted to it"
            was = "x".join(map(str, mean.shape))
            print(
                f"The plan so far is {was} (environments, horizon, action) and "
                f"{'x'.join(map(str, shape))} is planned now: it is {what}."
            )
        return fitted

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """Collects steps as SB3 does, but stores each before the callbacks see it.

        A checkpoint written by a callback then holds every step that the simulator took, and a
        resumed run goes on with the rollout that the checkpoint interrupted.
        """
        self.policy.set_training_mode(False)
        callback.on_rollout_start()
        while should_collect_more_steps(train_freq, self._rollout_steps, self._rollout_episodes):
            with interrupts.deferred():
                actions, buffer_actions = self._sample_action(
                    learning_starts, action_noise, env.num_envs
                )
                new_obs, rewards, dones, infos = env.step(actions)
                try:
                    self._store_transition(
                        replay_buffer,
                        buffer_actions,
                        new_obs,  # type: ignore[arg-type]
                        rewards,
                        dones,
                        infos,
                    )
                except RuntimeError as error:
                    step = self.num_timesteps + env.num_envs
                    raise RuntimeError(f"Step {step}: {error}") from error
                self._check_rewards(rewards)
                self.num_timesteps += env.num_envs
                self._lifetime_steps += env.num_envs
                self._rollout_steps += 1
                self._rollout_episodes += int(dones.sum())
                self._last_episode_starts = dones
                self._update_info_buffer(infos, dones)
                self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
                self._on_step()
                finished = self._count_episodes(dones, action_noise, env.num_envs)

            callback.update_locals(locals())
            if not callback.on_step():
                return RolloutReturn(
                    self._rollout_steps * env.num_envs, self._rollout_episodes, False
                )
            if log_interval is not None and any(n % log_interval == 0 for n in finished):
                self.dump_logs()
        callback.on_rollout_end()
        result = RolloutReturn(self._rollout_steps * env.num_envs, self._rollout_episodes, True)
        self._rollout_steps = self._rollout_episodes = 0
        return result

    def _check_rewards(self, rewards: np.ndarray) -> None:
        """Warns once of a reward that the networks cannot predict."""
        if self._said_reward:
            return
        bins = self.policy.world_model.architecture
        low, high = -math.expm1(-bins.vmin), math.expm1(bins.vmax)
        if low <= rewards.min() and rewards.max() <= high:
            return
        self._said_reward = True
        beyond = rewards.max() if rewards.max() > high else rewards.min()
        warnings.warn(
            f"A reward of {beyond:g} lies outside [{low:.0f}, {high:.0f}], beyond which the "
            "networks cannot predict, and is learnt as the nearer end (said once): scale the "
            "rewards, for example with SB3's VecNormalize or gymnasium.wrappers.TransformReward.",
            stacklevel=2,
        )

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Stores a step with its observations as they were before VecNormalize, if there is one."""
        below = self._normalization
        if below is None:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
            return
        before = self._last_original_obs
        assert before is not None
        original = below.next(new_obs, dones, before)
        following = below.with_last(original, dones, infos, before)
        reward = below.normalizer.get_original_reward()
        replay_buffer.add(before, following, buffer_action, reward, dones, infos)  # type: ignore[arg-type]
        self._last_obs, self._last_original_obs = new_obs, original

    def _count_episodes(
        self, dones: np.ndarray, action_noise: ActionNoise | None, n_envs: int
    ) -> list[int]:
        """Counts finished episodes; their running numbers."""
        finished = []
        for index in np.flatnonzero(dones):
            self._episode_num += 1
            finished.append(self._episode_num)
            if action_noise is not None:
                kwargs = {"indices": [index]} if n_envs > 1 else {}
                action_noise.reset(**kwargs)
        return finished

    # -- saving --------------------------------------------------------------------------------

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.model_optimizer", "policy.prior_optimizer"], []

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "_training_generator",
            "_means",
            "_plan_mean",
            "_pink_noise",
            "_normalization",
            "_saved_episodes",
            "_update_step",
            "_made_update_step",
            "_known_planner",
            "_is_set_up",
            "_said_plain",
            "_said_reward",
            "_why_anew",
            "_without_run",
            "_workers",
            "_started",
        ]

    def save(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        resumable: bool = True,
    ) -> None:
        """Saves everything but the replay buffer, atomically and without pickled code.

        With :meth:`save_replay_buffer` at the same moment, a run resumes exactly: random streams,
        the plan and (where the environments can be restored) the episodes in progress are kept.

        :param path: file to write, or a binary stream
        :param exclude: attributes to leave out besides the usual ones
        :param include: attributes to keep although they are usually left out
        :param resumable: False for an agent that is to be played, shared or tuned further: without
            the optimisers' states, target networks, random streams and open episodes the file is
            a third as large. What learns from it begins with new optimisers, and targets that
            equal the Q networks.
        :raises TypeError: naming an attribute that cannot be written without pickling
        """
        self._follow_planner()
        unwrapped(self.policy).follow_parts()
        agent_file.save(self, path, exclude or (), include or (), resumable)

    @classmethod
    def load(
        cls: type[SelfTDMPC2],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: th.device | str = "auto",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> SelfTDMPC2:
        """Loads a model saved by :meth:`save`; no pickled code is executed.

        Given an environment that can be restored (``DMC/``), ``learn(...,
        reset_num_timesteps=False)`` goes on in the very episode that was in progress; any other
        environment is reset first.

        :param path: file, or a binary stream
        :param env: environment to go on with; none is needed for predictions
        :param device: where the model goes
        :param custom_objects: to use instead of the saved attributes of these names
        :param print_system_info: whether to print the present versions
        :param force_reset: if False, an environment that cannot be restored is not reset either:
            it must still be in the state in which the model was saved
        :param kwargs: attributes that replace the saved ones
        :raises ValueError: if the file is no such archive, is damaged, or does not fit the
            environment
        """
        if print_system_info:
            get_system_info()
        device = usable_device(device)
        read = read_archive(path, device, custom_objects, True, print_system_info)
        replaced = custom_objects or {}
        with workers.watched([env if isinstance(env, VecEnv) else None]):
            return agent_file.load(cls, path, read, env, device, replaced, force_reset, kwargs)

    def set_parameters(
        self,
        load_path_or_dict: str | dict[str, Any],
        exact_match: bool = True,
        device: th.device | str = "auto",
    ) -> None:
        """Loads parameters from a file of :meth:`save` or a dictionary of state dicts.

        :param load_path_or_dict: see SB3
        :param exact_match: whether every parameter must be there
        :param device: where to
        """
        parameters = load_path_or_dict
        device = usable_device(device)
        if not isinstance(parameters, dict):
            _, parameters = read_archive(parameters, device, load_data=False)
            parameters.pop("run_streams", None)
        for name, state in parameters.items():
            check_parameters(self, name, state, parameters is not load_path_or_dict)
        super().set_parameters(parameters, exact_match, device)

    @classmethod
    def load_official(
        cls: type[SelfTDMPC2],
        path: str | pathlib.Path | io.BufferedIOBase,
        env: GymEnv | str,
        **kwargs: Any,
    ) -> SelfTDMPC2:
        """Builds an agent from one of the authors' single-task checkpoints (tdmpc2.com).

        Both of their formats are read; the sizes are those of the file. A checkpoint holds the
        networks alone: predictions need no more, but learning starts with fresh optimisers and
        its usual random steps (pass ``learning_starts=0`` to act by the agent at once).

        :param path: file, or a binary stream
        :param env: environment of the checkpoint's task, with its action repeat (theirs is 2 on
            DMControl)
        :param kwargs: further arguments of :class:`TDMPC2`
        :raises FileNotFoundError: if there is no such file
        :raises ValueError: if it is damaged, no single-task checkpoint, or does not fit the
            environment or the arguments
        """
        tensors = official_checkpoint.read_checkpoint(path)
        settings = official_checkpoint.merged_settings(
            official_checkpoint.infer_settings(tensors), kwargs
        )
        model = cls(settings.pop("policy"), env, **settings)
        official_checkpoint.load_tensors(model.policy.world_model, tensors)
        return model

    def save_official(
        self,
        path: str | pathlib.Path | io.BufferedIOBase,
        module_placeholders: bool = False,
    ) -> None:
        """Writes the networks as a checkpoint of the authors' code, atomically.

        :param path: file (``.pt`` is added if it has no suffix), or a binary stream
        :param module_placeholders: whether to add empty entries that their code asks for under
            tensordict 0.14 and later, and refuses under earlier versions (they pin 0.8)
        :raises ValueError: if their code has no such model: SSM dynamics, dictionaries, images
            that are not 64x64
        """
        official_checkpoint.write_checkpoint(path, self.policy.world_model, module_placeholders)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        is_set_up, self._is_set_up = self._is_set_up, False  # nobody else may assign env
        try:
            super().set_env(env, force_reset)
        finally:
            self._is_set_up = is_set_up
        self._saved_episodes = None
        self._normalization = self._find_normalization()

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """Saves the replay buffer atomically, as plain arrays.

        :param path: file, or a binary stream
        """
        assert isinstance(self.replay_buffer, SequenceReplayBuffer)
        self.replay_buffer.save(path)

    def load_replay_buffer(
        self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True
    ) -> None:
        """Loads a replay buffer saved by :meth:`save_replay_buffer`.

        :param path: file, or a binary stream
        :param truncate_last_traj: accepted for SB3's sake; an open episode goes on exactly if the
            environment does, and is closed as truncated otherwise
        :raises ValueError: if the file is damaged or does not fit this buffer
        """
        if self.replay_buffer is None:
            self.replay_buffer = self._make_buffer()
        assert isinstance(self.replay_buffer, SequenceReplayBuffer)
        self.replay_buffer.load(path)
