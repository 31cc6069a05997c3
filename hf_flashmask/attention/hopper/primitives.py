"""What the warps of the Hopper kernels do with a tile that has come: masking, the softmax, row sums.

A tile of scores is BLOCK_M / 2 = 64 rows, one warpgroup's, by BLOCK_N = 64 or 128 columns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def split_rows_layout(BLOCK_N):
    """The layout of a wgmma accumulator [64, BLOCK_N], its rows as [2, 32].

    A thread's rows lie in one half, so it needs one 32-bit word of row bits a column.
    """
    columns, step = [], 8
    while step < BLOCK_N:
        columns.append([0, 0, step])
        step *= 2
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 8, 0], *columns],
        lane_bases=[[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[0, 16, 0], [1, 0, 0]],
        block_bases=[],
        shape=[2, 32, BLOCK_N],
    )


@gluon.jit
def _rows_below(bound, first):
    """32 bits, of the rows ``first`` and on: those below ``bound``, as int64."""
    rows = gl.minimum(gl.maximum(gl.maximum(bound, 0) - first, 0), 32).to(gl.int64)
    return (gl.full(rows.shape, 1, gl.int64, rows.type.layout) << rows) - 1


@gluon.constexpr_function
def columns_layout(BLOCK_N):
    """Row bits of columns, [2, BLOCK_N] words, by 128 threads."""
    if BLOCK_N == 128:
        return gl.BlockedLayout([2, 1], [1, 32], [1, 4], [1, 0])
    return gl.BlockedLayout([1, 1], [1, 32], [2, 2], [1, 0])


@gluon.jit
def hide_bits(bounds_s, at, words, m0, BLOCK_N: gl.constexpr, NUM_BOUNDS: gl.constexpr):
    """What the mask hides of 64 rows from m0: a bit a row, in ``words`` [2, BLOCK_N].

    A thread turns a column's bounds (``bounds_s[at]`` and the next) into bits. So 2 and 4 bounds cost about the same.
    """
    COLUMNS: gl.constexpr = columns_layout(BLOCK_N)
    COLUMN: gl.constexpr = gl.SliceLayout(0, COLUMNS)
    first = (m0 + 32 * gl.arange(0, 2, gl.SliceLayout(1, COLUMNS)))[:, None]
    r0 = _rows_below(bounds_s.index(at).load(COLUMN)[None, :], first)
    r1 = _rows_below(bounds_s.index(at + 1).load(COLUMN)[None, :], first)
    if NUM_BOUNDS == 2:
        hidden = ~(r0 & ~r1)
    else:
        r2 = _rows_below(bounds_s.index(at + 2).load(COLUMN)[None, :], first)
        r3 = _rows_below(bounds_s.index(at + 3).load(COLUMN)[None, :], first)
        hidden = (r1 & ~r0) | (r3 & ~r2)
    words.store(hidden.to(gl.int32))


@gluon.jit
def hide(s, words, BLOCK_N: gl.constexpr):
    """s [64, BLOCK_N] with -inf in place of what ``words`` hide: an element tests one bit."""
    SPLIT: gl.constexpr = split_rows_layout(BLOCK_N)
    word = words.load(gl.SliceLayout(1, SPLIT))[:, None, :]
    row = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, SPLIT)))
    bit = (gl.full([32], 1, gl.int32, row.type.layout) << row)[None, :, None]
    hides = gl.convert_layout(gl.reshape((word & bit) != 0, [64, BLOCK_N]), s.type.layout, assert_trivial=True)
    return gl.where(hides, float("-inf"), s)


@gluon.jit
def partial_sums(p, BLOCK_N: gl.constexpr):
    """[64, BLOCK_N] to [64, 8]: what a thread can add up alone."""
    return gl.sum(gl.reshape(p, [64, BLOCK_N // 8, 8]), 1)


@gluon.jit
def softmax_step(s, m_i, l_i, qk_scale, BLOCK_N: gl.constexpr):
    """The online softmax's (weights, m_i, l_i, factor of what came before) for scores s."""
    m_new = gl.maximum(m_i, gl.max(s, 1))
    p = gl.exp2(gl.fma(s, qk_scale, (-m_new * qk_scale)[:, None]))
    alpha = gl.exp2((m_i - m_new) * qk_scale)
    l_i = l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + partial_sums(p, BLOCK_N)
    return p, m_new, l_i, alpha


@gluon.jit
def pack_pairs(p, dtype: gl.constexpr):
    """p [64, N] in 16 bits, two columns in an int32: [64, N / 2]. Loops carry 16-bit values one by one otherwise, and
    take them apart and put them together in every round.
    """
    even, odd = gl.split(gl.reshape(p, [p.shape[0], p.shape[1] // 2, 2]))
    if dtype == gl.bfloat16:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        pairs = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
        )
    return pairs


@gluon.jit
def unpack_pairs(pairs, dtype: gl.constexpr, LAYOUT: gl.constexpr):
    """[64, N / 2] of pack_pairs to [64, N], which costs no instruction."""
    even = pairs.to(gl.int16).to(dtype, bitcast=True)
    odd = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    both = gl.reshape(gl.join(even, odd), [pairs.shape[0], pairs.shape[1] * 2])
    return gl.convert_layout(both, LAYOUT, assert_trivial=True)


@gluon.jit
def read_scalar(memory):
    return gl.max(memory.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def write_scalar(memory, value):
    memory.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
