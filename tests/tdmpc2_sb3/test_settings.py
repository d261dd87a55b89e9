"""Settings after construction: each has an effect from then on, or is refused with a sentence."""

from __future__ import annotations

import inspect
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import NormalActionNoise

from tdmpc2_sb3 import TDMPC2, MlpPolicy, settings
from tdmpc2_sb3.settings import SETTINGS, FixedSettingError, real_number, whole_number

ARGUMENTS = set(inspect.signature(TDMPC2.__init__).parameters) - {"self", "_init_setup_model"}
FIXED = sorted(name for name, setting in SETTINGS.items() if setting.fixed is not None)
LIVE = sorted(SETTINGS.keys() - FIXED)
#: Another value of each; one that is missing is made from the present one.
OTHERS = {
    "learning_rate": lambda: 1e-2,
    "learning_starts": lambda: 5,
    "gamma": lambda: 0.5,
    "action_noise": lambda: NormalActionNoise(np.zeros(2), 0.3 * np.ones(2)),
    "exploration_noise": lambda: "pink",
    "initial_gradient_steps": lambda: 3,
    "train_horizon": lambda: 2,
    "train_freq": lambda: 2,
    "entropy": lambda: "gaussian",
    "rho": lambda: 0.9,
    "td_lambda": lambda: 0.5,
    "max_grad_norm": lambda: 1e-3,
    "min_std": lambda: 0.5,
    "max_std": lambda: 0.3,
    "use_planner": lambda: False,
    "num_iterations": lambda: 3,
    "tau": lambda: 0.5,
}
#: Settings of what comes before the first gradient step.
EARLY = ("learning_starts", "initial_gradient_steps")


def another(agent, name):
    value = getattr(agent, name)
    if name in OTHERS:
        return OTHERS[name]()
    return value + 1 if isinstance(value, int) else 2.0 * value + 0.1


def run(make_agent, name=None):
    """Everything that a run leaves, during which a setting was changed."""
    agent = make_agent(episodic=True, initial_gradient_steps=2, entropy_coef=0.01)
    if name in EARLY:
        setattr(agent, name, another(agent, name))
    agent.learn(28)
    if name is not None and name not in EARLY:
        setattr(agent, name, another(agent, name))
    agent.learn(8, reset_num_timesteps=False)
    parameters = [each.detach().flatten() for each in agent.policy.parameters()]
    steps = th.tensor([float(agent._n_updates)])
    actions = th.as_tensor(agent.replay_buffer.actions).flatten()
    return th.cat([*parameters, agent.policy.scale.view(1), steps, actions])


def test_there_is_a_row_for_every_argument():
    assert set(SETTINGS) == ARGUMENTS


@pytest.mark.parametrize(
    "name", [n for n in LIVE if n not in ("policy", "env", "compile", "tensorboard_log", "verbose")]
)
def test_a_change_has_an_effect(make_agent, name):
    plain, again, changed = run(make_agent), run(make_agent), run(make_agent, name)
    assert th.equal(plain, again)
    assert not th.equal(plain, changed)


@pytest.mark.parametrize("name", FIXED)
def test_what_is_built_stays(make_agent, name):
    agent = make_agent()
    before = agent.__dict__.get(name)
    with pytest.raises(FixedSettingError, match=f"^{name} cannot become 'other' any more: .*\\.$"):
        setattr(agent, name, "other")
    assert agent.__dict__.get(name) is before
    if before is not None:
        setattr(agent, name, before)  # what it is already


def test_other_live_settings(make_agent, point_env, tmp_path, capsys):
    agent = make_agent()
    agent.learn(25)
    agent.compile = "auto"
    assert agent.policy.ways._compile == "auto"
    agent.tensorboard_log = str(tmp_path / "log")
    agent.learn(2)
    assert list((tmp_path / "log").rglob("events*"))
    agent.verbose = 1
    agent.learn(2)
    assert "open episode" in capsys.readouterr().out
    agent.learning_starts = 10_000
    with pytest.warns(UserWarning, match="no gradient step"):
        agent.learn(2)


def test_losses_and_plans_read_the_present_values(make_agent):
    agent = make_agent()
    agent.learn(25)
    agent.gamma = np.float64(0.5)
    agent.entropy_coef = 0.25
    agent.num_samples = np.int64(48)
    agent.tau = 0.3
    agent.train(1, 8)
    config = agent._update_step.config
    assert (config.gamma, config.entropy_coef, agent._update_step.tau) == (0.5, 0.25, 0.3)
    assert agent.policy.planner.gamma == 0.5
    assert agent.policy.planner.num_samples == 48
    before = agent._update_step
    agent.train(1, 8)
    assert agent._update_step is before  # nothing changed


def test_tau_is_the_rate_of_the_target(make_agent):
    agent = make_agent()
    agent.learn(25)
    agent.tau = 1.0
    agent.train(1, 8)
    model = agent.policy.world_model
    for target, online in zip(
        model.target_q_ensemble.parameters(), model.q_ensemble.parameters(), strict=True
    ):
        th.testing.assert_close(target, online, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("horizon", [1, 2, 5])
def test_another_horizon_amid_an_episode(make_agent, horizon):
    agent = make_agent(max_std=0.5)
    agent.learn(27)
    mean = agent._plan_mean.clone()
    agent.horizon = horizon
    fitted = agent._previous_plan(1)
    assert fitted.shape == (1, horizon, 2)
    shared = min(horizon, 3)
    assert th.equal(fitted[:, :shared], mean[:, :shared])
    assert not fitted[:, shared:].any()
    agent.learn(15, reset_num_timesteps=False)
    assert agent._plan_mean.shape == (1, horizon, 2)
    assert agent.replay_buffer.horizon == horizon
    assert agent._update_step.model_weights.shape == (horizon,)


def test_sub_sequences_of_another_length_are_all_there_are(make_agent):
    """Ten steps an episode hold 11 - T sub-sequences."""
    agent = make_agent()
    agent.learn(40)
    for steps in (1, 4, 10):
        agent.train_horizon = steps
        agent.train(1, 8)
        assert agent.replay_buffer.rings.num_starts == 4 * (11 - steps)


def test_wrong_values_change_nothing(make_agent):
    agent = make_agent()
    for name, value, message in [
        ("gamma", 1.5, r"gamma is 1.5: it must lie in \[0, 1\]"),
        ("num_elites", 33, "only 32 samples"),
        ("batch_size", 8.5, "batch_size is 8.5: it must be a whole number"),
        ("train_freq", (0, "step"), "train_freq is 0"),
        ("entropy", "none", "use one of gaussian, squashed"),
        ("policy", "MlpPolicy", "assign a TDMPC2Policy"),
        ("learning_rate", lambda progress: 1.0 / progress, "fails at a remaining progress of 0"),
    ]:
        before = dict(agent.__dict__)
        with pytest.raises(ValueError, match=message):
            setattr(agent, name, value)
        assert agent.__dict__ == before
    assert agent.policy.planner.gamma == agent.gamma


def test_another_policy_learns_in_the_place_of_the_first(make_agent, tmp_path):
    other = make_agent(seed=5, latent_dim=24, horizon=2).policy
    other.save(tmp_path / "policy.zip")
    loaded = MlpPolicy.load(tmp_path / "policy.zip", "cpu")
    agent = make_agent(policy_kwargs={"latent_dim": 32})
    agent.learn(25)
    first = agent.policy
    first_weights = {k: v.clone() for k, v in first.state_dict().items()}
    agent.policy = loaded
    assert (agent.latent_dim, agent.horizon, agent.policy_kwargs) == (24, 2, {})
    agent.learn(12, reset_num_timesteps=False)
    for name, value in first.state_dict().items():
        assert th.equal(value, first_weights[name]), name
    for name, value in loaded.named_parameters():
        assert not th.equal(value, other.state_dict()[name]), name
    agent.save(tmp_path / "agent.zip")
    again = TDMPC2.load(tmp_path / "agent.zip", device="cpu")
    for name, value in again.policy.state_dict().items():
        assert th.equal(value, loaded.state_dict()[name]), name


def test_a_policy_for_something_else_is_refused(make_agent, point_env):
    agent = make_agent()
    other = make_agent(point_env(bounds=(-2.0, 2.0)))
    with pytest.raises(ValueError, match=r"action space is .* assign a policy made for it"):
        agent.policy = other.policy
    with pytest.raises(ValueError, match="episodic=True, but episodic is False"):
        agent.policy = make_agent(episodic=True).policy


def test_the_policys_own_planner_settings_are_kept(make_agent, tmp_path):
    agent = make_agent(policy_kwargs={"num_samples": 40})
    agent.policy.planner = agent.policy.planner._replace(num_samples=44, horizon=4, gamma=0.7)
    agent.learn(25)
    assert (agent.num_samples, agent.horizon, agent.gamma) == (44, 4, 0.7)
    assert agent._update_step.config.gamma == 0.7
    agent.policy.planner = agent.policy.planner._replace(temperature=0.9)
    agent.save(tmp_path / "agent.zip")
    assert TDMPC2.load(tmp_path / "agent.zip", device="cpu").policy.planner == agent.policy.planner
    with pytest.raises(ValueError, match="num_elites is 45"):
        agent.policy.planner = agent.policy.planner._replace(num_elites=45)


def test_changed_settings_are_saved(make_agent, tmp_path):
    agent = make_agent()
    agent.gamma, agent.entropy_coef, agent.enc_lr_scale, agent.train_freq = 0.5, 0.3, 0.7, 2
    agent.save(tmp_path / "agent.zip")
    loaded = TDMPC2.load(tmp_path / "agent.zip", device="cpu")
    assert (loaded.gamma, loaded.entropy_coef, loaded.train_freq.frequency) == (0.5, 0.3, 2)
    assert loaded.policy.model_optimizer.param_groups[0]["lr_scale"] == 0.7
    other = TDMPC2.load(tmp_path / "agent.zip", device="cpu", enc_lr_scale=0.2)
    assert other.policy.model_optimizer.param_groups[0]["lr_scale"] == 0.2
    with pytest.raises(ValueError, match="horizn: the model has no such attribute"):
        TDMPC2.load(tmp_path / "agent.zip", device="cpu", horizn=3)


class Annealed(BaseCallback):
    def _on_step(self):
        self.model.entropy_coef = 1e-3 * (40 - self.num_timesteps)
        return True


def test_a_callback_changes_a_coefficient_with_every_step(make_agent):
    agent = make_agent()
    agent.learn(38, callback=Annealed())
    assert agent._update_step.config.entropy_coef == pytest.approx(2e-3)


WHOLE = [
    name
    for name in sorted(SETTINGS)
    if name not in ("policy", "env", "tensorboard_log", "action_noise", "device", "seed")
    and isinstance(
        {"latent_dim": 16, "enc_dim": 32, "mlp_dim": 32, "num_enc_layers": 2, "num_q": 2,
         "simnorm_dim": 8, "num_bins": 11, "learning_starts": 20, "num_iterations": 2,
         "initial_gradient_steps": 3, "train_horizon": 2}.get(
            name, inspect.signature(TDMPC2.__init__).parameters[name].default), int)
    and not isinstance(inspect.signature(TDMPC2.__init__).parameters[name].default, bool)
]  # fmt: skip


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, float, np.float32])
def test_whole_numbers_of_any_kind(make_agent, tiny, kind):
    extra = {"train_freq": 2, "gradient_steps": 1, "initial_gradient_steps": 3, "horizon": 2,
             "train_horizon": 3, "model_size": 1, "simnorm_dim": 8, "num_bins": 11,
             "policy_delay": 2, "stats_window_size": 7, "verbose": 0}  # fmt: skip
    values = {name: tiny.get(name, extra.get(name)) for name in WHOLE}
    assert None not in values.values()
    values["buffer_size"] = 200  # as an 8-bit number
    agent = make_agent(**{name: kind(value) for name, value in values.items()})
    for name in WHOLE:
        found = agent._stats_window_size if name == "stats_window_size" else getattr(agent, name)
        found = found.frequency if name == "train_freq" else found
        assert type(found) is int, name
        assert found == values[name], name
    agent.learn(24)
    assert agent._n_updates == 3 + 2  # after 20, 22 and 24 steps


def test_numbers():
    assert whole_number("n", np.float64(3.0)) == 3
    for wrong in (True, 3.5, "3", None, float("nan"), float("inf"), np.array([1, 2])):
        with pytest.raises(ValueError, match=r"^n is .*: it must be a whole number\.$"):
            whole_number("n", wrong)
    assert type(real_number("x", np.float32(0.5))) is float
    for wrong in (True, "3", None, float("nan"), float("inf"), th.ones(2)):
        with pytest.raises(ValueError, match=r"^x is .*: it must be a finite number"):
            real_number("x", wrong)


class Options(NamedTuple):
    """A configuration: two fields are arguments already, one follows from others."""

    gamma: float = 0.99
    derived: bool = False
    share: float = 0.25
    count: int = 3
    either: bool = False
    kind: str = "one"


def test_fields_of_a_configuration_are_arguments(monkeypatch):
    monkeypatch.setattr(settings, "SETTINGS", dict(SETTINGS))

    class Agent(settings.LiveSettings):
        @settings.takes_fields_of(Options, derived=("derived",))
        def __init__(self, policy, gamma=0.9):
            assert self.count == 3 or policy == "counted"  # before the constructor runs
            self.gamma = gamma
            self._is_set_up = True

        def _on_change(self, name, previous):
            pass

    agent = Agent("p", share=0.5)
    found = {name: getattr(agent, name) for name in ("gamma", "share", "count", "either", "kind")}
    assert found == {"gamma": 0.9, "share": 0.5, "count": 3, "either": False, "kind": "one"}
    assert not hasattr(agent, "derived")
    assert Agent("counted", count=4).count == 4
    names = ["self", "policy", "gamma", "share", "count", "either", "kind"]
    assert list(inspect.signature(Agent.__init__).parameters) == names
    with pytest.raises(TypeError, match="shade"):
        Agent("p", shade=0.5)
    for name, value, message in [
        ("share", "much", "share is 'much': it must be a finite number"),
        ("share", math.nan, "share is nan: it must be a finite number"),
        ("count", 1.5, "count is 1.5: it must be a whole number"),
        ("either", 1, "either is 1: use True or False"),
    ]:
        with pytest.raises(ValueError, match=message):
            setattr(agent, name, value)
    agent.count = np.int64(7)
    assert type(agent.count) is int


def test_configurations_whose_fields_are_all_named_leave_a_constructor_as_it_is():
    assert not hasattr(TDMPC2.__init__, "__wrapped__")

    def construct(self, gamma=0.9, share=0.1, count=1, either=False, kind="one"):
        pass

    assert settings.takes_fields_of(Options, derived=("derived",))(construct) is construct


def test_a_field_is_in_use_where_it_has_an_effect():
    in_use = {name: settings.is_in_use(Options(), name) for name in Options._fields}
    assert in_use == {
        "gamma": True,  # a number that is not 0
        "derived": False,
        "share": True,
        "count": True,
        "either": False,
        "kind": False,  # a word at its default
    }
    assert settings.is_in_use(Options(share=0.0), "share")  # 0 in the place of a default
    assert settings.is_in_use(Options(kind="other"), "kind")


PARTS = ("encoder", "dynamics", "reward_net", "q_ensemble", "policy_net")


@pytest.mark.parametrize("learnt", [0, 26])
@pytest.mark.parametrize("part", [*PARTS, "world_model"])
def test_a_part_put_in_place_of_another_learns(make_agent, tmp_path, part, learnt):
    agent, other = make_agent(), make_agent(seed=5)
    if learnt:
        agent.learn(learnt)
    kept = agent.policy.world_model.reward_net if part != "reward_net" else None
    if part == "world_model":
        agent.policy.world_model = other.policy.world_model
    else:
        setattr(agent.policy.world_model, part, getattr(other.policy.world_model, part))
    before = {k: v.clone() for k, v in agent.policy.state_dict().items()}
    moments = len(agent.policy.model_optimizer.state)
    agent.learn(26, reset_num_timesteps=False)
    for name, parameter in agent.policy.named_parameters():
        assert not th.equal(parameter, before[name]), name
    if learnt and part != "world_model" and kept is not None:
        # What stayed goes on with its moments: 6 + 26 gradient steps and more.
        weight = next(kept.parameters())
        steps = agent.policy.model_optimizer.state[weight]["step"]
        assert steps == agent._n_updates
    assert not moments or len(agent.policy.model_optimizer.state) == moments
    agent.save(tmp_path / "agent.zip")
    loaded = TDMPC2.load(tmp_path / "agent.zip", device="cpu")
    for name, value in loaded.policy.state_dict().items():
        assert th.equal(value, agent.policy.state_dict()[name]), name


def test_a_weight_put_in_place_of_another_learns_as_the_same_numbers_would(make_agent):
    agent, other = make_agent(), make_agent()
    for each in (agent, other):
        each.learn(26)
    head = agent.policy.world_model.reward_net[0]
    bias = head.bias
    head.bias = th.nn.Parameter(bias.detach().clone())
    other_bias = other.policy.world_model.reward_net[0].bias
    del other.policy.model_optimizer.state[other_bias]  # a new parameter has no moments
    for each in (agent, other):
        each.train(2, 8)
    for (name, one), two in zip(
        agent.policy.named_parameters(), other.policy.parameters(), strict=True
    ):
        assert th.equal(one, two), name
    assert bias not in agent.policy.model_optimizer.state


def test_an_environment_is_set_by_set_env(make_agent, point_env):
    agent = make_agent()
    with pytest.raises(FixedSettingError, match=r"call set_env\(env\) instead"):
        agent.env = make_agent(point_env()).env
    other = make_agent(point_env()).env
    agent.set_env(other)
    agent.learn(8)
    assert agent.env is other
    with pytest.raises(FixedSettingError):
        agent.env = None


def test_a_buffer_that_knows_no_sub_sequences_is_refused(make_agent):
    agent = make_agent()
    agent.replay_buffer = ReplayBuffer(100, agent.observation_space, agent.action_space)
    with pytest.raises(RuntimeError, match=r"is a ReplayBuffer: .* assign a SequenceReplayBuffer"):
        agent.learn(8)


@pytest.mark.parametrize("steps", ["30", None, math.inf, math.nan, True, [30]])
def test_steps_to_learn_that_are_no_number(make_agent, steps):
    with pytest.raises(RuntimeError, match=r"total_timesteps is .*: it must be a finite number"):
        make_agent().learn(steps)


@pytest.mark.parametrize(("steps", "made"), [(np.int64(21), 21), (2.1e1, 21), (20.5, 21)])
def test_steps_to_learn_of_any_kind_of_number(make_agent, steps, made):
    """As in SB3, a part of a step is one more."""
    assert make_agent().learn(steps).num_timesteps == made


@pytest.mark.parametrize("interval", ["4", 0, 1.5])
def test_log_intervals_that_are_none(make_agent, interval):
    with pytest.raises(RuntimeError, match=r"log_interval is .*: it must be"):
        make_agent().learn(20, log_interval=interval)


@pytest.mark.parametrize("seed", [2**32, 2**40, 10**30])
def test_seeds_that_numpy_does_not_take(make_agent, seed):
    agent = make_agent(seed=2**32 - 1)
    said = f"seed is {seed}: NumPy takes no seed above 4294967295"
    with pytest.raises(ValueError, match=said):
        make_agent(seed=seed)
    with pytest.raises(ValueError, match=said):
        agent.set_random_seed(seed)
