"""Attention of ``flashmask bench infer``: few queries over a full cache, against sdpa and FlexAttention.

Every method is checked against float32 arithmetic on a part of its output, captured in a CUDA graph, and timed by
replaying it after a flush of L2: launching is in no time, as in a decoder that is compiled or captured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_flashmask.attention import flashmask_attention
from hf_flashmask.masks import ColumnMask, causal

# A tree of drafted tokens in depth-first order: the row after the last descendant of each.
TREE = (8, 5, 3, 4, 5, 8, 7, 8)


@dataclass(frozen=True)
class Problem:
    """Queries over a cache in Transformers' layout. ``seen`` is how many keys some query of each batch row sees."""

    q: Tensor  # [B, Hq, Sq, D]
    k: Tensor  # [B, Hkv, Sk, D]
    v: Tensor
    mask: ColumnMask
    seen: int  # over the batch

    @property
    def nbytes(self) -> int:
        """The fewest that attention can read: K and V of what is seen."""
        return 2 * self.seen * self.k.shape[1] * self.k.shape[3] * self.k.element_size()

    def error(self, out: Tensor) -> float:
        """Of out ``[B, Hq, Sq, D]``, relative, on the heads of the first key head in the first and last batch row."""
        group = self.q.shape[1] // self.k.shape[1]
        visible = self.mask.to_dense()
        worst = 0.0
        for b in {0, self.q.shape[0] - 1}:
            q, k, v = self.q[b, :group].float(), self.k[b, :1].float(), self.v[b, :1].float()
            scores = (q @ k.transpose(1, 2)) * q.shape[-1] ** -0.5
            hidden = ~visible[b if visible.shape[0] > 1 else 0]
            expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
            worst = max(worst, float((out[b, :group].float() - expected).norm() / expected.norm()))
        return worst


def problem(case: str, batch: int, kv_len: int, heads: int, kv_heads: int, head_dim: int, device: str) -> Problem:
    """The inputs of a case: "decode", "decode_padded", "decode_static" or "tree"."""
    generator = torch.Generator(device).manual_seed(0)
    q_len = len(TREE) if case == "tree" else 1

    def random(n: int, length: int) -> Tensor:
        shape = (batch, n, length, head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    q, k, v = random(heads, q_len), random(kv_heads, kv_len), random(kv_heads, kv_len)
    if case == "tree":
        bounds = torch.full((1, 1, 1, kv_len), q_len, dtype=torch.int32)
        bounds[..., -q_len:] = torch.tensor(TREE, dtype=torch.int32)
        mask = ColumnMask(bounds.to(device), causal=True, q_len=q_len)
        mask.full_prefix = kv_len - q_len  # all drafts hang behind what is in the cache
        return Problem(q, k, v, mask, batch * kv_len)
    if case == "decode":
        return Problem(q, k, v, causal(kv_len, q_len=1, device=device), batch * kv_len)
    key = torch.arange(kv_len)
    if case == "decode_static":  # the first half of a static cache is filled
        visible = (key < kv_len // 2).expand(batch, -1)
    else:  # rows of evenly spread lengths, the shortest half as long as the longest
        padding = torch.arange(batch) * (kv_len // 2) // max(1, batch - 1)
        visible = key >= padding[:, None]
    bounds = torch.stack((visible.int(), torch.zeros_like(visible, dtype=torch.int32)), 1)[:, None]
    mask = ColumnMask(bounds.contiguous().to(device), causal=False, q_len=1)
    return Problem(q, k, v, mask, int(visible.sum()))


Attend = Callable[[], Tensor]


def _ours(p: Problem, backend: str) -> Attend:
    q, k, v = (t.transpose(1, 2) for t in (p.q, p.k, p.v))
    return lambda: flashmask_attention(q, k, v, p.mask, backend=backend).transpose(1, 2)


def _sdpa(p: Problem, *, dense: bool, repeat: bool = False) -> Attend:
    """sdpa with grouped queries; ``dense``: with a boolean mask; ``repeat``: keys repeated, as Transformers has it."""
    visible = p.mask.to_dense() if dense else None
    group = p.q.shape[1] // p.k.shape[1]

    def attend() -> Tensor:
        k, v = (t.repeat_interleave(group, 1) if repeat else t for t in (p.k, p.v))
        return torch.nn.functional.scaled_dot_product_attention(p.q, k, v, attn_mask=visible, enable_gqa=not repeat)

    return attend


def _flex(p: Problem) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    bounds, q_len, kv_len = p.mask.bounds, p.q.shape[2], p.k.shape[2]
    ends = bounds[0, 0, 0]

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i < ends[j]) & (i >= j - (kv_len - q_len))

    torch._dynamo.reset()  # the limit on recompilations counts over all shapes
    block_mask = create_block_mask(mask_mod, None, None, q_len, kv_len, device=p.q.device)
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(p.q, p.k, p.v, block_mask=block_mask, enable_gqa=True)


# By case, what it is compared with.
CASES: dict[str, dict[str, Callable[[Problem], Attend]]] = {
    "decode": {"sdpa": functools.partial(_sdpa, dense=False)},
    "decode_padded": {
        "sdpa_mask": functools.partial(_sdpa, dense=True),
        "sdpa_mask_repeated": functools.partial(_sdpa, dense=True, repeat=True),
    },
    "decode_static": {
        "sdpa_mask": functools.partial(_sdpa, dense=True),
        "sdpa_mask_repeated": functools.partial(_sdpa, dense=True, repeat=True),
    },
    "tree": {"flex": _flex},
}


def methods(case: str, backend: str) -> dict[str, Callable[[Problem], Attend]]:
    return {"flashmask": functools.partial(_ours, backend=backend), **CASES[case]}


def captured(attend: Attend) -> Callable[[], Any]:
    """A replay of it on a GPU, after what compiles has compiled; itself on a CPU."""
    with torch.no_grad():
        device = attend().device
        if device.type != "cuda":
            return attend
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attend()
    replay: Callable[[], Any] = graph.replay
    return replay
