"""The backward kernel: a program a multiprocessor takes blocks of keys, heaviest first, until there are none.

One warp (the producer) takes the work and brings tiles through TMA: K and V once a piece of work, Q, dO and their row
statistics in a ring of STAGES. Two warpgroups (the consumers) hold dK and dV of the block's 128 keys in registers.
Scores are transposed, keys on the rows: bounds stay in registers, P^T and dS^T are operands as they are. What a tile
adds to dQ goes through shared memory, and TMA adds it to a float32 buffer; in which order is up to chance.

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

from hf_flashmask.attention.triton.primitives import LENGTHS, find_work, hide, next_tile, open_list, tanh

from .compat import reinterpret, tma_add, tma_load, tma_store
from .primitives import read_scalar, write_scalar

# What the producer tells the consumers of a piece of work: batch * key heads + key head (-1: no more), block of keys,
# steps, mask of the first step.
WORK_FIELDS = gl.constexpr(4)
# And of a step: 2 * block of queries + whether it is partial, block of the statistics and of dq, mask.
STEP_FIELDS = gl.constexpr(3)


@gluon.jit
def in_thread_order(dq, BLOCK_D: gl.constexpr):
    """dq [64, BLOCK_D], the accumulator of two warpgroups side by side, as [2 * BLOCK_D, 32].

    Four neighbours here lie in one thread, and the next four in the next: 16-byte stores without bank conflicts.
    ``finish_kernel`` puts it back.
    """
    dq = gl.reshape(dq, [4, 2, 8, 2, BLOCK_D // 16, 4, 2])
    return gl.reshape(gl.permute(dq, (4, 3, 0, 2, 5, 1, 6)), [2 * BLOCK_D, 32])


@gluon.jit
def _load_bounds(bounds, mask, n, bounds_len, NUM_BOUNDS: gl.constexpr):
    """The bounds of keys n, four of [BLOCK_N]; those beyond NUM_BOUNDS repeat the first."""
    at = bounds + mask.to(gl.int64) * NUM_BOUNDS * bounds_len + n
    b0 = gl.load(at)
    b1 = gl.load(at + bounds_len)
    b2 = b0
    b3 = b0
    if NUM_BOUNDS == 4:
        b2 = gl.load(at + 2 * bounds_len)
        b3 = gl.load(at + 3 * bounds_len)
    return b0, b1, b2, b3


@gluon.jit
def _read_work(work_s, work_full, work_free, turn, BLOCK_N: gl.constexpr):
    """The piece of work number ``turn``: batch * key heads + key head, first key, steps, mask of the first step."""
    slot = turn % 2
    mbarrier.wait(work_full.index(slot), (turn // 2) & 1)
    bh = read_scalar(work_s.index(slot * WORK_FIELDS))
    n0 = read_scalar(work_s.index(slot * WORK_FIELDS + 1)) * BLOCK_N
    steps = read_scalar(work_s.index(slot * WORK_FIELDS + 2))
    mask = read_scalar(work_s.index(slot * WORK_FIELDS + 3))
    mbarrier.arrive(work_free.index(slot), count=1)
    return bh, n0, steps, mask


@gluon.jit
def _store_tile(desc, tile, memory, b, h, n0):
    """tile [BLOCK_N, BLOCK_D] to its place, through ``memory``, which all additions but the last have read."""
    tma.store_wait(1)
    staged = reinterpret(memory, desc.dtype, desc.block_shape, desc.layout)
    staged.reshape(tile.shape).store(tile.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [b, h, n0, 0], staged)


@gluon.jit
def _scores(rows, columns):
    """rows columns^T [BLOCK_N, BLOCK_M], issued and not awaited."""
    BLOCK_N: gl.constexpr = rows.shape[0]
    BLOCK_M: gl.constexpr = columns.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    zero = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, LAYOUT)
    return warpgroup_mma(rows, columns.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def _consume(
    q_s, do_s, stats_s, k_s, v_s, ds_s, dq_s, steps_s, work_s, bars, dq, dk, dv, bounds, bounds_len, heads,
    qk_scale, cap_scale, softmax_scale,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, ONE_MASK: gl.constexpr,
):  # fmt: skip
    """Two warpgroups: dk and dv of the blocks of keys that the producer takes, and what these add to dq."""
    q_full, do_full, free, k_full, v_full, kv_free, work_full, work_free = bars
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_M, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    OWN: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_D // 2, 16])
    KEYS: gl.constexpr = gl.SliceLayout(1, SCORES)
    QUERIES: gl.constexpr = gl.SliceLayout(0, SCORES)
    DQ_ROWS: gl.constexpr = dq.block_shape[0]
    # Half as wide, K and V have room in registers, which spares shared memory, the narrowest place of all.
    KV_IN_REGISTERS: gl.constexpr = BLOCK_D == 64
    dtype: gl.constexpr = k_s.dtype
    k_tile = k_s.reshape([BLOCK_N, BLOCK_D])
    v_tile = v_s.reshape([BLOCK_N, BLOCK_D])
    step = 0
    turn = 0
    loads = 0
    bh, n0, steps, mask = _read_work(work_s, work_full, work_free, turn, BLOCK_N)
    while bh >= 0:
        n = n0 + gl.arange(0, BLOCK_N, KEYS)
        b0, b1, b2, b3 = _load_bounds(bounds, mask, n, bounds_len, NUM_BOUNDS)
        dk_acc = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, GRADS)
        dv_acc = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, GRADS)
        mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1, pred=steps > 0)
        mbarrier.wait(k_full, loads & 1, pred=steps > 0)
        keys = k_tile.load(OWN) if KV_IN_REGISTERS else k_tile
        s = _scores(keys, q_s.index(step % STAGES).reshape([BLOCK_M, BLOCK_D]))
        mbarrier.wait(v_full, loads & 1, pred=steps > 0)
        values = v_tile.load(OWN) if KV_IN_REGISTERS else v_tile
        mbarrier.wait(do_full.index(step % STAGES), (step // STAGES) & 1, pred=steps > 0)
        s = warpgroup_mma_wait(0, deps=(s,))
        for left in range(steps - 1, -1, -1):
            stage = step % STAGES
            q_tile = q_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            do_tile = do_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            dp = _scores(values, do_tile)
            block = read_scalar(steps_s.index(stage * STEP_FIELDS))
            row = read_scalar(steps_s.index(stage * STEP_FIELDS + 1))
            if not ONE_MASK:
                now = read_scalar(steps_s.index(stage * STEP_FIELDS + 2))
                if now != mask:
                    b0, b1, b2, b3 = _load_bounds(bounds, now, n, bounds_len, NUM_BOUNDS)
                    mask = now
            lse = stats_s.index(stage).slice(0, 1, 0).load(SCORES)
            if SOFTCAP:
                s = tanh(s * cap_scale)
            p = gl.exp2(gl.fma(s, qk_scale, -lse))
            if block % 2 != 0:
                m = (block // 2 * BLOCK_M + gl.arange(0, BLOCK_M, QUERIES))[None, :]
                p = hide(
                    p, 0.0, m, 0, 0, 0, b0[:, None], b1[:, None], b2[:, None], b3[:, None], 0, False, NUM_BOUNDS,
                    BLOCK_N, False,
                )  # fmt: skip
            weights = gl.convert_layout(p.to(dtype), OPERAND)
            delta = stats_s.index(stage).slice(1, 1, 0).load(SCORES)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            dv_acc = warpgroup_mma(weights, do_tile, dv_acc, is_async=True)
            ds = p * (dp - delta)
            if SOFTCAP:
                ds = ds * (1.0 - s * s)
            ds = ds.to(dtype)
            ds_operand = gl.convert_layout(ds, OPERAND)
            ds_s.store(ds)
            fence_async_shared()
            # The addition before last has read its part of dq_s; the barrier in here is that of ds_s, too.
            tma.store_wait(1)
            dk_acc = warpgroup_mma(ds_operand, q_tile, dk_acc, is_async=True)
            zero = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, DQ)
            dq_acc = warpgroup_mma(ds_s.permute((1, 0)), k_tile, zero, use_acc=False, is_async=True)
            dv_acc, dk_acc, weights, ds_operand = warpgroup_mma_wait(1, deps=(dv_acc, dk_acc, weights, ds_operand))
            mbarrier.arrive(free.index(stage), count=1)
            at = step % 2
            step += 1
            # The scores of the next step are computed while this dq goes out. After the last step they are of
            # whatever is there, and not used.
            mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1, pred=left > 0)
            s_next = _scores(keys, q_s.index(step % STAGES).reshape([BLOCK_M, BLOCK_D]))
            dq_acc = warpgroup_mma_wait(1, deps=(dq_acc,))
            dq_s.index(at).store(in_thread_order(dq_acc, BLOCK_D))
            fence_async_shared()
            tma_add(dq, [row * DQ_ROWS, 0], dq_s.index(at))
            mbarrier.wait(do_full.index(step % STAGES), (step // STAGES) & 1, pred=left > 0)
            s = warpgroup_mma_wait(0, deps=(s_next,))
        mbarrier.arrive(kv_free, count=1, pred=steps > 0)
        loads += (steps > 0).to(gl.int32)
        # Through dq_s, as if they were the next two of its ring.
        _store_tile(dv, dv_acc, dq_s.index(step % 2), bh // heads, bh % heads, n0)
        _store_tile(dk, dk_acc * softmax_scale, dq_s.index((step + 1) % 2), bh // heads, bh % heads, n0)
        turn += 1
        bh, n0, steps, mask = _read_work(work_s, work_full, work_free, turn, BLOCK_N)
    tma.store_wait(0)


@gluon.jit
def _take(
    counter, order, counts, pieces, lines, heads_total, heads, group, mask_stride, mask_heads, HEAD_GROUP: gl.constexpr
):
    """The next piece of work: whether there is one, its block of keys, b, key head, first mask, and its steps."""
    number = gl.atomic_add(counter, 1, sem="relaxed")
    block_n, b, h_kv, first = find_work(
        gl.minimum(number, pieces - 1), order, lines, heads_total, heads, group, mask_stride, mask_heads, HEAD_GROUP
    )
    steps = 0
    for g in range(group):
        mask = (b * mask_stride + (h_kv * group + g) // mask_heads).to(gl.int64)
        at = counts + (mask * lines + block_n) * 2
        steps += gl.load(at) + gl.load(at + 1)
    return number < pieces, block_n, b, h_kv, first.to(gl.int32), steps


@gluon.jit
def _produce(
    q, do, stats, k, v, spans, counts, order, counter, q_s, do_s, stats_s, k_s, v_s, steps_s, work_s, bars,
    row_blocks, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HEAD_GROUP: gl.constexpr,
):  # fmt: skip
    """The warp that takes work and loads what it needs."""
    q_full, do_full, free, k_full, v_full, kv_free, work_full, work_free = bars
    pieces = heads_total * lines
    step = 0
    turn = 0
    loads = 0
    more, block_n, b, h_kv, first, steps = _take(
        counter, order, counts, pieces, lines, heads_total, heads, group, mask_stride, mask_heads, HEAD_GROUP
    )
    while more:
        slot = turn % 2
        mbarrier.wait(work_free.index(slot), ((turn // 2) & 1) ^ 1)
        write_scalar(work_s.index(slot * WORK_FIELDS), b * heads + h_kv)
        write_scalar(work_s.index(slot * WORK_FIELDS + 1), block_n)
        write_scalar(work_s.index(slot * WORK_FIELDS + 2), steps)
        write_scalar(work_s.index(slot * WORK_FIELDS + 3), first)
        mbarrier.arrive(work_full.index(slot), count=1)
        # The work after this one, looked up while the ring is full.
        more, block_next, b_next, h_next, first, steps_next = _take(
            counter, order, counts, pieces, lines, heads_total, heads, group, mask_stride, mask_heads, HEAD_GROUP
        )
        begin = step
        for g in range(group):
            h = h_kv * group + g
            mask = b * mask_stride + h // mask_heads
            line, partial, full, span, block, end = open_list(
                spans, counts, mask.to(gl.int64), block_n, lines, capacity
            )
            rows = (b * heads * group + h) * row_blocks
            for visit in range(partial + full):
                stage = step % STAGES
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                write_scalar(steps_s.index(stage * STEP_FIELDS), block * 2 + (visit < partial).to(gl.int32))
                write_scalar(steps_s.index(stage * STEP_FIELDS + 1), rows + block)
                write_scalar(steps_s.index(stage * STEP_FIELDS + 2), mask)
                mbarrier.expect(q_full.index(stage), q.block_type.nbytes + stats.block_type.nbytes)
                mbarrier.arrive(q_full.index(stage), count=1)
                tma_load(q, [b, h, block * BLOCK_M, 0], q_full.index(stage), q_s.index(stage))
                tma_load(stats, [(rows + block) * 2, 0], q_full.index(stage), stats_s.index(stage))
                mbarrier.expect(do_full.index(stage), do.block_type.nbytes)
                tma_load(do, [b, h, block * BLOCK_M, 0], do_full.index(stage), do_s.index(stage))
                starts = step == begin
                mbarrier.wait(kv_free, (loads & 1) ^ 1, pred=starts)
                mbarrier.expect(k_full, k.block_type.nbytes, pred=starts)
                tma_load(k, [b, h_kv, block_n * BLOCK_N, 0], k_full, k_s, pred=starts)
                mbarrier.expect(v_full, v.block_type.nbytes, pred=starts)
                tma_load(v, [b, h_kv, block_n * BLOCK_N, 0], v_full, v_s, pred=starts)
                span, block, end = next_tile(line, span, block, end, visit, partial, capacity)
                step += 1
        loads += (steps > 0).to(gl.int32)
        block_n, b, h_kv, steps = block_next, b_next, h_next, steps_next
        turn += 1
    slot = turn % 2
    mbarrier.wait(work_free.index(slot), ((turn // 2) & 1) ^ 1)
    write_scalar(work_s.index(slot * WORK_FIELDS), -1)
    mbarrier.arrive(work_full.index(slot), count=1)


@gluon.jit(do_not_specialize=LENGTHS)
def backward_kernel(
    q, do, stats, k, v, dq, dk, dv, bounds, spans, counts, order, counter,
    bounds_len, row_blocks, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
    qk_scale, cap_scale, softmax_scale,
    BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, HEAD_GROUP: gl.constexpr, ONE_MASK: gl.constexpr,
):  # fmt: skip
    """dk and dv of all keys and key heads, and dq added to its buffer.

    ``q .. v``, ``dk`` and ``dv`` are TMA descriptors of ``[B, H, S, D]`` views in boxes of BLOCK_M or BLOCK_N rows,
    ``stats`` one of ``[B * Hq * row_blocks * 2, BLOCK_M]`` and ``dq`` of ``[B * Hq * row_blocks * 2 * BLOCK_D, 32]``:
    see ``prepare_kernel``. ``counter`` is an int32 zero. ONE_MASK: the query heads of a key head share one. The rest is
    as in the Triton kernel.
    """
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q.layout)
    do_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], do.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [STAGES, 2, BLOCK_M], stats.layout)
    k_s = gl.allocate_shared_memory(k.dtype, [1, 1, BLOCK_N, BLOCK_D], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [1, 1, BLOCK_N, BLOCK_D], v.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], k.dtype)
    ds_s = gl.allocate_shared_memory(k.dtype, [BLOCK_N, BLOCK_M], DS)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 2 * BLOCK_D, 32], dq.layout)
    steps_s = gl.allocate_shared_memory(gl.int32, [STAGES * STEP_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    work_s = gl.allocate_shared_memory(gl.int32, [2 * WORK_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    kv_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(kv_free, count=1)
    for i in gl.static_range(2):
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_free.index(i), count=1)
    bars = (q_full, do_full, free, k_full, v_full, kv_free, work_full, work_free)
    # Warps of the second and registers a thread; the first gets what is left.
    gl.warp_specialize([
        (_consume, (
            q_s, do_s, stats_s, k_s, v_s, ds_s, dq_s, steps_s, work_s, bars, dq, dk, dv, bounds, bounds_len, heads,
            qk_scale, cap_scale, softmax_scale, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, ONE_MASK,
        )),
        (_produce, (
            q, do, stats, k, v, spans, counts, order, counter, q_s, do_s, stats_s, k_s, v_s, steps_s, work_s, bars,
            row_blocks, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
            BLOCK_M, BLOCK_N, STAGES, HEAD_GROUP,
        )),
    ], [1], [24])  # fmt: skip
