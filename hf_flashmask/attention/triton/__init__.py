"""Portable Triton kernels: forward and backward over lists of visited tiles, and a forward for few queries."""

from __future__ import annotations

from torch import Tensor

from hf_flashmask.masks import ColumnMask

from . import decode_launch, launch
from .decode_launch import MAX_Q_LEN
from .decode_launch import start as start_few
from .launch import backward, plan_bytes


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q ``[B, Sq, Hq, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]`` to out ``[B, Sq, Hq, Dv]`` and lse.

    Up to 16 queries, as in generation, go to the decode kernels, which split the keys; more to the forward kernel.
    """
    chosen = decode_launch if q.shape[1] <= MAX_Q_LEN else launch
    return chosen.forward(q, k, v, mask, softmax_scale, softcap, sinks)


__all__ = ["MAX_Q_LEN", "backward", "forward", "plan_bytes", "start_few"]
