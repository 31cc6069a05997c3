"""What the warps of the Hopper kernels do with a tile that has come: masking, the softmax, row sums.

A tile of scores is 64 rows, one warpgroup's: of queries forward, by BLOCK_N = 64 or 128 keys, of keys backward, by
BLOCK_M = 64 queries.
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
def load_bounds(bounds, mask, n, bounds_len, NUM_BOUNDS: gl.constexpr):
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
def hide_columns(p, m0, b0, b1, b2, b3, NUM_BOUNDS: gl.constexpr):
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
def widen(x):
    """x in float32, from pairs and no sooner than here: a compiler that saw through it would keep 32 bits of each."""
    if x.dtype == gl.bfloat16:
        CODE: gl.constexpr = _widening("bf16")
    else:
        CODE: gl.constexpr = _widening("f16")
    return gl.inline_asm_elementwise(CODE, "=f,=f,r", [x], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def read_scalar(memory):
    return gl.max(memory.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)


@gluon.jit
def write_scalar(memory, value):
    memory.store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
