"""``flashmask bench kernels``: forward and backward of every mask, against other kernels, checked and then timed."""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_flashmask.attention.backends import BACKENDS

from . import accuracy, kernel_masks
from .clock import Clock
from .measure import table
from .peers import KernelCase, Make, Peer, load
from .records import ENVIRONMENT, Log, Refusal, check_device, check_known, environment, failure

# FLOPs of a visible pair and head, in units of the head dim: 2 products forward, 5 backward.
FLOPS = {"fwd": 4.0, "bwd": 10.0}
COLUMNS = (
    *ENVIRONMENT, "mask", "seq_len", "head_dim", "heads", "batch", "density", "peer", "pass", "ms", "tflops",
    "mask_prep_ms", "mask_prep_host_ms", "mask_bytes", "error", "runs", "note",
)  # fmt: skip
Row = dict[str, object]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Setup:
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    head_dims: tuple[int, ...] = (64, 128)
    masks: tuple[str, ...] = kernel_masks.MASKS
    peers: tuple[str, ...] | None = None  # all
    plugins: tuple[Path, ...] = ()
    out: Path = Path("kernels.csv")
    backend: str = "triton"
    device: str = "cuda"
    tokens: int = 131072  # batch x length
    hidden: int = 4096  # heads x head dim
    time_budget: float | None = None  # seconds
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_known("masks", self.masks, kernel_masks.MASKS)
        check_known("backend", [self.backend], BACKENDS)
        check_device(self.device)
        if odd := [d for d in self.head_dims if self.hidden % d]:
            raise Refusal(f"head_dims must divide the hidden size of {self.hidden}, got {odd}")
        if long := [n for n in self.lengths if n > self.tokens]:
            raise Refusal(f"lengths must be at most {self.tokens} tokens, got {long}")


@dataclass
class _Entry:
    """What is known of one peer in one case. Values by pass."""

    name: str
    peer: Peer | None = None
    prep: tuple[float, float] | None = None
    ms: dict[str, list[float]] = field(default_factory=lambda: {which: [] for which in FLOPS})
    error: dict[str, float] = field(default_factory=dict)
    note: dict[str, str] = field(default_factory=dict)

    def attempt(self, passes: Sequence[str], step: Callable[[], None]) -> None:
        """A failure becomes a note on these passes, which are then not measured any further."""
        try:
            step()
        except Exception as error:
            self.note |= dict.fromkeys(passes, failure(error))


def run(setup: Setup) -> str:
    """Measure everything, write rows as they come; the table."""
    peers = load(setup.plugins, setup.peers)
    log = Log(setup.out, COLUMNS)
    origin = environment(setup.device, setup.command, setup.commit)
    clock, begin = Clock(setup.device), time.perf_counter()
    cases = [(n, d, name) for n in setup.lengths for d in setup.head_dims for name in setup.masks]
    rows: list[Row] = []
    left: list[tuple[int, int, str]] = []
    inputs: Inputs | None = None
    for number, (seq_len, head_dim, name) in enumerate(cases):
        seconds = time.perf_counter() - begin
        if setup.time_budget is not None and seconds > setup.time_budget:
            left = cases[number:]
            break
        shape = (setup.tokens // seq_len, seq_len, setup.hidden // head_dim, head_dim)
        if inputs is None or inputs[0].shape != shape:
            inputs = None
            release(setup.device)
            inputs = random_inputs(shape, setup.device)
        spec = kernel_masks.build(name, seq_len)
        case = KernelCase(spec, spec.mask.to(setup.device), *inputs, backend=setup.backend)
        new = [origin | row for row in measure(case, peers, clock)]
        del case
        release(setup.device)
        log.append(new)
        rows += new
        print(
            f"[{number + 1}/{len(cases)}, {seconds:.0f} s] {seq_len} x {head_dim} {name}: {progress(new)}",
            file=sys.stderr,
        )
    parts = [summary(rows)] if rows else []
    if left:
        parts.append(
            f"out of time; {len(left)} of {len(cases)} cases left out: "
            + ", ".join(f"{n} x {d} {name}" for n, d, name in left)
        )
    return "\n\n".join(parts)


def random_inputs(shape: tuple[int, ...], device: str) -> Inputs:
    """q, k, v, do: normal, bfloat16, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, do = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(4))
    return q, k, v, do


def release(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def measure(case: KernelCase, peers: Mapping[str, Make], clock: Clock) -> list[Row]:
    """Rows of one case, without where they come from: two a peer, none for peers that have no such mask."""
    entries = []
    expected = accuracy.reference(case.q, case.k, case.v, case.do, case.mask)
    for name, make in peers.items():
        entry = _Entry(name)
        entry.attempt(("fwd", "bwd"), partial(_start, entry, make, case, clock))
        if entry.peer is not None:
            entry.attempt(("fwd", "bwd"), partial(_check_forward, entry, entry.peer, expected))
            if not entry.note:
                entry.attempt(("bwd",), partial(_check_backward, entry, entry.peer, expected))
        if entry.peer is not None or entry.note:
            entries.append(entry)
    for which in FLOPS:
        for order in (entries, entries[::-1]):  # two rounds: no peer always runs on the warmer chip
            for entry in order:
                if which not in entry.note:
                    entry.attempt((which,), partial(_time, entry, which, clock))
    return [row for entry in entries for row in _rows(case, entry)]


def _start(entry: _Entry, make: Make, case: KernelCase, clock: Clock) -> None:
    peer = make(case)
    prepare = getattr(peer, "prepare", None)
    if prepare is not None:
        entry.prep = clock.preparation(prepare)
    entry.peer = peer


def _check_forward(entry: _Entry, peer: Peer, expected: accuracy.Reference) -> None:
    _judge(entry, "fwd", expected.forward_error(peer.fwd()))


def _check_backward(entry: _Entry, peer: Peer, expected: accuracy.Reference) -> None:
    _judge(entry, "bwd", expected.backward_error(peer.bwd()))


def _judge(entry: _Entry, which: str, error: float) -> None:
    entry.error[which] = error
    if not error < accuracy.TOLERANCE:
        raise ArithmeticError(f"wrong: relative error {error:.2g}, at most {accuracy.TOLERANCE} allowed; not timed")


def _time(entry: _Entry, which: str, clock: Clock) -> None:
    before = getattr(entry.peer, "before_bwd", None) if which == "bwd" else None
    entry.ms[which] += clock.samples(getattr(entry.peer, which), before)


def _rows(case: KernelCase, entry: _Entry) -> list[Row]:
    batch, seq_len, heads, head_dim = case.q.shape
    pairs = case.spec.mask.visible_pairs() * batch * heads
    rows = []
    for which, flops in FLOPS.items():
        ms = statistics.median(entry.ms[which]) if entry.ms[which] and which not in entry.note else None
        rows.append({
            "mask": case.name, "seq_len": seq_len, "head_dim": head_dim, "heads": heads, "batch": batch,
            "density": f"{case.spec.mask.density():.5f}", "peer": entry.name, "pass": which,
            "ms": "" if ms is None else f"{ms:.4f}",
            "tflops": "" if ms is None else f"{flops * pairs * head_dim / ms / 1e9:.5g}",
            "mask_prep_ms": "" if entry.prep is None else f"{entry.prep[0]:.4f}",
            "mask_prep_host_ms": "" if entry.prep is None else f"{entry.prep[1]:.4f}",
            "mask_bytes": _mask_bytes(entry.peer),
            "error": f"{entry.error[which]:.2e}" if which in entry.error else "",
            "runs": len(entry.ms[which]), "note": entry.note.get(which, ""),
        })  # fmt: skip
    return rows


def _mask_bytes(peer: Peer | None) -> Any:
    size = getattr(peer, "mask_bytes", None)
    return "" if size is None else size


def progress(rows: Sequence[Mapping[str, object]]) -> str:
    """Forward and backward of every peer, in a line."""
    by_peer: dict[str, list[str]] = {}
    for row in rows:
        shown = f"{float(str(row['tflops'])):.4g}" if row["tflops"] else "failed"
        by_peer.setdefault(str(row["peer"]), []).append(shown)
    return ", ".join(f"{peer} {'/'.join(values)}" for peer, values in by_peer.items()) + " TFLOP/s"


def summary(rows: Sequence[Mapping[str, object]], ours: str = "flashmask", other: str = "flex") -> str:
    """A table of TFLOP/s for every length and head dim, and how many times faster ours is; "-" = not measured."""
    found = {
        (str(r["seq_len"]), str(r["head_dim"]), str(r["mask"]), str(r["peer"]), str(r["pass"])): float(str(r["tflops"]))
        for r in rows
        if r["tflops"]
    }
    shapes = dict.fromkeys((str(r["seq_len"]), str(r["head_dim"])) for r in rows)
    names = dict.fromkeys(str(r["mask"]) for r in rows)
    header = [f"{peer} {which}" for which in FLOPS for peer in (ours, other)]
    header = ["TFLOP/s", *header[:2], "ratio", *header[2:], "ratio"]
    parts = []
    for shape in shapes:
        body: list[list[str]] = []
        ratios: dict[str, list[float]] = {which: [] for which in FLOPS}
        for name in names:
            cells = []
            for which in FLOPS:
                a, b = (found.get((*shape, name, peer, which)) for peer in (ours, other))
                if a and b:
                    ratios[which].append(a / b)
                cells += [f"{a:.4g}" if a else "-", f"{b:.4g}" if b else "-", f"{a / b:.2f}" if a and b else "-"]
            if any(c != "-" for c in cells):
                body.append([name, *cells])
        means = [f"{math.exp(statistics.fmean(map(math.log, r))):.2f}" if r else "-" for r in ratios.values()]
        body.append(["geometric mean", "", "", means[0], "", "", means[1]])
        parts.append(f"{shape[0]} tokens, head dim {shape[1]}\n" + table(header, body))
    return "\n\n".join(parts)


def markdown(rows: Sequence[Mapping[str, str]], head_dim: int, ours: str = "flashmask", other: str = "flex") -> str:
    """TFLOP/s of ours and another peer, and their ratio, as a Markdown table; the last row of each kind counts.

    Raises:
        Refusal: nothing was measured of both at this head dim.
    """
    found = {
        (int(r["seq_len"]), r["pass"], r["mask"], r["peer"]): float(r["tflops"])
        for r in rows
        if r["tflops"] and int(r["head_dim"]) == head_dim
    }
    cases = list(dict.fromkeys(key[:2] for key in found if key[3] == other))
    if not cases:
        raise Refusal(f"no measurements of {ours} and {other} at head dim {head_dim}")
    titles = [f"{n // 1024}K {'forward' if which == 'fwd' else 'backward'}" for n, which in cases]
    lines = [f"| mask | {' | '.join(titles)} |", "|---|" + "---|" * len(cases)]
    for name in dict.fromkeys(key[2] for key in found):
        cells = []
        for case in cases:
            a, b = (found.get((*case, name, peer)) for peer in (ours, other))
            cells.append(f"{a:.0f} / {b:.0f} = **{a / b:.2f}**" if a and b else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
