"""One moving picture of trained agents, a tile each, as the README shows it.

    python benchmarks/gallery.py agents docs/images/agents.gif

plays every agent of a folder of the zoo's layout (the newest run of each task and algorithm) for
four seconds of the simulator from where the episode's second fifth begins, and writes the return of
the whole episode under it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gymnasium
import numpy as np
from PIL import Image, ImageDraw
from rl_zoo3.utils import ALGOS, get_latest_run_id

from tdmpc2_sb3.zoo.register import install
from tdmpc2_sb3.zoo.yaml_files import read_yaml

WIDTH, HEIGHT, CAPTION = 160, 120, 14
SECONDS, RATE = 4, 12.5  # of the film


def agents(folder: Path) -> list[Path]:
    """The newest run of every algorithm and task in a folder."""
    names = {(each.parent, each.name.rpartition("_")[0]) for each in folder.glob("tdmpc2*/*_*")}
    return [
        parent / f"{name}_{get_latest_run_id(str(parent), name)}" for parent, name in sorted(names)
    ]


def film(run: Path, seed: int) -> list[Image.Image]:
    """The tile of one agent, frame by frame.

    :param run: its folder
    :param seed: of the episode
    """
    (settings,) = run.glob("*/args.yml")
    args, config = read_yaml(settings), read_yaml(settings.with_name("config.yml"))
    kwargs = {**config.get("env_kwargs", {}), "width": 2 * WIDTH, "height": 2 * HEIGHT}
    env = gymnasium.make(args["env"], render_mode="rgb_array", **kwargs)
    model = ALGOS[args["algo"]].load(run / f"{settings.parent.name}.zip", device="cpu")
    rate = env.metadata["render_fps"]
    observation, _ = env.reset(seed=seed)
    state, done, total, pictures = None, False, 0.0, []
    while not done:
        action, state = model.predict(observation, state=state, deterministic=True)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        done = terminated or truncated
        pictures.append(env.render())
    first = len(pictures) // 5
    chosen = first + (np.arange(int(SECONDS * RATE)) * rate / RATE).astype(int)
    kind = " (SSM)" if args["algo"] == "tdmpc2_ssm" else ""
    text = f"{args['env'][4:-3]}{kind}  {total:.0f}"
    print(text)
    return [_tile(pictures[min(index, len(pictures) - 1)], text) for index in chosen]


def _tile(picture: np.ndarray, text: str) -> Image.Image:
    tile = Image.new("RGB", (WIDTH, HEIGHT + CAPTION), "white")
    tile.paste(Image.fromarray(picture).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS))
    ImageDraw.Draw(tile).text((3, HEIGHT + 1), text, "black")
    return tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("agents", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--columns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1000)
    arguments = parser.parse_args()
    install()
    films = [film(run, arguments.seed) for run in agents(arguments.agents)]
    columns = min(arguments.columns, len(films))
    rows = -(-len(films) // columns)
    sheets = []
    for tiles in zip(*films, strict=True):
        sheet = Image.new("RGB", (columns * WIDTH, rows * (HEIGHT + CAPTION)), "white")
        for index, tile in enumerate(tiles):
            place = (index % columns * WIDTH, index // columns * (HEIGHT + CAPTION))
            sheet.paste(tile, place)
        sheets.append(sheet.quantize(64, dither=Image.Dither.NONE))
    sheets[0].save(
        arguments.output,
        save_all=True,
        append_images=sheets[1:],
        duration=int(1000 / RATE),
        loop=0,
        optimize=True,
    )
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
