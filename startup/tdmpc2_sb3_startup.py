"""What the start-up hook does once gymnasium or the zoo is imported.

Python runs `tdmpc2_sb3_startup.pth` at every start (twice in a virtual environment, so it looks
whether it has run). All that line does is put a finder on
`sys.meta_path` that waits for a few module names; this file is first imported when one of them is
asked for. It then lets the module load as ever and adds what this project brings:

- `gymnasium`: the `DMC/` environment ids, so that `gymnasium.make("DMC/...")` needs no import;
- `rl_zoo3.utils`, `rl_zoo3.hyperparams_opt`, `rl_zoo3.exp_manager`: the algorithms, their tuning
  ranges and their YAML files, see `tdmpc2_sb3/zoo/register.py`.

The file lies beside the packages, not inside one, because importing a package's `__init__` here
would import what the hook is waiting for. Nothing in it may raise: a fault becomes one warning and
the module loads as if the hook were not there. `TDMPC2_SB3_NO_HOOK=1` switches all of it off.
"""

import sys

_busy = set()


def find_spec(finder, name, path):
    """Return the spec that the other finders give for `name`, its loader wrapped, or None."""
    if name in _busy:  # another finder that asks all finders, as this one does
        return None
    _busy.add(name)
    try:
        for other in sys.meta_path:
            if other is finder or not hasattr(other, "find_spec"):
                continue
            spec = other.find_spec(name, path)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _ThenRegister(spec.loader, name)
                return spec
        return None
    finally:
        _busy.discard(name)


class _ThenRegister:
    """A loader that hands everything to the true one, and registers after the module has run."""

    def __init__(self, loader, name):
        self._loader = loader
        self._name = name

    def __getattr__(self, attribute):
        return getattr(self._loader, attribute)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        # From here on nobody shall see this wrapper: importlib.resources, pickle and runpy look at
        # the loader's type.
        module.__loader__ = self._loader
        module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        try:
            register(self._name)
        except Exception as error:
            _warn(
                f"tdmpc2-sb3 could not add itself to {self._name}, which works as without it:"
                f" {type(error).__name__}: {error}. TDMPC2_SB3_NO_HOOK=1 switches this off."
            )


def register(name):
    """Add this project's part to the module `name`, which has just been loaded."""
    if name == "gymnasium":
        import dmc_gym_plugin  # noqa: F401  (registers on import)
    else:
        from tdmpc2_sb3.zoo.register import extend

        extend(sys.modules[name])


def _warn(message):
    try:
        import warnings

        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Exception:  # warnings turned into errors: still no reason to break somebody's import
        sys.stderr.write(message + "\n")
