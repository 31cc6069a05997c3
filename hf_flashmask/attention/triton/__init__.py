"""Portable Triton kernels: forward and backward over the visited tiles of a TilePlan."""

from .launch import backward, build_plan, forward, tile_plan

__all__ = ["backward", "build_plan", "forward", "tile_plan"]
