"""The authors' single-task checkpoints: read into, and written from, our world model.

Their file is a torch file whose entry ``model`` is a state dict. Read are its present format and
the older one, which flattens the Q ensembles (see :func:`_present_format`); written is the present
one. Nothing is unpickled beyond tensors.

| theirs | ours |
|---|---|
| ``_encoder.state.<layer>.*`` | ``encoder.state.net.<layer>.*`` |
| ``_encoder.rgb.<2, 4, 6, 8>.*`` | ``encoder.pixels.observation.net.<0, 2, 4, 6>.*`` |
| ``_dynamics.*``, ``_reward.*``, ``_termination.*``, ``_pi.*`` | ``dynamics.net.*``, ... |
| ``_Qs.params.*``, ``_target_Qs_params.*`` | ``q_ensemble.layers.*``, ... (heads stacked) |
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import IO, Any

import torch as th
from torch import nn

from tdmpc2_sb3.model.dynamics import MLPDynamics
from tdmpc2_sb3.model.world_model import LOG_STD_MAX, LOG_STD_MIN, WorldModel
from tdmpc2_sb3.replay.observation_entries import input_size, is_image
from tdmpc2_sb3.saving.files import CorruptFileError, PathOrFile, reading_path, write_to
from tdmpc2_sb3.saving.tensor_file import read_tensors

Tensors = dict[str, th.Tensor]

SUFFIX = "pt"
_MAX_HEADS = 1000
ONLINE, DETACHED, TARGET = "_Qs.params.", "_detach_Qs_params.", "_target_Qs_params."
OLD_TARGET = "_target_Qs.params."
OLD_NAMES = ("weight", "bias", "ln.weight", "ln.bias")
PREFIXES = {
    "_encoder.state.": "encoder.state.net.",
    # Two layers without parameters, random shift and scaling, come first in theirs.
    **{f"_encoder.rgb.{i + 2}.": f"encoder.pixels.observation.net.{i}." for i in (0, 2, 4, 6)},
    "_dynamics.": "dynamics.net.",
    "_reward.": "reward_net.",
    "_termination.": "termination_net.",
    "_pi.": "policy_net.",
    ONLINE: "q_ensemble.layers.",
    TARGET: "target_q_ensemble.layers.",
}
# What the authors' libraries add differs between their versions and carries nothing.
PLACEHOLDER = re.compile(r"Qs\.module\.|__batch_size$|__device$|^_action_masks$")


# -- reading -----------------------------------------------------------------------------------


def read_checkpoint(path: PathOrFile) -> Tensors:
    """The tensors of a single-task checkpoint by the names of the present format, on the CPU.

    :param path: file or open binary file
    :raises FileNotFoundError: if there is no such file
    :raises ValueError: if it is damaged, no checkpoint, or one of a multi-task agent
    """
    name: Any
    if isinstance(path, io.BufferedIOBase):
        name, source = getattr(path, "name", "stream"), path.read()
    else:
        name = reading_path(path, SUFFIX)
        source = name.read_bytes()
    try:
        content = read_tensors(source, th.device("cpu"))
    except Exception as error:  # whatever wrong opcodes lead to
        raise CorruptFileError(
            f"'{name}' cannot be read as a torch file of tensors alone: it is damaged, of another "
            "kind, or holds pickled objects; download the checkpoint again."
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or "_dynamics.0.weight" not in state:
        raise ValueError(
            f"'{name}' is no TD-MPC2 checkpoint (it has no entry '_dynamics.0.weight'): "
            "TDMPC2.load reads the files of TDMPC2.save, load_official those of the authors' code."
        )
    if "_task_emb.weight" in state:
        raise ValueError(
            f"'{name}' is a multi-task checkpoint: choose one of the single-task ones, "
            "multi-task agents are not supported."
        )
    named = {k: v for k, v in state.items() if not PLACEHOLDER.search(str(k))}
    for key, value in named.items():
        if not isinstance(value, th.Tensor) or not value.is_floating_point() or value.is_meta:
            raise CorruptFileError(
                f"'{name}' has {str(key)[:60]!r} of {type(value).__name__} where a tensor of "
                "floats is needed: download the checkpoint again."
            )
        if not bool(th.isfinite(value).all()):
            raise CorruptFileError(
                f"'{name}' has numbers in {str(key)[:60]!r} that are not finite: download the "
                "checkpoint again."
            )
    return _present_format({str(key): value for key, value in named.items()})


def _present_format(state: Mapping[str, Any]) -> Tensors:
    """Renames the older format's ``_Qs.params.<4 layer + name>``; passes the present one on."""
    tensors: Tensors = {}
    for key, value in state.items():
        if key.startswith(DETACHED):
            continue  # the same tensors as the online heads'
        for old, new in ((ONLINE, ONLINE), (OLD_TARGET, TARGET)):
            number = key[len(old) :]
            if key.startswith(old) and number.isdigit():
                layer, name = divmod(int(number), len(OLD_NAMES))
                key = f"{new}{layer}.{OLD_NAMES[name]}"
                break
        tensors[key] = value
    return tensors


def infer_settings(tensors: Tensors) -> dict[str, Any]:
    """The arguments of ``TDMPC2`` that the tensors' shapes tell, the policy's name among them.

    SimNorm's group size has no tensor of its own; the authors' is 8.

    :param tensors: of :func:`read_checkpoint`
    :raises ValueError: if an entry is missing
    """

    def size(key: str, axis: int) -> int:
        if key not in tensors:
            raise ValueError(
                f"The checkpoint has no entry '{key}': it is incomplete or of a format that is not "
                "known here; download it again."
            )
        if tensors[key].ndim <= axis:
            raise ValueError(
                f"The checkpoint's '{key}' has the shape {tuple(tensors[key].shape)} and should "
                "have more axes: it is damaged; download it again."
            )
        return int(tensors[key].shape[axis])

    settings = {
        "policy": "MlpPolicy",
        "dynamics": "mlp",
        "latent_dim": size("_dynamics.2.weight", 0),
        "mlp_dim": size("_dynamics.0.weight", 0),
        "num_q": size(f"{ONLINE}2.weight", 0),
        "num_bins": size("_reward.2.weight", 0),
        "episodic": "_termination.0.weight" in tensors,
    }
    if any(key.startswith("_encoder.rgb.") for key in tensors):
        _check_sizes(tensors, settings, 0)
        return {**settings, "policy": "CnnPolicy"}
    layers = {key.split(".")[2] for key in tensors if key.startswith("_encoder.state.")}
    settings["enc_dim"] = size("_encoder.state.0.weight", 0)
    settings["num_enc_layers"] = len(layers)
    _check_sizes(tensors, settings, len(layers))
    return settings


def _check_sizes(tensors: Tensors, settings: dict[str, Any], layers: int) -> None:
    """Refuse sizes that only some tensors have: networks of them would be larger than the file."""
    latent, mlp, heads = (settings[name] for name in ("latent_dim", "mlp_dim", "num_q"))
    bins, enc = settings["num_bins"], settings.get("enc_dim")
    expected: dict[str, tuple[int | None, ...]] = {
        "_dynamics.0.weight": (mlp, None),
        "_dynamics.1.weight": (mlp, mlp),
        "_dynamics.2.weight": (latent, mlp),
        "_reward.2.weight": (bins, mlp),
        f"{ONLINE}0.weight": (heads, mlp, None),
        f"{ONLINE}1.weight": (heads, mlp, mlp),
        f"{ONLINE}2.weight": (heads, bins, mlp),
        **{f"_encoder.state.{i}.weight": (enc, enc if i else None) for i in range(layers - 1)},
    }
    if layers:
        expected[f"_encoder.state.{layers - 1}.weight"] = (latent, enc if layers > 1 else None)
    else:
        expected["_encoder.rgb.2.weight"] = (None, None, None, None)
    for key, shape in expected.items():
        found = tuple(tensors[key].shape) if key in tensors else ()
        fits = len(found) == len(shape) and all(
            size in (None, other) for size, other in zip(shape, found, strict=True)
        )
        if key in tensors and not fits:
            raise ValueError(
                f"The checkpoint's '{key}' has shape {found} beside other sizes ({shape}): this "
                "architecture is not known here."
            )
        if key not in tensors:
            raise ValueError(
                f"The checkpoint has no entry '{key}': it is incomplete or of a format that is not "
                "known here; download it again."
            )
    if heads > _MAX_HEADS:
        raise ValueError(f"The checkpoint has {heads} Q heads: at most {_MAX_HEADS} are read.")


def merged_settings(inferred: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The inferred settings and the user's.

    :raises ValueError: if they contradict each other
    """
    for name, value in inferred.items():
        asked = given.get(name)
        if name != "policy" and asked not in (None, "auto", value):
            raise ValueError(
                f"{name} is {asked!r} but the checkpoint was made with {value!r}: leave it out."
            )
    automatic = {name: value for name, value in given.items() if name not in inferred}
    if "policy" in given:
        automatic["policy"] = given["policy"]
    return {**inferred, **automatic}


def load_tensors(model: WorldModel, tensors: Tensors) -> None:
    """Copies a checkpoint's tensors into a world model.

    :param model: built with :func:`infer_settings`
    :param tensors: of :func:`read_checkpoint`
    :raises ValueError: if they do not fit the model, that is the environment's observations or
        actions, or an entry is missing or unknown
    """
    _check_convertible(model, "load_official reads")
    _check_log_std(tensors)
    ours = {
        _our_name(key): value
        for key, value in tensors.items()
        if key not in ("log_std_min", "log_std_dif")
    }
    state = model.state_dict()
    for problem, names in (
        ("lacks", state.keys() - ours.keys()),
        ("has the unknown", ours.keys() - state.keys()),
    ):
        if names:
            raise ValueError(
                f"The checkpoint {problem} entry '{_their_name(min(names))}': it is incomplete or "
                "of a format that is not known here; download it again."
            )
    _check_inputs(model, tensors)
    for name, value in ours.items():
        if value.shape != state[name].shape:
            raise ValueError(
                f"The checkpoint's '{_their_name(name)}' has shape {tuple(value.shape)} where "
                f"{tuple(state[name].shape)} is needed: this architecture is not known here."
            )
    model.load_state_dict(ours)


def _check_inputs(model: WorldModel, tensors: Tensors) -> None:
    latent_dim = model.architecture.latent_dim
    found = {
        "actions": (tensors["_dynamics.0.weight"].shape[1] - latent_dim, model.action_dim),
    }
    space = model.observation_space
    if is_image(space, model.normalize_images):
        assert space.shape is not None
        found["channels"] = (tensors["_encoder.rgb.2.weight"].shape[1], space.shape[0])
    else:
        found["observations"] = (tensors["_encoder.state.0.weight"].shape[1], input_size(space))
    for what, (theirs, ours) in found.items():
        if theirs != ours:
            raise ValueError(
                f"The checkpoint was made for {theirs} {what} and the environment has {ours}: "
                "use the environment of the checkpoint's task."
            )


def _check_log_std(tensors: Tensors) -> None:
    for key, ours in (("log_std_min", LOG_STD_MIN), ("log_std_dif", LOG_STD_MAX - LOG_STD_MIN)):
        if key in tensors and tensors[key].numel() != 1:
            raise ValueError(
                f"The checkpoint's {key} has the shape {tuple(tensors[key].shape)} and should be "
                "one number: it is damaged; download it again."
            )
        if key in tensors and not math.isclose(float(tensors[key]), ours, rel_tol=1e-6):
            raise ValueError(
                f"The checkpoint's {key} is {float(tensors[key]):g} and this package's policy "
                f"prior has {ours:g}: such a checkpoint cannot be used."
            )


# -- writing -----------------------------------------------------------------------------------


def write_checkpoint(path: PathOrFile, model: WorldModel, module_placeholders: bool) -> None:
    """Writes a world model as the authors' code does, atomically.

    :param path: file (``.pt`` is added if it has no suffix) or open binary file
    :param model: with MLP dynamics and one vector or 64x64 image as its observation
    :param module_placeholders: whether to add the empty entries ``_Qs.module.*``
    :raises ValueError: if the authors' code has no such model
    """
    state = official_state(model, module_placeholders)

    def writer(file: IO[bytes]) -> None:
        th.save({"model": state}, file)

    write_to(path, writer, SUFFIX)


def official_state(model: WorldModel, module_placeholders: bool = False) -> dict[str, Any]:
    """The state dict of the authors' world model.

    :param model: see :func:`write_checkpoint`
    :param module_placeholders: see :func:`write_checkpoint`
    :raises ValueError: see :func:`write_checkpoint`
    """
    _check_convertible(model, "save_official writes")
    state: dict[str, Any] = {
        _their_name(name): value.detach().cpu() for name, value in model.state_dict().items()
    }
    online = {key[len(ONLINE) :]: value for key, value in state.items() if key.startswith(ONLINE)}
    state.update({DETACHED + name: value for name, value in online.items()})
    state["log_std_min"] = th.tensor(LOG_STD_MIN, dtype=th.float32)
    state["log_std_dif"] = th.tensor(LOG_STD_MAX - LOG_STD_MIN, dtype=th.float32)
    # Without these the version of tensordict that the authors pin refuses the file.
    for prefix in (ONLINE, DETACHED, TARGET):
        state[f"{prefix}__batch_size"] = th.Size([model.architecture.num_q])
        state[f"{prefix}__device"] = None
    if module_placeholders:
        for name, value in online.items():
            shape = value.shape[1:]
            state[f"_Qs.module.{name}"] = th.empty(shape, device="meta", dtype=th.float32)
            for prefix in ("_detach_Qs", "_target_Qs"):
                state[f"{prefix}.module.{name}"] = th.empty_like(value, device="meta")
    return state


def _check_convertible(model: WorldModel, what: str) -> None:
    encoder = model.encoder
    if type(model.dynamics) is not MLPDynamics:
        problem = f"its dynamics are {type(model.dynamics).__name__}"
    elif encoder.is_dict:
        problem = "its observations are dictionaries"
    elif not model.normalize_images:
        problem = "its images are normalised by the environment"
    elif encoder.image_keys and not _is_reference_encoder(model):
        problem = "its images or its latent_dim are not of the paper's pixel encoder"
    else:
        return
    raise ValueError(
        f"{what} models of the authors' layout, MLP dynamics on one vector or 64x64 image, but "
        f"{problem}: use save() and load()."
    )


def _is_reference_encoder(model: WorldModel) -> bool:
    """Whether SimNorm directly follows the convolutions, as in the paper's encoder."""
    shape = model.observation_space.shape
    pixels = model.encoder.pixels["observation"]
    assert isinstance(pixels.net, nn.Sequential)
    return shape is not None and shape[-2:] == (64, 64) and not list(pixels.net[-1].parameters())


def _our_name(theirs: str) -> str:
    for prefix, ours in PREFIXES.items():
        if theirs.startswith(prefix):
            return ours + theirs[len(prefix) :]
    return theirs


def _their_name(ours: str) -> str:
    for theirs, prefix in PREFIXES.items():
        if ours.startswith(prefix):
            return theirs + ours[len(prefix) :]
    return ours
