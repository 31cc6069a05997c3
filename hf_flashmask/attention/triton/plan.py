"""Makes a TilePlan on the device: three small kernels, no host sync, exact for any column mask.

A column hides at most two row intervals, so along the row tiles its state changes at most eight times. For a block of
columns these changes are counted into bins and summed up, which gives the state of every tile of the block in
O(columns + tiles), with no look at single entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_flashmask.attention.plan import MAX_SPANS, TileList, TilePlan
from hf_flashmask.masks import ColumnMask

from .primitives import LENGTHS

# Tiles looked at in one step; the first and last 16 of them only lend their state to their neighbours.
_CHUNK = 512
_MAX_TILES = 2**15 - 1  # span ends are int16
_COMPARED = 128
# An end that no row reaches.
_FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _load_padded(bounds, n, kv_len, NUM_BOUNDS: tl.constexpr):
    """The bound vectors of columns n; those beyond NUM_BOUNDS repeat the first. Columns that do not exist hide all."""
    inside = n < kv_len
    b0 = tl.load(bounds + n, mask=inside, other=0)
    b1 = b0
    b2 = b0
    b3 = b0
    if NUM_BOUNDS >= 2:
        b1 = tl.load(bounds + kv_len + n, mask=inside, other=_FAR)
    if NUM_BOUNDS == 4:
        b2 = tl.load(bounds + 2 * kv_len + n, mask=inside, other=0)
        b3 = tl.load(bounds + 3 * kv_len + n, mask=inside, other=0)
    return b0, b1, b2, b3


@triton.jit
def _clip(start, end, q_len):
    """[start, end) within the rows; (q_len, q_len) if nothing is left."""
    start = tl.minimum(tl.maximum(start, 0), q_len)
    end = tl.minimum(tl.maximum(end, 0), q_len)
    empty = start >= end
    return tl.where(empty, q_len, start), tl.where(empty, q_len, end)


@triton.jit
def _hidden_rows(b0, b1, b2, b3, n, q_len, kv_len, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr):
    """Two disjoint ascending intervals of hidden rows for each column n; unused ones are (q_len, q_len)."""
    far = tl.full(n.shape, _FAR, tl.int32)
    zero = tl.zeros(n.shape, tl.int32)
    if NUM_BOUNDS == 4:
        s0, e0 = _clip(b0, b1, q_len)
        s1, e1 = _clip(b2, b3, q_len)
    elif CAUSAL:
        s0, e0 = _clip(b0, b1 if NUM_BOUNDS == 2 else far, q_len)
        s1, e1 = _clip(zero, n - (kv_len - q_len), q_len)
    else:
        s0, e0 = _clip(b0, far, q_len)
        s1, e1 = _clip(zero, b1, q_len)
    swap = s1 < s0
    first_start, first_end = tl.where(swap, s1, s0), tl.where(swap, e1, e0)
    second_start, second_end = tl.where(swap, s0, s1), tl.where(swap, e0, e1)
    joined = (second_start <= first_end) & (second_start < q_len)
    first_end = tl.where(joined, tl.maximum(first_end, second_end), first_end)
    second_start = tl.where(joined, q_len, second_start)
    second_end = tl.where(joined, q_len, second_end)
    return first_start, first_end, second_start, second_end


@triton.jit
def _tiles_inside(start, end, q_len, row_tiles, BLOCK_M: tl.constexpr):
    """The row tiles [first, last) that lie inside the rows [start, end)."""
    first = tl.cdiv(start, BLOCK_M)
    last = tl.where(end >= q_len, row_tiles, end // BLOCK_M)
    return first, tl.maximum(first, last)


@triton.jit
def _tiles_touched(start, end, q_len, row_tiles, BLOCK_M: tl.constexpr):
    """The row tiles [first, last) that the rows [start, end) touch."""
    empty = start >= q_len
    return tl.where(empty, row_tiles, start // BLOCK_M), tl.where(empty, row_tiles, tl.cdiv(end, BLOCK_M))


@triton.jit
def _changes(first, last, origin, CHUNK: tl.constexpr):
    """[CHUNK] bins: ranges that begin less those that end there; what comes before the chunk is in bin 15."""
    first = tl.minimum(tl.maximum(first - origin, 15), CHUNK - 1)
    last = tl.minimum(tl.maximum(last - origin, 15), CHUNK - 1)
    return tl.histogram(first, CHUNK) - tl.histogram(last, CHUNK)


@triton.jit
def _record(spans, state, before, tile, counted, begun, ended, capacity):
    """Write the spans that begin or end at ``tile`` ([CHUNK]), whose state and the one before are given.

    States: 0 hidden, 1 partial, 2 full. The i-th begin and the i-th end of a kind belong together. ``begun`` and
    ``ended`` count them so far, partial ones plus 65536 times full ones.
    """
    begins_partial = (state == 1) & (before != 1) & counted
    begins_full = (state == 2) & (before != 2) & counted
    ends_partial = (state != 1) & (before == 1) & counted
    ends_full = (state != 2) & (before == 2) & counted
    begins = begins_partial.to(tl.int32) + begins_full.to(tl.int32) * 65536
    ends = ends_partial.to(tl.int32) + ends_full.to(tl.int32) * 65536
    nth_begin = begun + tl.cumsum(begins, 0)
    nth_end = ended + tl.cumsum(ends, 0)
    slot = tl.where(begins_full, nth_begin // 65536, nth_begin % 65536) - 1
    at = tl.where(begins_full, slot + capacity, slot) * 2
    tl.store(spans + at, tile.to(tl.int16), mask=(begins_partial | begins_full) & (slot < capacity))
    # A tile can end a span of one kind only.
    slot = tl.where(ends_full, nth_end // 65536, nth_end % 65536) - 1
    at = tl.where(ends_full, slot + capacity, slot) * 2 + 1
    tl.store(spans + at, tile.to(tl.int16), mask=(ends_partial | ends_full) & (slot < capacity))
    return begun + tl.sum(begins, 0), ended + tl.sum(ends, 0)


@triton.jit
def _finish(spans, counts, begun, partial, full, first, last, capacity):
    """Write the counts; a list that did not fit becomes one partial span over all it visits."""
    fits = (begun % 65536 <= capacity) & (begun // 65536 <= capacity)
    tl.debug_barrier()  # the spans written before must not land after this one
    if not fits:
        tl.store(spans, first.to(tl.int16))
        tl.store(spans + 1, last.to(tl.int16))
    tl.store(counts, tl.where(fits, partial, last - first))
    tl.store(counts + 1, tl.where(fits, full, 0))


@triton.jit(do_not_specialize=LENGTHS)
def _columns_kernel(
    bounds, padded, words, spans, counts, q_len, kv_len, row_tiles, column_tiles, words_len, capacity,
    CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The list of one block of columns, its padded bounds, and the states of its tiles, 2 bits each, in ``words``
    [words_len, column_tiles].
    """
    mask = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    b0, b1, b2, b3 = _load_padded(bounds + mask * NUM_BOUNDS * kv_len, n, kv_len, NUM_BOUNDS)
    stride = column_tiles * BLOCK_N
    padded += mask * NUM_BOUNDS * stride
    tl.store(padded + n, b0)
    if NUM_BOUNDS >= 2:
        tl.store(padded + stride + n, b1)
    if NUM_BOUNDS == 4:
        tl.store(padded + 2 * stride + n, b2)
        tl.store(padded + 3 * stride + n, b3)
    s0, e0, s1, e1 = _hidden_rows(b0, b1, b2, b3, n, q_len, kv_len, CAUSAL, NUM_BOUNDS)
    inside_first_0, inside_last_0 = _tiles_inside(s0, e0, q_len, row_tiles, BLOCK_M)
    inside_first_1, inside_last_1 = _tiles_inside(s1, e1, q_len, row_tiles, BLOCK_M)
    touched_first_0, touched_last_0 = _tiles_touched(s0, e0, q_len, row_tiles, BLOCK_M)
    touched_first_1, touched_last_1 = _tiles_touched(s1, e1, q_len, row_tiles, BLOCK_M)
    # Both intervals may touch one tile, which counts once.
    touched_first_1 = tl.maximum(touched_first_1, touched_last_0)
    touched_last_1 = tl.maximum(touched_first_1, touched_last_1)

    line = mask * column_tiles + column
    spans += line * capacity * 4
    begun = 0
    ended = 0
    partial = 0
    full = 0
    first = row_tiles
    last = 0
    words += mask * words_len * column_tiles + column
    bins = tl.arange(0, CHUNK)
    for origin in range(-16, row_tiles - 15, CHUNK - 32):
        hidden = _changes(inside_first_0, inside_last_0, origin, CHUNK)
        hidden += _changes(inside_first_1, inside_last_1, origin, CHUNK)
        touched = _changes(touched_first_0, touched_last_0, origin, CHUNK)
        touched += _changes(touched_first_1, touched_last_1, origin, CHUNK)
        tile = origin + bins
        # How many columns of the block hide all of a tile, and any of it, summed up together.
        changes = hidden + touched * 65536
        totals = tl.cumsum(changes, 0)
        state = _state(totals, tile, row_tiles, BLOCK_N)
        before = _state(totals - changes, tile - 1, row_tiles, BLOCK_N)
        counted = (bins >= 16) & (bins < CHUNK - 16) & (tile <= row_tiles)
        begun, ended = _record(spans, state, before, tile, counted, begun, ended, capacity)
        partial += tl.sum(((state == 1) & counted).to(tl.int32), 0)
        full += tl.sum(((state == 2) & counted).to(tl.int32), 0)
        visited = (state > 0) & counted
        first = tl.minimum(first, tl.min(tl.where(visited, tile, row_tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(visited, tile + 1, 0), 0))
        packed = tl.sum(tl.reshape(state << (bins % 16) * 2, (CHUNK // 16, 16)), 1)
        word = tl.arange(0, CHUNK // 16)
        at = origin // 16 + word
        tl.store(
            words + at.to(tl.int64) * column_tiles,
            packed,
            mask=(word >= 1) & (word < CHUNK // 16 - 1) & (at < words_len),
        )
    _finish(spans, counts + line * 2, begun, partial, full, first, last, capacity)


@triton.jit
def _state(totals, tile, row_tiles, BLOCK_N: tl.constexpr):
    """0 hidden, 1 partial, 2 full: from the number of columns that hide all of it, plus 65536 times that hide any."""
    state = tl.where(totals % 65536 == BLOCK_N, 0, tl.where(totals // 65536 == 0, 2, 1))
    return tl.where((tile >= 0) & (tile < row_tiles), state, 0)


@triton.jit(do_not_specialize=LENGTHS)
def _rows_kernel(words, spans, counts, row_tiles, column_tiles, words_len, capacity, CHUNK: tl.constexpr):
    """The list of one block of rows, from the states of tiles that _columns_kernel left."""
    mask = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    line = mask * row_tiles + row
    spans += line * capacity * 4
    words += (mask * words_len + row // 16) * column_tiles
    begun = 0
    ended = 0
    partial = 0
    full = 0
    first = column_tiles
    last = 0
    for origin in range(0, column_tiles + 1, CHUNK):
        tile = origin + tl.arange(0, CHUNK)
        shift = row % 16 * 2
        state = (tl.load(words + tile, mask=tile < column_tiles, other=0) >> shift) & 3
        before = (tl.load(words + tile - 1, mask=(tile > 0) & (tile <= column_tiles), other=0) >> shift) & 3
        begun, ended = _record(spans, state, before, tile, tile <= column_tiles, begun, ended, capacity)
        partial += tl.sum((state == 1).to(tl.int32), 0)
        full += tl.sum((state == 2).to(tl.int32), 0)
        first = tl.minimum(first, tl.min(tl.where(state > 0, tile, column_tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(state > 0, tile + 1, 0), 0))
    _finish(spans, counts + line * 2, begun, partial, full, first, last, capacity)


@triton.jit(do_not_specialize=LENGTHS)
def _order_kernel(counts, order, lines, COMPARED: tl.constexpr):
    """Lines by falling weight, ties by position: every line counts those that go before it."""
    mask = tl.program_id(0).to(tl.int64)
    counts += mask * lines * 2
    line = tl.program_id(1) * COMPARED + tl.arange(0, COMPARED)
    weight = _weight(counts, line, lines)
    rank = tl.zeros([COMPARED], tl.int32)
    for start in range(0, lines, COMPARED):
        other = start + tl.arange(0, COMPARED)
        heavier = _weight(counts, other, lines)[None, :] - weight[:, None]
        goes_before = (heavier > 0) | ((heavier == 0) & (other[None, :] < line[:, None]))
        rank += tl.sum((goes_before & (other < lines)[None, :]).to(tl.int32), 1)
    tl.store(order + mask * lines + rank, line, mask=line < lines)


@triton.jit
def _weight(counts, line, lines):
    """Time of a line; masking makes a partial tile an eighth dearer."""
    partial = tl.load(counts + line * 2, mask=line < lines, other=0)
    return partial * 9 + tl.load(counts + line * 2 + 1, mask=line < lines, other=0) * 8


def build(mask: ColumnMask, block_m: int, block_n: int) -> TilePlan:
    """The plan of a mask on a CUDA device (or any, in Triton's interpreter), in O(Sk + tiles / 16) scratch memory.

    Raises:
        NotImplementedError: more than 32767 tiles along a side.
    """
    bounds = mask.bounds.contiguous()
    masks, kv_len = bounds.shape[0] * bounds.shape[1], mask.kv_len
    row_tiles, column_tiles = triton.cdiv(mask.q_len, block_m), triton.cdiv(kv_len, block_n)
    if max(row_tiles, column_tiles) > _MAX_TILES:
        raise NotImplementedError(
            f"the mask has {row_tiles} x {column_tiles} tiles of {block_m} x {block_n}; at most {_MAX_TILES} a side"
        )
    words_len = triton.cdiv(row_tiles, 16)
    padded = torch.empty(masks * bounds.shape[2], column_tiles * block_n, dtype=torch.int32, device=mask.device)
    words = torch.empty(masks, words_len, column_tiles, dtype=torch.int32, device=mask.device)
    row_list, column_list = (_empty(bounds, *sides) for sides in ((row_tiles, column_tiles), (column_tiles, row_tiles)))
    _columns_kernel[masks, column_tiles](
        bounds, padded, words, column_list.spans, column_list.counts,
        mask.q_len, kv_len, row_tiles, column_tiles, words_len, column_list.capacity,
        CAUSAL=mask.causal, NUM_BOUNDS=bounds.shape[2], BLOCK_M=block_m, BLOCK_N=block_n, CHUNK=_CHUNK,
    )  # fmt: skip
    _rows_kernel[masks, row_tiles](
        words, row_list.spans, row_list.counts, row_tiles, column_tiles, words_len, row_list.capacity, CHUNK=_CHUNK
    )
    for tiles in (row_list, column_list):
        _order_kernel[masks, triton.cdiv(tiles.lines, _COMPARED)](
            tiles.counts, tiles.order, tiles.lines, COMPARED=_COMPARED
        )
    return TilePlan(block_m, block_n, padded, row_list, column_list)


def _empty(bounds: Tensor, lines: int, tiles: int) -> TileList:
    masks = bounds.shape[0] * bounds.shape[1]
    capacity = min((tiles + 1) // 2, MAX_SPANS)
    # One more span, since walking a list reads one beyond its end.
    spans = torch.empty(masks * lines * 2 * capacity + 1, 2, dtype=torch.int16, device=bounds.device)
    counts = torch.empty(masks, lines, 2, dtype=torch.int32, device=bounds.device)
    order = torch.empty(masks, lines, dtype=torch.int32, device=bounds.device)
    return TileList(spans, counts, order, capacity)
