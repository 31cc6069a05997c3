"""Makes tile lists on the device: two or three small kernels, no host sync, exact for any column mask.

A column hides at most two row intervals, so along the row tiles its state changes at most eight times. For a block of
columns these changes are counted into bins and summed up, which gives the state of every tile of the block in
O(columns + tiles), with no look at single entries.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_flashmask.attention.plan import MAX_SPANS, TileList
from hf_flashmask.masks import ColumnMask

from .primitives import LENGTHS

# Tiles looked at in one step; the first and last 16 of them only lend their state to their neighbours.
_CHUNK = 256
_MAX_TILES = 2**16 - 2  # spans are 16 bits, unsigned, and half as many of a kind fit into 15
_COMPARED = 64
# An end that no row reaches.
_FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _load_bounds(bounds, n, kv_len, NUM_BOUNDS: tl.constexpr):
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
    bounds, words, spans, counts, q_len, kv_len, row_tiles, column_tiles, words_len, capacity,
    CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    LIST: tl.constexpr,
):  # fmt: skip
    """One block of columns: its list, or else its tiles' states, 2 bits each, in ``words`` [words_len, column_tiles].

    Only chunks of tiles where a column changes are looked at tile by tile.
    """
    mask = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    b0, b1, b2, b3 = _load_bounds(bounds + mask * NUM_BOUNDS * kv_len, n, kv_len, NUM_BOUNDS)
    s0, e0, s1, e1 = _hidden_rows(b0, b1, b2, b3, n, q_len, kv_len, CAUSAL, NUM_BOUNDS)
    hides_0, hidden_0 = _tiles_inside(s0, e0, q_len, row_tiles, BLOCK_M)
    hides_1, hidden_1 = _tiles_inside(s1, e1, q_len, row_tiles, BLOCK_M)
    touches_0, touched_0 = _tiles_touched(s0, e0, q_len, row_tiles, BLOCK_M)
    touches_1, touched_1 = _tiles_touched(s1, e1, q_len, row_tiles, BLOCK_M)
    # Both intervals may touch one tile, which counts once.
    touches_1 = tl.maximum(touches_1, touched_0)
    touched_1 = tl.maximum(touches_1, touched_1)

    line = mask * column_tiles + column
    spans += line * capacity * 4
    words += mask * words_len * column_tiles + column
    begun = 0
    ended = 0
    partial = 0
    full = 0
    first = row_tiles
    last = 0
    bins = tl.arange(0, CHUNK)
    word = tl.arange(0, CHUNK // 16)
    STEP: tl.constexpr = CHUNK - 32
    for origin in range(-16, row_tiles - 15, STEP):
        begin = origin + 16
        changes = _within(hides_0, begin, STEP) | _within(hidden_0, begin, STEP)
        changes |= _within(hides_1, begin, STEP) | _within(hidden_1, begin, STEP)
        changes |= _within(touches_0, begin, STEP) | _within(touched_0, begin, STEP)
        changes |= _within(touches_1, begin, STEP) | _within(touched_1, begin, STEP)
        # Lists also begin and end at the edges of the mask.
        if (begin == 0) | (begin + STEP > row_tiles) | (tl.max(changes.to(tl.int32), 0) != 0):
            hidden = _changes(hides_0, hidden_0, origin, CHUNK) + _changes(hides_1, hidden_1, origin, CHUNK)
            touched = _changes(touches_0, touched_0, origin, CHUNK) + _changes(touches_1, touched_1, origin, CHUNK)
            tile = origin + bins
            # How many columns of the block hide all of a tile, and any of it, summed up together.
            steps = hidden + touched * 65536
            totals = tl.cumsum(steps, 0)
            state = _state(totals, tile, row_tiles, BLOCK_N)
            if LIST:
                before = _state(totals - steps, tile - 1, row_tiles, BLOCK_N)
                counted = (bins >= 16) & (bins < CHUNK - 16) & (tile <= row_tiles)
                begun, ended = _record(spans, state, before, tile, counted, begun, ended, capacity)
                partial += tl.sum(((state == 1) & counted).to(tl.int32), 0)
                full += tl.sum(((state == 2) & counted).to(tl.int32), 0)
                visited = (state > 0) & counted
                first = tl.minimum(first, tl.min(tl.where(visited, tile, row_tiles), 0))
                last = tl.maximum(last, tl.max(tl.where(visited, tile + 1, 0), 0))
            else:
                packed = tl.sum(tl.reshape(state << (bins % 16) * 2, (CHUNK // 16, 16)), 1)
                _store_words(words, packed, origin, word, words_len, column_tiles, CHUNK)
        else:
            hidden_here = _covers(hides_0, hidden_0, begin) + _covers(hides_1, hidden_1, begin)
            touched_here = _covers(touches_0, touched_0, begin) + _covers(touches_1, touched_1, begin)
            constant = _state(tl.sum(hidden_here + touched_here * 65536, 0), begin, row_tiles, BLOCK_N)
            if LIST:
                partial += tl.where(constant == 1, STEP, 0)
                full += tl.where(constant == 2, STEP, 0)
                first = tl.where(constant > 0, tl.minimum(first, begin), first)
                last = tl.where(constant > 0, begin + STEP, last)
            else:
                packed = tl.zeros([CHUNK // 16], tl.int32) + constant * 0x55555555
                _store_words(words, packed, origin, word, words_len, column_tiles, CHUNK)
    if LIST:
        _finish(spans, counts + line * 2, begun, partial, full, first, last, capacity)


@triton.jit
def _within(tile, begin, STEP: tl.constexpr):
    return (tile >= begin) & (tile < begin + STEP)


@triton.jit
def _covers(first, last, tile):
    return ((first <= tile) & (tile < last)).to(tl.int32)


@triton.jit
def _store_words(words, packed, origin, word, words_len, column_tiles, CHUNK: tl.constexpr):
    at = origin // 16 + word
    stored = (word >= 1) & (word < CHUNK // 16 - 1) & (at < words_len)
    tl.store(words + at.to(tl.int64) * column_tiles, packed, mask=stored)


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
        if tl.max((state != before).to(tl.int32), 0) != 0:
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


def build(mask: ColumnMask, block_m: int, block_n: int, *, by_columns: bool) -> TileList:
    """The list of every row of tiles, or of every column, in O(Sk) memory plus 2 bits a tile while it is made.

    The mask is on a GPU, or anywhere in Triton's interpreter.

    Raises:
        NotImplementedError: more than 65534 tiles along a side.
    """
    bounds = mask.bounds.contiguous()
    masks, kv_len = bounds.shape[0] * bounds.shape[1], mask.kv_len
    row_tiles, column_tiles = triton.cdiv(mask.q_len, block_m), triton.cdiv(kv_len, block_n)
    if max(row_tiles, column_tiles) > _MAX_TILES:
        raise NotImplementedError(
            f"the mask has {row_tiles} x {column_tiles} tiles of {block_m} x {block_n}; at most {_MAX_TILES} a side; "
            "use backend='torch'"
        )
    lines, tiles = (column_tiles, row_tiles) if by_columns else (row_tiles, column_tiles)
    capacity = min((tiles + 1) // 2, MAX_SPANS)
    # One more span, since walking a list reads one beyond its end.
    spans = torch.empty(masks * lines * 2 * capacity + 1, 2, dtype=torch.int16, device=mask.device)
    counts = torch.empty(masks, lines, 2, dtype=torch.int32, device=mask.device)
    order = torch.empty(masks, lines, dtype=torch.int32, device=mask.device)
    words_len = triton.cdiv(row_tiles, 16)
    words = counts if by_columns else torch.empty(masks, words_len, column_tiles, dtype=torch.int32, device=mask.device)
    _columns_kernel[masks, column_tiles](
        bounds, words, spans, counts, mask.q_len, kv_len, row_tiles, column_tiles, words_len, capacity,
        CAUSAL=mask.causal, NUM_BOUNDS=bounds.shape[2], BLOCK_M=block_m, BLOCK_N=block_n, CHUNK=_CHUNK, LIST=by_columns,
    )  # fmt: skip
    if not by_columns:
        _rows_kernel[masks, row_tiles](words, spans, counts, row_tiles, column_tiles, words_len, capacity, CHUNK=_CHUNK)
    _order_kernel[masks, triton.cdiv(lines, _COMPARED)](counts, order, lines, COMPARED=_COMPARED)
    return TileList(spans, counts, order, capacity)


def pad_bounds(mask: ColumnMask, block_n: int) -> Tensor:
    """A copy of the bounds, int32 ``[masks * C, Sk rounded up to block_n]``; the columns added hide every row."""
    masks, heads, vectors, kv_len = mask.bounds.shape
    padded = mask.bounds.new_zeros(masks, heads, vectors, triton.cdiv(kv_len, block_n) * block_n)
    padded[..., :kv_len] = mask.bounds
    if vectors > 1:
        padded[:, :, 1, kv_len:] = 2**31 - 1  # [0, LTE), or [0, UTE); the second of two intervals stays empty
    return padded.flatten(0, 2)
