"""The kernels for few queries over many keys (generation): the keys of a head are split among programs, then combined.

The query heads that share a key head, times the query rows, are the rows of one tile, so K and V are read once. Every
program looks at the bounds of its own blocks of keys, some at a time, and reads the blocks that a row of it sees.
Blocks are dealt out to the splits in turn, so that a window, or the filled part of a static cache, keeps all of them
busy.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .primitives import LENGTHS, LN2, LOG2E, LOWEST, include_sink, load_tile, seen, tanh

DECODE_LENGTHS = (
    *LENGTHS, "full_prefix", "inverse_group", "parts", "splits", "bounds_sb", "bounds_sh", "bounds_sg", "bounds_sc",
    "table_sb", "page",
)  # fmt: skip
# Rows are divided by the query heads of a key head by multiplying: r // group = r * ceil(2**bits / group) >> bits,
# exactly for the up to 16 queries (r below 32 * group) of groups of up to MAX_GROUP.
INVERSE_BITS = tl.constexpr(24)
MAX_GROUP = 512


@triton.jit
def _load_bounds(bounds, n, kv_len, stride, NUM_BOUNDS: tl.constexpr):
    """The bound vectors of columns n, in n's shape; those beyond NUM_BOUNDS repeat the first."""
    inside = n < kv_len
    b0 = tl.load(bounds + n, mask=inside, other=0)
    b1 = b0
    b2 = b0
    b3 = b0
    if NUM_BOUNDS >= 2:
        b1 = tl.load(bounds + stride + n, mask=inside, other=0)
    if NUM_BOUNDS == 4:
        b2 = tl.load(bounds + 2 * stride + n, mask=inside, other=0)
        b3 = tl.load(bounds + 3 * stride + n, mask=inside, other=0)
    return b0, b1, b2, b3


@triton.jit
def _some(lo, last, b0, b1, b2, b3, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr):
    """Whether some row of [lo, last) sees a column: the first that does is lo, or comes right after hidden rows."""
    if NUM_BOUNDS == 1:
        some = lo < tl.minimum(b0, last)
    elif NUM_BOUNDS == 2 and CAUSAL:
        some = (lo < tl.minimum(b0, last)) | (tl.maximum(lo, b1) < last)
    elif NUM_BOUNDS == 2:
        some = tl.maximum(lo, b1) < tl.minimum(b0, last)
    else:
        some = (lo < last) & seen(lo, b0, b1, b2, b3, CAUSAL, NUM_BOUNDS)
        after = tl.maximum(lo, b1)
        some = some | ((after < last) & seen(after, b0, b1, b2, b3, CAUSAL, NUM_BOUNDS))
        after = tl.maximum(lo, b3)
        some = some | ((after < last) & seen(after, b0, b1, b2, b3, CAUSAL, NUM_BOUNDS))
    return some


@triton.jit
def _every(first, last, b0, b1, b2, b3, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr):
    """Whether all rows of [first, last) see a column; of a causal mask, the triangle apart."""
    if NUM_BOUNDS == 1:
        every = b0 >= last
    elif NUM_BOUNDS == 2 and not CAUSAL:
        every = (b0 >= last) & (b1 <= first)
    else:
        every = (b0 >= last) | (b1 <= first) | (b0 >= b1)
    if NUM_BOUNDS == 4:
        every = every & ((b2 >= last) | (b3 <= first) | (b2 >= b3))
    return every


@triton.jit
def _join(code, end, other_code, other_end):
    return code | other_code, tl.maximum(end, other_end)


@triton.jit
def _scan(
    bounds, first, step, first_row, last_row, kv_len, stride, stride_g, mask_heads, diagonal,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr,
):  # fmt: skip
    """Of every ``step``-th block of columns from ``first`` on, up to 16: which some row sees and which all rows see
    whole, as bits; how many some row sees; and where the last column ends that is seen.

    A program waits for this before it loads keys, and no other warp is there to fill the gaps: few instructions.
    """
    at = tl.arange(0, BLOCKS * BLOCK_N)
    block = at // BLOCK_N
    n = (first + block * step) * BLOCK_N + at % BLOCK_N
    lo = tl.maximum(first_row, n - diagonal) if CAUSAL else first_row
    some = n < 0
    every = n < kv_len
    for g in range(mask_heads):
        b0, b1, b2, b3 = _load_bounds(bounds + g * stride_g, n, kv_len, stride, NUM_BOUNDS)
        some = some | _some(lo, last_row, b0, b1, b2, b3, CAUSAL, NUM_BOUNDS)
        every = every & _every(first_row, last_row, b0, b1, b2, b3, CAUSAL, NUM_BOUNDS)
    if CAUSAL:
        every = every & (lo <= first_row)
    some = some & (n < kv_len)
    seen_bit = some.to(tl.int32) << block
    part_bit = (~every).to(tl.int32) << block + 16
    code, end = tl.reduce((seen_bit | part_bit, tl.where(some, n + 1, 0)), 0, _join)
    visit = code & 0xFFFF
    pairs = visit - (visit >> 1 & 0x5555)
    fours = (pairs & 0x3333) + (pairs >> 2 & 0x3333)
    eights = fours + (fours >> 4) & 0x0F0F
    return visit, ~code >> 16 & 0xFFFF, eights + (eights >> 8) & 0x1F, end


@triton.jit
def _place(block_table, b, n0, end, table_sb, page, PAGED: tl.constexpr):
    """Where column n0 lies, as (batch row or page, key of it), and where among its keys the columns end at ``end``."""
    row = b
    key = n0
    if PAGED:
        row = tl.load(block_table + b.to(tl.int64) * table_sb + n0 // page)
        key = n0 % page
        end = end - n0 + key
    return row, key, end


@triton.jit
def _scores(
    q_tile, k, b, h, n0, k_sb, k_sh, k_ss, end, cap_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    k_tile = load_tile(k, b, h, n0, k_sb, k_sh, k_ss, end, HEAD_DIM, BLOCK_N, BLOCK_D, False)
    s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if SOFTCAP:
        s = tanh(s * cap_scale)
    return s


@triton.jit
def _accumulate(
    s, m_i, weights, acc, qk_scale, v, b, h, n0, v_sb, v_sh, v_ss, end,
    HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One more block's scores: (m_i, weights, acc)."""
    m_new = tl.maximum(m_i, tl.max(s, 1))
    p = tl.exp2(s * qk_scale - (m_new * qk_scale)[:, None])
    alpha = tl.exp2((m_i - m_new) * qk_scale)[:, None]
    # Summed up over columns at the end only: that is a wait of all warps.
    weights = weights * alpha + p
    acc = acc * alpha
    v_tile = load_tile(v, b, h, n0, v_sb, v_sh, v_ss, end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, False)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV]
    return m_new, weights, acc


@triton.jit(do_not_specialize=DECODE_LENGTHS)
def decode_kernel(
    q, k, v, bounds, block_table, partial, out, lse, sinks,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, bounds_sb, bounds_sh, bounds_sg, bounds_sc, table_sb, page,
    q_len, kv_len, full_prefix, heads, group, inverse_group, mask_heads, parts, splits, row_tiles, qk_scale, cap_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr, MASK_PER_ROW: tl.constexpr, SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr, SINKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split's share of BLOCK_M rows of one key head: ``partial [B, Hkv, Sq * group, splits, Dv]``, float32, and
    behind these ``parts`` vectors the base-2 logarithm of the weight of each; -inf for rows that see nothing of it,
    whose partial is anything. WHOLE: there is one split, so out and lse are written, as by ``combine_kernel``.

    ``heads`` are key heads, ``group`` the query heads of each; row r is query ``r // group`` of head ``r % group``.
    ``mask_heads`` is how many masks a group has: 1, or with MASK_PER_ROW ``group``. All rows see the first
    ``full_prefix`` columns. Scores times ``qk_scale`` are in powers of two; with SOFTCAP they are first
    ``tanh(scores * cap_scale)``. With PAGED, k and v are pages of ``page`` keys, a multiple of BLOCK_N, and row b of
    ``block_table`` names those of batch row b in order.
    """
    split = tl.program_id(1)
    tile = tl.program_id(0) % row_tiles
    bh = tl.program_id(0) // row_tiles
    b = bh // heads
    h = bh % heads
    rows = q_len * group
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m = r * inverse_group >> INVERSE_BITS
    g = r - m * group

    d = tl.arange(0, BLOCK_D)
    at = q + b.to(tl.int64) * q_sb + ((h * group + g).to(tl.int64) * q_sh + m.to(tl.int64) * q_ss)[:, None] + d[None, :]
    q_tile = tl.load(at, mask=(r < rows)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    column = tl.arange(0, BLOCK_N)[None, :]

    # This split's blocks are every splits-th; of the first ones no bounds need to be looked at.
    mine = (tl.cdiv(kv_len, BLOCK_N) - split + splits - 1) // splits
    known = mine
    if full_prefix < kv_len:
        known = tl.maximum(full_prefix // BLOCK_N - split + splits - 1, 0) // splits
    if known > 0:
        for i in tl.range(0, known, num_stages=STAGES):
            n0 = (split + i * splits) * BLOCK_N
            row, key, stop = _place(block_table, b, n0, kv_len, table_sb, page, PAGED)
            s = _scores(
                q_tile, k, row, h, key, k_sb, k_sh, k_ss, stop, cap_scale,
                HEAD_DIM, BLOCK_N, BLOCK_D, SOFTCAP, PRECISION,
            )  # fmt: skip
            s = tl.where(n0 + column < kv_len, s, float("-inf"))
            m_i, weights, acc = _accumulate(
                s, m_i, weights, acc, qk_scale, v, row, h, key, v_sb, v_sh, v_ss, stop,
                HEAD_DIM_V, BLOCK_N, BLOCK_DV, PRECISION,
            )  # fmt: skip

    bounds += b.to(tl.int64) * bounds_sb + h.to(tl.int64) * bounds_sh
    diagonal = kv_len - q_len
    first_row = tile * BLOCK_M * inverse_group >> INVERSE_BITS
    last_row = tl.minimum(q_len, (((tile + 1) * BLOCK_M - 1) * inverse_group >> INVERSE_BITS) + 1)
    for done in range(known, mine, BLOCKS):
        first = split + done * splits
        visit, full, count, end = _scan(
            bounds, first, splits, first_row, last_row, kv_len, bounds_sc, bounds_sg, mask_heads, diagonal,
            BLOCK_N, BLOCKS, CAUSAL, NUM_BOUNDS,
        )  # fmt: skip
        for _ in tl.range(0, count, num_stages=STAGES):
            bit = visit & -visit
            visit = visit ^ bit
            number = (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # the exponent of a power of two
            n0 = (first + number * splits) * BLOCK_N
            row, key, stop = _place(block_table, b, n0, end, table_sb, page, PAGED)
            s = _scores(
                q_tile, k, row, h, key, k_sb, k_sh, k_ss, stop, cap_scale,
                HEAD_DIM, BLOCK_N, BLOCK_D, SOFTCAP, PRECISION,
            )  # fmt: skip
            if (full & bit) == 0:
                of_row = bounds
                n = n0 + column
                if MASK_PER_ROW:
                    of_row = bounds + g[:, None] * bounds_sg
                    n = n + tl.zeros([BLOCK_M, 1], tl.int32)
                b0, b1, b2, b3 = _load_bounds(of_row, n, kv_len, bounds_sc, NUM_BOUNDS)
                visible = seen(m[:, None], b0, b1, b2, b3, CAUSAL, NUM_BOUNDS) & (n < kv_len)
                if CAUSAL:
                    visible = visible & (m[:, None] >= n - diagonal)
                s = tl.where(visible, s, float("-inf"))
            m_i, weights, acc = _accumulate(
                s, m_i, weights, acc, qk_scale, v, row, h, key, v_sb, v_sh, v_ss, stop,
                HEAD_DIM_V, BLOCK_N, BLOCK_DV, PRECISION,
            )  # fmt: skip

    if PDL:
        gdc_launch_dependents()  # which wait for the end of this kernel, but not to be launched
    l_i = tl.sum(weights, 1)
    top = m_i * qk_scale
    dv = tl.arange(0, BLOCK_DV)
    if WHOLE:
        head = h * group + g
        if SINKS:
            sink = tl.load(sinks + head, mask=r < rows, other=0.0).to(tl.float32) * LOG2E
            top, l_i, acc = include_sink(sink, top, l_i, acc)
    empty = l_i == 0.0
    acc = acc * tl.where(empty, 0.0, 1.0 / l_i)[:, None]
    weight = tl.where(empty, float("-inf"), top + tl.log2(l_i))
    if WHOLE:
        heads_q = heads * group
        row_q = (b.to(tl.int64) * q_len + m) * heads_q + head
        tl.store(lse + (b.to(tl.int64) * heads_q + head) * q_len + m, weight * LN2, mask=r < rows)
        at = out + row_q[:, None] * HEAD_DIM_V + dv[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (dv < HEAD_DIM_V)[None, :])
    else:
        part = (bh.to(tl.int64) * rows + r) * splits + split
        tl.store(partial + parts.to(tl.int64) * HEAD_DIM_V + part, weight, mask=r < rows)
        at = partial + part[:, None] * HEAD_DIM_V + dv[None, :]
        tl.store(at, acc, mask=((r < rows) & ~empty)[:, None] & (dv < HEAD_DIM_V)[None, :])


@triton.jit(do_not_specialize=DECODE_LENGTHS)
def combine_kernel(
    partial, out, lse, sinks, q_len, heads, group, inverse_group, parts, splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, SINKS: tl.constexpr, COMBINED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out ``[B, Sq, Hq, Dv]`` and lse ``[B, Hq, Sq]`` of one row of one query head, from all its splits."""
    at = tl.program_id(0)
    rows = q_len * group
    bh = at // rows
    r = at % rows
    b = bh // heads
    m = r * inverse_group >> INVERSE_BITS
    h = bh % heads * group + r - m * group
    heads_q = heads * group
    dv = tl.arange(0, BLOCK_DV)
    top = tl.full([], LOWEST, tl.float32)
    weight = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
        weight = tl.exp2(sink - top)
    first = at.to(tl.int64) * splits
    partial_lse = partial + parts.to(tl.int64) * HEAD_DIM_V
    if PDL:
        gdc_wait()  # launched while the splits are under way
    for s0 in range(0, splits, COMBINED):
        s = s0 + tl.arange(0, COMBINED)
        part_lse = tl.load(partial_lse + first + s, mask=s < splits, other=float("-inf"))
        # Loaded whether written or not: waiting for part_lse would cost more.
        part = tl.load(
            partial + (first + s)[:, None] * HEAD_DIM_V + dv[None, :],
            mask=(s < splits)[:, None] & (dv < HEAD_DIM_V)[None, :], other=0.0,
        )  # fmt: skip
        part = tl.where((part_lse > float("-inf"))[:, None], part, 0.0)
        new = tl.maximum(top, tl.max(part_lse, 0))
        w = tl.exp2(part_lse - new)
        alpha = tl.exp2(top - new)
        weight = weight * alpha + tl.sum(w, 0)
        acc = acc * alpha + tl.sum(w[:, None] * part, 0)
        top = new
    empty = weight == 0.0
    acc = acc * tl.where(empty, 0.0, 1.0 / weight)
    row = (b.to(tl.int64) * q_len + m) * heads_q + h
    tl.store(out + row * HEAD_DIM_V + dv, acc.to(out.dtype.element_ty), mask=dv < HEAD_DIM_V)
    tl.store(
        lse + (b.to(tl.int64) * heads_q + h) * q_len + m,
        tl.where(empty, float("-inf"), (top + tl.log2(weight)) * LN2),
    )
