"""Kernels for Hopper (compute capability 9.0) in Gluon: TMA, asynchronous wgmma, specialised warps.

They walk the lists of tiles of the portable Triton kernels, which are also their semantic twins: Gluon has no
interpreter.
"""

from .launch import backward, forward, plan_bytes

__all__ = ["backward", "forward", "plan_bytes"]
