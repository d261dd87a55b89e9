"""Contact sheets and films of episodes, for people to look at."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

#: Formats that hold one picture, and those that hold a film.
STILLS = (".png", ".jpg", ".jpeg", ".webp")
FILMS = (".mp4", ".gif")

#: Something that picks an action: observation, step -> action.
Actor = Callable[[Any, int], NDArray[np.float32]]


def make_actor(kind: str, env: gymnasium.Env, seed: int) -> Actor:
    """Return an actor.

    :param kind: ``random``, ``zero``, or ``sine`` (slow waves, out of phase: smooth motion)
    """
    size = env.action_space.shape or (0,)
    random = np.random.RandomState(seed)
    phase = random.uniform(0, 2 * math.pi, size)

    def act(_observation: Any, step: int) -> NDArray[np.float32]:
        if kind == "random":
            return random.uniform(-1, 1, size).astype(np.float32)
        if kind == "zero":
            return np.zeros(size, np.float32)
        return np.sin(0.1 * step + phase).astype(np.float32)

    return act


def play(
    env_id: str, actions: str, seed: int, steps: int | None, height: int, width: int
) -> Iterator[tuple[int, float, Callable[[], NDArray[np.uint8]]]]:
    """Play one episode; yield the agent step, the return so far and a function that draws it."""
    env = gymnasium.make(env_id, render_mode="rgb_array", render_height=height, render_width=width)
    observation, _ = env.reset(seed=seed)
    act = make_actor(actions, env, seed)
    total, step, over = 0.0, 0, False
    try:
        yield step, total, env.render  # type: ignore[misc]
        while not over and (steps is None or step < steps):
            observation, reward, terminated, truncated, _ = env.step(act(observation, step))
            total += float(reward)
            step += 1
            over = terminated or truncated
            yield step, total, env.render  # type: ignore[misc]
    finally:
        env.close()


def contact_sheet(pictures: list[tuple[str, NDArray[np.uint8]]], columns: int) -> Image.Image:
    """Return labelled pictures of one size as the tiles of a sheet."""
    height, width = pictures[0][1].shape[:2]
    margin, caption = 6, 20
    columns = min(columns, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    size = (margin + columns * (width + margin), margin + rows * (height + caption + margin))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = _font([label for label, _ in pictures], width)
    for index, (label, picture) in enumerate(pictures):
        row, column = divmod(index, columns)
        left = margin + column * (width + margin)
        top = margin + row * (height + caption + margin)
        sheet.paste(Image.fromarray(picture), (left, top))
        draw.text((left + 2, top + height + 2), label, fill="black", font=font)
    return sheet


def _font(labels: list[str], width: int) -> Any:
    """Return the largest readable font in which every label fits its tile."""
    size = 13
    while size > 8 and max(ImageFont.load_default(size).getlength(x) for x in labels) > width:
        size -= 1
    return ImageFont.load_default(size)


def episode_sheet(env_id: str, tiles: int, columns: int, **options: Any) -> Image.Image:
    """Return ``tiles`` moments of one episode, evenly spaced, as a sheet."""
    steps = options["steps"]
    if steps is None:
        steps = gymnasium.spec(env_id).max_episode_steps or 1000
    moments = {round(k * steps / max(1, tiles - 1)) for k in range(tiles)}
    pictures = []
    for step, total, draw in play(env_id, **options):
        if step in moments:
            pictures.append((f"step {step}, return {total:.1f}", draw()))
            progress(f"{env_id}: {len(pictures)} of {len(moments)} pictures")
    return contact_sheet(pictures, columns)


def tasks_sheet(env_ids: list[str], columns: int, **options: Any) -> Image.Image:
    """Return one picture of every task, after ``steps`` steps, as a sheet."""
    options["steps"] = 25 if options["steps"] is None else options["steps"]
    names = [env_id.removeprefix("DMC/").removesuffix("-v0") for env_id in env_ids]
    domains = {name.split("-")[0] for name in names}
    if len(domains) == 1:  # the same for all: leave it out
        names = [name.split("-", 1)[1] for name in names]
    pictures = []
    for number, (env_id, name) in enumerate(zip(env_ids, names, strict=True), 1):
        progress(f"{number} of {len(env_ids)}: {env_id}")
        for step, _total, draw in play(env_id, **options):
            if step == options["steps"]:
                pictures.append((name, draw()))
    return contact_sheet(pictures, columns)


def film(env_id: str, output: Path, **options: Any) -> int:
    """Write an episode as a film in real time.

    :return: the number of pictures
    """
    fps = gymnasium.make(env_id).unwrapped.metadata["render_fps"]
    frames: Iterator[NDArray[np.uint8]] = (draw() for _, _, draw in play(env_id, **options))
    if output.suffix == ".gif":
        images = [Image.fromarray(frame) for frame in _counted(env_id, frames)]
        images[0].save(output, save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
        return len(images)
    import imageio_ffmpeg

    size = (options["width"], options["height"])
    writer = imageio_ffmpeg.write_frames(str(output), size, fps=fps, macro_block_size=2)
    writer.send(None)
    count = 0
    try:
        for frame in _counted(env_id, frames):
            writer.send(np.ascontiguousarray(frame))
            count += 1
    finally:
        writer.close()
    return count


def _counted(env_id: str, frames: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    for number, frame in enumerate(frames, 1):
        progress(f"{env_id}: {number} pictures")
        yield frame


def progress(text: str) -> None:
    """Show how far the work is, on a terminal's one line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
