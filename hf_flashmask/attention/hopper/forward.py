"""The forward kernel: a program a multiprocessor takes blocks of query rows, heaviest first, until there are none.

One warp (the producer) takes the work and brings tiles through TMA into a ring of STAGES K and V tiles; two warpgroups
(the consumers) have 64 of the block's 128 rows each. A consumer issues the scores of the next block of keys before the
weighted values of this one, so the tensor cores run during its softmax.

Barriers come in pairs: ``full`` when memory has been written, ``free`` when it has been read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_flashmask.attention.triton.primitives import (
    LENGTHS,
    LN2,
    LOG2E,
    LOWEST,
    find_work,
    next_tile,
    open_list,
    tanh,
)

from .compat import tma_load, tma_store
from .primitives import hide, partial_sums, read_scalar, softmax_step, write_scalar

# What the producer tells the consumers of a piece of work: batch * heads + head (-1: no more), block of rows, tiles.
WORK_FIELDS = gl.constexpr(4)


@gluon.jit
def _scores(q_tile, k_tile, BLOCK_N: gl.constexpr):
    """q k^T [64, BLOCK_N], issued and not awaited."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _attend(
    q_tile, k_s, v_s, bounds_s, words_s, bars, partial, total, turn, step, m0, qk_scale, cap_scale,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, NUM_BOUNDS: gl.constexpr,
    SOFTCAP: gl.constexpr,
):  # fmt: skip
    """acc [64, BLOCK_D] (not yet divided), m_i, l_i of 64 rows over all their blocks of keys, and the next step.

    ``step`` counts blocks of keys over all work: the place in the ring. ``turn`` counts pieces of work.
    """
    q_full, q_free, k_full, k_free, v_full, v_free, _, _ = bars
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    dtype: gl.constexpr = k_s.dtype
    m_i = gl.full([64], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    l_i = partial_sums(gl.zeros([64, BLOCK_N], gl.float32, SCORES), BLOCK_N)
    acc = gl.zeros([64, BLOCK_D], gl.float32, OUT)
    mbarrier.wait(q_full, turn & 1)
    if total > 0:
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        s = _scores(q_tile, k_s.index(stage).reshape([BLOCK_N, BLOCK_D]), BLOCK_N)
        s = warpgroup_mma_wait(0, deps=(s,))
        if SOFTCAP:
            s = tanh(s * cap_scale)
        if partial > 0:
            s = hide(s, bounds_s, stage * NUM_BOUNDS, words_s, m0, BLOCK_N, NUM_BOUNDS)
        mbarrier.arrive(k_free.index(stage), count=1)
        p, m_i, l_i, alpha = softmax_step(s, m_i, l_i, qk_scale, BLOCK_N)
        weights = gl.convert_layout(p.to(dtype), WEIGHTS)
        step += 1
        mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1, pred=total > 1)
        for visit in range(1, total):
            stage = step % STAGES
            before = (step - 1) % STAGES
            s_next = _scores(q_tile, k_s.index(stage).reshape([BLOCK_N, BLOCK_D]), BLOCK_N)
            mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
            acc = warpgroup_mma(weights, v_s.index(before).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
            s_next = warpgroup_mma_wait(1, deps=(s_next,))
            if SOFTCAP:
                s_next = tanh(s_next * cap_scale)
            if visit < partial:
                s_next = hide(s_next, bounds_s, stage * NUM_BOUNDS, words_s, m0, BLOCK_N, NUM_BOUNDS)
            mbarrier.arrive(k_free.index(stage), count=1)
            p, m_i, l_i, alpha = softmax_step(s_next, m_i, l_i, qk_scale, BLOCK_N)
            weights_next = gl.convert_layout(p.to(dtype), WEIGHTS)
            step += 1
            # Ends a basic block, so that the compiler does not move the wait below ahead of the exponentials.
            mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1, pred=visit + 1 < total)
            acc, weights, weights_next = warpgroup_mma_wait(0, deps=(acc, weights, weights_next))
            mbarrier.arrive(v_free.index(before), count=1)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUT))[:, None]
            weights = weights_next
        mbarrier.arrive(q_free, count=1)
        before = (step - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((step - 1) // STAGES) & 1)
        acc = warpgroup_mma(weights, v_s.index(before).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(v_free.index(before), count=1)
    else:
        mbarrier.arrive(q_free, count=1)
    return acc, m_i, gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, SCORES)), step


@gluon.jit
def _consume(
    q_s, k_s, v_s, out_s, bounds_s, words_s, work_s, bars, out, lse, sinks, q_len, heads, qk_scale, cap_scale,
    HALF: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """A warpgroup: the rows of one half of every block that the producer takes."""
    work_full, work_free = bars[6], bars[7]
    q_tile = q_s.index(HALF).reshape([64, BLOCK_D])
    out_tile = out_s.index(HALF).reshape([64, BLOCK_D])
    step = 0
    turn = 0
    mbarrier.wait(work_full.index(0), 0)
    bh = read_scalar(work_s.index(0))
    while bh >= 0:
        slot = turn % 2
        m0 = read_scalar(work_s.index(slot * WORK_FIELDS + 1)) * 128 + HALF * 64
        partial = read_scalar(work_s.index(slot * WORK_FIELDS + 2))
        total = read_scalar(work_s.index(slot * WORK_FIELDS + 3))
        mbarrier.arrive(work_free.index(slot), count=1)
        b = bh // heads
        h = bh % heads
        acc, m_i, l_i, step = _attend(
            q_tile, k_s, v_s, bounds_s, words_s.index(HALF), bars, partial, total, turn, step, m0, qk_scale, cap_scale,
            BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP,
        )  # fmt: skip
        top = m_i * qk_scale
        ROWS: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
        if SINKS:
            sink = gl.load(sinks + h).to(gl.float32) * LOG2E
            m_new = gl.maximum(top, sink)
            alpha = gl.exp2(top - m_new)
            l_i = l_i * alpha + gl.exp2(sink - m_new)
            acc = acc * gl.convert_layout(alpha, ROWS)[:, None]
            top = m_new
        empty = l_i == 0.0
        acc = acc * gl.convert_layout(gl.where(empty, 0.0, 1.0 / l_i), ROWS)[:, None]
        m = m0 + gl.arange(0, 64, l_i.type.layout)
        value = gl.where(empty, float("-inf"), (top + gl.log2(l_i)) * LN2)
        gl.store(lse + bh.to(gl.int64) * q_len + m, value, mask=m < q_len)
        tma.store_wait(0)  # the output before has been read from shared memory
        out_tile.store(acc.to(q_s.dtype))
        fence_async_shared()
        tma_store(out, [b, h, m0, 0], out_s.index(HALF))
        turn += 1
        mbarrier.wait(work_full.index(turn % 2), (turn // 2) & 1)
        bh = read_scalar(work_s.index(turn % 2 * WORK_FIELDS))
    tma.store_wait(0)


@gluon.jit
def _take(counter, order, counts, pieces, lines, heads_total, heads, mask_stride, mask_heads, HEAD_GROUP: gl.constexpr):
    """The next piece of work: whether there is one, its block of rows, b, h, mask, and its partial and all tiles."""
    number = gl.atomic_add(counter, 1, sem="relaxed")
    block_m, b, h, mask = find_work(
        gl.minimum(number, pieces - 1), order, lines, heads_total, heads, 1, mask_stride, mask_heads, HEAD_GROUP
    )
    at = counts + (mask * lines + block_m) * 2
    partial = gl.load(at)
    return number < pieces, block_m, b, h, mask, partial, partial + gl.load(at + 1)


@gluon.jit
def _load_keys(
    k, v, bounds, k_s, v_s, bounds_s, bars, spans, span, block, end, partial, capacity, first, last, step, b, h_kv,
    bounds_at, bounds_len,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_BOUNDS: gl.constexpr,
):  # fmt: skip
    """Visits ``first`` to ``last`` of a list: their K and V tiles, and the bounds of partial ones."""
    k_full, k_free, v_full, v_free = bars[2], bars[3], bars[4], bars[5]
    for visit in range(first, last):
        stage = step % STAGES
        phase = ((step // STAGES) & 1) ^ 1
        n0 = block * BLOCK_N
        mbarrier.wait(k_free.index(stage), phase)
        if visit < partial:
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes + NUM_BOUNDS * bounds.block_type.nbytes)
            for i in gl.static_range(NUM_BOUNDS):
                tma_load(
                    bounds, [bounds_at + i * bounds_len + n0], k_full.index(stage),
                    bounds_s.index(stage * NUM_BOUNDS + i),
                )  # fmt: skip
        else:
            mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        tma_load(k, [b, h_kv, n0, 0], k_full.index(stage), k_s.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        tma_load(v, [b, h_kv, n0, 0], v_full.index(stage), v_s.index(stage))
        span, block, end = next_tile(spans, span, block, end, visit, partial, capacity)
        step += 1
    return span, block, end, step


@gluon.jit
def _produce(
    q, k, v, bounds, spans, counts, order, counter, q_s, k_s, v_s, bounds_s, work_s, bars,
    bounds_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_BOUNDS: gl.constexpr, HEAD_GROUP: gl.constexpr,
):  # fmt: skip
    """The warp that takes work and loads what it needs."""
    q_full, q_free, work_full, work_free = bars[0], bars[1], bars[6], bars[7]
    pieces = heads_total * lines
    step = 0
    turn = 0
    more, block_m, b, h, mask, partial, total = _take(
        counter, order, counts, pieces, lines, heads_total, heads, mask_stride, mask_heads, HEAD_GROUP
    )
    while more:
        slot = turn % 2
        mbarrier.wait(work_free.index(slot), ((turn // 2) & 1) ^ 1)
        write_scalar(work_s.index(slot * WORK_FIELDS), b * heads + h)
        write_scalar(work_s.index(slot * WORK_FIELDS + 1), block_m)
        write_scalar(work_s.index(slot * WORK_FIELDS + 2), partial)
        write_scalar(work_s.index(slot * WORK_FIELDS + 3), total)
        mbarrier.arrive(work_full.index(slot), count=1)
        line, partial, _full, span, block, end = open_list(spans, counts, mask, block_m, lines, capacity)
        mbarrier.wait(q_free, (turn & 1) ^ 1)
        mbarrier.expect(q_full, 2 * q.block_type.nbytes)
        tma_load(q, [b, h, block_m * 128, 0], q_full, q_s.index(0))
        tma_load(q, [b, h, block_m * 128 + 64, 0], q_full, q_s.index(1))
        bounds_at = mask.to(gl.int32) * NUM_BOUNDS * bounds_len
        h_kv = h // group
        span, block, end, step = _load_keys(
            k, v, bounds, k_s, v_s, bounds_s, bars, line, span, block, end, partial, capacity, 0, gl.minimum(total, 1),
            step, b, h_kv, bounds_at, bounds_len, BLOCK_N, STAGES, NUM_BOUNDS,
        )  # fmt: skip
        # The work after this one, looked up while the consumers are busy.
        more, block_m, b_next, h_next, mask, partial_next, total_next = _take(
            counter, order, counts, pieces, lines, heads_total, heads, mask_stride, mask_heads, HEAD_GROUP
        )
        span, block, end, step = _load_keys(
            k, v, bounds, k_s, v_s, bounds_s, bars, line, span, block, end, partial, capacity, 1, total,
            step, b, h_kv, bounds_at, bounds_len, BLOCK_N, STAGES, NUM_BOUNDS,
        )  # fmt: skip
        b, h, partial, total = b_next, h_next, partial_next, total_next
        turn += 1
    slot = turn % 2
    mbarrier.wait(work_free.index(slot), ((turn // 2) & 1) ^ 1)
    write_scalar(work_s.index(slot * WORK_FIELDS), -1)
    mbarrier.arrive(work_full.index(slot), count=1)


@gluon.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, out, lse, sinks, bounds, spans, counts, order, counter,
    q_len, bounds_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads, qk_scale, cap_scale,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_BOUNDS: gl.constexpr,
    SOFTCAP: gl.constexpr, SINKS: gl.constexpr, HEAD_GROUP: gl.constexpr,
):  # fmt: skip
    """out and lse of all rows and heads.

    ``q .. out`` are TMA descriptors of ``[B, H, S, D]`` views in boxes of 64 rows (q, out) or BLOCK_N; ``bounds`` one
    of the flat ``[masks, NUM_BOUNDS, bounds_len]``; ``counter`` an int32 zero. The rest is as in the Triton kernel.
    """
    q_s = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, BLOCK_D], q.layout)
    out_s = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 64, BLOCK_D], out.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v.layout)
    bounds_s = gl.allocate_shared_memory(gl.int32, [STAGES * NUM_BOUNDS, BLOCK_N], bounds.layout)
    words_s = gl.allocate_shared_memory(gl.int32, [2, 2, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    work_s = gl.allocate_shared_memory(gl.int32, [2 * WORK_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_free, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_free.index(i), count=2)
    bars = (q_full, q_free, k_full, k_free, v_full, v_free, work_full, work_free)
    # Warps and registers a thread of the second and third; the first gets what is left.
    gl.warp_specialize([
        (_consume, (
            q_s, k_s, v_s, out_s, bounds_s, words_s, work_s, bars, out, lse, sinks, q_len, heads, qk_scale, cap_scale,
            0, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, SINKS,
        )),
        (_consume, (
            q_s, k_s, v_s, out_s, bounds_s, words_s, work_s, bars, out, lse, sinks, q_len, heads, qk_scale, cap_scale,
            1, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, SINKS,
        )),
        (_produce, (
            q, k, v, bounds, spans, counts, order, counter, q_s, k_s, v_s, bounds_s, work_s, bars,
            bounds_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
            BLOCK_N, STAGES, NUM_BOUNDS, HEAD_GROUP,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
