"""Dense masks and row intervals to bounds: exactly, or with an error that says where it cannot be."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import intervals
from .column_mask import ColumnMask

# An additive mask hides a key when its weight underflows to zero. -1e4 does so in float32 for any sane score, and is
# the largest constant that models use (BERT); finfo.min and -inf lie below it.
MASKED_AT_MOST = -1e4


def from_dense(mask: Tensor) -> ColumnMask:
    """See :meth:`ColumnMask.from_dense`."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.ndim != 4 or 0 in mask.shape:
        raise ValueError(f"mask must be a non-empty [B|1, H|1, Sq, Sk] tensor, got shape {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"mask must be bool (True = visible) or additive float, got {mask.dtype}; for a 0/1 mask pass mask.bool()"
        )
    refuse_gradient(mask)
    mask = mask.detach()
    # A broadcast dimension (stride 0) holds one mask, whatever its size says.
    mask = mask[tuple(slice(0, 1) if mask.stride(d) == 0 else slice(None) for d in range(2))]

    def masked(first: int, last: int) -> Tensor:
        rows = mask[:, :, first:last]
        if mask.dtype == torch.bool:
            return ~rows
        hidden = rows <= MASKED_AT_MOST
        odd = ~hidden & (rows != 0)
        if odd.any():
            b, h, i, j = (int(x) for x in odd.nonzero()[0])
            raise ValueError(
                f"an additive mask must be 0 (visible) or at most {MASKED_AT_MOST:g} (masked) everywhere, but "
                f"mask[{b}, {h}, {first + i}, {j}] is {float(rows[b, h, i, j])}; a bias that is neither is not a mask: "
                "use attn_implementation='sdpa' or 'eager' for it"
            )
        return hidden

    return from_row_blocks(mask.shape, masked, mask.device)


def refuse_gradient(mask: Tensor) -> None:
    """
    Raises:
        NotImplementedError: a gradient is wanted of the mask.
    """
    if mask.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "mask requires grad, but a mask has no gradient; pass mask.detach(), or, if it is a bias that is learned, "
            "use attn_implementation='sdpa' or 'eager' for it"
        )


def from_row_blocks(
    shape: tuple[int, ...], masked: Callable[[int, int], Tensor], device: torch.device, *, what: str = "mask"
) -> ColumnMask:
    """From a function that computes rows of a mask, without ever holding all of them.

    Args:
        shape: ``(B, H, Sq, Sk)``.
        masked: ``masked(first, last)`` gives bool ``[B, H, last - first, Sk]``, True = hidden.
        what: the subject of the error message.
    """
    batch, heads, q_len, kv_len = shape
    start, end, count = intervals.extract(q_len, (batch, heads, kv_len), masked, device)
    if (count > 2).any():
        b, h, j = (int(x) for x in (count > 2).nonzero()[0])
        # One column: read it again for the message.
        column = torch.cat([masked(f, t)[b, h, :, j] for f, t in intervals.row_blocks(q_len, batch * heads * kv_len)])
        edges = torch.nn.functional.pad(column.to(torch.int8), (1, 1)).diff().nonzero()[:, 0].tolist()
        _refuse(what, b, h, j, list(zip(edges[::2], edges[1::2], strict=True)))
    return _fewest_bounds(start, end, q_len)


def from_masked_intervals(start: Tensor, end: Tensor, *, q_len: int) -> ColumnMask:
    """See :meth:`ColumnMask.from_masked_intervals`."""
    for name, t in (("start", start), ("end", end)):
        if not isinstance(t, Tensor) or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"{name} must be an integer tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if start.ndim != 4 or start.shape != end.shape or 0 in start.shape:
        raise ValueError(
            f"start and end must both be [B|1, Hm|1, K, Sk], got {tuple(start.shape)} and {tuple(end.shape)}"
        )
    start, end, count = intervals.merge(start, end, q_len)
    if (count > 2).any():
        b, h, j = (int(x) for x in (count > 2).nonzero()[0])
        n = int(count[b, h, j])
        _refuse("mask", b, h, j, list(zip(start[b, h, :n, j].tolist(), end[b, h, :n, j].tolist(), strict=True)))
    if start.shape[2] == 1:
        start, end = (torch.nn.functional.pad(t, (0, 0, 0, 1), value=q_len) for t in (start, end))
    return _fewest_bounds(start[:, :, :2], end[:, :, :2], q_len)


def _refuse(what: str, batch: int, head: int, column: int, found: list[tuple[int, int]]) -> None:
    shown = ", ".join(f"[{a}, {b})" for a, b in found[:6]) + (", ..." if len(found) > 6 else "")
    raise ValueError(
        f"{what} is not representable as column bounds: batch {batch}, head {head}, key column {column} hides "
        f"{len(found)} separate query intervals, {shown}, and a column mask holds two; "
        "use attn_implementation='sdpa' for this mask"
    )


def _fewest_bounds(start: Tensor, end: Tensor, q_len: int) -> ColumnMask:
    """Choose the smallest exact form for disjoint ascending intervals ``[B, H, 2, Sk]``, empties last."""
    kv_len = start.shape[-1]
    (s0, s1), (e0, e1) = start.unbind(2), end.unbind(2)
    triangle = (torch.arange(kv_len, dtype=torch.int32, device=start.device) - (kv_len - q_len)).clamp(0, q_len)
    none0, none1 = s0 >= q_len, s1 >= q_len
    # What is left when the causal triangle [0, triangle) is taken out: one interval (rest_start, rest_end), or two.
    covers = (triangle == 0) | ((s0 == 0) & (e0 >= triangle))
    exact = (triangle > 0) & (s0 == 0) & (e0 == triangle)
    rest_start = torch.where(exact, s1, torch.where(triangle > 0, triangle, s0))
    rest_end = torch.where(exact, e1, e0)
    causal_two = covers & (exact | none1)
    empty = rest_start >= rest_end
    rest_start, rest_end = rest_start.masked_fill(empty, q_len), rest_end.masked_fill(empty, q_len)
    causal_one = causal_two & (empty | (rest_end >= q_len))
    # Otherwise: visible rows in one piece, [UTE, LTS).
    upper = ~none0 & (s0 == 0)
    ute = torch.where(upper, e0, 0)
    lts = torch.where(upper, s1, s0)
    last = torch.where(upper, e1, e0)
    open_ended = (lts >= q_len) | (last >= q_len)
    two = open_ended & (upper | none1)
    checks = torch.stack([c.all() for c in (causal_one, two, causal_two)]).tolist()
    if checks[0]:
        return ColumnMask(rest_start.unsqueeze(2), causal=True, q_len=q_len)
    if checks[1]:
        return ColumnMask(torch.stack((lts, ute), 2), causal=False, q_len=q_len)
    if checks[2]:
        return ColumnMask(torch.stack((rest_start, rest_end), 2), causal=True, q_len=q_len)
    return ColumnMask(torch.stack((s0, e0, s1, e1), 2), causal=False, q_len=q_len)
