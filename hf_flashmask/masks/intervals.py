"""Sets of query rows as short lists of intervals, one list per key column.

Everything a column mask can say is "these one or two row intervals are hidden", so converting, combining and counting
masks is interval arithmetic on ``[..., K, Sk]`` tensors with a small K. Starts are inclusive, ends exclusive, an
interval with ``start >= end`` is empty.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Elements of scratch per step of the streaming loops: bounds memory to a few dozen MiB whatever the length.
_SCRATCH_ELEMENTS = 1 << 21


def row_blocks(n_rows: int, elements_per_row: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose ``rows x elements_per_row`` scratch stays small."""
    step = max(1, _SCRATCH_ELEMENTS // max(1, elements_per_row))
    for start in range(0, n_rows, step):
        yield start, min(n_rows, start + step)


def merge(start: Tensor, end: Tensor, q_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort, clip to ``[0, q_len)`` and fuse overlapping or touching intervals.

    Args:
        start, end: int ``[..., K, Sk]``, in any order, possibly empty, overlapping or out of range.

    Returns:
        ``(start, end, count)``: int32 ``[..., K, Sk]`` disjoint ascending intervals, unused slots ``(q_len, q_len)``
        last, and the int32 ``[..., Sk]`` number of used slots.
    """
    start, end = start.clamp(0, q_len).to(torch.int32), end.clamp(0, q_len).to(torch.int32)
    empty = start >= end
    start, end = start.masked_fill(empty, q_len), end.masked_fill(empty, q_len)
    start, order = start.sort(dim=-2)
    end = end.gather(-2, order)
    reach = end.cummax(dim=-2).values
    opens = torch.ones_like(start, dtype=torch.bool)
    opens[..., 1:, :] = start[..., 1:, :] > reach[..., :-1, :]
    opens &= start < q_len
    slot = (opens.cumsum(-2) - 1).clamp(min=0)
    # Unused slots hold (q_len, 0) so that amin/amax ignore the empties that were filed under a real slot.
    used = start < q_len
    out_start = torch.full_like(start, q_len).scatter_reduce(-2, slot, start, "amin")
    out_end = torch.zeros_like(end).scatter_reduce(-2, slot, end.masked_fill(~used, 0), "amax")
    out_end = out_end.masked_fill(out_start >= q_len, q_len)
    return out_start, out_end, opens.sum(-2, dtype=torch.int32)


def covered(start: Tensor, end: Tensor, first: int | Tensor, last: int | Tensor) -> Tensor:
    """Rows of ``[first, last)`` that the disjoint intervals ``[..., K, Sk]`` cover: int ``[..., Sk]``."""
    lo, hi = start.clamp(min=first), end.clamp(max=last)
    return (hi - lo).clamp(min=0).sum(-2)


def run_spans(new: Tensor) -> tuple[Tensor, Tensor]:
    """First and end token of the run that each token is in: int64 ``[B, S]`` each; bool ``new`` marks beginnings."""
    n = new.shape[1]
    token = torch.arange(n, device=new.device).expand(new.shape)
    start = torch.where(new, token, 0).cummax(-1).values
    following = torch.cat((torch.where(new, token, n)[:, 1:], torch.full_like(token[:, :1], n)), 1)
    return start, following.flip(-1).cummin(-1).values.flip(-1)


def extract(
    n_rows: int, shape: tuple[int, int, int], rows: Callable[[int, int], Tensor], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the masked intervals of every column by streaming over blocks of rows.

    Args:
        n_rows: number of query rows.
        shape: ``(B, H, Sk)`` of the mask.
        rows: ``rows(first, last)`` gives the *masked* entries of those rows, bool ``[B, H, last - first, Sk]``.

    Returns:
        ``(start, end, count)``: the masked intervals of each column, int32 ``[B, H, 2, Sk]``, and how many there are,
        int32 ``[B, H, Sk]``. Where a column has three or more, the intervals are incomplete. Time is
        O(rows x columns), memory O(columns).
    """
    batch, heads, n_cols = shape
    # Rows where a column changes, in order: hidden from the first, seen again from the second, and so on.
    edges = torch.full((batch, heads, 4, n_cols), n_rows, dtype=torch.int32, device=device)
    count = torch.zeros((batch, heads, n_cols), dtype=torch.int64, device=device)
    previous = torch.zeros((batch, heads, 1, n_cols), dtype=torch.bool, device=device)
    for first, last in row_blocks(n_rows, batch * heads * n_cols):
        masked = rows(first, last)
        changes = masked ^ torch.cat((previous, masked[:, :, :-1]), dim=2)
        previous = masked[:, :, -1:]
        before, count = count, count + changes.sum(2)
        if bool((count > 4).any()):
            continue  # more than fits; go on counting, so that the first such column can be named
        # At most four a column, so the list is short. By column, then row; its place in the column is its slot.
        b, h, i, j = changes.nonzero(as_tuple=True)
        column = (b * heads + h) * n_cols + j
        column, order = column.sort(stable=True)
        place = torch.arange(column.numel(), device=device)
        place -= torch.searchsorted(column, column)
        b, h, i, j = (t[order] for t in (b, h, i, j))
        edges[b, h, before[b, h, j] + place, j] = (i + first).to(torch.int32)
    return edges[:, :, 0::2], edges[:, :, 1::2], ((count + 1) // 2).to(torch.int32)
