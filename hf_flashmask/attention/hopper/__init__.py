"""Kernels for Hopper (compute capability 9.0) in Gluon: TMA, asynchronous wgmma, specialised warps.

They serve the forward. The backward is that of the portable Triton kernels, which needs no more than what either
forward saves; both give the same bits run after run.
"""

from hf_flashmask.attention.triton import backward

from .launch import forward, plan_bytes

__all__ = ["backward", "forward", "plan_bytes"]
