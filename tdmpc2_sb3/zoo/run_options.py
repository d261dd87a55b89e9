"""What a run's `args.yml` and `config.yml` may hold where they are rebuilt from.

All of it is checked here before the zoo sees it; the rest of both files is not used: it is in the
checkpoint already.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tdmpc2_sb3.saving.attribute_checks import is_real, is_whole, short
from tdmpc2_sb3.zoo import checkpoints


class Kind(NamedTuple):
    """What a value has to be.

    :ivar fits: whether a value is
    :ivar words: the same for people
    """

    fits: Callable[[Any], bool]
    words: str


def _whole(low: int, high: int = 2**53) -> Kind:
    return Kind(lambda value: is_whole(value, low, high), f"a whole number from {low} to {high}")


def _is_class(value: Any) -> bool:
    """Whether the zoo can import it: a name, or a name with arguments."""
    if isinstance(value, dict):
        return len(value) == 1 and all(map(_is_class, value)) and all(map(_named, value.values()))
    return isinstance(value, str) and "." in value.strip(".")


def _named(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _names(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)


def _or_none(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.fits(value), f"{kind.words} or nothing")


FLAG = Kind(lambda value: isinstance(value, bool), "true or false")
WORD = Kind(lambda value: isinstance(value, str) and "\0" not in value, "a word")
NUMBER = Kind(is_real, "a number")
WORDS = Kind(_names, "a list of words")
ARGUMENTS = Kind(_named, "a dictionary of keyword arguments")
CLASSES = Kind(
    lambda value: value is None or all(map(_is_class, checkpoints.specified(value))),
    "a name, or a list of names and their arguments",
)

#: The zoo's options from which a run is made again; a run of ours has them all.
OPTIONS = {
    "eval_freq": _whole(-1),
    "eval_episodes": _whole(1),
    "save_freq": _whole(-1),
    "env_kwargs": _or_none(ARGUMENTS),
    "eval_env_kwargs": _or_none(ARGUMENTS),
    "log_interval": _whole(-(2**31)),
    "save_replay_buffer": FLAG,
    "verbose": _whole(-10, 10),
    "vec_env": Kind(lambda value: value in ("dummy", "subproc"), "dummy or subproc"),
    "n_eval_envs": _whole(1, 2**16),
    "num_threads": _whole(-1, 2**12),
    "device": WORD,
    "progress": FLAG,
}
#: Those that name the run; all files have them.
NAMING_OPTIONS = {
    "algo": WORD,
    "env": WORD,
    "n_timesteps": _whole(-1),
    "seed": _whole(0, 2**32 - 1),
}
#: Those that may be absent.
OTHER_OPTIONS = {"gym_packages": WORDS, "tensorboard_log": _or_none(WORD), "track": FLAG}

#: The hyperparameters that a checkpoint does not hold; the zoo also knows strings of some.
HYPERPARAMETERS = {
    "n_timesteps": _whole(1),
    "n_envs": _whole(1, 2**16),
    "eval_freq": _whole(-1),
    "env_kwargs": ARGUMENTS,
    "train_env_kwargs": ARGUMENTS,
    "frame_stack": _whole(1, 2**10),
    "gamma": NUMBER,
    "policy": WORD,
    "normalize": Kind(
        lambda value: isinstance(value, bool | str) or _named(value), "true or false"
    ),
    "monitor_kwargs": Kind(lambda value: isinstance(value, str) or _named(value), ARGUMENTS.words),
    "env_wrapper": CLASSES,
    "vec_env_wrapper": CLASSES,
    "callback": CLASSES,
}
#: Arguments of our checkpoint callback that lead to no other folder.
CALLBACK = {"save_freq": _whole(1), "verbose": _whole(0, 10)}
#: Arguments of VecNormalize and of Monitor.
KEYWORDS = {
    "normalize": {
        **dict.fromkeys(("training", "norm_obs", "norm_reward"), FLAG),
        **dict.fromkeys(("clip_obs", "clip_reward", "gamma", "epsilon"), NUMBER),
        "norm_obs_keys": _or_none(WORDS),
    },
    "monitor_kwargs": {
        **dict.fromkeys(("allow_early_resets", "override_existing"), FLAG),
        **dict.fromkeys(("reset_keywords", "info_keywords"), WORDS),
    },
}


def check(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Compare values with their kinds; names that are not among these are passed over.

    :param where: what holds them, for the sentence
    :raises ValueError: naming the first that does not fit
    """
    for name, kind in kinds.items():
        if name in values and not kind.fits(values[name]):
            shown = short(values[name])
            raise ValueError(
                f"'{name}' of {where} is {shown} and should be {kind.words}: use another copy."
            )


def hyperparameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The checked hyperparameters from which a run is made again.

    :param config: all of them
    :param where: what holds them, for the sentence
    :raises ValueError: if one cannot be meant
    """
    check(config, HYPERPARAMETERS, where)
    used = {name: value for name, value in config.items() if name in HYPERPARAMETERS}
    for name, kinds in KEYWORDS.items():
        found = used.get(name)
        if isinstance(found, str):
            found = plain_keywords(found)
        if not isinstance(found, Mapping):
            continue
        unknown = next((key for key in found if key not in kinds), None)
        if unknown is not None:
            raise ValueError(
                f"'{name}' of {where} has an argument {short(unknown)}, which is none of "
                f"{', '.join(kinds)}: use another copy."
            )
        check(found, kinds, f"'{name}' in {where}")
    for entry in checkpoints.specified(used.get("callback")):
        if isinstance(entry, dict) and checkpoints.is_checkpoint_entry(entry):
            check(entry[checkpoints.CALLBACK_NAME], CALLBACK, f"'callback' in {where}")
    return used


def plain_keywords(expression: str) -> dict[str, Any] | None:
    """What a string that the zoo evaluates gives; None unless that is a dictionary of constants.

    :param expression: such as `dict(norm_obs=True)` or `{'norm_obs': True}`
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            if tree.func.id != "dict" or tree.args:
                return None
            found: Any = {each.arg: ast.literal_eval(each.value) for each in tree.keywords}
        else:
            found = ast.literal_eval(tree)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return None
    return found if _named(found) else None
