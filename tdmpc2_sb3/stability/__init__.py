"""Planning stability, measured: what ``python -m tdmpc2_sb3.stability`` is made of.

``recording`` plays held-out episodes, ``simulation`` tries plans in the restored simulator,
``metrics`` holds the seven measures, ``study`` the intervals, ``report`` tables and picture.
"""

from __future__ import annotations

from tdmpc2_sb3.stability.recording import Episode, RecordingConfig
from tdmpc2_sb3.stability.study import Estimate, Measurement, Study, Subject, run_study

__all__ = [
    "Episode",
    "Estimate",
    "Measurement",
    "RecordingConfig",
    "Study",
    "Subject",
    "run_study",
]
