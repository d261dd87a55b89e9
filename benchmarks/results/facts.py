"""Tables of facts: what packages have. Each cell is a row of its file, with evidence of its own.

Columns: `feature`, `package`, `answer` (yes, no, few words; ? where it could not be found out),
`evidence` and `read`, the day on which it was read. Evidence is one or more of, apart by spaces:

- a guide of ours, `docs/resume.md#what-goes-on-exactly`;
- a file, folder or test of ours, `tests/zoo/test_hub.py::test_round_trip`;
- a page, `https://...`; of a GitHub repository's files with the whole hash that was read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SOURCE = ("evidence", "read")
UNKNOWN = "?"
READ_AT = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)/(?:blob|tree)/([0-9a-f]{40})")

Row = dict[str, str]


def pivoted(rows: Sequence[Row]) -> list[Row]:
    """Returns a row a feature, with a column a package, whose cells lead to their evidence.

    :param rows: of a file of facts
    """
    packages = list(dict.fromkeys(row["package"] for row in rows))
    features: dict[str, Row] = {}
    for row in rows:
        cells = features.setdefault(row["feature"], dict.fromkeys(packages, UNKNOWN))
        cells[row["package"]] = _linked(row)
    return [{"feature": feature, **cells} for feature, cells in features.items()]


def _linked(row: Row) -> str:
    """Returns an answer that leads to the first page among its evidence."""
    for place in row["evidence"].split():
        if not is_file(place):
            return f"[{row['answer']}]({place.removeprefix('docs/')})"
    return row["answer"]


def states_read(rows: Sequence[Row]) -> str:
    """Returns a sentence: on which days which states of which repositories were read.

    :param rows: of a file of facts
    """
    days = sorted({row["read"] for row in rows})
    states: dict[str, dict[str, None]] = {}
    for row in rows:
        for repository, state in READ_AT.findall(row["evidence"]):
            states.setdefault(repository, {})[state[:7]] = None
    listed = "; ".join(f"{repository} at {', '.join(each)}" for repository, each in states.items())
    return f"Read on {' to '.join(dict.fromkeys((days[0], days[-1])))}: {listed}."


def shown_by(rows: Sequence[Row]) -> list[Row]:
    """Returns a row a feature with our files and tests that show it, to which no cell can lead.

    :param rows: of a file of facts
    """
    places = {
        row["feature"]: [f"`{place}`" for place in row["evidence"].split() if is_file(place)]
        for row in rows
        if any(is_file(place) for place in row["evidence"].split())
    }
    return [{"feature": feature, "shown by": ", ".join(each)} for feature, each in places.items()]


def is_file(place: str) -> bool:
    """Returns whether evidence is a file, folder or test of ours, and no page."""
    return not place.startswith(("https://", "docs/"))
