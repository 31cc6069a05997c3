"""The backward kernel: a program a multiprocessor takes blocks of keys, heaviest first, until there are none.

One warp (the producer) takes the work and brings tiles through TMA: K and V once a piece of work, Q, dO and their row
statistics in a ring of STAGES. Two warpgroups (the consumers) hold dK and dV of 64 keys each in registers. Scores are
transposed, keys on the rows: bounds stay in registers, P^T and dS^T are operands as they are. A third warpgroup takes
dS from shared memory and computes what a tile adds to dQ, which TMA adds to a float32 buffer; in which order is up to
chance. No warpgroup waits for another but through barriers, so one computes while another masks and exponentiates.

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

from hf_flashmask.attention.triton.primitives import LENGTHS, find_work, next_tile, open_list, tanh

from .compat import reinterpret, tma_add, tma_load, tma_store
from .primitives import read_scalar, write_scalar

# What the producer tells the consumers of a piece of work: batch * key heads + key head (-1: no more), block of keys,
# steps, mask of the first step.
WORK_FIELDS = gl.constexpr(4)
# And of a step: 2 * block of queries + whether it is partial, mask.
STEP_FIELDS = gl.constexpr(2)


@gluon.jit
def in_thread_order(dq):
    """dq [64, 64], a warpgroup's accumulator, as [128, 32].

    Four neighbours here lie in one thread, and the next four in the next: 16-byte stores without bank conflicts.
    ``finish_kernel`` puts it back.
    """
    dq = gl.reshape(dq, [4, 2, 8, 8, 4, 2])
    return gl.reshape(gl.permute(dq, (3, 0, 2, 4, 1, 5)), [128, 32])


@gluon.jit
def _load_bounds(bounds, mask, n, bounds_len, NUM_BOUNDS: gl.constexpr):
    """The bounds of keys n, four of [64], none below 0; those beyond NUM_BOUNDS repeat the first."""
    at = bounds + mask.to(gl.int64) * NUM_BOUNDS * bounds_len + n
    b0 = gl.maximum(gl.load(at), 0)
    b1 = gl.maximum(gl.load(at + bounds_len), 0)
    b2 = b0
    b3 = b0
    if NUM_BOUNDS == 4:
        b2 = gl.maximum(gl.load(at + 2 * bounds_len), 0)
        b3 = gl.maximum(gl.load(at + 3 * bounds_len), 0)
    return b0, b1, b2, b3


@gluon.jit
def _hide(p, m0, b0, b1, b2, b3, NUM_BOUNDS: gl.constexpr):
    """p [64 keys, rows from m0] with 0 in place of what the mask hides.

    Rows in eights: which eight is known when compiling, so no thread holds the rows of all its elements.
    """
    BLOCK_M: gl.constexpr = p.shape[1]
    x = gl.reshape(p, [64, BLOCK_M // 8, 8])
    EIGHTS: gl.constexpr = x.type.layout
    KEYS: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, EIGHTS))
    m = m0 + gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, EIGHTS)))[None, None, :]
    eight = 8 * gl.arange(0, BLOCK_M // 8, gl.SliceLayout(0, gl.SliceLayout(2, EIGHTS)))[None, :, None]
    before = gl.convert_layout(b0, KEYS)[:, None, None] - m > eight
    after = gl.convert_layout(b1, KEYS)[:, None, None] - m <= eight
    if NUM_BOUNDS == 2:
        visible = before & after
    else:
        visible = before | after
        before = gl.convert_layout(b2, KEYS)[:, None, None] - m > eight
        after = gl.convert_layout(b3, KEYS)[:, None, None] - m <= eight
        visible &= before | after
    return gl.convert_layout(gl.reshape(gl.where(visible, x, 0.0), p.shape), p.type.layout, assert_trivial=True)


@gluon.constexpr_function
def _widening(name):
    return f"{{.reg .b16 a, b; mov.b32 {{a, b}}, $2; cvt.f32.{name} $0, a; cvt.f32.{name} $1, b;}}"


@gluon.jit
def _widen(x):
    """x in float32, from pairs and no sooner than here: a compiler that saw through it would keep 32 bits of each."""
    if x.dtype == gl.bfloat16:
        CODE: gl.constexpr = _widening("bf16")
    else:
        CODE: gl.constexpr = _widening("f16")
    return gl.inline_asm_elementwise(CODE, "=f,=f,r", [x], dtype=gl.float32, is_pure=False, pack=2)


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
    """tile [64, BLOCK_D] to its place, through ``memory``, which all stores but the last have read."""
    tma.store_wait(1)
    memory.reshape(tile.shape).store(tile.to(desc.dtype))
    fence_async_shared()
    tma_store(desc, [b, h, n0, 0], memory)


@gluon.jit
def _scores(rows, columns, stats, START: gl.constexpr):
    """rows columns^T [64, BLOCK_M] plus, with START, the row ``stats``; issued and not awaited."""
    BLOCK_M: gl.constexpr = columns.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    acc = gl.zeros([64, BLOCK_M], gl.float32, LAYOUT)
    if START:
        acc, _ = gl.broadcast(stats.load(LAYOUT), acc)
    return warpgroup_mma(rows, columns.permute((1, 0)), acc, use_acc=START, is_async=True)


@gluon.jit
def _consume(
    q_s, do_s, stats_s, k_s, v_s, ds_s, out_s, steps_s, work_s, bars, dk, dv, bounds, bounds_len, heads,
    qk_scale, cap_scale, softmax_scale,
    HALF: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, ONE_MASK: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dk and dv of one HALF of the blocks of keys that the producer takes, and ds for dq."""
    q_full, do_full, free, k_full, v_full, v_free, ds_full, ds_free, work_full, work_free = bars
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    OWN: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    KEYS: gl.constexpr = gl.SliceLayout(1, SCORES)
    # Half as wide, K and V have room in registers, which spares shared memory, the narrowest place of all.
    KV_IN_REGISTERS: gl.constexpr = BLOCK_D == 64
    dtype: gl.constexpr = k_s.dtype
    k_tile = k_s.index(HALF).reshape([64, BLOCK_D])
    v_tile = v_s.index(HALF).reshape([64, BLOCK_D])
    # dv goes out through the memory of ds.
    if BLOCK_D == 128:
        dv_s = reinterpret(ds_s, dv.dtype, dv.block_shape, dv.layout)
    else:
        dv_s = reinterpret(ds_s.index(0), dv.dtype, dv.block_shape, dv.layout)
    dk_s = out_s.index(HALF)
    step = 0
    turn = 0
    loads = 0
    bh, n0, steps, mask = _read_work(work_s, work_full, work_free, turn, BLOCK_N)
    while bh >= 0:
        n0 += 64 * HALF
        n = n0 + gl.arange(0, 64, KEYS)
        b0, b1, b2, b3 = _load_bounds(bounds, mask, n, bounds_len, NUM_BOUNDS)
        dk_acc = gl.zeros([64, BLOCK_D], gl.float32, GRADS)
        dv_acc = gl.zeros([64, BLOCK_D], gl.float32, GRADS)
        mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1, pred=steps > 0)
        mbarrier.wait(k_full, loads & 1, pred=steps > 0)
        keys = k_tile.load(OWN) if KV_IN_REGISTERS else k_tile
        stats = stats_s.index(step % STAGES)
        s = _scores(keys, q_s.index(step % STAGES).reshape([BLOCK_M, BLOCK_D]), stats.slice(0, 1, 0), not SOFTCAP)
        tma.store_wait(1)  # the dv before has left the memory of ds
        mbarrier.wait(v_full, loads & 1, pred=steps > 0)
        values = v_tile.load(OWN) if KV_IN_REGISTERS else v_tile
        mbarrier.wait(do_full.index(step % STAGES), (step // STAGES) & 1, pred=steps > 0)
        s = warpgroup_mma_wait(0, deps=(s,))
        for left in range(steps - 1, -1, -1):
            stage = step % STAGES
            q_tile = q_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            do_tile = do_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            block = read_scalar(steps_s.index(stage * STEP_FIELDS))
            if not ONE_MASK:
                now = read_scalar(steps_s.index(stage * STEP_FIELDS + 1))
                if now != mask:
                    b0, b1, b2, b3 = _load_bounds(bounds, now, n, bounds_len, NUM_BOUNDS)
                    mask = now
            if SOFTCAP:
                s = tanh(s * cap_scale)
                p = gl.exp2(gl.fma(s, qk_scale, stats_s.index(stage).slice(0, 1, 0).load(SCORES)))
            else:
                p = gl.exp2(s * qk_scale)
            if block % 2 != 0:
                p = _hide(p, block // 2 * BLOCK_M, b0, b1, b2, b3, NUM_BOUNDS)
            weights = gl.convert_layout(p.to(dtype), OPERAND)
            # Row statistics are where the sums begin: no registers of their own.
            dp = _scores(values, do_tile, stats_s.index(stage).slice(1, 1, 0), True)
            dv_acc = warpgroup_mma(weights, do_tile, dv_acc, is_async=True)
            dp, dv_acc, weights = warpgroup_mma_wait(0, deps=(dp, dv_acc, weights))
            # At head dim 128, from 16 bits again: registers do not hold both, nor dp while p is made, which the other
            # consumer's products and dq's fill instead.
            if BLOCK_D == 128:
                p = gl.convert_layout(_widen(weights), SCORES)
            ds = p * dp
            if SOFTCAP:
                ds = ds * (1.0 - s * s)
            ds = ds.to(dtype)
            ds_operand = gl.convert_layout(ds, OPERAND)
            at = step % 2
            mbarrier.wait(ds_free.index(at), ((step // 2) & 1) ^ 1)
            ds_s.index(at).store(ds)
            fence_async_shared()
            mbarrier.arrive(ds_full.index(at), count=1)
            dk_acc = warpgroup_mma(ds_operand, q_tile, dk_acc, is_async=True)
            step += 1
            # The scores of the next step follow at once. After the last step they are of whatever is there, and not
            # used.
            mbarrier.wait(q_full.index(step % STAGES), (step // STAGES) & 1, pred=left > 0)
            stats = stats_s.index(step % STAGES)
            next_tile = q_s.index(step % STAGES).reshape([BLOCK_M, BLOCK_D])
            s_next = _scores(keys, next_tile, stats.slice(0, 1, 0), not SOFTCAP)
            dk_acc, ds_operand = warpgroup_mma_wait(1, deps=(dk_acc, ds_operand))
            mbarrier.arrive(free.index(stage), count=1)
            mbarrier.wait(do_full.index(step % STAGES), (step // STAGES) & 1, pred=left > 0)
            s = warpgroup_mma_wait(0, deps=(s_next,))
        mbarrier.arrive(v_free, count=1, pred=steps > 0)
        loads += (steps > 0).to(gl.int32)
        mbarrier.wait(ds_free.index(step % 2), ((step // 2) & 1) ^ 1)
        mbarrier.wait(ds_free.index((step + 1) % 2), (((step + 1) // 2) & 1) ^ 1)
        _store_tile(dv, dv_acc, dv_s, bh // heads, bh % heads, n0)
        _store_tile(dk, dk_acc * softmax_scale, dk_s, bh // heads, bh % heads, n0)
        turn += 1
        bh, n0, steps, mask = _read_work(work_s, work_full, work_free, turn, BLOCK_N)
    tma.store_wait(0)


@gluon.jit
def _add_dq(
    k_s, ds0_s, ds1_s, dq_s, rows_s, work_s, bars, dq,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: what each step adds to dq, 64 columns at a time, through TMA."""
    k_full, k_free, ds_full, ds_free, work_full, work_free = bars
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    PARTS: gl.constexpr = BLOCK_D // 64
    step = 0
    turn = 0
    loads = 0
    bh, _, steps, _ = _read_work(work_s, work_full, work_free, turn, BLOCK_N)
    while bh >= 0:
        mbarrier.wait(k_full, loads & 1, pred=steps > 0)
        for left in range(steps - 1, -1, -1):
            at = step % 2
            mbarrier.wait(ds_full.index(at), (step // 2) & 1)
            row = read_scalar(rows_s.index(step % (2 * STAGES)))
            for part in gl.static_range(PARTS):
                keys_0 = k_s.index(0).reshape([64, BLOCK_D]).slice(64 * part, 64, 1)
                keys_1 = k_s.index(1).reshape([64, BLOCK_D]).slice(64 * part, 64, 1)
                zero = gl.zeros([BLOCK_M, 64], gl.float32, DQ)
                acc = warpgroup_mma(ds0_s.index(at).permute((1, 0)), keys_0, zero, use_acc=False, is_async=True)
                acc = warpgroup_mma(ds1_s.index(at).permute((1, 0)), keys_1, acc, is_async=True)
                # The addition before last has read its part of dq_s.
                tma.store_wait(1)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                if part == PARTS - 1:
                    mbarrier.arrive(ds_free.index(at), count=1)
                    mbarrier.arrive(k_free, count=1, pred=left == 0)
                    slot = part if PARTS == 2 else at
                else:
                    slot = part
                dq_s.index(slot).store(in_thread_order(acc))
                fence_async_shared()
                tma_add(dq, [(row * PARTS + part) * 128, 0], dq_s.index(slot))
            step += 1
        loads += (steps > 0).to(gl.int32)
        turn += 1
        bh, _, steps, _ = _read_work(work_s, work_full, work_free, turn, BLOCK_N)
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
    q, do, stats, k, v, spans, counts, order, counter, q_s, do_s, stats_s, k_s, v_s, steps_s, rows_s, work_s, bars,
    row_blocks, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HEAD_GROUP: gl.constexpr,
):  # fmt: skip
    """The warp that takes work and loads what it needs."""
    q_full, do_full, free, k_full, k_free, v_full, v_free, work_full, work_free = bars
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
                write_scalar(steps_s.index(stage * STEP_FIELDS + 1), mask)
                # dq is behind: the consumers by two steps at most, which are behind by STAGES.
                write_scalar(rows_s.index(step % (2 * STAGES)), rows + block)
                mbarrier.expect(q_full.index(stage), q.block_type.nbytes + stats.block_type.nbytes)
                mbarrier.arrive(q_full.index(stage), count=1)
                tma_load(q, [b, h, block * BLOCK_M, 0], q_full.index(stage), q_s.index(stage))
                tma_load(stats, [(rows + block) * 2, 0], q_full.index(stage), stats_s.index(stage))
                mbarrier.expect(do_full.index(stage), do.block_type.nbytes)
                tma_load(do, [b, h, block * BLOCK_M, 0], do_full.index(stage), do_s.index(stage))
                starts = step == begin
                mbarrier.wait(k_free, (loads & 1) ^ 1, pred=starts)
                mbarrier.expect(k_full, 2 * k.block_type.nbytes, pred=starts)
                for half in gl.static_range(2):
                    tma_load(k, [b, h_kv, block_n * BLOCK_N + 64 * half, 0], k_full, k_s.index(half), pred=starts)
                mbarrier.wait(v_free, (loads & 1) ^ 1, pred=starts)
                mbarrier.expect(v_full, 2 * v.block_type.nbytes, pred=starts)
                for half in gl.static_range(2):
                    tma_load(v, [b, h_kv, block_n * BLOCK_N + 64 * half, 0], v_full, v_s.index(half), pred=starts)
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
    k_s = gl.allocate_shared_memory(k.dtype, [2, 1, 1, 64, BLOCK_D], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [2, 1, 1, 64, BLOCK_D], v.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], k.dtype)
    ds0_s = gl.allocate_shared_memory(k.dtype, [2, 64, BLOCK_M], DS)
    ds1_s = gl.allocate_shared_memory(k.dtype, [2, 64, BLOCK_M], DS)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 128, 32], dq.layout)
    out_s = gl.allocate_shared_memory(k.dtype, [2, 1, 1, 64, BLOCK_D], dk.layout)
    steps_s = gl.allocate_shared_memory(gl.int32, [STAGES * STEP_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rows_s = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    work_s = gl.allocate_shared_memory(gl.int32, [2 * WORK_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    mbarrier.init(k_full, count=1)
    mbarrier.init(k_free, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(v_free, count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_free.index(i), count=1)
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_free.index(i), count=3)
    consumer = (q_full, do_full, free, k_full, v_full, v_free, ds_full, ds_free, work_full, work_free)
    adder = (k_full, k_free, ds_full, ds_free, work_full, work_free)
    producer = (q_full, do_full, free, k_full, k_free, v_full, v_free, work_full, work_free)
    # Warps of the second and following and registers a thread; the first gets what is left.
    gl.warp_specialize([
        (_consume, (
            q_s, do_s, stats_s, k_s, v_s, ds0_s, out_s, steps_s, work_s, consumer, dk, dv, bounds, bounds_len, heads,
            qk_scale, cap_scale, softmax_scale, 0, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, ONE_MASK,
        )),
        (_consume, (
            q_s, do_s, stats_s, k_s, v_s, ds1_s, out_s, steps_s, work_s, consumer, dk, dv, bounds, bounds_len, heads,
            qk_scale, cap_scale, softmax_scale, 1, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, ONE_MASK,
        )),
        (_add_dq, (
            k_s, ds0_s, ds1_s, dq_s, rows_s, work_s, adder, dq, BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
        )),
        (_produce, (
            q, do, stats, k, v, spans, counts, order, counter, q_s, do_s, stats_s, k_s, v_s, steps_s, rows_s, work_s,
            producer, row_blocks, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
            BLOCK_M, BLOCK_N, STAGES, HEAD_GROUP,
        )),
    ], [4, 4, 1], [208, 72, 24])  # fmt: skip
