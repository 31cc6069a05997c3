"""The warp that takes work for the others: pieces of work, each with where its list of tiles begins.

What it has to look up is five loads, each of which waits for the one before. Done by the warp that brings tiles,
between two pieces of work, they leave its ring of tiles empty.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hf_flashmask.attention.triton.primitives import find_work, open_list

from .primitives import read_scalar, write_scalar

# Of a piece of work, in each of two slots: batch * heads + head (-1: no more), line of tiles, tiles to visit, mask;
# then of the list of its first query head partial and full tiles, span, tile and end of the first, and whether it
# stands for no list at all.
WORK_FIELDS = gl.constexpr(10)
# A row of K and V that no tensor has, for lists that visit nothing: TMA fills tiles from there on with zeros.
NOWHERE = gl.constexpr(2**30)


@gluon.jit
def read_work(work_s, work_full, turn):
    """Of the piece of work number ``turn``, once it is there: batch * heads + head, line, tiles, mask."""
    slot = turn % 2
    mbarrier.wait(work_full.index(slot), (turn // 2) & 1)
    at = slot * WORK_FIELDS
    return (
        read_scalar(work_s.index(at)), read_scalar(work_s.index(at + 1)), read_scalar(work_s.index(at + 2)),
        read_scalar(work_s.index(at + 3)),
    )  # fmt: skip


@gluon.jit
def read_list(work_s, turn):
    """Of the list of its first query head: partial and full tiles, span, tile, end, and whether there is none."""
    at = turn % 2 * WORK_FIELDS
    return (
        read_scalar(work_s.index(at + 4)), read_scalar(work_s.index(at + 5)), read_scalar(work_s.index(at + 6)),
        read_scalar(work_s.index(at + 7)), read_scalar(work_s.index(at + 8)), read_scalar(work_s.index(at + 9)) != 0,
    )  # fmt: skip


@gluon.jit
def take(counter, order, lines, heads_total, heads, group, mask_stride, mask_heads, head_group):
    """The next piece of work: whether there is one, its line, b, head and mask. After all, the last one again."""
    number = gl.atomic_add(counter, 1, sem="relaxed")
    pieces = heads_total * lines
    line, b, h, mask = find_work(
        gl.minimum(number, pieces - 1), order, lines, heads_total, heads, group, mask_stride, mask_heads, head_group
    )
    return number < pieces, line, b, h, mask


@gluon.jit
def schedule(lists, sizes, work_s, work_full, work_free):
    """One warp. Work is taken when a slot is free: all have read it, and the producer says that it is time."""
    spans, counts, order, counter = lists
    lines, capacity, heads_total, heads, group, mask_stride, mask_heads, head_group = sizes
    turn = 0
    more = True
    while more:
        slot = turn % 2
        mbarrier.wait(work_free.index(slot), ((turn // 2) & 1) ^ 1)
        more, line, b, h, mask = take(
            counter, order, lines, heads_total, heads, group, mask_stride, mask_heads, head_group
        )
        _, partial, full, span, tile, end = open_list(spans, counts, mask, line, lines, capacity)
        steps = partial + full
        for g in range(1, group):
            other = (b * mask_stride + (h * group + g) // mask_heads).to(gl.int64)
            at = counts + (other * lines + line) * 2
            steps += gl.load(at) + gl.load(at + 1)
        # Keys that nothing sees are visited once: by queries that they are all hidden from, and as zeros.
        nothing = steps == 0
        at = slot * WORK_FIELDS
        write_scalar(work_s.index(at), gl.where(more, b * heads + h, -1))
        write_scalar(work_s.index(at + 1), line)
        write_scalar(work_s.index(at + 2), gl.where(nothing, 1, steps))
        write_scalar(work_s.index(at + 3), mask.to(gl.int32))
        write_scalar(work_s.index(at + 4), gl.where(nothing, 1, partial))
        write_scalar(work_s.index(at + 5), full)
        write_scalar(work_s.index(at + 6), span)
        write_scalar(work_s.index(at + 7), gl.where(nothing, 0, tile))
        write_scalar(work_s.index(at + 8), end)
        write_scalar(work_s.index(at + 9), nothing.to(gl.int32))
        mbarrier.arrive(work_full.index(slot), count=1)
        turn += 1
