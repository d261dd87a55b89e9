"""What each argument of :class:`tdmpc2_sb3.TDMPC2` may be, and which may change later.

One row an argument, in :data:`SETTINGS`; a field of the losses' or the planner's configuration that
has none there gets one by its default, see :func:`takes_fields_of`. The algorithm reads whatever
may change anew with every action or gradient step, and refuses to have the others assigned, with
the reason and a remedy.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import get_device

AUTOMATIC = "auto"
MOST_SEED = 2**32 - 1
MOST_STEPS = 2**53  # of whatever is counted
ENTROPIES = ("gaussian", "squashed")  # see tdmpc2_sb3.losses.scaled_entropy
EXPLORATION_NOISES = ("white", "pink")
_NETWORKS_ARE_BUILT = "the networks have been built with it: build a new model"
_BUFFER_IS_BUILT = "the replay buffer has been built with it: build a new model"


class FixedSettingError(AttributeError):
    """A setting that stays as it was at construction was assigned."""


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """The value as an ``int``: NumPy's integers and floats without a fraction are whole numbers.

    :param name: how to call it in an error
    :param value: to be checked
    :param least: the smallest that is allowed; None if every one is
    :raises ValueError: if it is something else, or too small
    """
    number: int | None = None
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        number = int(value)
    elif isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = int(float(value)) if float(value).is_integer() else None
    if number is None:
        raise ValueError(f"{name} is {value!r}: it must be a whole number.")
    if least is not None and number < least:
        raise ValueError(f"{name} is {number}: it must be at least {least}.")
    return number


def real_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> float:
    """The value as a ``float``.

    :param name: how to call it in an error
    :param value: to be checked
    :param low: the smallest that is allowed
    :param high: the largest that is allowed
    :param above: whether ``low`` itself is too small
    :raises ValueError: if it is no number, not finite, or out of range
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: it must be a finite number.")
    number = float(value)
    if not low <= number <= high or (above and number == low):
        if math.isinf(low):
            allowed = f"be at most {high:g}"
        elif math.isinf(high):
            allowed = "be positive" if above else f"be at least {low:g}"
        else:
            allowed = f"lie in [{low:g}, {high:g}]"
        raise ValueError(f"{name} is {value!r}: it must {allowed}.")
    return number


def usable_device(device: th.device | str) -> th.device:
    """The device, as SB3 names it; numbers can be put there. Where CUDA is asked for and absent it
    is the CPU, as in all of SB3, with a warning.

    :param device: "auto", "cpu", "cuda", "mps", ...
    :raises ValueError: if this machine has no such device
    """
    try:
        found = get_device(device)
        th.empty(1, device=found)
        if device != "auto" and th.device(device).type != found.type:
            warnings.warn(
                f"device is {str(device)!r}, but torch finds no such device here: the CPU is used. "
                "Say device='cpu' or 'auto' if that is meant.",
                stacklevel=3,
            )
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(
            f"device is {str(device)!r}, which cannot be used here ({reason}): pass device='cpu' "
            "or 'auto'."
        ) from error
    return found


class Check(NamedTuple):
    """Which values an argument may have."""

    convert: Callable[[str, Any], Any]  # what is kept of a value; raises ValueError
    needed: str  # the same in words
    #: The largest number, by amount, that a file may give: more takes memory or time without end.
    most: float = math.inf


def _whole(
    least: int | None, *others: Any, most: int = MOST_STEPS, remedy: str | None = None
) -> Check:
    """
    :param others: values that are allowed too
    :param most: see :class:`Check`
    :param remedy: what every error says
    """

    def convert(name: str, value: Any) -> Any:
        if any(value is each or (isinstance(each, str) and value == each) for each in others):
            return value
        try:
            return whole_number(name, value, least)
        except ValueError as error:
            if remedy is None:
                raise
            raise ValueError(f"{name} is {value!r}: {remedy}.") from error

    least_said = -most if least is None else least
    return Check(convert, f"a whole number from {least_said} to {most}", most)


def _real(
    low: float,
    high: float = math.inf,
    above: bool = False,
    automatic: bool = False,
    optional: bool = False,
) -> Check:
    """
    :param automatic: whether "auto" is allowed too
    :param optional: whether None is
    """

    def convert(name: str, value: Any) -> Any:
        if automatic and isinstance(value, str) and value == AUTOMATIC:
            return value
        if optional and value is None:
            return value
        return real_number(name, value, low, high, above)

    needed = "a finite number"
    if not math.isinf(high):
        needed = f"a number in [{low:g}, {high:g}]"
    elif not math.isinf(low):
        needed += f" above {low:g}" if above else f" from {low:g} on"
    return Check(convert, needed, most=1e300)


def _norm(name: str, value: Any) -> Any:
    """A bound that may be infinite: there is none then."""
    known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not known or not value > 0:
        raise ValueError(f"{name} is {value!r}: it must lie in (0, inf].")
    return float(value)


def _one_of(*choices: Any) -> Check:
    names = all(isinstance(each, str) for each in choices)
    listed = [each if names else repr(each) for each in choices]
    allowed = f"one of {', '.join(listed)}"
    if not names:
        allowed = f"{', '.join(listed[:-1])} or {listed[-1]}"

    def convert(name: str, value: Any) -> Any:
        value = bool(value) if isinstance(value, np.bool_) else value
        if not any(type(value) is type(each) and value == each for each in choices):
            raise ValueError(f"{name} is {value!r}: use {allowed}.")
        return value

    return Check(convert, allowed)


def _seed(name: str, value: Any) -> int | None:
    if value is None:
        return None
    seed = whole_number(name, value, 0)
    if seed > MOST_SEED:
        raise ValueError(f"{name} is {seed}: NumPy takes no seed above {MOST_SEED}, pass another.")
    return seed


def _train_freq(name: str, value: Any) -> Any:
    if not isinstance(value, (tuple, list)):
        return whole_number(name, value, 1)
    if len(value) != 2:
        raise ValueError(f"{name} is {value!r}: give a number of steps, or (number, 'episode').")
    frequency = whole_number(name, value[0], 1)
    if isinstance(value, TrainFreq):
        return value._replace(frequency=frequency)
    return frequency, value[1]


def _learning_rate(name: str, value: Any) -> Any:
    return value if callable(value) else real_number(name, value, 0.0)


class Setting(NamedTuple):
    """One argument."""

    check: Check | None = None  # None: whatever uses the value checks it
    fixed: str | None = None  # why it cannot change any more, with a remedy; None if it can


def _built(check: Check | None = None, reason: str = _NETWORKS_ARE_BUILT) -> Setting:
    return Setting(check, reason)


_COEFFICIENT = Setting(_real(-math.inf))
_SIZE = _built(_whole(1, None, most=10**5))
_SAMPLES = 2**20

SETTINGS: dict[str, Setting] = {
    "policy": Setting(),
    "env": _built(None, "call set_env(env) instead"),
    "learning_rate": Setting(
        Check(_learning_rate, "a number or a schedule of numbers, not negative")
    ),
    "buffer_size": _built(_whole(1, most=2**31), _BUFFER_IS_BUILT),
    "learning_starts": Setting(_whole(0, AUTOMATIC, remedy="give a number of steps or 'auto'")),
    "batch_size": Setting(_whole(1, most=2**20)),
    "tau": Setting(_real(0.0, 1.0)),
    "gamma": Setting(_real(0.0, 1.0, automatic=True)),
    "train_freq": Setting(Check(_train_freq, "up to 1,000,000 steps or episodes")),
    "gradient_steps": Setting(
        _whole(
            -1,
            most=10**6,
            remedy="give a number of gradient steps, or -1 for as many as steps were collected",
        )
    ),
    "action_noise": Setting(),
    "exploration_noise": Setting(_one_of(*EXPLORATION_NOISES)),
    "replay_buffer_class": _built(None, _BUFFER_IS_BUILT),
    "replay_buffer_kwargs": _built(None, _BUFFER_IS_BUILT),
    "initial_gradient_steps": Setting(
        _whole(0, AUTOMATIC, most=10**9, remedy="give a number of gradient steps or 'auto'")
    ),
    "horizon": Setting(_whole(1, most=1000)),
    "train_horizon": Setting(_whole(1, None, most=1000)),
    "model_size": _built(_whole(1, most=10**9)),
    "latent_dim": _SIZE,
    "enc_dim": _SIZE,
    "mlp_dim": _SIZE,
    "num_enc_layers": _built(_whole(1, None, most=100)),
    "num_q": _built(_whole(1, None, most=1000)),
    "simnorm_dim": _SIZE,
    "num_bins": _SIZE,
    "dropout": _built(_real(-math.inf, optional=True)),
    "dynamics": _built(),
    "dynamics_kwargs": _built(),
    "num_samples": Setting(_whole(1, most=_SAMPLES)),
    "num_elites": Setting(_whole(1, most=_SAMPLES)),
    "num_pi_trajs": Setting(_whole(0, most=_SAMPLES)),
    "num_iterations": Setting(
        _whole(1, AUTOMATIC, most=10**4, remedy="give a whole number or 'auto'")
    ),
    "temperature": Setting(_real(0.0, above=True)),
    "min_std": Setting(_real(0.0, above=True)),
    "max_std": Setting(_real(0.0, above=True)),
    "consistency_coef": _COEFFICIENT,
    "reward_coef": _COEFFICIENT,
    "value_coef": _COEFFICIENT,
    "termination_coef": _COEFFICIENT,
    "entropy_coef": _COEFFICIENT,
    "entropy": Setting(_one_of(*ENTROPIES)),
    "rho": Setting(_real(0.0, 1.0, automatic=True)),
    "td_lambda": Setting(_real(0.0, 1.0)),
    "policy_delay": Setting(_whole(1, most=10**9)),
    "enc_lr_scale": Setting(_real(0.0)),
    "max_grad_norm": Setting(Check(_norm, "a number in (0, inf]")),
    "episodic": _built(_one_of(True, False, AUTOMATIC)),
    "reference_terminations": _built(_one_of(True, False), _BUFFER_IS_BUILT),
    "use_planner": Setting(_one_of(True, False)),
    "compile": Setting(_one_of(True, False, AUTOMATIC)),
    "stats_window_size": _built(
        _whole(1, most=10**9), "the statistics have begun: build a new model"
    ),
    "tensorboard_log": Setting(),
    "policy_kwargs": _built(None, "the policy has been built with them: build a new model"),
    "verbose": Setting(_whole(0, False, True, most=10**6)),
    "seed": _built(
        Check(_seed, f"None or a whole number from 0 to {MOST_SEED}", MOST_SEED),
        "the random streams have begun: call set_random_seed(seed) instead",
    ),
    "device": _built(
        None, "the networks are there: save the model and load it on the other device"
    ),
}


Constructor = TypeVar("Constructor", bound=Callable[..., None])


def takes_fields_of(
    *configs: Any, derived: tuple[str, ...] = ()
) -> Callable[[Constructor], Constructor]:
    """Decorates a constructor: fields of configurations that it does not name are arguments, too.

    By keyword, with the field's default. They become attributes of the same names before the
    constructor runs, and get a row in :data:`SETTINGS` unless they have one.

    :param configs: NamedTuples whose fields have defaults
    :param derived: fields that follow from other arguments
    """

    def extended(constructor: Constructor) -> Constructor:
        signature = inspect.signature(constructor)
        fields = {
            name: default
            for config in configs
            for name, default in config._field_defaults.items()
            if name not in signature.parameters and name not in derived
        }
        for name, default in fields.items():
            SETTINGS.setdefault(name, _setting_like(default))
        if not fields:
            return constructor

        @functools.wraps(constructor)
        def construct(self: Any, *args: Any, **kwargs: Any) -> None:
            vars(self).update({name: kwargs.pop(name, value) for name, value in fields.items()})
            constructor(self, *args, **kwargs)

        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value)
            for name, value in fields.items()
        ]
        construct.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), *added]
        )
        return construct  # type: ignore[return-value]

    return extended


def _setting_like(default: Any) -> Setting:
    """A row for values of a default's kind."""
    if isinstance(default, bool):
        return Setting(_one_of(True, False))
    if isinstance(default, int):
        return Setting(_whole(None))
    return Setting(_real(-math.inf)) if isinstance(default, float) else Setting()


def is_in_use(config: Any, name: str) -> bool:
    """Whether a field of a configuration has an effect: at its default it has none, but a number
    does unless it is 0.

    :param config: a NamedTuple whose fields have defaults
    :param name: of the field
    """
    value = getattr(config, name)
    if name not in config._field_defaults or value != config._field_defaults[name]:
        return True
    return isinstance(value, (bool, int, float)) and value != 0


class LiveSettings:
    """An object whose settings are checked when they are assigned, once it is set up.

    Before (at construction and loading) they are checked all at once.
    """

    _is_set_up = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_set_up and name in SETTINGS:
            self._change(name, value)
        else:
            super().__setattr__(name, value)

    def _change(self, name: str, value: Any) -> None:
        fixed, present = SETTINGS[name].fixed, self.__dict__.get(name)
        if fixed is not None:
            if value is present or (type(value) is type(present) and value == present):
                return
            raise FixedSettingError(f"{name} cannot become {value!r} any more: {fixed}.")
        value, before = check_setting(name, value), dict(self.__dict__)
        self.__dict__[name] = value
        try:
            self._on_change(name, present)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    def _on_change(self, name: str, previous: Any) -> None:
        """A setting has its new value: whatever depends on it follows, unless it is read anew.

        :param name: of the setting
        :param previous: its value before
        :raises ValueError: if it does not go with the others; nothing has changed then
        """
        raise NotImplementedError

    def _check_all(self) -> None:
        """
        :raises ValueError: naming the first setting that is out of range
        """
        for name in SETTINGS:
            if name in self.__dict__:
                self.__dict__[name] = check_setting(name, self.__dict__[name])


def check_setting(name: str, value: Any) -> Any:
    """What is kept of a value that an argument is given.

    :param name: of the argument
    :param value: given
    :raises ValueError: naming the argument, the value and the remedy
    """
    check = SETTINGS[name].check
    return value if check is None else check.convert(name, value)


#: What SB3's other policies take and this one does not, and what to use instead.
_POLICY_LACKS = {
    "optimizer_class": "its gradient steps are Adam's, which kernels and CUDA graphs know; set "
    "learning_rate and enc_lr_scale",
    "optimizer_kwargs": "its gradient steps are Adam's with the paper's settings; set "
    "learning_rate, enc_lr_scale and max_grad_norm",
    "net_arch": "set mlp_dim, enc_dim and num_enc_layers",
    "n_critics": "set num_q",
    "activation_fn": "its layers are the paper's, LayerNorm and Mish",
    "features_extractor_class": "its encoder is chosen by the observation space",
    "features_extractor_kwargs": "set latent_dim, enc_dim and num_enc_layers",
    "share_features_extractor": "all its networks share the encoder",
    "use_sde": "its plans explore by their own spread; set max_std or action_noise",
}


def refuse_policy_arguments(arguments: dict[str, Any]) -> None:
    """
    :raises ValueError: naming the first argument that the policy does not take
    """
    for name in arguments:
        instead = _POLICY_LACKS.get(name, "see the arguments of tdmpc2_sb3.policies.TDMPC2Policy")
        raise ValueError(f"policy_kwargs hold {name!r}, which TDMPC2's policy lacks: {instead}.")


def learn_arguments(total_timesteps: Any, log_interval: Any) -> tuple[int, Any]:
    """The arguments of ``learn`` that are numbers: a part of a step is one more.

    :raises RuntimeError: if they are none
    """
    try:
        steps = math.ceil(real_number("total_timesteps", total_timesteps))
        if log_interval is not None:
            log_interval = whole_number("log_interval", log_interval, 1)
    except ValueError as error:  # the zoo would take it for a trial to be pruned
        raise RuntimeError(str(error)) from error
    return steps, log_interval


def automatic_initial_updates(
    random_steps: int, gradient_steps: int, train_freq: TrainFreq, n_envs: int, episodes: int
) -> int:
    """Gradient steps that the random steps would have been due, had learning begun at once; no
    more than one a step, as the reference makes.

    :param random_steps: learning_starts
    :param gradient_steps: an update
    :param train_freq: how often there is one
    :param n_envs: that step together
    :param episodes: finished so far
    """
    if gradient_steps < 0:
        return random_steps
    if train_freq.unit == TrainFrequencyUnit.EPISODE:
        due = episodes * gradient_steps // train_freq.frequency
    else:
        due = round(random_steps * (gradient_steps / (train_freq.frequency * n_envs)))
    return min(due, random_steps)


def warn_if_nothing_is_learnt(
    steps: int,
    random_steps: int,
    made: int,
    needed: int,
    stored: int,
    train_freq: TrainFreq,
    n_envs: int,
) -> None:
    """Says so if a call of learn() ends before learning begins.

    :param steps: of the call
    :param random_steps: learning_starts
    :param made: how many of these there were before
    :param needed: steps in the replay buffer to learn from
    :param stored: how many there are
    :param train_freq: rollouts are finished
    :param n_envs: that step together
    """
    if train_freq.unit == TrainFrequencyUnit.STEP:
        rollout = train_freq.frequency * n_envs
        steps = math.ceil(steps / rollout) * rollout
    reason = None
    if random_steps > made + steps:
        reason = (
            f"{random_steps} random steps (learning_starts) come first, of which "
            f"{random_steps - made - steps} are missing at its end. Make total_timesteps larger"
        )
    elif needed > stored + steps:
        reason = (
            f"the replay buffer holds {stored} steps at its start and {stored + steps} at its end, "
            f"but {needed} are learnt from (learning_starts, or one sub-sequence). Make "
            "total_timesteps larger, call load_replay_buffer() where a run goes on"
        )
    if steps > 0 and reason is not None:
        warnings.warn(
            f"This call of learn() makes no gradient step: {reason}, or pass a smaller "
            "learning_starts.",
            stacklevel=3,
        )
