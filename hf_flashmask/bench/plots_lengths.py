"""Pictures of training against the length of a row: ``bench sweep`` and ``bench longest``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .plot_style import INK, METHODS, Row, latest, lengths_axis, origin, plain, timed
from .sweep import SETUP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TASKS = {"sft": "SFT, all parameters", "lora": "LoRA", "dpo": "DPO, all parameters", "rm": "RM, all parameters"}
_PANELS = (("tokens_per_s", 1e-3, "thousand tokens a second"), ("peak_mib", 1 / 1024, "peak memory, GiB"))
_LONGEST_SETUP = ("gpu", "layers", "layers_run", "hidden", "document")


def sweep(rows: Sequence[Row]) -> Figure:
    """Tokens a second and memory, a panel a task, a line a method."""
    from matplotlib.figure import Figure

    rows = latest(rows, ("gpu", *SETUP))
    measured = timed(rows, "seconds")
    panels = [panel for panel in _PANELS if any(row[panel[0]] for row in measured)]
    tasks = [task for task in _TASKS if any(row["task"] == task for row in measured)]
    figure = Figure(figsize=(max(7.0, 3.7 * len(tasks)), 3.1 * len(panels) + 1.2), dpi=120, layout="constrained")
    grid = figure.subplots(len(panels), len(tasks), squeeze=False)
    for i, (line, (column, unit, label)) in enumerate(zip(grid, panels, strict=True)):
        for ax, task in zip(line, tasks, strict=True):
            own = [row for row in rows if row["task"] == task]
            _curves(ax, own, column, unit)
            if i == 0:
                ax.set_title(_TASKS[task], fontsize=11, color=INK)
            if i == len(panels) - 1:
                ax.set_xlabel("tokens of the packed row", color=INK)
        line[0].set_ylabel(label, color=INK)
    _legend(figure, measured, any(_out_of_memory(row) for row in rows))
    row = rows[-1]
    shape = f"{row['layers']} layers x {row['hidden']}, {row['dtype']}, full recomputation, AdamW"
    figure.suptitle(f"Training steps of a Llama, {shape}\n{origin(measured)}", fontsize=12)
    return figure


def longest(rows: Sequence[Row]) -> Figure:
    """Memory against the length of a row, to what does not fit."""
    from matplotlib.figure import Figure

    rows = latest(rows, _LONGEST_SETUP)
    measured = timed(rows, "peak_mib")
    figure = Figure(figsize=(7.0, 4.6), dpi=120, layout="constrained")
    ax = figure.subplots()
    # The shortest row that did not fit says it.
    failed = {
        m: min((int(r["tokens"]) for r in rows if r["method"] == m and r["fits"] == "no"), default=0) for m in METHODS
    }
    shown = [r for r in rows if r["fits"] == "yes" or int(r["tokens"]) == failed[r["method"]]]
    _curves(ax, shown, *_PANELS[1][:2])
    ax.set_xlabel(f"tokens of the packed row, documents of {int(rows[-1]['document']):,}", color=INK)
    ax.set_ylabel(_PANELS[1][2], color=INK)
    _legend(figure, measured, any(failed.values()))
    row = rows[-1]
    figure.suptitle(
        f"LoRA steps of a Llama of {row['layers']} layers x {row['hidden']}, full recomputation\n{origin(measured)}",
        fontsize=11.5,
    )
    return figure


def _out_of_memory(row: Row) -> bool:
    return "out of memory" in row["note"].lower()


def _curves(ax: Axes, rows: Sequence[Row], column: str, unit: float) -> None:
    """A line a method, and a cross at the length that its memory did not hold."""
    lengths = sorted({int(row["tokens"]) for row in rows if row[column] or _out_of_memory(row)})
    lengths_axis(ax, lengths)
    crosses: dict[int, int] = {}
    for method, (_, color, _, _) in METHODS.items():
        points = sorted(
            (int(r["tokens"]), float(r[column]) * unit) for r in rows if r["method"] == method and r[column]
        )
        if points:
            ax.plot(*zip(*points, strict=True), **_line_style(method), zorder=2 if method == "flashmask" else 3)
        for tokens in (int(r["tokens"]) for r in rows if r["method"] == method and _out_of_memory(r)):
            # Crosses of several methods stand above each other, at the foot of the picture.
            above = crosses[tokens] = crosses.get(tokens, -1) + 1
            ax.plot(
                [tokens], [0.045 + 0.075 * above], marker="X", color=color, markersize=8, linestyle="none",
                transform=ax.get_xaxis_transform(), markeredgecolor="white", markeredgewidth=0.6, zorder=4,
            )  # fmt: skip
    ax.set_ylim(0, 1.08 * max(float(row[column]) * unit for row in rows if row[column]))
    plain(ax)


def _line_style(method: str) -> dict[str, Any]:
    """Curves may lie on each other, so ours is a broad one, below the rest."""
    _, color, _, marker = METHODS[method]
    broad = method == "flashmask"
    return {
        "color": color, "marker": marker, "markersize": 7.5 if broad else 4.5, "linewidth": 3.4 if broad else 1.4,
    }  # fmt: skip


def _legend(figure: Figure, rows: Sequence[Row], crosses: bool) -> None:
    from matplotlib.lines import Line2D

    used = [name for name in METHODS if any(row["method"] == name for row in rows)]
    handles = [Line2D([], [], **_line_style(name), label=METHODS[name][0]) for name in used]
    if crosses:
        handles.append(Line2D([], [], color=INK, marker="X", markersize=8, linestyle="none", label="out of memory"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
