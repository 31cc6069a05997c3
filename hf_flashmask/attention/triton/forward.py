"""The forward kernel: one program for each block of query rows and head, over the row's list of visited tiles."""

import triton
import triton.language as tl

from .primitives import (
    LENGTHS,
    LN2,
    LOG2E,
    LOWEST,
    find_work,
    hide,
    include_sink,
    load_bounds,
    load_tile,
    next_tile,
    open_list,
    store_tile,
    tanh,
    to_registers,
)


@triton.jit
def _attend(
    q, k, v, bounds, mask, m_i, l_i, acc, b, h_kv, m0, m, block,
    k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, kv_len, bounds_len, diagonal, qk_scale, cap_scale, masked,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr, SOFTCAP: tl.constexpr,
    TMA: tl.constexpr, TMA_BOUNDS: tl.constexpr, PRECISION: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """One block of keys: the online softmax's new (m_i, l_i, acc)."""
    n0 = block * BLOCK_N
    k_tile = load_tile(k, b, h_kv, n0, k_sb, k_sh, k_ss, kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)  # [BLOCK_N, BLOCK_D]
    s = tl.dot(q, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if SOFTCAP:
        s = tanh(s * cap_scale)
    if masked:
        n = n0 + tl.arange(0, BLOCK_N)[None, :]
        b0, b1, b2, b3 = load_bounds(bounds, mask, n0, bounds_len, BLOCK_N, NUM_BOUNDS, TMA_BOUNDS)
        s = hide(
            s, float("-inf"), m[:, None], n, m0, n0, b0, b1, b2, b3, diagonal, CAUSAL, NUM_BOUNDS, BLOCK_N, not MERGE
        )
    m_new = tl.maximum(m_i, tl.max(s, 1))
    p = tl.exp2(s * qk_scale - (m_new * qk_scale)[:, None])
    alpha = tl.exp2((m_i - m_new) * qk_scale)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = acc * alpha[:, None]
    v_tile = load_tile(v, b, h_kv, n0, v_sb, v_sh, v_ss, kv_len, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV]
    return m_new, l_i, acc


@triton.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, out, lse, sinks, bounds, spans, counts, order,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, o_sb, o_sh, o_ss,
    q_len, kv_len, bounds_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads, qk_scale, cap_scale,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, NUM_BOUNDS: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, TMA: tl.constexpr,
    TMA_BOUNDS: tl.constexpr, PRECISION: tl.constexpr, HEAD_GROUP: tl.constexpr, STAGES: tl.constexpr,
    MERGE: tl.constexpr, IN_REGISTERS: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M rows of one head.

    ``q .. out`` are tensors, or TMA descriptors of ``[B, H, S, D]`` views. Scores times ``qk_scale`` are in powers of
    two; with SOFTCAP they are first ``tanh(scores * cap_scale)``. ``heads_total`` is B times ``heads``, ``group`` the
    query heads of a key head; the mask of (b, h) is ``b * mask_stride + h // mask_heads``.
    """
    block_m, b, h, mask = find_work(
        tl.program_id(0), order, lines, heads_total, heads, 1, mask_stride, mask_heads, HEAD_GROUP
    )
    h_kv = h // group
    diagonal = kv_len - q_len
    m0 = block_m * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, b, h, m0, q_sb, q_sh, q_ss, q_len, HEAD_DIM, BLOCK_M, BLOCK_D, TMA)
    if IN_REGISTERS:
        q_tile = to_registers(q_tile, q_len)
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    spans, partial, full, span, block, end = open_list(spans, counts, mask, block_m, lines, capacity)
    for part in tl.static_range(1 if MERGE else 2):
        first = partial if part == 1 else 0
        last = partial if not MERGE and part == 0 else partial + full
        for visit in tl.range(first, last, num_stages=STAGES):
            masked = visit < partial if MERGE else part == 0
            m_i, l_i, acc = _attend(
                q_tile, k, v, bounds, mask, m_i, l_i, acc, b, h_kv, m0, m, block,
                k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, kv_len, bounds_len, diagonal, qk_scale, cap_scale, masked,
                HEAD_DIM, HEAD_DIM_V, BLOCK_N, BLOCK_D, BLOCK_DV, CAUSAL, NUM_BOUNDS, SOFTCAP,
                TMA, TMA_BOUNDS, PRECISION, MERGE,
            )  # fmt: skip
            span, block, end = next_tile(spans, span, block, end, visit, partial, capacity)
    top = m_i * qk_scale
    if SINKS:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2E
        top, l_i, acc = include_sink(sink, top, l_i, acc)
    empty = l_i == 0.0
    acc = acc * tl.where(empty, 0.0, 1.0 / l_i)[:, None]
    at = (b * heads + h).to(tl.int64) * q_len + m
    tl.store(lse + at, tl.where(empty, float("-inf"), (top + tl.log2(l_i)) * LN2), mask=m < q_len)
    store_tile(out, acc, b, h, m0, o_sb, o_sh, o_ss, q_len, HEAD_DIM_V, BLOCK_M, BLOCK_DV, TMA)
