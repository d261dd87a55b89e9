"""Command line: ``python -m dmc_gym_plugin list`` and ``... preview DMC/walker-walk-v0``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import gymnasium

from dmc_gym_plugin import rendering
from dmc_gym_plugin.settings import check_count
from dmc_gym_plugin.sizes import SIZES
from dmc_gym_plugin.tasks import NAMESPACE, TASKS, TaskInfo, has_labmaze

GROUPS = ("suite", "extended", "manipulation", "locomotion")


def ids_of(group: str) -> list[str]:
    """Return the ids of a group."""
    return [info.id for info in TASKS.values() if info.group == group]


def list_tasks(groups: list[str]) -> None:
    """Print the tasks, one a line."""
    print(f"{'id':<62} {'observation':>11} {'action':>6} {'step (s)':>8} {'episode':>7}")
    for group in groups:
        rows = [info for info in TASKS.values() if info.group == group]
        note = ""
        if group == "locomotion" and not has_labmaze():
            note = ", not available: labmaze is not installed"
        print(f"\n{group} ({len(rows)} tasks{note})")
        for info in rows:
            observation, action, seconds = _sizes(info)
            print(
                f"{info.id:<62} {observation:>11} {action:>6} {seconds:>8g} {info.control_steps:>7}"
            )
    print(
        "\nobservation: numbers of the flat view; step: seconds of one control step; episode: "
        "control steps (agent steps x action_repeat)."
    )


def _sizes(info: TaskInfo) -> tuple[int, int, float]:
    """Return a row of `SIZES`; that of a task which has none there is read from the simulator."""
    known = SIZES.get(f"{info.domain}-{info.task}")
    if known is not None:
        return known
    env = gymnasium.make(info.id)
    simulation = env.get_wrapper_attr("simulation")
    numbers, actions = (space.shape or () for space in (env.observation_space, env.action_space))
    env.close()
    return numbers[0], actions[0], simulation.control_timestep


def preview(args: argparse.Namespace) -> None:
    """Write a contact sheet or a film."""
    from dmc_gym_plugin import preview as pictures

    suffix = args.output.suffix.lower()
    if suffix not in pictures.STILLS + pictures.FILMS:
        known = ", ".join(pictures.STILLS + pictures.FILMS)
        raise SystemExit(f"{args.output} ends in {suffix!r}; give one of {known}.")
    env_ids = [name for arg in args.ids for name in (ids_of(arg) if arg in GROUPS else [arg])]
    for env_id in env_ids:
        if not env_id.startswith(f"{NAMESPACE}/"):
            raise SystemExit(
                f"{env_id} is none of the {NAMESPACE}/ tasks; `python -m dmc_gym_plugin list` "
                "prints them."
            )
        gymnasium.spec(env_id)  # an unknown id ends here, before any work
    for name in ("tiles", "columns", "height", "width"):
        check_count(f"--{name}", getattr(args, name))
    if args.steps is not None:
        check_count("--steps", args.steps)
    if suffix in pictures.FILMS and len(env_ids) > 1:
        raise SystemExit(f"A film shows one task, but {len(env_ids)} were given; name one.")
    options = {
        "actions": args.actions,
        "seed": args.seed,
        "steps": args.steps,
        "height": args.height,
        "width": args.width,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if suffix in pictures.FILMS:
        pictures.film(env_ids[0], args.output, **options)
    elif len(env_ids) == 1:
        pictures.episode_sheet(env_ids[0], args.tiles, args.columns, **options).save(args.output)
    else:
        pictures.tasks_sheet(env_ids, args.columns, **options).save(args.output)
    pictures.progress("")
    print(f"Wrote {args.output}.")


def parser() -> argparse.ArgumentParser:
    """Return the parser."""
    top = argparse.ArgumentParser(prog="python -m dmc_gym_plugin", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="print the tasks, their sizes and lengths")
    listing.add_argument("groups", nargs="*", help=f"some of {', '.join(GROUPS)}; all by default")
    show = commands.add_parser("preview", help="write a contact sheet or a film of an episode")
    show.add_argument("ids", nargs="+", help="ids, or a group's name; several give one tile each")
    show.add_argument("-o", "--output", type=Path, required=True, help=".png, .mp4, .gif ...")
    show.add_argument("--actions", choices=("sine", "random", "zero"), default="sine")
    show.add_argument("--seed", type=int, default=0)
    show.add_argument("--steps", type=int, help="agent steps; the whole episode by default")
    show.add_argument("--tiles", type=int, default=12, help="pictures of an episode's sheet")
    show.add_argument("--columns", type=int, default=4)
    show.add_argument("--height", type=int, default=240)
    show.add_argument("--width", type=int, default=320)
    return top


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    args = parser().parse_args(arguments)
    if args.command == "list":
        unknown = [name for name in args.groups if name not in GROUPS]
        if unknown:
            raise SystemExit(f"There is no group {unknown[0]!r}; choose of {', '.join(GROUPS)}.")
        try:
            list_tasks(args.groups or list(GROUPS))
            sys.stdout.flush()
        except BrokenPipeError:  # as of `list | head`; Python would complain of it at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        preview(args)
    except (gymnasium.error.Error, rendering.RenderingError, ValueError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main(sys.argv[1:])
