"""The table as CSV and Markdown, and what one run lost against another."""

from __future__ import annotations

import csv
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from hf_flashmask.bench.records import Refusal, read

from .outcome import CASES, COLUMNS, FAILED, MISMATCH, OK, STATUSES, Row


def write_csv(rows: Iterable[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.as_dict() for row in rows)


def read_csv(path: Path) -> list[Row]:
    """
    Raises:
        Refusal: it is no file that ``write_csv`` wrote.
    """
    found = read(path)
    if missing := set(COLUMNS) - found[0].keys():
        raise Refusal(f"{path} is no table of 'flashmask check --models': it has no column {min(missing)}")
    return [Row(**{name: row[name] for name in COLUMNS}) for row in found]


def wrong(rows: Iterable[Row]) -> list[str]:
    """Types of which a case differs from eager or whose check failed."""
    return [f"{row.kind} {row.type}: {row.status} ({row.reason})" for row in rows if row.status in (MISMATCH, FAILED)]


def lost(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """What was ok before and is not now, of types and of their cases; only types that both hold."""
    now = {(row.kind, row.type): row for row in after}
    losses = []
    for old in before:
        new = now.get((old.kind, old.type))
        if new is None:
            continue
        if old.status == OK and new.status != OK:
            losses.append(f"{old.kind} {old.type}: was ok, now {new.status} ({new.reason})")
            continue
        for name, cell in old.cases().items():
            if cell == OK and getattr(new, name) != OK:
                losses.append(f"{old.kind} {old.type}, {name}: was ok, now {getattr(new, name) or 'not run'}")
    return losses


def summary(rows: Sequence[Row]) -> str:
    """Counts of statuses a kind, as a Markdown table."""
    kinds = list(dict.fromkeys(row.kind for row in rows))
    counts = Counter((row.kind, row.status) for row in rows)
    lines = ["| kind | types | " + " | ".join(STATUSES) + " |", "|---" * (2 + len(STATUSES)) + "|"]
    for kind in kinds:
        cells = [counts[kind, status] for status in STATUSES]
        lines.append(f"| {kind} | {sum(cells)} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def markdown(rows: Sequence[Row], command: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    lines = [
        "# Model coverage",
        "",
        f"Made by `{command}` with {versions}, Python {platform.python_version()}. Every model type that the",
        "installed Transformers can build offline, tiny and random, in float32 on a CPU; flashmask against eager with",
        "the same weights. Do not edit.",
        "",
        summary(rows),
        "",
        *(f"- **{status}**: {meaning}." for status, meaning in STATUSES.items()),
        "",
        "Cases: left and right padding; `packed`, two documents in one row (images in one row for towers) against",
        "eager on each alone, with and without a cache; `mask4d`, an additive mask of questions and answers that do",
        "not see each other; `dynamic` and `static`, greedy decoding behind padding, tokens and scores, through the",
        "cache whose kinds of layers stand in `cache`; `gradient`, of every parameter. `-` does not apply, `~` leaks",
        "as eager does, `sdpa` equals sdpa where padding reaches recurrent layers or eager is not causal, `refused`",
        "raises an error that says why. Reasons of every cell are in the CSV file of the same name.",
        "",
    ]
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        lines += [f"## {kind}", ""]
        run = [row for row in of_kind if row.cases()]
        if run:
            lines += ["| type | status | cache | " + " | ".join(CASES) + " | |", "|---" * (4 + len(CASES)) + "|"]
            for row in run:
                cells = " | ".join(_short(getattr(row, name)) for name in CASES)
                lines.append(f"| {row.type} | {row.status} | {row.cache} | {cells} | {_escape(row.reason)} |")
            lines.append("")
        rest = [row for row in of_kind if not row.cases()]
        if rest:
            lines += ["| type | status | reason |", "|---|---|---|"]
            lines += [f"| {row.type} | {row.status} | {_escape(row.reason)} |" for row in rest]
            lines.append("")
    return "\n".join(lines)


def _short(cell: str) -> str:
    word = cell.partition(":")[0]
    return {"": "-", "n/a": "-", "leaks as eager": "~", "as sdpa": "sdpa"}.get(word, word)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
