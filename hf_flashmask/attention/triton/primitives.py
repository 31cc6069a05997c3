"""What the kernels share: loading tiles, masking with column bounds, walking a list of tiles, finding the work.

Names: m are query rows, n key columns; b, h batch and query head; a tile is BLOCK_M x BLOCK_N.
"""

import triton
import triton.language as tl

# Lengths and counts, which must not make a kernel compile anew (names a kernel lacks are ignored).
LENGTHS = (
    "q_len", "kv_len", "bounds_len", "stats_len", "words_len", "lines", "row_tiles", "row_blocks", "column_tiles",
    "capacity", "heads_total", "heads", "group", "mask_stride", "mask_heads", "head_group",
)  # fmt: skip
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# What the running maximum starts from: finite, so that rows which have seen nothing yet need no special case.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _tile_pointers(x, b, h, row, stride_b, stride_h, stride_s, rows, SIZE: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCK_D: tl.constexpr):  # fmt: skip
    """Addresses [BLOCK, BLOCK_D] of a tile, and which of them the tensor has; the tile's start in 64 bits."""
    s = row + tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    start = x + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + row.to(tl.int64) * stride_s
    inside = (s < rows)[:, None]
    if SIZE < BLOCK_D:
        inside = inside & (d < SIZE)[None, :]
    return start + tl.arange(0, BLOCK)[:, None] * stride_s + d[None, :], inside


@triton.jit
def load_tile(x, b, h, row, stride_b, stride_h, stride_s, rows, SIZE: tl.constexpr, BLOCK: tl.constexpr,
              BLOCK_D: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows [row, row + BLOCK) of head (b, h): [BLOCK, BLOCK_D]; zeros beyond ``rows`` and beyond the head dim SIZE."""
    if TMA:
        tile = x.load([b, h, row, 0]).reshape(BLOCK, BLOCK_D)
    else:
        at, inside = _tile_pointers(x, b, h, row, stride_b, stride_h, stride_s, rows, SIZE, BLOCK, BLOCK_D)
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(x, tile, b, h, row, stride_b, stride_h, stride_s, rows, SIZE: tl.constexpr, BLOCK: tl.constexpr,
               BLOCK_D: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The counterpart of load_tile; rows and columns beyond the tensor are dropped."""
    if TMA:
        x.store([b, h, row, 0], tile.to(x.dtype).reshape(1, 1, BLOCK, BLOCK_D))
    else:
        at, inside = _tile_pointers(x, b, h, row, stride_b, stride_h, stride_s, rows, SIZE, BLOCK, BLOCK_D)
        tl.store(at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_row(x, row, column, stride, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """x[row, column : column + BLOCK] as [1, BLOCK], of a matrix padded to whole blocks."""
    if TMA:
        values = x.load([row.to(tl.int32), column])
    else:
        values = tl.load(x + row.to(tl.int64) * stride + column + tl.arange(0, BLOCK)[None, :])
    return values


@triton.jit
def load_bounds(bounds, mask, n0, stride, BLOCK_N: tl.constexpr, NUM_BOUNDS: tl.constexpr, TMA: tl.constexpr):
    """The plan's bound vectors of BLOCK_N columns, four of [1, BLOCK_N]; those beyond NUM_BOUNDS repeat the first."""
    row = mask * NUM_BOUNDS
    b0 = load_row(bounds, row, n0, stride, BLOCK_N, TMA)
    b1 = b0
    b2 = b0
    b3 = b0
    if NUM_BOUNDS >= 2:
        b1 = load_row(bounds, row + 1, n0, stride, BLOCK_N, TMA)
    if NUM_BOUNDS == 4:
        b2 = load_row(bounds, row + 2, n0, stride, BLOCK_N, TMA)
        b3 = load_row(bounds, row + 3, n0, stride, BLOCK_N, TMA)
    return b0, b1, b2, b3


@triton.jit
def seen(m, b0, b1, b2, b3, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr):
    """Whether rows m see the columns of these bounds; of a causal mask, the triangle apart."""
    if NUM_BOUNDS == 1:
        visible = m < b0
    elif NUM_BOUNDS == 2 and CAUSAL:
        visible = (m < b0) | (m >= b1)
    elif NUM_BOUNDS == 2:
        visible = (m < b0) & (m >= b1)
    else:
        visible = ((m < b0) | (m >= b1)) & ((m < b2) | (m >= b3))
    return visible


@triton.jit
def hide(x, hidden, m, n, m0, n0, b0, b1, b2, b3, diagonal, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr,
         BLOCK_N: tl.constexpr, BRANCH: tl.constexpr):  # fmt: skip
    """x with ``hidden`` in place of what the mask hides. m and n, from m0 and n0, broadcast to its shape.

    ``diagonal`` is kv_len - q_len. BRANCH: compare with it only in tiles that it crosses, which most partial tiles are
    not; worth it where registers are to spare.
    """
    visible = seen(m, b0, b1, b2, b3, CAUSAL, NUM_BOUNDS)
    if CAUSAL and not BRANCH:
        visible = visible & (m >= n - diagonal)
    x = tl.where(visible, x, hidden)
    if CAUSAL and BRANCH:  # noqa: SIM102  (the outer one is settled when compiling)
        if n0 + BLOCK_N - 1 - diagonal > m0:
            x = tl.where(m >= n - diagonal, x, hidden)
    return x


@triton.jit
def find_work(pid, order, lines, heads_total, heads, group, mask_stride, mask_heads, head_group):
    """(line, b, h, mask) of program ``pid``: a block of rows or columns of a head.

    ``heads`` are those that programs are for, each standing for ``group`` query heads. ``head_group`` heads at a time,
    so that what they read stays in L2; within a group the heaviest lines of all its heads go first, so that the last
    programs are short.
    """
    first = pid // (head_group * lines) * head_group
    size = tl.minimum(head_group, heads_total - first)
    rank = (pid - first * lines) // size
    bh = first + (pid - first * lines) % size
    b = bh // heads
    h = bh % heads
    mask = (b * mask_stride + h * group // mask_heads).to(tl.int64)
    return tl.load(order + mask * lines + rank), b, h, mask


@triton.jit
def list_of(spans, mask, line, lines, capacity):
    """The spans of a line: of partial tiles, then of full ones, ``capacity`` of two numbers each."""
    return spans + (mask * lines + line) * capacity * 4


@triton.jit
def open_list(spans, counts, mask, line, lines, capacity):
    """Where a line's walk begins: its spans, (partial, full) tiles to visit, and (span, tile, end) of the first."""
    at = mask * lines + line
    partial = tl.load(counts + at * 2)
    full = tl.load(counts + at * 2 + 1)
    spans = list_of(spans, mask, line, lines, capacity)
    span = tl.where(partial == 0, capacity, 0)
    tile = tl.load(spans + span * 2).to(tl.int32) & 0xFFFF
    end = tl.load(spans + span * 2 + 1).to(tl.int32) & 0xFFFF
    return spans, partial, full, span, tile, end


@triton.jit
def next_tile(spans, span, tile, end, visit, partial, capacity):
    """(span, tile, end) of the visit after ``visit``; after the last one, what follows the list, which nobody uses."""
    tile += 1
    moves = tile == end
    span += moves.to(tl.int32)
    span = tl.where(visit + 1 == partial, capacity, span)
    tile = tl.where(moves, tl.load(spans + span * 2).to(tl.int32) & 0xFFFF, tile)
    end = tl.load(spans + span * 2 + 1).to(tl.int32) & 0xFFFF
    return span, tile, end


@triton.jit
def include_sink(sink, top, l_i, acc):
    """(top, l_i, acc) of rows whose softmax has a sink too, a logit in powers of two: top, l_i [M], acc [M, D]."""
    new = tl.maximum(top, sink)
    alpha = tl.exp2(top - new)
    return new, l_i * alpha + tl.exp2(sink - new), acc * alpha[:, None]


@triton.jit
def tanh(x):
    """Accurate relative to small x too, where the usual formula cancels."""
    square = x * x
    small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.01, small, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E))))


@triton.jit
def to_registers(tile, q_len):
    """The same tile, as the result of arithmetic, which Triton feeds to wgmma from registers: shared memory is left to
    the operands that stream by. (A factor of 1 known at compile time would be folded away.)
    """
    return tile * (q_len > 0).to(tile.dtype)
