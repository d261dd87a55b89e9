"""The extra tasks of the TD-MPC2 literature, on dm_control's models and classes.

The definitions (target speeds, heights, weights) are those that the published curves were made
with; the code is our own. Every reward lies in [0, 1]. Below, ``ramp(x, a, b)`` rises linearly
from 0 at a to 1 at b, ``half_ramp(x, a, b)`` rises linearly from 0.5 at a to 1 at b and is
continued below a until it reaches 0, and ``bell(x, h)`` is 1 above h and falls off like a
Gaussian below, to 0.1 at h/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from dm_control.rl import control
from dm_control.suite import ball_in_cup, base, cheetah, common, hopper, pendulum, reacher, walker
from lxml import etree  # type: ignore[import-untyped]

from dmc_gym_plugin.fast_rewards import tolerance

INFINITY = math.inf

CHEETAH_HEIGHT = 1.2  # metres that a raised foot or torso should reach
CHEETAH_BACKWARDS_SPEED = 8.0  # metres a second
CHEETAH_ONE_FOOT_SPEED = 6.0
CHEETAH_STILL_SPEED = 0.5
HOPPER_BACKWARDS_SPEED = 1.0
BALL_DISTANCE = 0.5  # metres between the ball and the cup's centre
BALL_SPEED = 6.0  # metres a second
PENDULUM_SPEED = 9.0  # radians a second
REACHER_LINK = 0.09  # metres, each of the first two links
REACHER_RANGE = "-80 80"  # degrees, second and third joint


def _ramp(x: float, start: float, full: float) -> float:
    bounds = (full, INFINITY) if full > start else (-INFINITY, full)
    return tolerance(x, bounds, abs(full - start), sigmoid="linear", value_at_margin=0)


def _half_ramp(x: float, start: float, full: float) -> float:
    bounds = (full, INFINITY) if full > start else (-INFINITY, full)
    return tolerance(x, bounds, abs(full - start), sigmoid="linear", value_at_margin=0.5)


def _bell(x: float, height: float) -> float:
    return tolerance(x, (height, INFINITY), height / 2)


class WalkerBackwards(walker.PlanarWalker):
    """Move backwards at ``move_speed`` (walk: 1 m/s, run: 8 m/s).

    Reward: s (5 half_ramp(-v, speed / 2, speed) + 1) / 6, with v the horizontal velocity,
    s = (3 bell(torso height, 1.2 m) + upright) / 4 and upright in [0, 1]: the suite's own reward
    for walking, mirrored.
    """

    def get_reward(self, physics: Any) -> float:
        """Return the reward."""
        upright = (1 + physics.torso_upright()) / 2
        stand = (3 * _bell(physics.torso_height(), walker._STAND_HEIGHT) + upright) / 4
        speed = self._move_speed
        move = _half_ramp(physics.horizontal_velocity(), -speed / 2, -speed)
        return stand * (5 * move + 1) / 6


class CheetahBackwards(cheetah.Cheetah):
    """Run backwards. Reward: ramp(-v, 0, 8 m/s), with v the horizontal velocity."""

    def get_reward(self, physics: Any) -> float:
        """Return the reward."""
        return _ramp(physics.speed(), 0.0, -CHEETAH_BACKWARDS_SPEED)


class CheetahOneFoot(cheetah.Cheetah):
    """Run forwards with one foot in the air (run_front: the back foot, run_back: the front foot).

    Reward: u (5 ramp(v, 0, 6 m/s) + 1) / 6, with v the horizontal velocity and
    u = (3 bell(raised foot's height, 1.2 m) + 2 bell(torso height, 1.2 m)) / 5.

    :param raised: the body of the raised foot, ``bfoot`` or ``ffoot``
    """

    def __init__(self, raised: str, random: Any = None) -> None:
        super().__init__(random=random)
        self._raised = raised

    def get_reward(self, physics: Any) -> float:
        """Return the reward."""
        heights = physics.named.data.xpos
        foot = _bell(heights[self._raised, "z"], CHEETAH_HEIGHT)
        torso = _bell(heights["torso", "z"], CHEETAH_HEIGHT)
        run = _ramp(physics.speed(), 0.0, CHEETAH_ONE_FOOT_SPEED)
        return (3 * foot + 2 * torso) / 5 * (5 * run + 1) / 6


class CheetahJump(cheetah.Cheetah):
    """Raise torso and both feet, without travelling.

    Reward: the mean over both feet of (5 bell(h, 1.2 m) + still) / 6, where h is the mean height of
    torso and foot, and still is 1 up to 0.5 m/s in either direction and falls linearly to 0 at
    1 m/s.
    """

    def get_reward(self, physics: Any) -> float:
        """Return the reward."""
        heights = physics.named.data.xpos
        torso = heights["torso", "z"]
        limit = CHEETAH_STILL_SPEED
        still = tolerance(
            physics.speed(), (-limit, limit), limit, sigmoid="linear", value_at_margin=0
        )
        total = 0.0
        for foot in ("bfoot", "ffoot"):
            high = _bell((torso + heights[foot, "z"]) / 2, CHEETAH_HEIGHT)
            total += (5 * high + still) / 6
        return total / 2


class HopperBackwards(hopper.Hopper):
    """Hop backwards.

    Reward: standing half_ramp(-v, 0.5 m/s, 1 m/s), with v the horizontal velocity and standing 1
    while the torso is 0.6 m to 2 m above the foot, else 0.
    """

    def __init__(self, random: Any = None) -> None:
        super().__init__(hopping=True, random=random)

    def get_reward(self, physics: Any) -> float:
        """Return the reward."""
        standing = tolerance(physics.height(), (hopper._STAND_HEIGHT, 2))
        full = HOPPER_BACKWARDS_SPEED
        return standing * _half_ramp(physics.speed(), -full / 2, -full)


class BallSpin(ball_in_cup.BallInCup):
    """Swing the ball around the cup. In nine of ten episodes it starts inside.

    Reward: 0 while the ball is in the cup, else
    (half_ramp(d, 0.25 m, 0.5 m) + 2 half_ramp(v, 3 m/s, 6 m/s)) / 3, with d the ball's distance
    from the cup's centre and v its speed.
    """

    def initialize_episode(self, physics: Any) -> None:
        """Draw collision-free positions until one lies in the cup, where it has to."""
        anywhere = self.random.uniform() < 0.1
        position = physics.named.data.qpos
        while True:
            position["ball_x"] = self.random.uniform(-0.2, 0.2)
            position["ball_z"] = self.random.uniform(0.2, 0.5)
            physics.after_reset()
            if physics.data.ncon == 0 and (anywhere or physics.in_target()):
                break
        base.Task.initialize_episode(self, physics)

    def get_reward(self, physics: Any) -> float:
        """Return the reward."""
        if physics.in_target():
            return 0.0
        velocity = physics.named.data.qvel
        speed = math.hypot(velocity["ball_x"][0], velocity["ball_z"][0])
        distance = float(np.linalg.norm(physics.ball_to_target()))
        far = _half_ramp(distance, BALL_DISTANCE / 2, BALL_DISTANCE)
        return (far + 2 * _half_ramp(speed, BALL_SPEED / 2, BALL_SPEED)) / 3


class PendulumSpin(pendulum.SwingUp):
    """Spin as fast as 9 rad/s, in either direction. Reward: half_ramp(|w|, 4.5, 9 rad/s)."""

    def get_reward(self, physics: Any) -> float:
        """Return the reward."""
        speed = abs(float(physics.angular_velocity()[0]))
        return _half_ramp(speed, PENDULUM_SPEED / 2, PENDULUM_SPEED)


class ReacherThree(reacher.Reacher):
    """Reach the target with an arm of three links (easy: 5 cm target, hard: 1.5 cm).

    Reward: 1 while the finger touches the target, else 0, as in the suite's two-link task.
    """


def three_link_model() -> bytes:
    """Return the suite's reacher with a third link, as MJCF.

    The first two links measure 0.09 m, the finger sits 0.09 m from the last joint, and the second
    and third joint turn by 80 degrees to either side.
    """
    root = etree.fromstring(common.read_model("reacher.xml"))
    arm = root.find(".//body[@name='arm']")
    hand = arm.find("body[@name='hand']")
    finger = hand.find("body[@name='finger']")
    link = f"0 0 0 {REACHER_LINK} 0 0"
    offset = f"{REACHER_LINK} 0 0"
    arm.find("geom").set("fromto", link)
    arm.remove(hand)
    middle = etree.SubElement(arm, "body", name="arm1", pos=offset)
    etree.SubElement(
        middle, "geom", name="arm1", type="capsule", fromto=link, size=".01", material="self"
    )
    etree.SubElement(middle, "joint", name="elbow", limited="true", range=REACHER_RANGE)
    middle.append(hand)
    hand.set("pos", offset)
    finger.set("pos", offset)
    hand.find("joint").set("range", REACHER_RANGE)
    motors = root.find("actuator")
    motors.insert(1, etree.Element("motor", name="elbow", joint="elbow"))
    return etree.tostring(root)


def _lengthen_floor(physics: Any) -> Any:
    """Draw the floor behind the starting point too; collisions know no end of it anyway."""
    name = "floor" if "floor" in physics.named.model.geom_size.axes.row.names else "ground"
    physics.named.model.geom_size[name, 0] *= 2
    return physics


Builder = Callable[..., tuple[Any, Any, float, float | None]]


def _walker(speed: float) -> Builder:
    def build(random: Any) -> tuple[Any, Any, float, float | None]:
        physics = _lengthen_floor(walker.Physics.from_xml_string(*walker.get_model_and_assets()))
        task = WalkerBackwards(move_speed=speed, random=random)
        return physics, task, walker._DEFAULT_TIME_LIMIT, walker._CONTROL_TIMESTEP

    return build


def _cheetah(make_task: Callable[..., Any]) -> Builder:
    def build(random: Any) -> tuple[Any, Any, float, float | None]:
        physics = _lengthen_floor(cheetah.Physics.from_xml_string(*cheetah.get_model_and_assets()))
        return physics, make_task(random=random), cheetah._DEFAULT_TIME_LIMIT, None

    return build


def _hopper(random: Any) -> tuple[Any, Any, float, float | None]:
    physics = _lengthen_floor(hopper.Physics.from_xml_string(*hopper.get_model_and_assets()))
    task = HopperBackwards(random=random)
    return physics, task, hopper._DEFAULT_TIME_LIMIT, hopper._CONTROL_TIMESTEP


def _ball(random: Any) -> tuple[Any, Any, float, float | None]:
    physics = ball_in_cup.Physics.from_xml_string(*ball_in_cup.get_model_and_assets())
    task = BallSpin(random=random)
    return physics, task, ball_in_cup._DEFAULT_TIME_LIMIT, ball_in_cup._CONTROL_TIMESTEP


def _pendulum(random: Any) -> tuple[Any, Any, float, float | None]:
    physics = pendulum.Physics.from_xml_string(*pendulum.get_model_and_assets())
    return physics, PendulumSpin(random=random), pendulum._DEFAULT_TIME_LIMIT, None


def _reacher(target_size: float) -> Builder:
    def build(random: Any) -> tuple[Any, Any, float, float | None]:
        physics = reacher.Physics.from_xml_string(three_link_model(), common.ASSETS)
        task = ReacherThree(target_size=target_size, random=random)
        return physics, task, reacher._DEFAULT_TIME_LIMIT, None

    return build


#: (domain, task) -> builder of physics, task, time limit and control time step (seconds).
BUILDERS: dict[tuple[str, str], Builder] = {
    ("walker", "walk_backwards"): _walker(walker._WALK_SPEED),
    ("walker", "run_backwards"): _walker(walker._RUN_SPEED),
    ("cheetah", "run_backwards"): _cheetah(CheetahBackwards),
    ("cheetah", "run_front"): _cheetah(lambda random: CheetahOneFoot("bfoot", random)),
    ("cheetah", "run_back"): _cheetah(lambda random: CheetahOneFoot("ffoot", random)),
    ("cheetah", "jump"): _cheetah(CheetahJump),
    ("hopper", "hop_backwards"): _hopper,
    ("reacher", "three_easy"): _reacher(reacher._BIG_TARGET),
    ("reacher", "three_hard"): _reacher(reacher._SMALL_TARGET),
    ("ball_in_cup", "spin"): _ball,
    ("pendulum", "spin"): _pendulum,
}


def load(
    domain: str,
    task: str,
    random: Any = None,
    time_limit: float | None = None,
    environment_kwargs: dict[str, Any] | None = None,
) -> control.Environment:
    """Return an extended task as dm_control's environment, like ``dm_control.suite.load``.

    :param random: a seed, a ``RandomState`` or None
    :param time_limit: seconds of an episode; None takes the task's own
    """
    physics, made, default_limit, timestep = BUILDERS[domain, task](random)
    return control.Environment(
        physics,
        made,
        time_limit=default_limit if time_limit is None else time_limit,
        control_timestep=timestep,
        **(environment_kwargs or {}),
    )
