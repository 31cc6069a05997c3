"""Before and after the backward kernel: statistics of the rows, and the float32 buffer in which dq is added up.

The buffer holds blocks of 64 rows of one head, each in the order in which threads hold it (``in_thread_order``).
"""

import triton
import triton.language as tl

from hf_flashmask.attention.triton.primitives import LENGTHS, load_tile, store_tile


@triton.jit(do_not_specialize=LENGTHS)
def prepare_kernel(
    out, do, lse, dlse, stats, buffer, o_sb, o_sh, o_ss, do_sb, do_sh, do_ss, q_len, heads, row_blocks, lse_scale,
    HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """``stats``, float32 ``[B * H * row_blocks, 2, BLOCK_M]``, and zeros in ``buffer`` ``[.., BLOCK_M * BLOCK_D]``.

    Statistics are -lse * lse_scale, and -delta = dlse - rowsum(out * do): the sums that they are taken from begin with
    them.
    """
    row = tl.program_id(0)
    bh = row // row_blocks
    b = bh // heads
    h = bh % heads
    m0 = row % row_blocks * BLOCK_M
    m = m0 + tl.arange(0, BLOCK_M)
    at = bh.to(tl.int64) * q_len + m
    do_tile = load_tile(do, b, h, m0, do_sb, do_sh, do_ss, q_len, HEAD_DIM_V, BLOCK_M, BLOCK_D, False)
    o_tile = load_tile(out, b, h, m0, o_sb, o_sh, o_ss, q_len, HEAD_DIM_V, BLOCK_M, BLOCK_D, False)
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse + at, mask=m < q_len, other=0.0)
    # Rows that see nothing have lse -inf; it stays, and every weight of theirs is 0, as for rows that do not exist.
    lse_i = tl.load(lse + at, mask=m < q_len, other=float("-inf"))
    lse_i = tl.where(lse_i == float("-inf"), float("-inf"), -lse_i * lse_scale)
    stats += row.to(tl.int64) * (2 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(stats, lse_i)
    tl.store(stats + BLOCK_M, -delta)
    SIZE: tl.constexpr = BLOCK_M * BLOCK_D
    tl.store(buffer + row.to(tl.int64) * SIZE + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32))


@triton.jit(do_not_specialize=LENGTHS)
def finish_kernel(
    buffer, dq, dq_sb, dq_sh, dq_ss, q_len, heads, row_blocks, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq = scale * buffer, rows in their order again."""
    row = tl.program_id(0)
    bh = row // row_blocks
    SIZE: tl.constexpr = BLOCK_M * BLOCK_D
    tile = tl.load(buffer + row.to(tl.int64) * SIZE + tl.arange(0, SIZE))
    # The inverse of in_thread_order.
    tile = tl.permute(tl.reshape(tile, (BLOCK_D // 8, 4, 8, 4, 2, 2)), (1, 4, 2, 0, 3, 5))
    tile = tl.reshape(tile, (BLOCK_M, BLOCK_D)) * scale
    store_tile(
        dq, tile, bh // heads, bh % heads, row % row_blocks * BLOCK_M, dq_sb, dq_sh, dq_ss, q_len, HEAD_DIM,
        BLOCK_M, BLOCK_D, False,
    )  # fmt: skip
