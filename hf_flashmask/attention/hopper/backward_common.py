"""What both backward kernels do alike: how work and steps are handed on, scores, and the warp that loads tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma

from hf_flashmask.attention.triton.primitives import list_of, next_tile, open_list

from .compat import tma_load
from .primitives import load_bounds, read_scalar, write_scalar
from .schedule import NOWHERE, WORK_FIELDS, read_list, read_work

# What the producer tells the consumers of a step: 4 * block of queries + 2 * whether another step follows + whether it
# is partial, mask.
STEP_FIELDS = gl.constexpr(2)
# Steps from its end at which a piece of work lets the next one be taken: time enough to look it up.
TAKE_AHEAD = gl.constexpr(4)


@gluon.jit
def in_thread_order(dq):
    """dq [64, columns], a warpgroup's accumulator, as [2 * columns, 32].

    Four neighbours here lie in one thread, and the next four in the next: 16-byte stores without bank conflicts.
    ``finish_kernel`` puts it back.
    """
    columns: gl.constexpr = dq.shape[1]
    dq = gl.reshape(dq, [4, 2, 8, columns // 8, 4, 2])
    return gl.reshape(gl.permute(dq, (3, 0, 2, 4, 1, 5)), [2 * columns, 32])


@gluon.jit
def next_work(work_s, work_full, work_free, turn, BLOCK_N: gl.constexpr):
    """The piece of work number ``turn``: batch * key heads + key head, first key, steps, mask of the first step."""
    bh, block_n, steps, mask = read_work(work_s, work_full, turn)
    mbarrier.arrive(work_free.index(turn % 2), count=1)
    return bh, block_n * BLOCK_N, steps, mask


@gluon.jit
def read_step(
    steps_s, stage, mask, limits, bounds, n, bounds_len, NUM_BOUNDS: gl.constexpr, ONE_MASK: gl.constexpr
):  # fmt: skip
    """What the producer says of a step, its mask, and the bounds of keys n under it; ``limits`` were those before."""
    what = read_scalar(steps_s.index(stage * STEP_FIELDS))
    b0, b1, b2, b3 = limits
    if not ONE_MASK:
        now = read_scalar(steps_s.index(stage * STEP_FIELDS + 1))
        if now != mask:
            b0, b1, b2, b3 = load_bounds(bounds, now, n, bounds_len, NUM_BOUNDS)
            mask = now
    return what, mask, b0, b1, b2, b3


@gluon.jit
def scores(rows, columns, stats, START: gl.constexpr):
    """rows columns^T [64, BLOCK_M] plus, with START, the row ``stats``; issued and not awaited."""
    BLOCK_M: gl.constexpr = columns.shape[0]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    acc = gl.zeros([64, BLOCK_M], gl.float32, LAYOUT)
    if START:
        acc, _ = gl.broadcast(stats.load(LAYOUT), acc)
    return warpgroup_mma(rows, columns.permute((1, 0)), acc, use_acc=START, is_async=True)


@gluon.jit
def allocate_queries(q, do, stats, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory of Q, dO and the statistics of their rows."""
    q_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q.layout)
    do_s = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], do.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [STAGES, 2, BLOCK_M], stats.layout)
    return q_s, do_s, stats_s


@gluon.jit
def allocate_scalars(STAGES: gl.constexpr):
    """Shared memory of what is said of a step, of its rows of dq, and of a piece of work."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    steps_s = gl.allocate_shared_memory(gl.int32, [STAGES * STEP_FIELDS, 1], LAYOUT)
    rows_s = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 1], LAYOUT)
    work_s = gl.allocate_shared_memory(gl.int32, [2 * WORK_FIELDS, 1], LAYOUT)
    return steps_s, rows_s, work_s


@gluon.jit
def produce(
    given, tiles, steps_s, rows_s, work_s, bars, sizes,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads what a piece of work needs."""
    q, do, stats, k, v, spans, counts = given
    row_blocks, lines, capacity, heads, group, mask_stride, mask_heads = sizes
    q_s, do_s, stats_s, k_s, v_s = tiles
    q_full, do_full, free, k_free, v_free, work_full, work_free = bars
    K_SLOTS: gl.constexpr = k_free.shape[0]
    HALVES: gl.constexpr = BLOCK_N // 64
    Q_BYTES: gl.constexpr = q.block_type.nbytes + stats.block_type.nbytes
    step = 0
    turn = 0
    bh, block_n, steps, mask = read_work(work_s, work_full, 0)
    while bh >= 0:
        slot = turn % 2
        k_slot = turn % K_SLOTS
        partial, full, span, block, end, nothing = read_list(work_s, turn)
        n0 = gl.where(nothing, NOWHERE, block_n * BLOCK_N)
        b = bh // heads
        h_kv = bh % heads
        begin = step
        last = step + steps - 1
        # Work taken early is work done out of its order: less of what programs read at one time is the same.
        takes = gl.maximum(last - TAKE_AHEAD, begin)
        for g in range(group):
            h = h_kv * group + g
            if g > 0:
                mask = b * mask_stride + h // mask_heads
                _, partial, full, span, block, end = open_list(
                    spans, counts, mask.to(gl.int64), block_n, lines, capacity
                )
            line = list_of(spans, mask.to(gl.int64), block_n, lines, capacity)
            rows = (b * heads * group + h) * row_blocks
            for visit in range(partial + full):
                stage = step % STAGES
                starts = step == begin
                # The first two pieces are taken at once.
                mbarrier.arrive(work_free.index(slot ^ 1), count=1, pred=(step == takes) & (turn > 0))
                follows = step != last
                if step == last:
                    bh, _, _, _ = read_work(work_s, work_full, turn + 1)
                    follows = bh >= 0
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                what = block * 4 + follows.to(gl.int32) * 2 + (visit < partial).to(gl.int32)
                write_scalar(steps_s.index(stage * STEP_FIELDS), what)
                write_scalar(steps_s.index(stage * STEP_FIELDS + 1), mask)
                # The writer is behind: the consumers by two steps at most, which are behind by STAGES.
                write_scalar(rows_s.index(step % (2 * STAGES)), rows + block)
                mbarrier.expect(q_full.index(stage), Q_BYTES)
                mbarrier.wait(k_free.index(k_slot), ((turn // K_SLOTS) & 1) ^ 1, pred=starts)
                mbarrier.expect(q_full.index(stage), HALVES * k.block_type.nbytes, pred=starts)
                mbarrier.arrive(q_full.index(stage), count=1, pred=step != begin)
                for half in gl.static_range(HALVES):
                    k_half = k_s.index(k_slot * HALVES + half)
                    tma_load(k, [b, h_kv, n0 + 64 * half, 0], q_full.index(stage), k_half, pred=starts)
                tma_load(q, [b, h, block * BLOCK_M, 0], q_full.index(stage), q_s.index(stage))
                tma_load(stats, [(rows + block) * 2, 0], q_full.index(stage), stats_s.index(stage))
                mbarrier.wait(v_free, (turn & 1) ^ 1, pred=starts)
                mbarrier.expect(do_full.index(stage), do.block_type.nbytes)
                mbarrier.expect(do_full.index(stage), HALVES * v.block_type.nbytes, pred=starts)
                mbarrier.arrive(do_full.index(stage), count=1, pred=step != begin)
                tma_load(do, [b, h, block * BLOCK_M, 0], do_full.index(stage), do_s.index(stage))
                for half in gl.static_range(HALVES):
                    tma_load(v, [b, h_kv, n0 + 64 * half, 0], do_full.index(stage), v_s.index(half), pred=starts)
                span, block, end = next_tile(line, span, block, end, visit, partial, capacity)
                step += 1
        turn += 1
        bh, block_n, steps, mask = read_work(work_s, work_full, turn)
