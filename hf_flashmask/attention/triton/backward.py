"""The backward kernels: dQ over the row lists, then dK and dV over the column lists.

Two passes recompute the scores twice, and in return nothing is accumulated in memory: no float32 copy of dQ, no
atomics, the same bits run after run.
"""

import triton
import triton.language as tl

from .primitives import (
    LENGTHS,
    LOG2E,
    find_work,
    hide,
    load_bounds,
    load_row,
    load_tile,
    next_tile,
    open_list,
    store_tile,
    tanh,
    to_registers,
)


@triton.jit
def _dq_block(
    q, do, lse, delta, k, v, bounds, mask, dq, b, h_kv, m0, m, block,
    k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, kv_len, bounds_len, diagonal, qk_scale, cap_scale, masked,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr, SOFTCAP: tl.constexpr,
    TMA: tl.constexpr, TMA_BOUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys to dq [BLOCK_M, BLOCK_D]."""
    n0 = block * BLOCK_N
    k_tile = load_tile(k, b, h_kv, n0, k_sb, k_sh, k_ss, kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
    s = tl.dot(q, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if SOFTCAP:
        s = tanh(s * cap_scale)
    p = tl.exp2(s * qk_scale - lse[:, None])
    if masked:
        n = n0 + tl.arange(0, BLOCK_N)[None, :]
        b0, b1, b2, b3 = load_bounds(bounds, mask, n0, bounds_len, BLOCK_N, NUM_BOUNDS, TMA_BOUNDS)
        p = hide(p, 0.0, m[:, None], n, m0, n0, b0, b1, b2, b3, diagonal, CAUSAL, NUM_BOUNDS, BLOCK_N, True)
    v_tile = load_tile(v, b, h_kv, n0, v_sb, v_sh, v_ss, kv_len, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
    dp = tl.dot(do, v_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    ds = p * (dp - delta[:, None])
    if SOFTCAP:
        ds = ds * (1.0 - s * s)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=LENGTHS)
def dq_kernel(
    q, k, v, out, do, dq, lse, dlse, stats, bounds, spans, counts, order,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, o_sb, o_sh, o_ss, do_sb, do_sh, do_ss, dq_sb, dq_sh, dq_ss,
    q_len, kv_len, bounds_len, stats_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
    qk_scale, cap_scale, softmax_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr, SOFTCAP: tl.constexpr, DLSE: tl.constexpr, TMA: tl.constexpr,
    TMA_BOUNDS: tl.constexpr, PRECISION: tl.constexpr, HEAD_GROUP: tl.constexpr, STAGES: tl.constexpr,
    MERGE: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M rows of one head, and what dkdv_kernel needs of them: ``stats``, float32 ``[B, H, 2, stats_len]``.

    These are lse in powers of two, and delta = rowsum(out * do) - dlse; ``stats_len`` is whole blocks.
    """
    block_m, b, h, mask = find_work(
        tl.program_id(0), order, lines, heads_total, heads, 1, mask_stride, mask_heads, HEAD_GROUP
    )
    h_kv = h // group
    diagonal = kv_len - q_len
    m0 = block_m * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    at = (b * heads + h).to(tl.int64) * q_len + m
    do_tile = load_tile(do, b, h, m0, do_sb, do_sh, do_ss, q_len, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA)
    o_tile = load_tile(out, b, h, m0, o_sb, o_sh, o_ss, q_len, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA)
    delta_i = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if DLSE:
        delta_i -= tl.load(dlse + at, mask=m < q_len, other=0.0)
    # Rows that see nothing have lse -inf; with +inf every weight of theirs is 0, as for rows that do not exist.
    lse_i = tl.load(lse + at, mask=m < q_len, other=float("inf"))
    lse_i = tl.where(lse_i == float("-inf"), float("inf"), lse_i * LOG2E)
    stats += (b * heads + h).to(tl.int64) * 2 * stats_len + m
    tl.store(stats, lse_i)
    tl.store(stats + stats_len, delta_i)
    q_tile = load_tile(q, b, h, m0, q_sb, q_sh, q_ss, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
    if IN_REGISTERS:
        q_tile = to_registers(q_tile, q_len)
        do_tile = to_registers(do_tile, q_len)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    spans, partial, full, span, block, end = open_list(spans, counts, mask, block_m, lines, capacity)
    for part in tl.static_range(1 if MERGE else 2):
        first = partial if part == 1 else 0
        last = partial if not MERGE and part == 0 else partial + full
        for visit in tl.range(first, last, num_stages=STAGES):
            masked = visit < partial if MERGE else part == 0
            acc = _dq_block(
                q_tile, do_tile, lse_i, delta_i, k, v, bounds, mask, acc, b, h_kv, m0, m, block,
                k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, kv_len, bounds_len, diagonal, qk_scale, cap_scale, masked,
                HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, NUM_BOUNDS, SOFTCAP,
                TMA, TMA_BOUNDS, PRECISION,
            )  # fmt: skip
            span, block, end = next_tile(spans, span, block, end, visit, partial, capacity)
    store_tile(dq, acc * softmax_scale, b, h, m0, dq_sb, dq_sh, dq_ss, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)


@triton.jit
def _dkdv_block(
    q, do, stats, stats_row, stats_len, k_tile, v_tile, b0, b1, b2, b3, dk, dv, b, h, n0, n, block,
    q_sb, q_sh, q_ss, do_sb, do_sh, do_ss, q_len, diagonal, qk_scale, cap_scale, masked,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr,
    SOFTCAP: tl.constexpr, TMA: tl.constexpr, TMA_BOUNDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one block of queries to dk [BLOCK_N, BLOCK_D] and dv [BLOCK_N, BLOCK_DV].

    Scores are transposed, keys on the rows: bounds stay in registers, and P^T and dS^T are operands as they are.
    """
    m0 = block * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)[None, :]
    q_tile = load_tile(q, b, h, m0, q_sb, q_sh, q_ss, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
    lse = load_row(stats, stats_row, m0, stats_len, BLOCK_M, TMA)
    s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if SOFTCAP:
        s = tanh(s * cap_scale)
    p = tl.exp2(s * qk_scale - lse)
    if masked:
        p = hide(p, 0.0, m, n, m0, n0, b0, b1, b2, b3, diagonal, CAUSAL, NUM_BOUNDS, BLOCK_N, False)
    do_tile = load_tile(do, b, h, m0, do_sb, do_sh, do_ss, q_len, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA)
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
    delta = load_row(stats, stats_row + 1, m0, stats_len, BLOCK_M, TMA)
    dp = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    ds = p * (dp - delta)
    if SOFTCAP:
        ds = ds * (1.0 - s * s)
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def dkdv_kernel(
    q, k, v, do, dk, dv, stats, bounds, spans, counts, order,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, do_sb, do_sh, do_ss, dk_sb, dk_sh, dk_ss, dv_sb, dv_sh, dv_ss,
    q_len, kv_len, bounds_len, stats_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
    qk_scale, cap_scale, softmax_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
    TMA_BOUNDS: tl.constexpr, PRECISION: tl.constexpr, HEAD_GROUP: tl.constexpr, STAGES: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N keys of one key head, summed over its ``group`` query heads.

    ``heads`` and ``heads_total`` count key heads here; ``mask_heads`` query heads, as everywhere.
    """
    block_n, b, h_kv, _ = find_work(
        tl.program_id(0), order, lines, heads_total, heads, group, mask_stride, mask_heads, HEAD_GROUP
    )
    diagonal = kv_len - q_len
    n0 = block_n * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    k_tile = load_tile(k, b, h_kv, n0, k_sb, k_sh, k_ss, kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
    v_tile = load_tile(v, b, h_kv, n0, v_sb, v_sh, v_ss, kv_len, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(group):
        h = h_kv * group + g
        mask = (b * mask_stride + h // mask_heads).to(tl.int64)
        b0, b1, b2, b3 = load_bounds(bounds, mask, n0, bounds_len, BLOCK_N, NUM_BOUNDS, TMA_BOUNDS)
        b0, b1, b2, b3 = b0.trans(), b1.trans(), b2.trans(), b3.trans()  # [BLOCK_N, 1]
        stats_row = (b * heads * group + h) * 2
        line, partial, full, span, block, end = open_list(spans, counts, mask, block_n, lines, capacity)
        for part in tl.static_range(1 if MERGE else 2):
            first = partial if part == 1 else 0
            last = partial if not MERGE and part == 0 else partial + full
            for visit in tl.range(first, last, num_stages=STAGES):
                masked = visit < partial if MERGE else part == 0
                dk_acc, dv_acc = _dkdv_block(
                    q, do, stats, stats_row, stats_len, k_tile, v_tile, b0, b1, b2, b3,
                    dk_acc, dv_acc, b, h, n0, n, block,
                    q_sb, q_sh, q_ss, do_sb, do_sh, do_ss, q_len, diagonal, qk_scale, cap_scale, masked,
                    HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, NUM_BOUNDS, SOFTCAP,
                    TMA, TMA_BOUNDS, PRECISION,
                )  # fmt: skip
                span, block, end = next_tile(line, span, block, end, visit, partial, capacity)
    store_tile(dk, dk_acc * softmax_scale, b, h_kv, n0, dk_sb, dk_sh, dk_ss, kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
    store_tile(dv, dv_acc, b, h_kv, n0, dv_sb, dv_sh, dv_ss, kv_len, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
