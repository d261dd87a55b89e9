"""What is ours in the zoo: algorithms, environment ids and the YAML files that serve them.

Facts alone, which every other module here may ask for: this one imports none of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

#: Environment ids that are ours, whatever the algorithm.
ENV_PREFIX = "DMC/"

#: Algorithms of others for which we bring YAML entries, on `DMC/` ids only.
BASELINES = ("sac", "ppo")


class ZooAlgorithm(NamedTuple):
    """An algorithm that the zoo learns to know.

    :param policy: policy set on the command line's behalf, None to take the YAML's
    :param config: name of the YAML file that serves it
    """

    policy: str | None
    config: str


#: Name on the zoo's command line and in its log folders -> what it stands for.
ALGORITHMS = {
    "tdmpc2": ZooAlgorithm(policy=None, config="tdmpc2.yml"),
    # The same class and the same YAML, so that the two dynamics are compared like with like.
    "tdmpc2_ssm": ZooAlgorithm(policy="SSMPolicy", config="tdmpc2.yml"),
}


def concerns_us(algo: str, env_id: str) -> bool:
    """Return whether a run is ours: one of our algorithms on any id, any algorithm on `DMC/`."""
    return algo in ALGORITHMS or env_id.startswith(ENV_PREFIX)


def hyperparams_folder() -> Path:
    """Return the folder of our YAML files: in the package when installed, else the checkout's."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "hyperparams"
    return inside if inside.is_dir() else package.parent / "hyperparams"


def config_path(algo: str, env_id: str) -> Path | None:
    """Return the YAML file that serves `algo` on `env_id`, or None to leave the zoo its own."""
    if algo in ALGORITHMS:
        return hyperparams_folder() / ALGORITHMS[algo].config
    if algo in BASELINES and env_id.startswith(ENV_PREFIX):
        return hyperparams_folder() / f"{algo}.yml"
    return None


def zoo_env_kwargs(env_id: str) -> dict[str, Any]:
    """The environment's settings in our YAML, such as the action repeat; {} without an entry."""
    import yaml  # not at every start of Python, where this module is looked at

    path = config_path("tdmpc2", env_id)
    if path is None or not path.is_file():
        return {}
    entry = yaml.safe_load(path.read_text()).get(env_id) or {}
    return dict(entry.get("env_kwargs") or {})
