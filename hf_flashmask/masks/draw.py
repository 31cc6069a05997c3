"""Pictures of a mask: text for a terminal, a matplotlib figure for everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .column_mask import ColumnMask

_MAX_CELLS = 128
_HIDDEN, _PARTIAL, _VISIBLE = "#eef1f4", "#f2a65a", "#2f6690"


def _one(mask: ColumnMask, batch: int, head: int) -> ColumnMask:
    """The mask of one batch row and head; a dimension of size 1 serves every index."""
    at = []
    for name, index, size in (("batch", batch, mask.shape[0]), ("head", head, mask.shape[1])):
        if index < 0 or (size > 1 and index >= size):
            raise ValueError(f"{name} must be in [0, {size}), got {index}")
        at.append(min(index, size - 1))
    return mask[at[0] : at[0] + 1, at[1] : at[1] + 1]


def _cells(mask: ColumnMask, size: int) -> tuple[torch.Tensor, int]:
    """States of square cells, at most ``size`` a side, and the tokens that a cell stands for."""
    block = max(1, -(-max(mask.q_len, mask.kv_len) // size))
    return mask.tile_map(block, block)[0, 0].cpu(), block


def draw(mask: ColumnMask, size: int = 32, *, batch: int = 0, head: int = 0) -> str:
    """See :meth:`ColumnMask.draw`."""
    if size < 1:
        raise ValueError(f"size must be positive, got {size}")
    cells, _ = _cells(_one(mask, batch, head), size)
    return "\n".join(" ".join(".+#"[c] for c in row) for row in cells.tolist())


def plot(
    mask: ColumnMask, *, batch: int = 0, head: int = 0, title: str | None = None, ax: Axes | None = None
) -> Figure:
    """See :meth:`ColumnMask.plot`."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    one = _one(mask, batch, head)
    cells, block = _cells(one, _MAX_CELLS)
    if ax is None:
        # Figure, not pyplot: no global state, no backend, nothing to close.
        ax = Figure(figsize=(5.2, 5.6), dpi=100, layout="constrained").subplots()
    ax.imshow(
        cells.numpy(),
        cmap=ListedColormap([_HIDDEN, _PARTIAL, _VISIBLE]),
        vmin=0,
        vmax=2,
        interpolation="nearest",
        extent=(0, cells.shape[1] * block, cells.shape[0] * block, 0),
    )
    ax.set_xlim(0, one.kv_len)
    ax.set_ylim(one.q_len, 0)
    if max(one.q_len, one.kv_len) <= 32:
        ax.set_xticks(range(one.kv_len + 1), minor=True)
        ax.set_yticks(range(one.q_len + 1), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.8)
        ax.tick_params(which="minor", length=0)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.spines[:].set_visible(False)
    states = [("hidden", _HIDDEN), ("partial", _PARTIAL), ("visible", _VISIBLE)]
    handles = [
        Patch(facecolor=c, edgecolor="#8a949e", linewidth=0.6, label=n)
        for n, c in states
        if n != "partial" or block > 1
    ]
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False, fontsize=9)
    unit = "" if block == 1 else f", cells of {block} x {block} tokens"
    ax.set_title(f"{title or 'mask'}\n{one.density():.1%} visible{unit}", fontsize=10)
    return cast("Figure", ax.figure)
