"""The mask of rows merged into a prefix tree, in layers of full attention and of a sliding window.

A window counts tokens along a row, so inside a tree it hides other intervals in every branch, which two intervals a key
cannot say. Layers with a window therefore take the rows apart: their queries, keys and values are gathered into rows,
which attend as rows do, and each token of the tree keeps the result of one row that holds it. Exact, and no dearer than
the window is without a tree; what is shared stays shared everywhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_flashmask.attention import flashmask_attention
from hf_flashmask.masks import ColumnMask


class TreeRows(NamedTuple):
    """The rows ``[N, L]`` that a tree of T tokens was made from."""

    places: Tensor  # int64 [N, L]: where every token of the rows stands in the tree; 0 for padding
    real: Tensor  # bool [N, L]: False for padding

    def origins(self, size: int) -> Tensor:
        """int64 ``[T]``: for every token of the tree, the first place of the flattened rows that holds it."""
        n_places = self.places.numel()
        at = torch.arange(n_places, device=self.places.device)
        place = torch.where(self.real, self.places, size).flatten()
        first = torch.full((size + 1,), n_places - 1, dtype=torch.int64, device=at.device)
        return first.scatter_reduce_(0, place, at, "amin")[:size]


class TreeMask(ColumnMask):
    """The column mask of a prefix tree, ``[1, 1, T, T]``, which knows its rows."""

    __slots__ = ("tree_rows",)

    def __init__(self, bounds: Tensor, *, causal: bool, q_len: int | None = None, tree_rows: TreeRows) -> None:
        super().__init__(bounds, causal=causal, q_len=q_len)
        self.tree_rows = tree_rows

    @property
    def row_len(self) -> int:
        return self.tree_rows.places.shape[1]

    def within(self, window: int | None) -> TreeMask:
        """For layers in which a token sees the last ``window`` tokens of its row, itself included; None = all."""
        if window is None or window >= self.row_len:
            return self
        return WindowedTree(self.bounds, causal=self.causal, q_len=self.q_len, tree_rows=self.tree_rows, window=window)

    def _arguments(self) -> dict[str, Any]:
        return {"causal": self.causal, "q_len": self.q_len, "tree_rows": self.tree_rows}

    def _moved(self, bounds: Tensor) -> TreeMask:
        rows = TreeRows(*(t.to(bounds.device) for t in self.tree_rows))
        return type(self)(bounds, **{**self._arguments(), "tree_rows": rows})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.bounds, self._arguments())


class WindowedTree(TreeMask):
    """A tree whose rows are attended to through a window: ``attend`` instead of a kernel over its bounds."""

    __slots__ = ("_origins", "_rows_mask", "window")

    def __init__(
        self, bounds: Tensor, *, causal: bool, q_len: int | None = None, tree_rows: TreeRows, window: int
    ) -> None:
        super().__init__(bounds, causal=causal, q_len=q_len, tree_rows=tree_rows)
        self.window = window
        self._origins = tree_rows.origins(self.kv_len)
        at = torch.arange(self.row_len, dtype=torch.int32, device=bounds.device)
        until = (at + window).expand(tree_rows.real.shape).masked_fill(~tree_rows.real, 0)
        self._rows_mask = ColumnMask(until[:, None, None].contiguous(), causal=True)

    def _arguments(self) -> dict[str, Any]:
        return {**super()._arguments(), "window": self.window}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """``flashmask_attention`` of ``[1, T, H, D]`` tensors in the order of the tree."""
        places = self.tree_rows.places
        q, k, v = (t[0].index_select(0, places.flatten()).view(*places.shape, *t.shape[2:]) for t in (q, k, v))
        out = flashmask_attention(q, k, v, self._rows_mask, **options)
        return out.flatten(0, 1).index_select(0, self._origins)[None]

    def __getitem__(self, index: Any) -> ColumnMask:
        raise NotImplementedError("a tree with a window cannot be sliced: its bounds do not hold the window")

    def __and__(self, other: ColumnMask) -> ColumnMask:
        raise NotImplementedError("a tree with a window cannot be combined: its bounds do not hold the window")

    def _raw_intervals(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a tree with a window has no column bounds; use attend()")


def _rebuild(kind: type[TreeMask], bounds: Tensor, arguments: dict[str, Any]) -> TreeMask:
    return kind(bounds, **arguments)
