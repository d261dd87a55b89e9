"""Damaged folders of the zoo's runs, for `fuzzing.py`: what a stranger may have put into one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from fuzz_damage import Damage

from tdmpc2_sb3.saving.checkpoint_files import BUFFER_FILE, MODEL_FILE, RUN_FILE
from tdmpc2_sb3.zoo import checkpoints, resume
from tdmpc2_sb3.zoo.register import install
from tdmpc2_sb3.zoo.yaml_files import read_yaml

ENV = "DMC/point_mass-hard-v0"
NAME = ENV.replace("/", "-")
SETTINGS = [
    *("latent_dim:16", "enc_dim:16", "mlp_dim:16", "num_q:2", "simnorm_dim:4", "num_bins:11"),
    *("num_samples:16", "num_elites:4", "num_pi_trajs:2", "num_iterations:2", "batch_size:8"),
    *("learning_starts:12", "buffer_size:200", "gradient_steps:1", "normalize:True"),
    "env_kwargs:dict(action_repeat=100)",  # episodes of 10 steps
    f"callback:[{{'{checkpoints.CALLBACK_NAME}': dict(save_freq=5)}}]",
]
OLDER, NEWEST = "checkpoint_000000000010", "checkpoint_000000000020"
#: Of these a legal number may take any time, as a user's own would.
COUNTS = {
    *("n_timesteps", "eval_episodes", "n_envs", "n_eval_envs", "frame_stack", "max_episode_steps"),
    *("time_limit", "n_episodes"),
}
CODE = "__import__('os').mkdir('../outside')"


class _Evil:
    """Pickled, a command."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def make(path: pathlib.Path) -> None:
    """A run of 26 steps that was killed after 20, whose checkpoint of step 10 is there still."""
    install()
    with _quiet(), _folder_and_command(path.parent, ["train.py"]):
        _train(path.parent / "one", seed=3, steps=10)
        (run,) = path.parent.glob(f"one/tdmpc2/{NAME}_1")
        shutil.copytree(_only_checkpoint(run), path.parent / "kept")
        assert resume.main([str(run), "-n", "20"]) == 0
        _only_checkpoint(run).rename(_newest(run))
        (path.parent / "kept").rename(run / OLDER)
        _train(path.parent / "two", seed=4, steps=10)
        other = path.parent / "two" / "tdmpc2" / f"{NAME}_1"
        _only_checkpoint(other).rename(path.parent / "other-checkpoint")
    (run / f"{NAME}.zip").unlink()
    args = read_yaml(run / NAME / "args.yml")
    (run / NAME / "args.yml").write_text(yaml.dump({**args, "n_timesteps": 26}))
    run.rename(path)


def _only_checkpoint(run: pathlib.Path) -> pathlib.Path:
    (found,) = run.glob("checkpoint_*")
    return found


def _train(folder: pathlib.Path, seed: int, steps: int) -> None:
    from rl_zoo3.train import train

    options = f"--algo tdmpc2 --env {ENV} --seed {seed} -n {steps} -f {folder}"
    zoo = f"{options} --device cpu --eval-episodes 1 --eval-freq 10 --verbose 0 -params".split()
    sys.argv = ["train.py", *zoo, *SETTINGS]
    train()


def use(path: pathlib.Path) -> str | None:
    """Resume the run as a user does; the reason if that is refused."""
    said = io.StringIO()
    with _quiet(said), _folder_and_command(path, ["resume"]):
        refused = resume.main([str(path)])
    return (said.getvalue().strip() or "without a reason") if refused else None


def damage(path: pathlib.Path, damage: Damage, victim: pathlib.Path) -> None:
    """Change one to three things in a run's folder.

    :param path: of the folder
    :param damage: of files
    :param victim: a file outside, to which links lead
    """
    acts = [_yaml, _yaml, _yaml, _run_file, _run_file, _checkpoint, _other_checkpoint]
    last = [_link, _files]  # nothing may be written through a link or wait for a pipe
    chosen = [_choose(damage, acts) for _ in range(int(damage.rng.choice([0, 1, 1, 2])))]
    if not chosen or damage.rng.random() < 0.2:
        chosen.append(_choose(damage, last))
    for act in chosen:
        with contextlib.suppress(Exception):
            act(path, damage, victim)  # what an earlier act damaged is not always changed again


def _choose(damage: Damage, values: list[Any]) -> Any:
    return values[int(damage.rng.integers(len(values)))]


def _yaml(path: pathlib.Path, damage: Damage, victim: pathlib.Path) -> None:
    file = path / NAME / _choose(damage, ["args.yml", "config.yml"])
    kind = damage.rng.random()
    if kind < 0.1:
        file.write_bytes(damage.raw(file.read_bytes()))
        return
    if kind < 0.15:
        tag = _choose(damage, ["object/apply:os.mkdir ['../outside']", "name:os.system", "tuple 5"])
        file.write_text(f"{file.read_text()}\n- !!python/{tag}")
        return
    document = read_yaml(file)
    if kind < 0.4:
        _add_setting(document, damage)
    else:
        damage.change(document)
    for key in COUNTS & set(document):
        if isinstance(document[key], (int, float)) and document[key] > 1000:
            document[key] = -document[key]
    file.write_text(yaml.dump(document))


def _add_setting(document: dict[str, Any], damage: Damage) -> None:
    """Give a setting that the zoo knows: code, a module, a path, or any value."""
    keys = [
        *("env_wrapper", "vec_env_wrapper", "callback", "policy", "normalize", "monitor_kwargs"),
        *("gym_packages", "env_kwargs", "eval_env_kwargs", "policy_kwargs", "learning_rate"),
        *("replay_buffer_class", "replay_buffer_kwargs", "noise_type", "n_envs", "frame_stack"),
        *("train_freq", "env", "algo", "trained_agent", "tensorboard_log", "log_folder", "device"),
    ]
    names = ["xml_file", "task_kwargs", "render_mode", "camera_id", "filename", "x"]
    value = _choose(
        damage,
        [
            *(CODE, f"dict(x={CODE})", "os.mkdir", "this.s", ["antigravity"], [{"os.mkdir": {}}]),
            *({_choose(damage, names): _choose(damage, damage.values)} for _ in range(3)),
            *(
                {checkpoints.CALLBACK_NAME: {"folder": damage.outside}},
                damage.outside,
                "../outside",
            ),
            *(_choose(damage, damage.values) for _ in range(3)),
        ],
    )
    document[_choose(damage, keys)] = value


def _newest(path: pathlib.Path) -> pathlib.Path:
    return path / NEWEST


def _run_file(path: pathlib.Path, damage: Damage, victim: pathlib.Path) -> None:
    file = _newest(path) / RUN_FILE
    if damage.rng.random() < 0.2:
        document = json.loads(file.read_text())
        folders = ["tb", "../tb", "../../outside", "/proc/self/fd", 3, "x" * 5000, "a\0b"]
        document["files"]["logger"] = _choose(damage, folders)
        sizes = _choose(damage, [{}, {"0.monitor.csv": 1}, {"../victim": 0}, {"x": None}])
        document["files"]["monitor_sizes"] = sizes
        file.write_text(json.dumps(document))
    else:
        file.write_bytes(damage.json(file.read_bytes()))


def _checkpoint(path: pathlib.Path, damage: Damage, victim: pathlib.Path) -> None:
    """A damaged model or buffer, whose digest fits or is not there."""
    name = _choose(damage, [MODEL_FILE, BUFFER_FILE])
    file = _newest(path) / name
    file.write_bytes(damage(file.read_bytes()))
    if damage.rng.random() < 0.8:
        _forget_digests(file.parent)


def _forget_digests(checkpoint: pathlib.Path) -> None:
    document = json.loads((checkpoint / RUN_FILE).read_text())
    document.pop("digests", None)
    (checkpoint / RUN_FILE).write_text(json.dumps(document))


def _other_checkpoint(path: pathlib.Path, damage: Damage, victim: pathlib.Path) -> None:
    """One of another run, or a file of it, of the older one or of the final model."""
    sources = [victim.parent / "other-checkpoint", path / OLDER]
    source, target = _choose(damage, sources), _newest(path)
    name = _choose(damage, [MODEL_FILE, BUFFER_FILE, RUN_FILE, None])
    if name is None:
        shutil.rmtree(target)
        shutil.copytree(source, target)
    else:
        shutil.copy(source / name, target / name)
        _forget_digests(target)


def _link(path: pathlib.Path, damage: Damage, victim: pathlib.Path) -> None:
    names = _files_of(path)
    names += [".running", "1.monitor.csv", f"{NAME}.zip", "tb", f"{NAME}_1"]
    place = path / _choose(damage, names)
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    target = _choose(damage, [victim, victim.parent / "outside", path / "evaluations.npz", place])
    if damage.rng.random() < 0.5 and target.is_file():
        os.link(target, place)
    else:
        place.symlink_to(target)


def _files_of(path: pathlib.Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*") if each.is_file())


def _files(path: pathlib.Path, damage: Damage, victim: pathlib.Path) -> None:
    """A file that is missing, damaged, cut, a folder or a pipe; or one too many."""
    file = path / _choose(damage, _files_of(path))
    extra = ["checkpoint_9", "checkpoint_000000000099.1.2", "checkpoint_9x", "7.monitor.csv"]
    acts: list[Callable[[], Any]] = [
        file.unlink,
        lambda: file.write_bytes(damage.raw(file.read_bytes())),
        lambda: os.truncate(file, file.stat().st_size // 2),
        lambda: (file.unlink(), file.mkdir()),
        lambda: (file.unlink(), os.mkfifo(file)),
        lambda: (path / NAME / "vecnormalize.pkl").write_bytes(pickle.dumps(_Evil())),
        lambda: shutil.copytree(_newest(path), path / _choose(damage, extra)),
        lambda: (path / _choose(damage, extra)).write_bytes(b"x"),
        lambda: (path / "0.monitor.csv").write_text(_monitor(damage)),
    ]
    _choose(damage, acts)()


def _monitor(damage: Damage) -> str:
    heads = ['#{"t_start": 1.0}', "#", "#[", "", '#{"t_start": "x"}']
    rows = ["1.0,10,3.5", "1.0,10,nan", "1.0,10,inf", "1.0,10", "1.0,10,1e999", "a,b,c", "\0", ","]
    columns = ["r,l,t", "r,l", "r,l,t,t", "t"]
    content = [_choose(damage, heads), _choose(damage, columns)]
    content += [_choose(damage, rows) for _ in range(3)]
    return "\n".join(content)


@contextlib.contextmanager
def _quiet(stream: io.StringIO | None = None) -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(stream or io.StringIO()),
    ):
        yield


@contextlib.contextmanager
def _folder_and_command(folder: pathlib.Path, command: list[str]) -> Iterator[None]:
    before = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = command
    try:
        yield
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
