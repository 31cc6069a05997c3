"""The backward kernel of head dims above 128, where one warpgroup's registers do not hold both dK and dV.

As ``backward``, but for blocks of 64 keys, and with a chain of three warpgroups. The first (``_weigh``) makes P and
holds dV, the second (``_differentiate``) makes dS of P, the third (``_gather``) holds dK and computes from dS what a
tile adds to dQ, which it adds to the buffer from registers: shared memory is full. P and dS are handed on there, in two
slots each. K and V have one, so a piece of work begins when the one before is done; dV leaves through the memory of its
V, dK through that of its K.

Barriers come in pairs: ``full`` when memory has been written, ``free`` when it has been read. ``v_done`` says that only
dV still needs the memory of V.
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
from .compat import reinterpret, tma_store
from .primitives import hide_columns, load_bounds, read_scalar
from .schedule import schedule


@gluon.constexpr_function
def grads_layout():
    """dk and dv [64, BLOCK_D] by products of 128 columns: for one of 256 ptxas does not find the registers."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])


@gluon.jit
def _weigh(
    tiles, p_s, steps_s, work_s, bars, given, out,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, NUM_BOUNDS: gl.constexpr,
    SOFTCAP: gl.constexpr, ONE_MASK: gl.constexpr,
):  # fmt: skip
    """One warpgroup: p, for the others, and dv."""
    q_s, do_s, stats_s, k_s, v_s = tiles
    bounds, bounds_len, qk_scale, cap_scale = given
    dv, heads = out
    q_full, do_full, free, v_free, p_full, p_free, v_done, work_full, work_free = bars
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    GRADS: gl.constexpr = grads_layout()
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, GRADS, 2)
    dtype: gl.constexpr = k_s.dtype
    keys = k_s.index(0).reshape([64, BLOCK_D])
    n = gl.arange(0, 64, gl.SliceLayout(1, SCORES))
    step = 0
    turn = 0
    bh, n0, steps, mask = next_work(work_s, work_full, work_free, 0, 64)
    while bh >= 0:
        b0, b1, b2, b3 = load_bounds(bounds, mask, n0 + n, bounds_len, NUM_BOUNDS)
        dv_acc = gl.zeros([64, BLOCK_D], gl.float32, GRADS)
        stage = step % STAGES
        mbarrier.wait(q_full.index(stage), (step // STAGES) & 1)
        s = scores(keys, q_s.index(stage).reshape([BLOCK_M, BLOCK_D]), stats_s.index(stage).slice(0, 1, 0), False)
        s = warpgroup_mma_wait(0, deps=(s,))
        for left in range(steps - 1, -1, -1):
            stage = step % STAGES
            what, mask, b0, b1, b2, b3 = read_step(
                steps_s, stage, mask, (b0, b1, b2, b3), bounds, n0 + n, bounds_len, NUM_BOUNDS, ONE_MASK
            )
            if SOFTCAP:
                s = tanh(s * cap_scale)
            p = gl.exp2(gl.fma(s, qk_scale, stats_s.index(stage).slice(0, 1, 0).load(SCORES)))
            if what % 2 != 0:
                p = hide_columns(p, what // 4 * BLOCK_M, b0, b1, b2, b3, NUM_BOUNDS)
            p16 = p.to(dtype)
            weights = gl.convert_layout(p16, OPERAND)
            at = step % 2
            mbarrier.wait(p_free.index(at), ((step // 2) & 1) ^ 1)
            mbarrier.wait(do_full.index(stage), (step // STAGES) & 1)
            step += 1
            next_stage = step % STAGES
            mbarrier.wait(q_full.index(next_stage), (step // STAGES) & 1, pred=left > 0)
            if SOFTCAP:  # its derivative goes with p: the others want both together
                p_s.index(at).store((p * (1.0 - s * s)).to(dtype))
            else:
                p_s.index(at).store(p16)
            dv_acc = warpgroup_mma(weights, do_s.index(stage).reshape([BLOCK_M, BLOCK_D]), dv_acc, is_async=True)
            # The next step's scores follow at once; in the last step, of whatever is there.
            next_q = q_s.index(next_stage).reshape([BLOCK_M, BLOCK_D])
            s_next = scores(keys, next_q, stats_s.index(next_stage).slice(0, 1, 0), False)
            mbarrier.arrive(p_full.index(at), count=1)
            dv_acc, weights = warpgroup_mma_wait(1, deps=(dv_acc, weights))
            mbarrier.arrive(free.index(stage), count=1)
            s = warpgroup_mma_wait(0, deps=(s_next,))
        mbarrier.wait(v_done, turn & 1)
        v_s.index(0).reshape([64, BLOCK_D]).store(dv_acc.to(dtype))
        fence_async_shared()
        tma_store(dv, [bh // heads, bh % heads, n0, 0], v_s.index(0))
        turn += 1
        bh, n0, steps, mask = next_work(work_s, work_full, work_free, turn, 64)
        tma.store_wait(0)
        mbarrier.arrive(v_free, count=1)


@gluon.jit
def _differentiate(tiles, p_s, ds_s, work_s, bars, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """One warpgroup: ds, of p."""
    _, do_s, stats_s, k_s, v_s = tiles
    q_full, do_full, p_full, p_free, ds_full, ds_free, v_done, work_full, work_free = bars
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    values = v_s.index(0).reshape([64, BLOCK_D])
    step = 0
    turn = 0
    bh, _, steps, _ = next_work(work_s, work_full, work_free, 0, 64)
    while bh >= 0:
        for _left in range(steps):
            stage = step % STAGES
            at = step % 2
            phase = (step // 2) & 1
            mbarrier.wait(q_full.index(stage), (step // STAGES) & 1)  # row statistics come with Q
            mbarrier.wait(do_full.index(stage), (step // STAGES) & 1)
            do_tile = do_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            dp = scores(values, do_tile, stats_s.index(stage).slice(1, 1, 0), True)
            mbarrier.wait(p_full.index(at), phase)
            p = p_s.index(at).load(SCORES)
            mbarrier.wait(ds_free.index(at), phase ^ 1)
            dp = warpgroup_mma_wait(0, deps=(dp,))
            ds_s.index(at).store((p.to(gl.float32) * dp).to(k_s.dtype))
            fence_async_shared()
            mbarrier.arrive(ds_full.index(at), count=1)
            mbarrier.arrive(p_free.index(at), count=1)
            step += 1
        mbarrier.arrive(v_done, count=1)
        turn += 1
        bh, _, steps, _ = next_work(work_s, work_full, work_free, turn, 64)


@gluon.jit
def _add(to, dq):
    """Adds dq [64, columns] to the buffer, in the order in which threads hold it."""
    dq = in_thread_order(dq)
    i = gl.arange(0, dq.shape[0], gl.SliceLayout(1, dq.type.layout))[:, None]
    j = gl.arange(0, 32, gl.SliceLayout(0, dq.type.layout))[None, :]
    gl.atomic_add(to + (i * 32 + j), dq, sem="relaxed")


@gluon.jit
def _gather(
    q_s, k_s, ds_s, rows_s, work_s, bars, dq, out, softmax_scale,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: dk, and what each step adds to dq."""
    dk, heads = out
    free, k_free, ds_full, ds_free, work_full, work_free = bars
    COLUMNS: gl.constexpr = 64  # of dq at a time: there are no registers for more
    PARTS: gl.constexpr = BLOCK_D // COLUMNS
    GRADS: gl.constexpr = grads_layout()
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, COLUMNS], k_s.dtype)
    parts_s = reinterpret(k_s, k_s.dtype, [PARTS, 64, COLUMNS], TILE)
    step = 0
    turn = 0
    bh, n0, steps, _ = next_work(work_s, work_full, work_free, 0, 64)
    while bh >= 0:
        dk_acc = gl.zeros([64, BLOCK_D], gl.float32, GRADS)
        for _left in range(steps):
            stage = step % STAGES
            at = step % 2
            mbarrier.wait(ds_full.index(at), (step // 2) & 1)
            row = read_scalar(rows_s.index(step % (2 * STAGES)))
            to = dq + row.to(gl.int64) * (BLOCK_M * BLOCK_D)
            q_tile = q_s.index(stage).reshape([BLOCK_M, BLOCK_D])
            rows = ds_s.index(at).permute((1, 0))
            zero = gl.zeros([BLOCK_M, COLUMNS], gl.float32, DQ)
            # Alone on purpose: with the first part of dq under way too it is slower.
            dk_acc = warpgroup_mma(ds_s.index(at), q_tile, dk_acc, is_async=True)
            dk_acc = warpgroup_mma_wait(0, deps=(dk_acc,))
            mbarrier.arrive(free.index(stage), count=1)
            for part in range(PARTS):  # not unrolled, or the compiler has several under way, and spills
                acc = warpgroup_mma(rows, parts_s.index(part), zero, use_acc=False, is_async=True)
                acc = warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(ds_free.index(at), count=1, pred=part == PARTS - 1)
                _add(to + part * (COLUMNS * BLOCK_M), acc)
            step += 1
        k_s.index(0).reshape([64, BLOCK_D]).store((dk_acc * softmax_scale).to(k_s.dtype))
        fence_async_shared()
        tma_store(dk, [bh // heads, bh % heads, n0, 0], k_s.index(0))
        turn += 1
        bh, n0, steps, _ = next_work(work_s, work_full, work_free, turn, 64)
        tma.store_wait(0)
        mbarrier.arrive(k_free.index(0), count=1)


@gluon.jit(do_not_specialize=LENGTHS)
def wide_backward_kernel(
    q, do, stats, k, v, dq, dk, dv, bounds, spans, counts, order, counter,
    bounds_len, row_blocks, lines, capacity, heads_total, heads, group, mask_stride, mask_heads,
    head_group, qk_scale, cap_scale, softmax_scale,
    BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    NUM_BOUNDS: gl.constexpr, SOFTCAP: gl.constexpr, ONE_MASK: gl.constexpr,
):  # fmt: skip
    """As ``backward_kernel`` without LSE_FIRST, for blocks of BLOCK_N = 64 keys; ``dq`` is the buffer itself."""
    q_s, do_s, stats_s = allocate_queries(q, do, stats, BLOCK_M, BLOCK_D, STAGES)
    k_s = gl.allocate_shared_memory(k.dtype, [1, 1, 1, BLOCK_N, BLOCK_D], k.layout)
    v_s = gl.allocate_shared_memory(v.dtype, [1, 1, 1, BLOCK_N, BLOCK_D], v.layout)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], k.dtype)
    p_s = gl.allocate_shared_memory(k.dtype, [2, BLOCK_N, BLOCK_M], DS)
    ds_s = gl.allocate_shared_memory(k.dtype, [2, BLOCK_N, BLOCK_M], DS)
    steps_s, rows_s, work_s = allocate_scalars(STAGES)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_free = gl.allocate_shared_memory(gl.int64, [1, 1], BARRIER)
    v_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    p_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    ds_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    v_done = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=2)
        mbarrier.init(do_full.index(i), count=2)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(work_full.index(i), count=1)
        mbarrier.init(work_free.index(i), count=4)
        mbarrier.init(p_full.index(i), count=1)
        mbarrier.init(p_free.index(i), count=1)
        mbarrier.init(ds_full.index(i), count=1)
        mbarrier.init(ds_free.index(i), count=1)
    mbarrier.init(k_free.index(0), count=1)
    mbarrier.init(v_free, count=1)
    mbarrier.init(v_done, count=1)
    weigher = (q_full, do_full, free, v_free, p_full, p_free, v_done, work_full, work_free)
    differentiator = (q_full, do_full, p_full, p_free, ds_full, ds_free, v_done, work_full, work_free)
    gatherer = (free, k_free, ds_full, ds_free, work_full, work_free)
    producer = (q_full, do_full, free, k_free, v_free, work_full, work_free)
    tiles = (q_s, do_s, stats_s, k_s, v_s)
    columns = (bounds, bounds_len, qk_scale, cap_scale)
    sizes = (row_blocks, lines, capacity, heads, group, mask_stride, mask_heads)
    tensors = (q, do, stats, k, v, spans, counts)
    lists = (spans, counts, order, counter)
    list_sizes = (lines, capacity, heads_total, heads, group, mask_stride, mask_heads, head_group)
    # Warps of the second and following and registers a thread; the first gets what is left.
    gl.warp_specialize([
        (_weigh, (
            tiles, p_s, steps_s, work_s, weigher, columns, (dv, heads),
            BLOCK_M, BLOCK_D, STAGES, NUM_BOUNDS, SOFTCAP, ONE_MASK,
        )),
        (_gather, (
            q_s, k_s, ds_s, rows_s, work_s, gatherer, dq, (dk, heads), softmax_scale, BLOCK_M, BLOCK_D, STAGES,
        )),
        (_differentiate, (tiles, p_s, ds_s, work_s, differentiator, BLOCK_M, BLOCK_D, STAGES)),
        (produce, (tensors, tiles, steps_s, rows_s, work_s, producer, sizes, BLOCK_M, BLOCK_N, STAGES)),
        (schedule, (lists, list_sizes, work_s, work_full, work_free)),
    ], [4, 4, 1, 1], [208, 72, 24, 24])  # fmt: skip
