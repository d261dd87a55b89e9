"""`python -m tdmpc2_sb3.zoo train --algo tdmpc2 ...`: the zoo with our part, hook or no hook."""

from __future__ import annotations

import os
import runpy
import sys

#: Name on our command line -> the zoo's module.
PROGRAMS = {
    "train": "rl_zoo3.train",
    "enjoy": "rl_zoo3.enjoy",
    "record_video": "rl_zoo3.record_video",
    "record_training": "rl_zoo3.record_training",
    "push_to_hub": "rl_zoo3.push_to_hub",
    "load_from_hub": "rl_zoo3.load_from_hub",
    "plot_train": "rl_zoo3.plots.plot_train",
    "all_plots": "rl_zoo3.plots.all_plots",
    "plot_from_file": "rl_zoo3.plots.plot_from_file",
}

USAGE = f"""usage: python -m tdmpc2_sb3.zoo PROGRAM [the zoo's options]
       python -m tdmpc2_sb3.zoo resume RUN
       python -m tdmpc2_sb3.zoo export RUN... [-o agents]
       python -m tdmpc2_sb3.zoo hyperparams

Runs a program of RL Baselines3 Zoo with tdmpc2, tdmpc2_ssm and the DMC/ environments in it.
PROGRAM is one of: {", ".join(PROGRAMS)}.
PROGRAM --help prints its options; `resume` goes on with a run of train that was stopped or killed;
`export` copies a run's agent to a small folder to play or share; `hyperparams` prints the folder
of our YAML files.

example: python -m tdmpc2_sb3.zoo train --algo tdmpc2 --env DMC/walker-walk-v0 -P
"""


def main() -> int:
    """Run the program named on the command line and return the exit status."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    program = arguments[0]
    if program == "hyperparams":
        from tdmpc2_sb3.zoo.algorithms import hyperparams_folder

        print(hyperparams_folder())
        return 0
    if program == "resume":
        from tdmpc2_sb3.zoo import resume

        return resume.main(arguments[1:])
    if program == "export":
        from tdmpc2_sb3.zoo import export

        return export.main(arguments[1:])
    if program not in PROGRAMS:
        print(f"unknown program '{program}'; one of: {', '.join(PROGRAMS)}", file=sys.stderr)
        return 2

    from tdmpc2_sb3.zoo.register import install

    install()
    arguments = sys.argv[1:]  # without the password of a database
    # Programs that start others (record_training) start them as plain `python -m rl_zoo3...`.
    os.environ.pop("TDMPC2_SB3_NO_HOOK", None)
    sys.argv = [PROGRAMS[program], *arguments[1:]]
    runpy.run_module(PROGRAMS[program], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
