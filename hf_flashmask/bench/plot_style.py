"""What the pictures of all benchmarks have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, str]

# Okabe and Ito's colours, which stay apart for colour-blind readers; hatches and markers for those who print.
OURS = "#0072b2"
INK = "#333a41"
# Of a method: what it is called, its colour, hatch and marker.
METHODS = {
    "sdpa": ("sdpa", "#e69f00", "///", "s"),
    "sdpa_mask": ("sdpa, dense mask", "#e69f00", "///", "s"),
    "sdpa_mask_repeated": ("sdpa, dense mask, keys repeated", "#d55e00", "xxx", "v"),
    "flex_attention": ("FlexAttention", "#009e73", "...", "^"),
    "flex": ("FlexAttention", "#009e73", "...", "^"),
    "flash_varlen": ("FlashAttention, varlen", "#cc79a7", "\\\\\\", "D"),
    "flashmask": ("flashmask", OURS, "", "o"),
    "flashmask_shared": ("flashmask, prompts shared", "#56b4e9", "", "P"),
}


class Untimed(Exception):
    """A file holds no measurement that was timed."""


def timed(rows: Sequence[Row], column: str) -> list[Row]:
    """Rows with something in the column.

    Raises:
        Untimed: there are none.
    """
    found = [row for row in rows if row[column]]
    if not found:
        raise Untimed
    return found


def latest(rows: Sequence[Row], setup: Sequence[str]) -> list[Row]:
    """Of a file that holds several runs, the rows that agree with the last one in their setup."""
    return [row for row in rows if all(row[name] == rows[-1][name] for name in setup)]


def origin(rows: Sequence[Row]) -> str:
    """GPU and versions; several where a file holds several."""

    def of(column: str) -> str:
        return " / ".join(dict.fromkeys(row[column] for row in rows if row[column]))

    parts = [of("gpu"), f"torch {of('torch')}", f"triton {of('triton')}" if of("triton") else ""]
    return ", ".join(part for part in (*parts, f"commit {of('commit')}") if part)


def thousands(tokens: int) -> str:
    """4096 as 4K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def lengths_axis(ax: Axes, lengths: Sequence[int]) -> None:
    """Tokens from left to right, every doubling as wide as the last."""
    ax.set_xscale("log", base=2)
    named: list[int] = []
    for n in lengths:
        if not named or n >= 1.2 * named[-1]:  # labels of closer ones would run into each other
            named.append(n)
    ax.set_xticks(named, [thousands(n) for n in named], fontsize=9)
    ax.set_xticks([], minor=True)
    ax.set_xlim(min(lengths) / 1.25, max(lengths) * 1.25)


def plain(ax: Axes) -> None:
    ax.grid(axis="y", color="#d9dee3", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#8a949e")
    ax.tick_params(colors=INK)
