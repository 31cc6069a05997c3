"""What the runs of TRL's tests have in common and what not, as a CSV file and a table."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hf_flashmask.bench.measure import table as text_table

from .plugin import STOCK

# Losses of all steps within this of each other are the same curve.
CLOSE = 1e-4


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
    return [_difference(a, b) for a, b in zip(ours, theirs, strict=True)]


def _difference(ours: float, theirs: float) -> float:
    if math.isfinite(ours) and math.isfinite(theirs):
        return abs(ours - theirs) / max(1.0, abs(theirs))
    return 0.0 if str(ours) == str(theirs) else math.inf


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)


def table(rows: Sequence[Row]) -> str:
    """A line for every file and mode: how many tests end how, and how far losses of those that pass lie apart."""
    lines = []
    for file, mode in sorted({(row.test.split("::")[0], row.mode) for row in rows}):
        group = [row for row in rows if row.test.split("::")[0] == file and row.mode == mode]
        stock = [row for row in group if row.stock == "passed"]
        passed = [row for row in group if row.ours == "passed"]
        refused = [row for row in stock if row.ours == "refused"]
        lost = [row for row in stock if row.ours not in ("passed", "refused")]
        trained = [row for row in passed if not math.isnan(row.first_difference)]
        first = max((row.first_difference for row in trained), default=math.nan)
        # Counted, since one training in half precision would decide a maximum.
        close = sum(row.largest_difference <= CLOSE for row in trained)
        counts = [group, stock, passed, refused, lost, [r for r in passed if r.calls], [r for r in passed if r.shared]]
        lines.append([file, mode, *(str(len(c)) for c in counts), f"{first:.1e}", f"{close}/{len(trained)}"])
    return text_table(
        ["file", "mode", "tests", "stock", "ours", "refused", "lost", "ran ours", "shared", "first loss", "same curve"],
        lines,
    )
