"""push_to_hub and load_from_hub: a model card that installs this package, and two repairs.

Both programs run as `__main__`, so what they import is wrapped, and only for our algorithms and
`DMC/` ids:

- the zoo's push_to_hub 2.9.2 imports a name that the installed Hub integration 3.2 no longer has;
- its load_from_hub takes `requests.HTTPError` for "no such file", which huggingface_hub 2 does not
  raise, so that a model without VecNormalize would not load.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from tdmpc2_sb3.zoo import playback, scrubbing
from tdmpc2_sb3.zoo.algorithms import ALGORITHMS, concerns_us
from tdmpc2_sb3.zoo.command_line import provide_tools, read_command

#: Repositories found to hold one of our models while this process downloads.
_our_repos: set[str] = set()


def extend() -> None:
    """Wrap what the zoo's Hub programs import. Call it before they do."""
    import huggingface_hub.repocard as repocard
    import huggingface_sb3

    repocard.metadata_save = _metadata_save(repocard.metadata_save)
    huggingface_sb3.load_from_hub = _load_from_hub(huggingface_sb3.load_from_hub)
    command = read_command()
    if command.is_ours and command.program in ("push_to_hub", "record_training"):
        provide_tools()
    if command.is_ours and command.program == "push_to_hub":
        # The package's attribute of this name is a function; the module is needed.
        _supply_generate_metadata(sys.modules["huggingface_sb3.push_to_hub"])


def _supply_generate_metadata(integration: ModuleType) -> None:
    if hasattr(integration, "generate_metadata"):
        return
    current = integration._generate_metadata  # type: ignore[attr-defined]

    def generate_metadata(*args: Any) -> dict[str, Any]:
        return current(*args).to_dict()

    integration.generate_metadata = generate_metadata  # type: ignore[attr-defined]


def _load_from_hub(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def load_from_hub(repo_id: str, filename: str) -> str:
        from huggingface_hub.errors import EntryNotFoundError
        from requests.exceptions import HTTPError

        if filename.endswith(".zip") and is_our_model_file(filename):
            _our_repos.add(str(repo_id))
        try:
            return original(repo_id, filename)
        except EntryNotFoundError as error:
            if filename == "vec_normalize.pkl" and str(repo_id) in _our_repos:
                # The exception that the zoo takes for "this model has none".
                raise HTTPError(str(error)) from error
            raise

    return load_from_hub


def is_our_model_file(filename: str) -> bool:
    """Return whether the Hub's name of a model, `<algo>-<env>.zip`, is that of one of ours."""
    algo, _, env_name = filename.partition("-")
    return algo in ALGORITHMS or env_name.startswith("DMC-")


def _metadata_save(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def metadata_save(local_path: Any, data: Any, *args: Any, **kwargs: Any) -> None:
        run = playback.run_in_hand()
        if run is not None and concerns_us(run.algo, run.env_id):
            card = Path(local_path)
            text = card.read_text(encoding="utf-8")
            # The zoo keeps its copy of a repository in a folder of the repository's name.
            text = complete_card(text, run.algo, run.env_id, card.resolve().parent.name)
            card.write_text(text, encoding="utf-8")
            if isinstance(data, dict) and isinstance(data.get("tags"), list):
                data["tags"] = [*data["tags"], "tdmpc2-sb3", "dm_control"]
            original(local_path, data, *args, **kwargs)
            # The zoo's last step before it uploads the folder.
            owner = re.search(r"-orga (\S+)", text)
            keep = [owner.group(1) if owner else "", card.resolve().parent.name]
            scrubbing.scrub_folder(card.resolve().parent, [*keep, run.algo, run.env_id])
            return
        original(local_path, data, *args, **kwargs)

    return metadata_save


_ZOO_INSTALL = re.compile(
    r"Install the RL Zoo \(with SB3 and SB3-Contrib\):\n```bash\n.*?```\n", re.S
)
_ZOO_REPEAT = re.compile(r"If you installed the RL Zoo3 via pip.*?```\n.*?```\n", re.S)


def complete_card(card: str, algo: str, env_id: str, repo_name: str) -> str:
    """Return the zoo's model card with this package's installation and loading in it.

    :param card: the text that the zoo wrote
    :param algo: name of the algorithm on the zoo's command line
    :param env_id: Gymnasium id of the environment
    :param repo_name: the repository's name without its owner
    """
    organization = re.search(r"-orga (\S+)", card)
    owner = organization.group(1) if organization else "<organization>"
    name = f"{algo}-{env_id.replace('/', '-')}"
    install = f"""
## Install

This agent needs the Python package `tdmpc2-sb3` (it was made with {version("tdmpc2-sb3")}), which
brings the `DMC/` environments, TD-MPC2 and the plug-in for the RL Zoo. In a clone of it:
```bash
pip install .
```

## Usage from Python
```python
import gymnasium
from huggingface_hub import hf_hub_download

{_import_line(algo)}

model = {_class(algo).__name__}.load(hf_hub_download("{owner}/{repo_name}", "{name}.zip"))
env = gymnasium.make("{env_id}"{_make_arguments(card)})
observation, _ = env.reset(seed=0)
state, episode_return, done = None, 0.0, False
while not done:
    action, state = model.predict(observation, state=state, deterministic=True)
    observation, reward, terminated, truncated, _ = env.step(action)
    episode_return += float(reward)
    done = terminated or truncated
print(episode_return)
```
"""
    card = _ZOO_REPEAT.sub("", _ZOO_INSTALL.sub("", card))
    chosen = "" if repo_name == name else f" -name {repo_name}"
    card = re.sub(
        r"python -m rl_zoo3\.load_from_hub(.*)", rf"TRUST_REMOTE_CODE=True \g<0>{chosen}", card
    )
    card = re.sub(r"python -m rl_zoo3\.push_to_hub(.*)", rf"\g<0>{chosen}", card)
    usage = card.find("\n## Usage (with SB3 RL Zoo)")
    return card + install if usage < 0 else card[:usage] + install + card[usage:]


def _class(algo: str) -> type:
    from rl_zoo3.utils import ALGOS

    return ALGOS[algo]


def _import_line(algo: str) -> str:
    cls = _class(algo)
    return f"from {cls.__module__.partition('.')[0]} import {cls.__name__}"


def _make_arguments(card: str) -> str:
    """Return the environment's arguments in the card, less the render mode, as Python source."""
    import ast

    found = re.search(r"# Environment Arguments\n```python\n(.*?)\n```", card, re.S)
    try:
        arguments = ast.literal_eval(found.group(1)) if found else {}
    except (ValueError, SyntaxError):  # an argument that is no literal: leave it to the reader
        return ", ...  # see Environment Arguments below"
    shown = {key: value for key, value in arguments.items() if key != "render_mode"}
    return "".join(f", {key}={value!r}" for key, value in shown.items())
