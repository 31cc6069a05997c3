"""Portable Triton kernels: forward and backward over lists of visited tiles."""

from .launch import backward, forward, plan_bytes

__all__ = ["backward", "forward", "plan_bytes"]
