"""The backward kernel: a program a multiprocessor takes blocks of keys, heaviest first, until there are none.

One warp takes the work (``schedule``), another (the producer) brings tiles through TMA: Q, dO and their row statistics
in a ring of STAGES, K and V with the first of a piece of work. Two warpgroups (the consumers) hold dK and dV of 64 keys
each in registers. Scores are transposed, keys on the rows: bounds stay in registers, P^T and dS^T are operands as they
are. A third warpgroup (the writer) takes dS from shared memory and computes what a tile adds to dQ, which TMA adds to a
float32 buffer; in which order is up to chance. It sends dK and dV off too. No warpgroup waits for another but through
barriers, so one computes while another masks and exponentiates.

All steps of all work form one stream: K has two slots, and the first scores of a piece of work go out in the last step
of the one before. dV leaves through the memory of dS, dK through that of its K.

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

from hf_flashmask.attention.triton.primitives import LENGTHS, tanh

from .backward_common import (
    allocate_queries,
    allocate_scalars,
    in_thread_order,
    next_work,
    produce,
    read_step,
    scores,
)
from .compat import reinterpret, tma_add, tma_store
from .primitives import hide_columns, load_bounds, read_scalar, widen
from .schedule import schedule


@gluon.constexpr_function
def kv_in_registers(BLOCK_D):
    """Half as wide, K and V have room there, which spares shared memory, the narrowest place of all."""
    return BLOCK_D == 64


@gluon.jit
def _consume(
    tiles, ds_s, dv_s, steps_s, work_s, bars, given,
    HALF: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, ONE_MASK: gl.constexpr, LSE_FIRST: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dk and dv of one HALF of the blocks of keys that the producer takes, and ds for dq."""
    q_s, do_s, stats_s, k_s, v_s = tiles
    bounds, bounds_len, qk_scale, cap_scale, softmax_scale = given
    q_full, do_full, free, v_free, ds_full, ds_free, out_full, work_full, work_free = bars
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    OWN: gl.constexpr = gl.DotOperandLayout(0, SCORES, 2)
    KEYS: gl.constexpr = gl.SliceLayout(1, SCORES)
    KV_IN_REGISTERS: gl.constexpr = kv_in_registers(BLOCK_D)
    dtype: gl.constexpr = k_s.dtype
    values = v_s.index(HALF).reshape([64, BLOCK_D])
    step = 0
    turn = 0
    bh, n0, steps, mask = next_work(work_s, work_full, work_free, 0, BLOCK_N)
    n = 64 * HALF + gl.arange(0, 64, KEYS)
    b0, b1, b2, b3 = load_bounds(bounds, mask, n0 + n, bounds_len, NUM_BOUNDS)
    # The first scores: of what is loaded, or of whatever memory holds if there is no work.
    mbarrier.wait(q_full.index(0), 0, pred=bh >= 0)
    keys = k_s.index(HALF).reshape([64, BLOCK_D])
    s = scores(keys, q_s.index(0).reshape([BLOCK_M, BLOCK_D]), stats_s.index(0).slice(0, 1, 0), LSE_FIRST)
    s = warpgroup_mma_wait(0, deps=(s,))
    while bh >= 0:
        dk_acc = gl.zeros([64, BLOCK_D], gl.float32, GRADS)
        dv_acc = gl.zeros([64, BLOCK_D], gl.float32, GRADS)
        slot = turn % 2
        if KV_IN_REGISTERS:
            own_keys = k_s.index(slot * 2 + HALF).reshape([64, BLOCK_D]).load(OWN)
            stage = step % STAGES
            q_tile = q_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            s = scores(own_keys, q_tile, stats_s.index(stage).slice(0, 1, 0), LSE_FIRST)
            mbarrier.wait(do_full.index(stage), (step // STAGES) & 1)
            own_values = values.load(OWN)
            mbarrier.arrive(v_free, count=1)
            s = warpgroup_mma_wait(0, deps=(s,))
        for left in range(steps - 1, -1, -1):
            stage = step % STAGES
            q_tile = q_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            do_tile = do_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            what, mask, b0, b1, b2, b3 = read_step(
                steps_s, stage, mask, (b0, b1, b2, b3), bounds, n0 + n, bounds_len, NUM_BOUNDS, ONE_MASK
            )
            if SOFTCAP:
                s = tanh(s * cap_scale)
            if LSE_FIRST:
                p = gl.exp2(s * qk_scale)
            else:
                p = gl.exp2(gl.fma(s, qk_scale, stats_s.index(stage).slice(0, 1, 0).load(SCORES)))
            if what % 2 != 0:
                p = hide_columns(p, what // 4 * BLOCK_M, b0, b1, b2, b3, NUM_BOUNDS)
            weights = gl.convert_layout(p.to(dtype), OPERAND)
            mbarrier.wait(do_full.index(stage), (step // STAGES) & 1)
            # Row statistics are where the sums begin: no registers of their own.
            stats = stats_s.index(stage).slice(1, 1, 0)
            dp = scores(own_values if KV_IN_REGISTERS else values, do_tile, stats, True)
            dv_acc = warpgroup_mma(weights, do_tile, dv_acc, is_async=True)
            if KV_IN_REGISTERS:
                dp = warpgroup_mma_wait(1, deps=(dp,))
            else:
                dp, dv_acc, weights = warpgroup_mma_wait(0, deps=(dp, dv_acc, weights))
                # From 16 bits again: registers do not hold both, nor dp while p is made, which the other consumer's
                # products and dq's fill instead.
                p = gl.convert_layout(widen(weights), SCORES)
            ds = p * dp
            if SOFTCAP:
                ds = ds * (1.0 - s * s)
            ds = ds.to(dtype)
            ds_operand = gl.convert_layout(ds, OPERAND)
            # Triton 3.6 lets all warps meet at a wait after a store, and before and after an arrival: so waits come
            # before the store, and arrivals when products are under way.
            at = step % 2
            mbarrier.wait(ds_free.index(at), ((step // 2 + turn) & 1) ^ 1)
            step += 1
            next_stage = step % STAGES
            mbarrier.wait(q_full.index(next_stage), (step // STAGES) & 1, pred=what % 4 >= 2)
            ds_s.index(at).store(ds)
            fence_async_shared()
            dk_acc = warpgroup_mma(ds_operand, q_tile, dk_acc, is_async=True)
            # The next step's scores follow at once, of the next work too; after all work, of whatever is there.
            next_q = q_s.index(next_stage).reshape([BLOCK_M, BLOCK_D])
            stats = stats_s.index(next_stage).slice(0, 1, 0)
            if KV_IN_REGISTERS:
                s_next = scores(own_keys, next_q, stats, LSE_FIRST)
            else:
                next_slot = slot ^ gl.where(left == 0, 1, 0)
                keys = k_s.index(next_slot * 2 + HALF).reshape([64, BLOCK_D])
                s_next = scores(keys, next_q, stats, LSE_FIRST)
            mbarrier.arrive(ds_full.index(at), count=1)
            dk_acc, dv_acc, weights, ds_operand = warpgroup_mma_wait(1, deps=(dk_acc, dv_acc, weights, ds_operand))
            mbarrier.arrive(free.index(stage), count=1)
            s = warpgroup_mma_wait(0, deps=(s_next,))
        first = step // 2 + turn
        second = (step + 1) // 2 + turn
        turn += 1
        bh, n0, steps, mask = next_work(work_s, work_full, work_free, turn, BLOCK_N)
        b0, b1, b2, b3 = load_bounds(bounds, mask, n0 + n, bounds_len, NUM_BOUNDS)
        # The memory of ds is used once more a piece of work, for dv.
        mbarrier.wait(ds_free.index(step % 2), (first & 1) ^ 1)
        mbarrier.wait(ds_free.index((step + 1) % 2), (second & 1) ^ 1)
        dv_s.store(dv_acc.to(dtype))
        k_s.index(slot * 2 + HALF).reshape([64, BLOCK_D]).store((dk_acc * softmax_scale).to(dtype))
        fence_async_shared()
        mbarrier.arrive(out_full, count=1)


@gluon.jit
def _write(
    k_s, ds0_s, ds1_s, dv0_s, dv1_s, dq_s, rows_s, work_s, bars, out,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: what each step adds to dq, 64 columns at a time, and what the consumers have made of dk and dv."""
    dq, dk, dv, heads = out
    k_free, v_free, ds_full, ds_free, out_full, work_full, work_free = bars
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    PARTS: gl.constexpr = BLOCK_D // 64
    KV_IN_REGISTERS: gl.constexpr = kv_in_registers(BLOCK_D)
    step = 0
    turn = 0
    bh, n0, steps, _ = next_work(work_s, work_full, work_free, 0, BLOCK_N)
    while bh >= 0:
        slot = turn % 2
        k0_s = k_s.index(slot * 2)
        k1_s = k_s.index(slot * 2 + 1)
        for left in range(steps - 1, -1, -1):
            at = step % 2
            mbarrier.wait(ds_full.index(at), (step // 2) & 1)
            row = read_scalar(rows_s.index(step % (2 * STAGES)))
            for part in gl.static_range(PARTS):
                keys_0 = k0_s.reshape([64, BLOCK_D]).slice(64 * part, 64, 1)
                keys_1 = k1_s.reshape([64, BLOCK_D]).slice(64 * part, 64, 1)
                zero = gl.zeros([BLOCK_M, 64], gl.float32, DQ)
                acc = warpgroup_mma(ds0_s.index(at).permute((1, 0)), keys_0, zero, use_acc=False, is_async=True)
                acc = warpgroup_mma(ds1_s.index(at).permute((1, 0)), keys_1, acc, is_async=True)
                # The addition before last has read its part of dq_s.
                tma.store_wait(1)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                if part == PARTS - 1:
                    mbarrier.arrive(ds_free.index(at), count=1)
                    if not KV_IN_REGISTERS:  # the consumers were done with V when the last ds came
                        mbarrier.arrive(v_free, count=1, pred=left == 0)
                to = part if PARTS == 2 else at
                dq_s.index(to).store(in_thread_order(acc))
                fence_async_shared()
                tma_add(dq, [(row * PARTS + part) * 128, 0], dq_s.index(to))
            step += 1
        mbarrier.wait(out_full, turn & 1)
        b = bh // heads
        h = bh % heads
        tma_store(dv, [b, h, n0, 0], dv0_s)
        tma_store(dv, [b, h, n0 + 64, 0], dv1_s)
        tma_store(dk, [b, h, n0, 0], k0_s)
        tma_store(dk, [b, h, n0 + 64, 0], k1_s)
        tma.store_wait(0)
        mbarrier.arrive(ds_free.index(0), count=1)
        mbarrier.arrive(ds_free.index(1), count=1)
        mbarrier.arrive(k_free.index(slot), count=1)
        turn += 1
        bh, n0, steps, _ = next_work(work_s, work_full, work_free, turn, BLOCK_N)


@gluon.jit
def _as_tile(ds_s, dv):
    """The memory of ds as a tile of dv."""
    memory = ds_s
    if dv.block_shape[3] == 64:
        memory = ds_s.index(0)
    return reinterpret(memory, dv.dtype, dv.block_shape, dv.layout)


@gluon.jit(do_not_specialize=LENGTHS)
def backward_kernel(
    q, do, stats, k, v, dq, dk, dv, bounds, spans, counts, order, counter,
    bounds_len, row_blocks, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
    head_group, qk_scale, cap_scale, softmax_scale,
    BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, ONE_MASK: gl.constexpr,
    LSE_FIRST: gl.constexpr,
):  # fmt: skip
    """dk and dv of all keys and key heads, and dq added to its buffer.

    ``q .. v``, ``dk`` and ``dv`` are TMA descriptors of ``[B, H, S, D]`` views in boxes of BLOCK_M or BLOCK_N rows,
    ``stats`` one of ``[B * Hq * row_blocks * 2, BLOCK_M]`` and ``dq`` of ``[B * Hq * row_blocks * 2 * BLOCK_D, 32]``:
    see ``prepare_kernel``. ``counter`` is an int32 zero. ONE_MASK: the query heads of a key head share one.
    LSE_FIRST: scores begin with -lse, in their own scale; else it is added to the exponents, in powers of two. The rest
    is as in the Triton kernel.
    """
    q_s, do_s, stats_s = allocate_queries(q, do, stats, BLOCK_M, BLOCK_D, STAGES)
    k_s = gl.allocate_shared_memory(k.dtype, [4, 1, 1, 64, BLOCK_D], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [2, 1, 1, 64, BLOCK_D], v.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], k.dtype)
    ds0_s = gl.allocate_shared_memory(k.dtype, [2, 64, BLOCK_M], DS)
    ds1_s = gl.allocate_shared_memory(k.dtype, [2, 64, BLOCK_M], DS)
    dq_s = gl.allocate_shared_memory(gl.float32, [2, 128, 32], dq.layout)
    dv0_s = _as_tile(ds0_s, dv)
    dv1_s = _as_tile(ds1_s, dv)
    steps_s, rows_s, work_s = allocate_scalars(STAGES)
    KV_IN_REGISTERS: gl.constexpr = kv_in_registers(BLOCK_D)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    out_full = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(do_full.index(i), count=2)
        mbarrier.init(free.index(i), count=2)
    mbarrier.init(v_free, count=2 if KV_IN_REGISTERS else 1)
    mbarrier.init(out_full, count=2)
    for i in gl.static_range(2):
        mbarrier.init(k_free.index(i), count=1)
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_free.index(i), count=1)
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_free.index(i), count=4)
    consumer = (q_full, do_full, free, v_free, ds_full, ds_free, out_full, work_full, work_free)
    writer = (k_free, v_free, ds_full, ds_free, out_full, work_full, work_free)
    producer = (q_full, do_full, free, k_free, v_free, work_full, work_free)
    tiles = (q_s, do_s, stats_s, k_s, v_s)
    columns = (bounds, bounds_len, qk_scale, cap_scale, softmax_scale)
    sizes = (row_blocks, lines, capacity, heads, group, mask_stride, mask_heads)
    tensors = (q, do, stats, k, v, spans, counts)
    lists = (spans, counts, order, counter)
    list_sizes = (lines, capacity, heads_total, heads, group, mask_stride, mask_heads, head_group)
    # Warps of the second and following and registers a thread; the first gets what is left.
    gl.warp_specialize([
        (_consume, (
            tiles, ds0_s, dv0_s.reshape([64, BLOCK_D]), steps_s, work_s, consumer, columns,
            0, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, ONE_MASK, LSE_FIRST,
        )),
        (_consume, (
            tiles, ds1_s, dv1_s.reshape([64, BLOCK_D]), steps_s, work_s, consumer, columns,
            1, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, ONE_MASK, LSE_FIRST,
        )),
        (_write, (
            k_s, ds0_s, ds1_s, dv0_s, dv1_s, dq_s, rows_s, work_s, writer, (dq, dk, dv, heads),
            BLOCK_M, BLOCK_N, BLOCK_D, STAGES,
        )),
        (produce, (tensors, tiles, steps_s, rows_s, work_s, producer, sizes, BLOCK_M, BLOCK_N, STAGES)),
        (schedule, (lists, list_sizes, work_s, work_full, work_free)),
    ], [4, 4, 1, 1], [208, 64, 32, 32])  # fmt: skip
