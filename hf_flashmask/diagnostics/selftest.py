"""``flashmask check``: every backend that can run on this machine, forward and backward, against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention.backends import choose
from hf_flashmask.bench.measure import table

BATCH, HEADS_Q, HEADS_KV = 2, 4, 2
# Largest error of a row, (forward, backward): some roundings of that type.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-5, 1e-4),
    torch.float16: (2e-3, 5e-3),
    torch.bfloat16: (1e-2, 3e-2),
}


class Kernel(NamedTuple):
    """A backend with a dtype, where it runs and at which head dim."""

    backend: str
    dtype: torch.dtype
    device: str
    head_dim: int


@dataclass(frozen=True)
class Case:
    """A mask of n tokens, and whether softcap, sinks and a gradient of lse come with it."""

    name: str
    mask: Callable[[int], ColumnMask]
    features: bool = False


Work = tuple[Case, Kernel]


def _thirds(n: int) -> list[int]:
    return [n // 3, n // 5, n - n // 3 - n // 5]


def _left_padding(n: int) -> ColumnMask:
    keep = torch.ones(BATCH, n, dtype=torch.bool)
    keep[1, : n // 4] = False  # these queries see nothing
    return masks.padding(keep)


def _evicted(n: int) -> ColumnMask:
    return masks.random_eviction(n, num_heads=HEADS_KV, generator=torch.Generator().manual_seed(0))


CASES = (
    Case("causal_document", lambda n: masks.causal_document(lengths=_thirds(n))),
    Case("sliding_window", lambda n: masks.sliding_window(n, n // 7)),
    Case("left padding", _left_padding),
    Case("causal, softcap, sinks, lse", masks.causal, features=True),
    Case("share_question", lambda n: masks.share_question([[n // 3, n // 5, n - n // 3 - n // 5]])),
    Case("document", lambda n: masks.document(lengths=_thirds(n))),
    Case("qk_sparse", lambda n: masks.qk_sparse(lengths=_thirds(n), dropped=[False, True, False])),
    Case("global_sliding_window", lambda n: masks.global_sliding_window(n, n // 16, n // 9)),
    Case("random_eviction, a head", _evicted),
)


class Cell(NamedTuple):
    """What came of a case on a kernel. ``error`` is the worst of out, lse and gradients over its tolerance."""

    ok: bool
    text: str


def kernels() -> tuple[list[Kernel], list[str]]:
    """Those that can run here, and of each backend and device that cannot, the reason."""
    found, reasons = [], []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for backend in ("torch", "triton", "hopper"):
            head_dim = 128 if backend == "hopper" else 64  # as "auto" would take it
            serving, refusal = [], ""
            for dtype in TOLERANCES:
                q = torch.empty(1, 128, 1, head_dim, dtype=dtype, device=device)
                try:
                    choose(backend, q, q, q)
                    serving.append(Kernel(backend, dtype, device, head_dim))
                except NotImplementedError as error:
                    refusal = str(error)
            found += serving
            if not serving:
                reasons.append(f"{backend}, {device}: not run: {refusal}")
    return found, reasons


def run(
    budget: float = 45.0, length: int | None = None, track: Callable[[list[Work]], Iterable[Work]] = iter
) -> tuple[str, bool]:
    """The table, and whether something ran and nothing failed. What would begin after ``budget`` seconds is not run.

    ``track`` may show how far the walk over all of them is, as tqdm does.
    """
    begin = time.perf_counter()
    columns, reasons = kernels()
    # Kernels that compile come last: a budget that is spent leaves out some of theirs.
    rows: dict[str, dict[Kernel, Cell]] = {case.name: {} for case in CASES}
    late = 0
    for case, kernel in track(list(_order(columns))):
        if time.perf_counter() - begin > budget:
            rows[case.name][kernel] = Cell(True, "not run")
            late += 1
            continue
        n = length or (1031 if kernel.device == "cuda" else 259)
        rows[case.name][kernel] = _cell(case, kernel, n)
    cells = [cell for row in rows.values() for cell in row.values()]
    failed = sum(not cell.ok for cell in cells)
    text = [_table(where, [k for k in columns if (k.backend, k.device) == where], rows) for where in _places(columns)]
    text += [*reasons, ""] if reasons else []
    text.append("Worst error of out, lse and every gradient, of one row, over what rounding explains; ok up to 1.")
    if late:
        text.append(f"{late} not run: {budget:.0f} s were over. Compiled kernels are kept: run it again.")
    ran = len(cells) - late
    if not ran:
        text.append("nothing was checked")
    else:
        text.append(f"{failed} of {ran} failed" if failed else f"all {ran} ok")
    return "\n".join(text), bool(ran) and not failed


def _places(columns: list[Kernel]) -> list[tuple[str, str]]:
    """Pairs of a backend and a device."""
    return list(dict.fromkeys((kernel.backend, kernel.device) for kernel in columns))


def _table(where: tuple[str, str], columns: list[Kernel], rows: Mapping[str, Mapping[Kernel, Cell]]) -> str:
    header = (f"{where[0]}, {where[1]}", *(str(kernel.dtype).removeprefix("torch.") for kernel in columns))
    cells = [(name, *(row[kernel].text for kernel in columns)) for name, row in rows.items()]
    return table(header, cells) + "\n"


def _order(columns: list[Kernel]) -> Iterator[Work]:
    """Kernels that compile nothing first; then case by case, so that a spent budget leaves out whole masks."""
    plain = [kernel for kernel in columns if kernel.backend == "torch"]
    yield from ((case, kernel) for kernel in plain for case in CASES)
    yield from ((case, kernel) for case in CASES for kernel in columns if kernel not in plain)


def _cell(case: Case, kernel: Kernel, n: int) -> Cell:
    try:
        error = _error(case, kernel, n)
    except Exception as failure:  # whatever a kernel raises is what the table is for
        return Cell(False, f"FAILED: {type(failure).__name__}: {str(failure)[:80]}")
    return Cell(error <= 1, f"{'ok' if error <= 1 else 'FAILED'} {error:.2g}")


def _error(case: Case, kernel: Kernel, n: int) -> float:
    """The worst error over its tolerance; infinite where something is not finite or not masked as it must be."""
    mask = case.mask(n).to(kernel.device)
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(kernel.device, kernel.dtype)

    inputs = [tensor(BATCH, n, heads, kernel.head_dim) for heads in (HEADS_Q, HEADS_KV, HEADS_KV)]
    do, dlse = tensor(BATCH, n, HEADS_Q, kernel.head_dim), tensor(BATCH, HEADS_Q, n)
    if case.features:
        inputs.append(tensor(HEADS_Q))

    def attend(given: list[Tensor], backend: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        given = [t.detach().requires_grad_() for t in given]
        sinks, softcap = (given[3], 5.0) if case.features else (None, None)
        out, lse = flashmask_attention(
            given[0], given[1], given[2], mask, softcap=softcap, sinks=sinks, return_lse=True, backend=backend
        )
        targets = [(out, do.to(out.dtype))] + ([(lse, dlse.to(lse.dtype))] if case.features else [])
        return out, lse, torch.autograd.grad([t for t, _ in targets], given, [g for _, g in targets])

    out, lse, grads = attend(inputs, kernel.backend)
    expected, expected_lse, expected_grads = attend([t.double() for t in inputs], "reference")
    alive = expected_lse > -torch.inf
    if not torch.equal(lse > -torch.inf, alive):
        return float("inf")
    forward, backward = TOLERANCES[kernel.dtype]
    errors = [row_error(out, expected) / forward, _largest((lse - expected_lse)[alive]) / (2 * forward)]
    errors += [row_error(got, wanted) / backward for got, wanted in zip(grads, expected_grads, strict=True)]
    # NaN compares with nothing: it is as wrong as can be.
    return max(error if error == error else float("inf") for error in errors)


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0


def row_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a row (last dimension) over that row's norm and the typical one: one wrong row shows."""
    expected = expected.detach().double()
    error = (actual.detach().double() - expected).norm(dim=-1)
    own = expected.norm(dim=-1)
    typical = own.square().mean().sqrt()
    return float((error / (own + typical + 0.05 * expected.shape[-1] ** 0.5)).max())
