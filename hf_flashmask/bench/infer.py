"""``flashmask bench infer``: attention of few queries over a cache, ``generate``, and long prefills under a mask."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_flashmask.attention.backends import BACKENDS

from . import infer_attention, infer_models
from .clock import Clock
from .kernels import release
from .measure import table
from .records import ENVIRONMENT, Log, Refusal, check_device, check_known, environment, failure

COLUMNS = (
    *ENVIRONMENT, "transformers", "case", "batch", "q_len", "kv_len", "heads", "kv_heads", "head_dim", "layers",
    "method", "ms", "gb_per_s", "copy_gb_per_s", "tokens_per_s", "error", "runs", "note",
)  # fmt: skip
ATTENTION = tuple(infer_attention.CASES)
GENERATE = {"generate_dynamic": "dynamic", "generate_static": "static"}
PREFILL = ("prefill_documents", "prefill_window")
CASES = (*ATTENTION, *GENERATE, *PREFILL)
IMPLEMENTATIONS = ("sdpa", "flashmask")
# bfloat16 attention is within a hundredth of float32's, logits of a model within a few; what is further is not timed.
TOLERANCE, LOGITS_TOLERANCE = 0.01, 0.1
COPY_BYTES = 2 << 30
Result = dict[str, object]


@dataclass(frozen=True)
class Setup:
    cases: tuple[str, ...] = CASES
    batches: tuple[int, ...] = (1, 4, 16, 64)
    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    memory: float = 40.0  # GiB of keys and values at most; larger caches are left out
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layers: int = 8
    hidden: int = 4096
    intermediate: int = 14336
    vocab_size: int = 128256
    prompt: int = 4096
    new_tokens: int = 256
    prefill: int = 32768
    window: int = 4096
    steps: int = 3
    device: str = "cuda"
    dtype: str = "bfloat16"
    backend: str = "triton"
    out: Path = Path("infer.csv")
    time_budget: float | None = None  # seconds
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_known("cases", self.cases, CASES)
        check_known("backend", [self.backend], BACKENDS)
        check_device(self.device)
        if self.heads % self.kv_heads:
            raise Refusal(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")

    def shapes(self, case: str) -> Iterator[tuple[int, int]]:
        """(batch, length) of the caches of a case; two rows at least where rows differ."""
        for batch in self.batches:
            for length in self.lengths:
                nbytes = 4 * batch * length * self.kv_heads * self.head_dim
                if nbytes <= self.memory * 2**30 and (case != "decode_padded" or batch > 1):
                    yield batch, length


@dataclass
class _Entry:
    """What is known of one method in one case."""

    name: str
    run: Any = None
    ms: list[float] = field(default_factory=list)
    error: float | None = None
    note: str = ""


def run(setup: Setup) -> str:
    """Measure every case, write rows as they come; the table."""
    import transformers

    log = Log(setup.out, COLUMNS)
    origin = environment(setup.device, setup.command, setup.commit) | {"transformers": transformers.__version__}
    begin = time.perf_counter()
    clock = Clock(setup.device)
    copy = copy_bandwidth(clock, setup.device)
    print(f"device-to-device copy: {copy:.0f} GB/s, read and written", file=sys.stderr)
    rows: list[Result] = []
    left: list[str] = []
    for case in setup.cases:
        problems: Sequence[Any] = list(setup.shapes(case)) if case in ATTENTION else [None]
        for shape in problems:
            if setup.time_budget is not None and time.perf_counter() - begin > setup.time_budget:
                left.append(case if shape is None else f"{case} {shape[0]} x {shape[1]}")
                continue
            found = _whole(setup, case) if shape is None else _attention(setup, clock, case, *shape)
            release(setup.device)
            new = [origin | {"copy_gb_per_s": f"{copy:.0f}"} | row for row in found]
            log.append(new)
            rows += new
            shown = ", ".join(f"{r['method']} {r['ms'] or r['note']}" for r in new)
            where = "" if shape is None else f" {shape[0]} x {shape[1]}"
            print(f"[{time.perf_counter() - begin:.0f} s] {case}{where}: {shown} ms", file=sys.stderr)
    text = summary(rows) if rows else ""
    return text + (f"\nout of time; left out: {', '.join(left)}" if left else "")


def copy_bandwidth(clock: Clock, device: str, nbytes: int | None = None) -> float:
    """GB/s of a copy from device memory to itself, bytes read and bytes written."""
    cuda = torch.device(device).type == "cuda"
    nbytes = nbytes or (COPY_BYTES if cuda else 16 << 20)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * nbytes / statistics.median(clock.samples(lambda: target.copy_(source))) / 1e6


# ---- attention -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _attention(setup: Setup, clock: Clock, case: str, batch: int, kv_len: int) -> list[Result]:
    problem = infer_attention.problem(
        case, batch, kv_len, setup.heads, setup.kv_heads, setup.head_dim, setup.device
    )  # fmt: skip
    entries = []
    for name, make in infer_attention.methods(case, setup.backend).items():
        entry = _Entry(name)
        try:
            attend = make(problem)
            entry.error = problem.error(attend())
            if not entry.error < TOLERANCE:
                raise ArithmeticError(f"wrong: relative error {entry.error:.2g}; not timed")
            entry.run = infer_attention.captured(attend)
        except Exception as error:
            entry.note = failure(error)
        entries.append(entry)
    for order in (entries, entries[::-1]):  # no method always runs on the warmer chip
        for entry in order:
            if not entry.note:
                entry.ms += clock.samples(entry.run)
    rows = []
    for entry in entries:
        ms = statistics.median(entry.ms) if entry.ms else None
        speed = {} if ms is None else {"gb_per_s": f"{problem.nbytes / ms / 1e6:.0f}"}
        rows.append(_row(setup, case, entry, batch, problem.q.shape[2], kv_len) | speed)
    return rows


# ---- whole models ----------------------------------------------------------------------------------------------


def _whole(setup: Setup, case: str) -> list[Result]:
    shape = infer_models.Shape(
        setup.layers, setup.hidden, setup.heads, setup.kv_heads, setup.intermediate, setup.vocab_size, setup.window
    )
    model = infer_models.build(
        shape, setup.device, getattr(torch, setup.dtype), windowed=case == "prefill_window"
    )  # fmt: skip
    if case in GENERATE:
        task: infer_models.Run = infer_models.Generate(model, GENERATE[case], 1, setup.prompt, setup.new_tokens)
        q_len, kv_len, tokens = 1, setup.prompt + setup.new_tokens, setup.new_tokens
    else:
        task = infer_models.Prefill(model, setup.prefill, documents=case == "prefill_documents")
        q_len = kv_len = tokens = setup.prefill
    entries = [_Entry(name) for name in IMPLEMENTATIONS]
    expected = None
    for entry in entries:  # compiles and warms up
        try:
            logits = task(entry.name)[1].float()
            expected = logits if expected is None else expected
            entry.error = float((logits - expected).norm() / expected.norm())
            if not entry.error <= LOGITS_TOLERANCE:
                raise ArithmeticError(f"wrong: logits differ by {entry.error:.2g} from {entries[0].name}'s; not timed")
        except Exception as error:
            entry.note = failure(error)
            release(setup.device)
    for number in range(setup.steps):
        for entry in entries[:: 1 if number % 2 == 0 else -1]:
            if not entry.note:
                entry.ms.append(task(entry.name)[0] * 1e3)
    return [
        _row(setup, case, entry, 1, q_len, kv_len)
        | ({"tokens_per_s": f"{tokens / statistics.median(entry.ms) * 1e3:.1f}"} if entry.ms else {})
        for entry in entries
    ]


# ---- tables ----------------------------------------------------------------------------------------------------


def _row(setup: Setup, case: str, entry: _Entry, batch: int, q_len: int, kv_len: int) -> Result:
    return {
        "case": case, "batch": batch, "q_len": q_len, "kv_len": kv_len, "heads": setup.heads,
        "kv_heads": setup.kv_heads, "head_dim": setup.head_dim, "layers": "" if case in ATTENTION else setup.layers,
        "method": entry.name, "ms": f"{statistics.median(entry.ms):.4f}" if entry.ms else "",
        "gb_per_s": "", "tokens_per_s": "", "error": "" if entry.error is None else f"{entry.error:.2e}",
        "runs": len(entry.ms), "note": entry.note,
    }  # fmt: skip


def summary(rows: Sequence[Mapping[str, object]]) -> str:
    """A line a case, shape and method: time, bandwidth and its share of a copy's, and how much faster ours is."""

    def key(row: Mapping[str, object]) -> tuple[object, ...]:
        return row["case"], row["batch"], row["kv_len"]

    ours = {key(r): float(str(r["ms"])) for r in rows if r["method"] == "flashmask" and r["ms"]}
    body = []
    for r in rows:
        ms = float(str(r["ms"])) if r["ms"] else None
        share = f"{float(str(r['gb_per_s'])) / float(str(r['copy_gb_per_s'])):.0%}" if r["gb_per_s"] else "-"
        ratio = f"{ms / ours[key(r)]:.2f}" if ms and key(r) in ours else "-"
        body.append([
            f"{r['case']} {r['batch']} x {r['kv_len']}", str(r["method"]), str(r["ms"] or r["note"])[:40],
            str(r["gb_per_s"] or "-"), share, str(r["tokens_per_s"] or "-"), ratio,
        ])  # fmt: skip
    return table(["case", "method", "ms", "GB/s", "of copy", "tokens/s", "flashmask is"], body)
