"""What the runs of TRL's tests have in common and what not, as a CSV file and a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_flashmask.bench.measure import table as text_table

from .plugin import STOCK


class Row(NamedTuple):
    """One test in one mode beside the same test with TRL's own attention."""

    test: str
    mode: str
    stock: str  # passed, failed or skipped
    ours: str  # the same, or "refused": an error of ours that says what is not supported
    message: str  # why it was not passed
    calls: int  # of our attention
    shared: bool  # whether a prompt was computed once
    first_difference: float  # of the losses of the first training step, relative; NaN: no training
    largest_difference: float  # of all steps


def compare(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """Rows of all tests in all modes but the stock one.

    Raises:
        KeyError: there is no stock run of a test.
    """
    stock = {r["test"]: r for r in records[STOCK]}
    rows = []
    for mode, results in records.items():
        if mode == STOCK:
            continue
        for ours in results:
            theirs = stock[ours["test"]]
            differences = _differences(ours["losses"], theirs["losses"])
            both = ours["outcome"] == theirs["outcome"] == "passed" and differences
            message = " ".join(ours["message"].split())[:300]
            rows.append(
                Row(
                    ours["test"], mode, theirs["outcome"], _outcome(ours["outcome"], message), message,
                    ours.get("calls", 0), ours["shared"], differences[0] if both else math.nan,
                    max(differences) if both else math.nan,
                )
            )  # fmt: skip
    return rows


def _outcome(outcome: str, message: str) -> str:
    return "refused" if outcome == "failed" and "padding_free=True: " in message else outcome


def _differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    if len(ours) != len(theirs):
        return [math.inf] if ours or theirs else []
    return [abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True)]


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


def table(rows: Sequence[Row]) -> str:
    """A line for every file and mode: how many tests end how."""
    lines = []
    groups = sorted({(row.test.split("::")[0], row.mode) for row in rows})
    for file, mode in groups:
        group = [row for row in rows if row.test.split("::")[0] == file and row.mode == mode]
        passed = [row for row in group if row.ours == "passed"]
        lost = [row for row in group if row.stock == "passed" and row.ours not in ("passed", "refused")]
        first = max((row.first_difference for row in passed if row.first_difference >= 0), default=math.nan)
        lines.append(
            [
                file, mode, str(len(group)), str(sum(row.stock == "passed" for row in group)), str(len(passed)),
                str(sum(row.ours == "refused" for row in group)), str(len(lost)),
                str(sum(row.calls > 0 for row in passed)), str(sum(row.shared for row in passed)), f"{first:.1e}",
            ]
        )  # fmt: skip
    header = ["file", "mode", "tests", "stock passes", "ours passes", "refused", "lost", "ran ours", "shared", "loss"]
    return text_table(header, lines)
