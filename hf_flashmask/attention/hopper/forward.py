"""The forward kernel: a program a multiprocessor takes blocks of query rows, heaviest first, until there are none.

A team has a warp (the producer) that takes the work and brings tiles through TMA, and two warpgroups (the consumers),
64 of the block's 128 rows each. A program is one team, or two that share nothing but the multiprocessor.

All blocks of keys of all work form one stream of steps. In a step a consumer issues the scores of a block of keys, then
the weighted values of the block before, and computes the softmax of the scores meanwhile; the first scores of the next
work go out behind the last values of this one, so that nothing drains in between.

Step ``i`` has stage ``i % STAGES`` of the ring: K of block i and V of block i - 1 come together (``full``) and are
released together (``free``). Q has two slots, one of the work at hand and one of the next; the output leaves through
the slot of its Q. At head dim 256 there is room for one, and the next Q comes once the output is gone.
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
    next_tile,
    open_list,
    tanh,
)

from .compat import tma_load, tma_store
from .primitives import (
    hide,
    hide_bits,
    pack_pairs,
    partial_sums,
    read_scalar,
    softmax_step,
    unpack_pairs,
    write_scalar,
)
from .schedule import NOWHERE, take

# What the producer tells the consumers of a piece of work: batch * heads + head (-1: no more), block of rows, tiles.
WORK_FIELDS = gl.constexpr(4)


@gluon.jit
def _scores(q_s, k_s, slot, HALF: gl.constexpr, stage, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr):
    """q k^T [64, BLOCK_N], issued and not awaited."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zero = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    q_tile = q_s.index(slot * 2 + HALF).reshape([64, BLOCK_D])
    k_tile = k_s.index(stage).reshape([BLOCK_N, BLOCK_D])
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _values(weights, v_s, acc, step, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """acc [64, BLOCK_D] plus weights [64, BLOCK_N] v of the block before ``step``, issued and not awaited."""
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    v_tile = v_s.index((step + STAGES - 1) % STAGES).reshape([BLOCK_N, BLOCK_D])
    return warpgroup_mma(unpack_pairs(weights, v_s.dtype, WEIGHTS), v_tile, acc, is_async=True)


@gluon.jit
def _read_work(work_s, bars, turn):
    """batch * heads + head, block of rows, partial and all tiles of a piece of work."""
    _, _, _, _, work_full, work_free = bars
    slot = turn % 2
    mbarrier.wait(work_full.index(slot), (turn // 2) & 1)
    bh = read_scalar(work_s.index(slot * WORK_FIELDS))
    block_m = read_scalar(work_s.index(slot * WORK_FIELDS + 1))
    partial = read_scalar(work_s.index(slot * WORK_FIELDS + 2))
    total = read_scalar(work_s.index(slot * WORK_FIELDS + 3))
    mbarrier.arrive(work_free.index(slot), count=1)
    return bh, block_m, partial, total


@gluon.jit
def _consume(
    team, given, HALF: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """A warpgroup: the rows of one half of every block that the producer takes.

    EARLY: weights become 16 bits while the tensor cores work, at the price of registers, not after.
    """
    q_s, k_s, v_s, bounds_s, words_s, work_s, bars = team
    out, lse, sinks, q_len, heads, qk_scale, cap_scale = given
    full, free, q_full, q_free, _, _ = bars
    Q_SLOTS: gl.constexpr = q_full.shape[0]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = k_s.dtype
    words = words_s.index(HALF)
    step = 0
    turn = 0
    bh, block_m, partial, total = _read_work(work_s, bars, 0)
    # The first scores: of what is loaded, or of whatever memory holds if there is no work.
    mbarrier.wait(q_full.index(0), 0, pred=bh >= 0)
    mbarrier.wait(full.index(0), 0, pred=bh >= 0)
    if partial > 0:
        hide_bits(bounds_s, 0, words, block_m * 128 + HALF * 64, BLOCK_N, NUM_BOUNDS)
    s = _scores(q_s, k_s, 0, HALF, 0, BLOCK_N, BLOCK_D)
    s = warpgroup_mma_wait(0, deps=(s,))
    while bh >= 0:
        slot = turn % Q_SLOTS
        m0 = block_m * 128 + HALF * 64
        mbarrier.arrive(free.index(step % STAGES), count=1)
        if SOFTCAP:
            s = tanh(s * cap_scale)
        if partial > 0:
            s = hide(s, words, BLOCK_N)
        m_i = gl.full([64], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
        l_i = partial_sums(gl.zeros([64, BLOCK_N], gl.float32, SCORES), BLOCK_N)
        p, m_i, l_i, alpha = softmax_step(s, m_i, l_i, qk_scale, BLOCK_N)
        weights = pack_pairs(p, dtype)
        acc = gl.zeros([64, BLOCK_D], gl.float32, OUT)
        step += 1
        if Q_SLOTS == 2:
            tma.store_wait(0)  # the output before has been read from the other slot
            mbarrier.arrive(q_free.index(slot ^ 1), count=1, pred=turn > 0)
        mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1, pred=total > 1)
        for visit in range(1, total):
            stage = step % STAGES
            s_next = _scores(q_s, k_s, slot, HALF, stage, BLOCK_N, BLOCK_D)
            acc = _values(weights, v_s, acc, step, BLOCK_N, BLOCK_D, STAGES)
            if visit < partial:
                hide_bits(bounds_s, stage * NUM_BOUNDS, words, m0, BLOCK_N, NUM_BOUNDS)
            s_next = warpgroup_mma_wait(1, deps=(s_next,))
            if SOFTCAP:
                s_next = tanh(s_next * cap_scale)
            if visit < partial:
                s_next = hide(s_next, words, BLOCK_N)
            p, m_i, l_i, alpha = softmax_step(s_next, m_i, l_i, qk_scale, BLOCK_N)
            carried = pack_pairs(p, dtype) if EARLY else p
            step += 1
            # Ends a basic block, so that the compiler does not move the wait below ahead of the exponentials.
            mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1, pred=visit + 1 < total)
            acc, weights, carried, l_i = warpgroup_mma_wait(0, deps=(acc, weights, carried, l_i))
            mbarrier.arrive(free.index(stage), count=1)
            acc = acc * gl.convert_layout(alpha, ROWS)[:, None]
            weights = carried if EARLY else pack_pairs(carried, dtype)
        # The last values, and the next work's first scores.
        turn += 1
        bh_next, block_m, partial, total = _read_work(work_s, bars, turn)
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        acc = _values(weights, v_s, acc, step, BLOCK_N, BLOCK_D, STAGES)
        if Q_SLOTS == 2:
            mbarrier.wait(q_full.index(turn % 2), (turn // 2) & 1, pred=bh_next >= 0)
            s = _scores(q_s, k_s, turn % 2, HALF, stage, BLOCK_N, BLOCK_D)
        if partial > 0:
            hide_bits(bounds_s, stage * NUM_BOUNDS, words, block_m * 128 + HALF * 64, BLOCK_N, NUM_BOUNDS)
        l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, SCORES))
        b = bh // heads
        h = bh % heads
        top = m_i * qk_scale
        if SINKS:
            sink = gl.load(sinks + h).to(gl.float32) * LOG2E
            m_new = gl.maximum(top, sink)
            alpha = gl.exp2(top - m_new)
            l_i = l_i * alpha + gl.exp2(sink - m_new)
            top = m_new
        empty = l_i == 0.0
        factor = gl.where(empty, 0.0, 1.0 / l_i)
        if SINKS:
            factor = factor * alpha
        m = m0 + gl.arange(0, 64, l_i.type.layout)
        value = gl.where(empty, float("-inf"), (top + gl.log2(l_i)) * LN2)
        gl.store(lse + bh.to(gl.int64) * q_len + m, value, mask=m < q_len)
        acc, weights = warpgroup_mma_wait(Q_SLOTS - 1, deps=(acc, weights))
        acc = acc * gl.convert_layout(factor, ROWS)[:, None]
        q_s.index(slot * 2 + HALF).reshape([64, BLOCK_D]).store(acc.to(dtype))
        fence_async_shared()
        tma_store(out, [b, h, m0, 0], q_s.index(slot * 2 + HALF))
        if Q_SLOTS == 1:
            tma.store_wait(0)
            mbarrier.arrive(q_free.index(0), count=1)
            mbarrier.wait(q_full.index(0), turn & 1, pred=bh_next >= 0)
            s = _scores(q_s, k_s, 0, HALF, stage, BLOCK_N, BLOCK_D)
        bh = bh_next
        s = warpgroup_mma_wait(0, deps=(s,))
    tma.store_wait(0)


@gluon.jit
def _take(counter, order, counts, lines, heads_total, heads, mask_stride, mask_heads, head_group):
    """The next piece of work: whether there is one, its block of rows, b, h, mask, and its partial and full tiles."""
    more, block_m, b, h, mask = take(counter, order, lines, heads_total, heads, 1, mask_stride, mask_heads, head_group)
    at = counts + (mask * lines + block_m) * 2
    return more, block_m, b, h, mask, gl.load(at), gl.load(at + 1)


@gluon.jit
def _load_q(q, q_s, bars, turn, b, h, block_m):
    """Q of piece of work number ``turn``, once its slot is free."""
    q_full, q_free = bars[2], bars[3]
    Q_SLOTS: gl.constexpr = q_full.shape[0]
    slot = turn % Q_SLOTS
    mbarrier.wait(q_free.index(slot), ((turn // Q_SLOTS) & 1) ^ 1)
    mbarrier.expect(q_full.index(slot), 2 * q.block_type.nbytes)
    tma_load(q, [b, h, block_m * 128, 0], q_full.index(slot), q_s.index(slot * 2))
    tma_load(q, [b, h, block_m * 128 + 64, 0], q_full.index(slot), q_s.index(slot * 2 + 1))


@gluon.jit
def _load_step(
    k, v, bounds, k_s, v_s, bounds_s, bars, step, here, before, bounds_at, bounds_len, partial,
    STAGES: gl.constexpr, NUM_BOUNDS: gl.constexpr,
):  # fmt: skip
    """K of the block ``here``, with its bounds if it is partial, and V of the block ``before``: (b, h, row) each."""
    full, free = bars[0], bars[1]
    stage = step % STAGES
    BYTES: gl.constexpr = k.block_type.nbytes + v.block_type.nbytes
    mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
    if partial:
        mbarrier.expect(full.index(stage), BYTES + NUM_BOUNDS * bounds.block_type.nbytes)
        for i in gl.static_range(NUM_BOUNDS):
            tma_load(bounds, [bounds_at + i * bounds_len], full.index(stage), bounds_s.index(stage * NUM_BOUNDS + i))
    else:
        mbarrier.expect(full.index(stage), BYTES)
    tma_load(k, [here[0], here[1], here[2], 0], full.index(stage), k_s.index(stage))
    tma_load(v, [before[0], before[1], before[2], 0], full.index(stage), v_s.index((step + STAGES - 1) % STAGES))


@gluon.jit
def _produce(team, given, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_BOUNDS: gl.constexpr):
    """The warp that takes work and loads what it needs."""
    q_s, k_s, v_s, bounds_s, _, work_s, bars = team
    q, k, v, bounds, spans, counts, order, counter, sizes = given
    bounds_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads, head_group = sizes
    full, free, q_full, _, work_full, work_free = bars
    Q_SLOTS: gl.constexpr = q_full.shape[0]
    step = 0
    turn = 0
    more, block_m, b, h, mask, partial, whole = _take(
        counter, order, counts, lines, heads_total, heads, mask_stride, mask_heads, head_group
    )
    # The first step has no block before it; what it loads as V nobody uses. (Zeros, since Triton 3.6 takes a variable
    # that starts as a copy of another of the loop for one that never changes.)
    b_before = 0
    h_before = 0
    row_before = 0
    while more:
        slot = turn % 2
        line, _partial, _full, span, block, end = open_list(spans, counts, mask, block_m, lines, capacity)
        # Rows that see nothing visit one block that all of them are hidden from, and whose K and V are zeros.
        nothing = partial + whole == 0
        partial = gl.where(nothing, 1, partial)
        total = partial + whole
        block = gl.where(nothing, 0, block)
        mbarrier.wait(work_free.index(slot), ((turn // 2) & 1) ^ 1)
        write_scalar(work_s.index(slot * WORK_FIELDS), b * heads + h)
        write_scalar(work_s.index(slot * WORK_FIELDS + 1), block_m)
        write_scalar(work_s.index(slot * WORK_FIELDS + 2), partial)
        write_scalar(work_s.index(slot * WORK_FIELDS + 3), total)
        mbarrier.arrive(work_full.index(slot), count=1)
        if Q_SLOTS == 2:
            _load_q(q, q_s, bars, turn, b, h, block_m)
        bounds_at = mask.to(gl.int32) * NUM_BOUNDS * bounds_len
        b_here = b
        h_here = h // group
        row = gl.where(nothing, NOWHERE, block * BLOCK_N)
        _load_step(
            k, v, bounds, k_s, v_s, bounds_s, bars, step, (b_here, h_here, row), (b_before, h_before, row_before),
            bounds_at + block * BLOCK_N, bounds_len, partial > 0, STAGES, NUM_BOUNDS,
        )  # fmt: skip
        if Q_SLOTS == 1:  # its slot becomes free when the work before has got the last values, which came above
            _load_q(q, q_s, bars, turn, b, h, block_m)
        step += 1
        partial_here = partial
        # The work after this one, looked up while the consumers are busy.
        more, block_m, b, h, mask, partial, whole = _take(
            counter, order, counts, lines, heads_total, heads, mask_stride, mask_heads, head_group
        )
        for visit in range(1, total):
            span, block, end = next_tile(line, span, block, end, visit - 1, partial_here, capacity)
            row_before = row
            row = block * BLOCK_N
            _load_step(
                k, v, bounds, k_s, v_s, bounds_s, bars, step, (b_here, h_here, row), (b_here, h_here, row_before),
                bounds_at + row, bounds_len, visit < partial_here, STAGES, NUM_BOUNDS,
            )  # fmt: skip
            step += 1
        b_before = b_here
        h_before = h_here
        row_before = row
        turn += 1
    slot = turn % 2
    mbarrier.wait(work_free.index(slot), ((turn // 2) & 1) ^ 1)
    write_scalar(work_s.index(slot * WORK_FIELDS), -1)
    write_scalar(work_s.index(slot * WORK_FIELDS + 2), 0)
    mbarrier.arrive(work_full.index(slot), count=1)
    if turn > 0:
        stage = step % STAGES
        mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), v.block_type.nbytes)
        tma_load(v, [b_before, h_before, row_before, 0], full.index(stage), v_s.index((step + STAGES - 1) % STAGES))


@gluon.jit
def _team(
    q, k, v, bounds,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SLOTS: gl.constexpr,
    NUM_BOUNDS: gl.constexpr,
):  # fmt: skip
    """What a producer and its two consumers share: memory for tiles, barriers at their start."""
    q_s = gl.allocate_shared_memory(q.dtype, [2 * Q_SLOTS, 1, 1, 64, BLOCK_D], q.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v.layout)
    bounds_s = gl.allocate_shared_memory(gl.int32, [STAGES * NUM_BOUNDS, BLOCK_N], bounds.layout)
    words_s = gl.allocate_shared_memory(gl.int32, [2, 2, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    work_s = gl.allocate_shared_memory(gl.int32, [2 * WORK_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], BARRIER)
    q_free = gl.allocate_shared_memory(gl.int64, [Q_SLOTS, 1], BARRIER)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(Q_SLOTS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_free.index(i), count=2)
    bars = (full, free, q_full, q_free, work_full, work_free)
    return q_s, k_s, v_s, bounds_s, words_s, work_s, bars


@gluon.jit(do_not_specialize=LENGTHS)
def forward_kernel(
    q, k, v, out, lse, sinks, bounds, spans, counts, order, counter,
    q_len, bounds_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads, head_group,
    qk_scale, cap_scale,
    BLOCK_D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, Q_SLOTS: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, TEAMS: gl.constexpr,
):  # fmt: skip
    """out and lse of all rows and heads.

    ``q .. out`` are TMA descriptors of ``[B, H, S, D]`` views in boxes of 64 rows (q, out) or BLOCK_N; ``bounds`` one
    of the flat ``[masks, NUM_BOUNDS, bounds_len]``; ``counter`` an int32 zero. The rest is as in the Triton kernel.
    """
    # The first partition's registers are what is left; then warps and registers a thread of the others.
    EARLY: gl.constexpr = TEAMS == 1
    team = _team(q, k, v, bounds, BLOCK_D, BLOCK_N, STAGES, Q_SLOTS, NUM_BOUNDS)
    rows = (out, lse, sinks, q_len, heads, qk_scale, cap_scale)
    sizes = (bounds_len, lines, capacity, heads_total, heads, group, mask_stride, mask_heads, head_group)
    work = (q, k, v, bounds, spans, counts, order, counter, sizes)
    if TEAMS == 1:
        gl.warp_specialize([
            (_consume, (team, rows, 0, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, SINKS, EARLY)),
            (_consume, (team, rows, 1, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, SINKS, EARLY)),
            (_produce, (team, work, BLOCK_N, STAGES, NUM_BOUNDS)),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        other = _team(q, k, v, bounds, BLOCK_D, BLOCK_N, STAGES, Q_SLOTS, NUM_BOUNDS)
        gl.warp_specialize([
            (_consume, (team, rows, 0, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, SINKS, EARLY)),
            (_consume, (team, rows, 1, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, SINKS, EARLY)),
            (_consume, (other, rows, 0, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, SINKS, EARLY)),
            (_consume, (other, rows, 1, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, SINKS, EARLY)),
            (_produce, (team, work, BLOCK_N, STAGES, NUM_BOUNDS)),
            (_produce, (other, work, BLOCK_N, STAGES, NUM_BOUNDS)),
        ], [4, 4, 4, 1, 1], [112, 112, 112, 24, 24])  # fmt: skip
