"""RunPlan: the mask as runs of visible columns, for backends that call one routine per run from the host.

A run is a rectangle of the score matrix: a range of rows and a range of columns that is fully visible, or exactly a
causal square, or mixed. Rows are cut where many columns begin or end together (document boundaries), so that packed
causal documents come out as one causal square each; what is left is cut into blocks of ``block_m`` rows.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flashmask.masks import ColumnMask, intervals

from .plan import cached

# Equal bounds on this many columns make a row boundary worth cutting at.
_MIN_SHARED = 64
# Narrower runs are joined with their neighbours: a call costs more than the columns it would save.
_MIN_COLUMNS = 64
# A block of rows whose exact runs are few is taken whole.
_MAX_EXACT_RUNS = 16


class Kind(enum.IntEnum):
    HIDDEN = 0
    MIXED = 1
    FULL = 2
    CAUSAL = 3


class Run(NamedTuple):
    first: int
    last: int
    kind: Kind


class RowBlock(NamedTuple):
    first: int
    last: int
    runs: tuple[Run, ...]

    def extent(self) -> int:
        """The larger of its number of rows and the columns of its widest run."""
        return max(self.last - self.first, *(run.last - run.first for run in self.runs))


class RunPlan(NamedTuple):
    """Runs of every mask of a ``ColumnMask``: ``blocks[b][h]`` for its own batch rows and heads.

    ``start`` and ``end`` are its hidden intervals, int32 ``[B|1, Hm|1, 2, Sk]`` on its device, to mask mixed runs with.
    """

    blocks: tuple[tuple[tuple[RowBlock, ...], ...], ...]
    start: Tensor
    end: Tensor


def plan_runs(mask: ColumnMask, block_m: int, block_n: int, *, squares: bool) -> RunPlan:
    """Build a plan on the host. O(Sk) memory, O(Sq / block_m x Sk) time.

    Args:
        block_m: most rows of a block with mixed runs, or of any block when ``squares`` is False.
        block_n: most columns of a run, and most rows of a block without mixed runs.
        squares: whether the routine can be told of causal squares.
    """
    start, end = mask.masked_intervals()
    batch, heads = mask.shape[:2]

    def plan(b: int, h: int) -> tuple[RowBlock, ...]:
        return _Planner(start[b, h].cpu(), end[b, h].cpu(), mask.q_len, block_m, block_n, squares).plan()

    return RunPlan(tuple(tuple(plan(b, h) for h in range(heads)) for b in range(batch)), start, end)


def cached_plan(mask: ColumnMask, block_m: int, block_n: int, *, squares: bool) -> RunPlan:
    """``plan_runs``, remembered for the mask's bounds tensor."""
    key = ("runs", block_m, block_n, squares)
    return cached(mask, key, lambda: plan_runs(mask, block_m, block_n, squares=squares))


class _Planner:
    """Plans one mask given as two disjoint hidden intervals a column, int32 ``[2, Sk]`` on the CPU."""

    def __init__(self, start: Tensor, end: Tensor, q_len: int, block_m: int, block_n: int, squares: bool) -> None:
        self.start, self.end, self.q_len = start, end, q_len
        self.block_m, self.block_n, self.squares = block_m, block_n, squares

    def plan(self) -> tuple[RowBlock, ...]:
        blocks = []
        cuts = self._natural_cuts() if self.squares and self.q_len > _MIN_SHARED else [0, self.q_len]
        for natural in pairwise(cuts):
            for first, last in _even(*natural, self.block_n):
                whole = self._exact(first, last) if self.squares else None
                if whole is not None:
                    blocks.append(whole)
                else:
                    blocks += [self._block(a, b) for a, b in _even(first, last, self.block_m)]
        return tuple(b for b in blocks if b.runs)

    def _natural_cuts(self) -> list[int]:
        values, counts = torch.cat((self.start, self.end)).unique(return_counts=True)
        shared = values[(counts >= _MIN_SHARED) & (values > 0) & (values < self.q_len)].tolist()
        return [0, *shared, self.q_len]

    def _runs(self, first: int, last: int) -> list[Run]:
        """Maximal runs of columns in one state, for these rows; causal squares found."""
        rows = last - first
        visible = rows - intervals.covered(self.start, self.end, first, last)
        state = (visible > 0).to(torch.int8) + (visible == rows).to(torch.int8)
        edges = [0, *(state.diff().nonzero()[:, 0] + 1).tolist(), state.numel()]
        if len(edges) > state.numel() // _MIN_COLUMNS + _MAX_EXACT_RUNS:
            # Scattered columns: decide by groups of _MIN_COLUMNS instead.
            edges = [*range(0, state.numel(), _MIN_COLUMNS), state.numel()]
        runs = []
        for a, b in pairwise(edges):
            kinds = state[a:b]
            low, high = int(kinds.min()), int(kinds.max())
            runs.append(Run(a, b, Kind(low) if low == high else Kind.MIXED))
        return self._find_squares(runs, first, last)

    def _find_squares(self, runs: list[Run], first: int, last: int) -> list[Run]:
        """A mixed run whose column c + t hides exactly the rows before first + t is a causal square.

        Its column 0 is visible to all the rows, so the square is a mixed run and the full column before it.
        """
        if last - first == 1:
            return runs
        out: list[Run] = []
        for run in runs:
            before = out[-1] if out else None
            square = (
                run.kind == Kind.MIXED
                and run.last - run.first == last - first - 1
                and before is not None
                and before.kind == Kind.FULL
                and before.last == run.first
                and self._hides_triangle(run, first, last)
            )
            if square and before is not None:
                out.pop()
                if before.last - before.first > 1:
                    out.append(Run(before.first, before.last - 1, Kind.FULL))
                out.append(Run(run.first - 1, run.last, Kind.CAUSAL))
            else:
                out.append(run)
        return out

    def _hides_triangle(self, run: Run, first: int, last: int) -> bool:
        start, end = self.start[:, run.first : run.last], self.end[:, run.first : run.last]
        t = torch.arange(1, last - first, dtype=torch.int32)
        above = intervals.covered(start, end, first, first + t)
        return bool((above == t).all() and (intervals.covered(start, end, first, last) == t).all())

    def _exact(self, first: int, last: int) -> RowBlock | None:
        """The rows as one block, if full runs and causal squares describe them exactly."""
        runs = [r for r in self._runs(first, last) if r.kind != Kind.HIDDEN]
        if len(runs) > _MAX_EXACT_RUNS or any(r.kind == Kind.MIXED for r in runs):
            return None
        return RowBlock(first, last, tuple(piece for run in runs for piece in self._split(run)))

    def _block(self, first: int, last: int) -> RowBlock:
        runs: list[Run] = []
        for run in self._runs(first, last):
            width = run.last - run.first
            if run.kind == Kind.HIDDEN:
                # A narrow gap is cheaper to compute and mask than to jump over.
                if width >= _MIN_COLUMNS or not runs:
                    runs.append(run)
                    continue
                run = Run(run.first, run.last, Kind.MIXED)
            previous = runs[-1] if runs else None
            if (
                previous is not None
                and not {previous.kind, run.kind} & {Kind.HIDDEN, Kind.CAUSAL}
                and (previous.kind == run.kind or min(width, previous.last - previous.first) < _MIN_COLUMNS)
            ):
                kind = run.kind if previous.kind == run.kind else Kind.MIXED
                runs[-1] = Run(previous.first, run.last, kind)
            else:
                runs.append(run)
        return RowBlock(first, last, tuple(piece for run in runs for piece in self._split(run)))

    def _split(self, run: Run) -> list[Run]:
        if run.kind == Kind.HIDDEN:
            return []
        if run.kind == Kind.CAUSAL:
            return [run] if self.squares else self._split(Run(run.first, run.last, Kind.MIXED))
        return [Run(a, b, run.kind) for a, b in _even(run.first, run.last, self.block_n)]


def _even(first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut a range into as few and as equal parts of at most ``most`` as can be."""
    n = -(-(last - first) // most)
    return pairwise([first + (last - first) * i // n for i in range(n + 1)])
