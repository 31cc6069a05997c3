"""``flashmask bench sparsity``: time against the tiles that a mask leaves, over packed causal documents.

A kernel that skips every hidden tile takes time in proportion to the others: a straight line.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from hf_flashmask.attention.backends import BACKENDS

from . import kernel_masks, kernels
from .clock import Clock
from .peers import KernelCase, load
from .records import Log, check_device, check_known, environment

TILE = 128
MAX_DOCUMENTS = 64
COLUMNS = (*kernels.COLUMNS, "documents", "tiles", "tile_sparsity")


@dataclass(frozen=True)
class Setup:
    seq_len: int = 32768
    head_dim: int = 128
    heads: int = 32
    batch: int = 4
    count: int = 40
    peer: str = "flashmask"
    plugins: tuple[Path, ...] = ()
    out: Path = Path("sparsity.csv")
    backend: str = "triton"
    device: str = "cuda"
    time_budget: float | None = None  # seconds
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_known("backend", [self.backend], BACKENDS)
        check_device(self.device)


@dataclass(frozen=True)
class Fit:
    """Least squares: ``ms = slope x tiles + intercept``."""

    slope: float
    intercept: float
    r_squared: float


def fit(tiles: Sequence[float], ms: Sequence[float]) -> Fit:
    """Of at least two different numbers of tiles."""
    x, y = np.asarray(tiles, dtype=float), np.asarray(ms, dtype=float)
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - slope * x - intercept) ** 2).sum())
    return Fit(float(slope), float(intercept), 1.0 - rest / spread if spread else 1.0)


def points(rows: Sequence[Mapping[str, object]], which: str) -> tuple[list[float], list[float]]:
    """Tiles and ms of one pass, of what could be measured."""
    chosen = [r for r in rows if r["pass"] == which and r["ms"]]
    return [float(str(r["tiles"])) for r in chosen], [float(str(r["ms"])) for r in chosen]


def splits(seq_len: int, count: int) -> list[tuple[int, ...]]:
    """Document lengths of rising sparsity, evenly spread from one document to ``MAX_DOCUMENTS``; the same every time.

    Random cuts give candidates; those whose visible share is nearest to even steps are taken.
    """
    rng = random.Random(0)
    most = min(MAX_DOCUMENTS, seq_len // 2)
    candidates = []
    for n_documents in range(1, most + 1):
        for _ in range(1 if n_documents == 1 else 2048 // n_documents):
            cuts = [0, *sorted(rng.sample(range(1, seq_len), n_documents - 1)), seq_len]
            lengths = tuple(b - a for a, b in pairwise(cuts))
            candidates.append((sum(n * n for n in lengths) / seq_len**2, lengths))
    low = min(share for share, _ in candidates)
    chosen = []
    for step in range(count):
        target = 1.0 - (1.0 - low) * step / max(1, count - 1)
        nearest = min(candidates, key=lambda candidate: abs(candidate[0] - target))
        candidates.remove(nearest)
        chosen.append(nearest)
    return [lengths for _, lengths in sorted(chosen, reverse=True)]


def run(setup: Setup) -> str:
    """Measure every mask, write rows as they come; the fits."""
    peers = load(setup.plugins, [setup.peer])
    log = Log(setup.out, COLUMNS)
    origin = environment(setup.device, setup.command, setup.commit)
    clock, begin = Clock(setup.device), time.perf_counter()
    shape = (setup.batch, setup.seq_len, setup.heads, setup.head_dim)
    inputs = kernels.random_inputs(shape, setup.device)
    rows: list[kernels.Row] = []
    all_splits = splits(setup.seq_len, setup.count)
    left = 0
    for number, lengths in enumerate(all_splits):
        seconds = time.perf_counter() - begin
        if setup.time_budget is not None and seconds > setup.time_budget:
            left = len(all_splits) - number
            break
        spec = kernel_masks.causal_document(lengths)
        case = KernelCase(spec, spec.mask.to(setup.device), *inputs, backend=setup.backend)
        tiles = case.mask.tile_map(TILE, TILE) != 0
        facts: kernels.Row = {
            "documents": len(lengths),
            "tiles": int(tiles.sum()),
            "tile_sparsity": f"{1.0 - float(tiles.double().mean()):.5f}",
        }
        new = [origin | row | facts for row in kernels.measure(case, peers, clock)]
        del case
        kernels.release(setup.device)
        log.append(new)
        rows += new
        print(
            f"[{number + 1}/{setup.count}, {seconds:.0f} s] {len(lengths)} documents, {facts['tiles']} tiles: "
            + kernels.progress(new),
            file=sys.stderr,
        )
    lines = [describe(rows, which) for which in kernels.FLOPS]
    if left:
        lines.append(f"out of time; the {left} sparsest of {setup.count} masks left out")
    return "\n".join(lines)


def describe(rows: Sequence[Mapping[str, object]], which: str) -> str:
    """One line on how straight the line is."""
    tiles, ms = points(rows, which)
    if len(set(tiles)) < 2:
        return f"{which}: too few measurements for a line"
    line = fit(tiles, ms)
    return (
        f"{which}: {line.slope * 1e3:.4g} us a tile + {line.intercept:.3g} ms, R^2 = {line.r_squared:.5f} "
        f"over {len(tiles)} masks of {min(tiles):.0f} to {max(tiles):.0f} tiles"
    )
