"""Tile shapes, hand-chosen and measured on an H200; no autotuning. What does not fit a device is passed over.

What decided on Hopper: two programs a multiprocessor hide each other's waits, so blocks are 64 wide with 4 warps; few
heads at a time keep K and V in L2. ``flashmask bench kernels`` shows what a change does.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton


class Config(NamedTuple):
    """A block of ``block_m`` query rows by ``block_n`` keys a step.

    ``head_group`` heads share L2 (``find_work``). ``merge``: one loop with a branch for partial tiles, instead of a
    loop for partial and one for full ones. ``in_registers``: the program's own rows are held in registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    head_group: int = 2
    merge: bool = False
    in_registers: bool = False

    def shared_memory(self, kernel: str, head_dim: int, head_dim_v: int, itemsize: int) -> int:
        """Bytes of tiles a program holds at once, own rows and stages of the other side's."""
        own, other = (self.block_n, self.block_m) if kernel == "dkdv" else (self.block_m, self.block_n)
        both = padded(head_dim) + padded(head_dim_v)
        own_width = padded(head_dim) if kernel in ("forward", "decode", "draft") else both
        return itemsize * ((0 if self.in_registers else own * own_width) + self.num_stages * other * both)


@functools.cache
def padded(head_dim: int) -> int:
    """Head dim of the tiles: Triton's are powers of two, its dots at least 16 wide."""
    return max(16, triton.next_power_of_2(head_dim))


_HOPPER = {
    ("forward", 64): [Config(64, 128, 4, 2, 4), Config(64, 64, 4, 2)],
    ("forward", 128): [Config(128, 64, 4, 2, 2, merge=True), Config(64, 64, 4, 2)],
    ("dq", 64): [Config(64, 64, 4, 2), Config(64, 32, 4, 2)],
    ("dq", 128): [Config(64, 64, 4, 3, 2, in_registers=True), Config(64, 32, 4, 2)],
    ("dq", 256): [Config(64, 64, 4, 2), Config(64, 32, 4, 2)],
    ("dkdv", 64): [Config(64, 64, 4, 3), Config(64, 64, 4, 2)],
    ("dkdv", 128): [Config(64, 64, 4, 2, 1), Config(32, 64, 4, 2)],
    # One program a multiprocessor: more blocks under way in it.
    ("decode", 128): [Config(16, 64, 4, 4), Config(16, 32, 4, 3)],
    ("draft", 128): [Config(64, 64, 4, 4), Config(32, 32, 4, 3)],
}
# By padded head dim, from the largest blocks to the smallest; what fits first is taken.
_PORTABLE = {
    ("forward", 64): [Config(128, 64, 4, 3), Config(64, 64, 4, 2), Config(64, 32, 4, 2)],
    ("forward", 128): [Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2)],
    ("forward", 256): [Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 1)],
    ("dq", 64): [Config(64, 64, 4, 2), Config(64, 32, 4, 2)],
    ("dq", 128): [Config(128, 64, 8, 2), Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 2)],
    ("dq", 256): [Config(64, 64, 8, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 16, 4, 1)],
    ("dkdv", 64): [Config(64, 64, 4, 2), Config(32, 64, 4, 2)],
    ("dkdv", 128): [Config(64, 128, 8, 2), Config(64, 64, 8, 2), Config(32, 64, 4, 2), Config(32, 32, 4, 2)],
    ("dkdv", 256): [Config(64, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 32, 4, 2), Config(16, 32, 4, 1)],
    # One query of up to 16 heads a key head, and more rows: block_m is the most that a tile has.
    ("decode", 64): [Config(16, 64, 4, 3), Config(16, 32, 4, 2)],
    ("decode", 128): [Config(16, 64, 4, 3), Config(16, 32, 4, 3)],
    ("decode", 256): [Config(16, 32, 4, 3), Config(16, 16, 4, 2)],
    ("draft", 64): [Config(64, 64, 4, 3), Config(32, 32, 4, 2)],
    ("draft", 128): [Config(64, 64, 4, 3), Config(32, 32, 4, 3)],
    ("draft", 256): [Config(64, 32, 4, 3), Config(32, 32, 4, 2), Config(16, 16, 4, 2)],
}
# float32 in three tf32 products: small blocks, since operands are split in registers.
_FLOAT32 = {
    ("forward", 64): [Config(64, 32, 4, 1), Config(32, 32, 4, 1)],
    ("forward", 128): [Config(32, 32, 4, 1)],
    ("forward", 256): [Config(16, 16, 4, 1)],
    ("dq", 64): [Config(32, 32, 4, 1)],
    ("dq", 128): [Config(32, 32, 4, 1), Config(16, 16, 4, 1)],
    ("dq", 256): [Config(16, 16, 4, 1)],
    ("dkdv", 64): [Config(32, 32, 4, 1)],
    ("dkdv", 128): [Config(16, 32, 8, 1), Config(16, 16, 4, 1)],
    ("dkdv", 256): [Config(16, 16, 4, 1)],
    ("decode", 64): [Config(16, 32, 4, 2)],
    ("decode", 128): [Config(16, 32, 4, 2)],
    ("decode", 256): [Config(16, 16, 4, 2)],
    ("draft", 64): [Config(32, 32, 4, 2)],
    ("draft", 128): [Config(32, 32, 4, 2)],
    ("draft", 256): [Config(16, 16, 4, 2)],
}


@functools.cache
def candidates(
    kernel: str, capability: tuple[int, int], room: int, head_dim: int, head_dim_v: int, itemsize: int
) -> tuple[Config, ...]:
    """Configurations of a kernel ("forward", "dq", "decode", ...) for ``room`` bytes of shared memory a block.

    The first is the one to use; the others are for compilers that need more than the tiles' bytes. The last is there
    even where it should not fit.
    """
    width = max(64, padded(head_dim), padded(head_dim_v))
    if itemsize == 4:
        choices = _FLOAT32[kernel, width]
    elif capability == (9, 0) and (kernel, width) in _HOPPER:
        choices = _HOPPER[kernel, width]
    else:
        choices = _PORTABLE[kernel, width]
    fitting = [c for c in choices if c.shared_memory(kernel, head_dim, head_dim_v, itemsize) <= room]
    return tuple(fitting or choices[-1:])


def uses_tma(capability: tuple[int, int], itemsize: int) -> bool:
    """Where tiles come through TMA descriptors: data centre GPUs with 16-bit inputs, whose dots read shared memory.

    Elsewhere Triton brings a descriptor's tile back into registers, and spills.
    """
    return capability[0] in (9, 10) and itemsize == 2
