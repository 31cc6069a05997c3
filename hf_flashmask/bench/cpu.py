"""``flashmask bench cpu``: forward and backward of packed causal documents, against sdpa, on this CPU."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flashmask import masks
from hf_flashmask.attention import flashmask_attention

from .documents import documents
from .measure import PeakMemory, in_fresh_process, mib, table

Forward = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]
METHODS = ("flashmask", "sdpa, dense mask", "sdpa, one call a document")


@dataclass(frozen=True)
class Setup:
    seq_len: int = 8192
    heads: int = 8
    head_dim: int = 64
    threads: int = 2
    repeats: int = 3
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Result:
    seconds: float
    peak_growth: int | None
    out: Tensor


def run(method: str, setup: Setup) -> Result:
    """Time forward + backward, mask included: the median of ``setup.repeats``. The first of them measures memory."""
    torch.set_num_threads(setup.threads)
    forward = {"flashmask": _flashmask, "sdpa, dense mask": _dense, "sdpa, one call a document": _one_by_one}[method]
    _step(forward, setup, min(512, setup.seq_len))  # loads code and starts threads outside the measurement
    out, first, growth = _step(forward, setup, setup.seq_len)
    seconds = [first, *(_step(forward, setup, setup.seq_len)[1] for _ in range(setup.repeats - 1))]
    return Result(statistics.median(seconds), growth, out)


def _step(forward: Forward, setup: Setup, seq_len: int) -> tuple[Tensor, float, int | None]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, seq_len, setup.heads, setup.head_dim)
    q, k, v, do = (torch.randn(shape, generator=generator).to(setup.dtype) for _ in range(4))
    for t in (q, k, v):
        t.requires_grad_()
    with PeakMemory() as memory:
        begin = time.perf_counter()
        out = forward(q, k, v, documents(seq_len))
        torch.autograd.grad(out, (q, k, v), do)
        seconds = time.perf_counter() - begin
    return out.detach(), seconds, memory.growth


def _flashmask(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return flashmask_attention(q, k, v, masks.causal_document(lengths=list(lengths)), backend="torch")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal).transpose(1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    row = torch.arange(q.shape[1])
    visible = (document[:, None] == document) & (row[:, None] >= row)
    return _sdpa(q, k, v, visible, False)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(t.split(lengths, 1) for t in (q, k, v)), strict=True)
    return torch.cat([_sdpa(qd, kd, vd, None, True) for qd, kd, vd in parts], 1)


def report(setup: Setup) -> str:
    """Measure every method in a process of its own; the table, with the correctness of what was timed."""
    results = {method: in_fresh_process(run, method, setup) for method in METHODS}
    dense = results["sdpa, dense mask"]
    rows = []
    for method, result in results.items():
        error = float((result.out - dense.out).abs().max())
        share = (
            "" if not (result.peak_growth and dense.peak_growth) else f"{result.peak_growth / dense.peak_growth:.2f}"
        )
        rows.append(
            (
                method,
                f"{result.seconds:.3f} s",
                f"{dense.seconds / result.seconds:.2f}x",
                mib(result.peak_growth),
                share,
                f"{error:.1e}",
            )
        )
    mask = masks.causal_document(lengths=list(documents(setup.seq_len)))
    return "\n".join(
        (
            f"Packed causal documents of {documents(setup.seq_len)} tokens, {mask.density():.1%} visible; "
            f"{setup.heads} heads of {setup.head_dim}, {str(setup.dtype).removeprefix('torch.')}, forward + backward",
            f"torch {torch.__version__}, {setup.threads} threads, {platform.processor() or platform.machine()} "
            f"({torch.backends.cpu.get_cpu_capability()})",
            "",
            table(("", "time", "speed-up", "peak memory growth", "share", "max difference"), rows),
        )
    )
