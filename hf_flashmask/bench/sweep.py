"""``flashmask bench sweep``: the FlashMask paper's end-to-end protocol on one device: tokens a second and memory of
training steps against the length of a row.

A Llama of Llama-2-7B's width with random weights, one packed row a step, bfloat16, full recomputation. A step makes its
mask, computes loss and gradients and updates the parameters by AdamW, whose learning rate is 0: every method sees the
same weights. Rows of the file that are there already are not measured again, so a run that was stopped can go on.

Source: arXiv 2410.01359, section 5.1 and its appendix (there 32 GPUs, here one; there a batch, here a row).
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import train
from .kernels import release
from .measure import table
from .records import ENVIRONMENT, Log, Refusal, check_device, check_known, environment, failure, read
from .sweep_methods import METHODS, register
from .sweep_tasks import TASKS, PackedRow, loss, questions

SETUP = ("layers", "hidden", "heads", "intermediate", "vocab_size", "dtype")
COLUMNS = (
    *ENVIRONMENT, "transformers", "peft", *SETUP, "task", "trained", "tokens", "questions", "visible", "method",
    "seconds", "tokens_per_s", "peak_mib", "loss", "grad_norm", "reference", "loss_error", "grad_error", "runs", "note",
)  # fmt: skip
LENGTHS = tuple(4096 << i for i in range(8))
OUT_OF_MEMORY = "out of memory"
# Gradients of a bfloat16 model differ by a few percent between exact attentions, losses by much less.
GRAD_TOLERANCE, LOSS_TOLERANCE = 0.2, 0.03
CHECKED = "layers.0.self_attn."  # the parameters whose gradients are compared: those of all layers above reach them
Result = dict[str, object]


@dataclass(frozen=True)
class Setup:
    tasks: tuple[str, ...] = tuple(TASKS)
    lengths: tuple[int, ...] = LENGTHS
    methods: tuple[str, ...] = tuple(METHODS)
    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    intermediate: int = 11008
    vocab_size: int = 32000
    steps: int = 3  # timed ones; fewer where one takes long
    step_limit: float = 60.0  # seconds; a method whose step takes longer meets no longer row
    device: str = "cuda"
    dtype: str = "bfloat16"
    out: Path = Path("sweep.csv")
    time_budget: float | None = None  # seconds
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_known("tasks", self.tasks, TASKS)
        check_known("methods", self.methods, METHODS)
        check_device(self.device)
        if short := [n for n in self.lengths if n < 128]:
            raise Refusal(f"lengths must be at least 128 tokens, got {', '.join(map(str, short))}")

    @property
    def facts(self) -> dict[str, str]:
        """What rows must agree in to be of one sweep."""
        return {name: str(getattr(self, name)) for name in SETUP}


@dataclass
class _Entry:
    """What is known of one method on one row."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    loss: float = math.nan
    gradient: Tensor | None = None  # on the CPU
    grad_norm: float = math.nan
    reference: str = ""
    loss_error: float | None = None
    grad_error: float | None = None
    note: str = ""


def run(setup: Setup) -> str:
    """Measure what the file does not hold yet, write rows as they come; the table of all of this sweep."""
    import peft
    import transformers

    log = Log(setup.out, COLUMNS)
    origin: dict[str, object] = {**environment(setup.device, setup.command, setup.commit)}
    origin |= {"transformers": transformers.__version__, "peft": peft.__version__, **setup.facts}
    register()
    progress = _Progress(setup, _known(setup, origin))
    # The limit on recompilations would leave FlexAttention uncompiled after a few lengths.
    with _quick_collections(), torch._dynamo.config.patch(recompile_limit=64):
        for task in setup.tasks:
            for row in _task(setup, task, progress):
                new = origin | row
                log.append([new])
                progress.done(new)
            release(setup.device)  # two models at once may be too many
    text = summary(progress.rows) if progress.rows else ""
    out_of_time = f"\nout of time; left out: {', '.join(progress.skipped)}" if progress.skipped else ""
    return text + out_of_time


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Garbage is collected before every measurement; what there was before need not be looked through each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _known(setup: Setup, origin: Mapping[str, object]) -> list[Mapping[str, object]]:
    """Rows of the file that belong to this sweep."""
    same = ("gpu", *SETUP)
    try:
        rows = read(setup.out)
    except Refusal:  # a file that has its header alone
        return []
    return [row for row in rows if all(row[name] == str(origin[name]) for name in same)]


class _Progress:
    """What is measured, what is left, and how long that takes."""

    def __init__(self, setup: Setup, known: Sequence[Mapping[str, object]]) -> None:
        self._setup = setup
        self.rows = list(known)
        self.skipped: list[str] = []
        self._begin = time.perf_counter()
        self._worked = 0.0  # in units of _work
        self._overhead: dict[str, float] = {}  # seconds of a method's last row that were not its steps

    def elapsed(self) -> float:
        return time.perf_counter() - self._begin

    def find(self, task: str, tokens: int, method: str) -> Mapping[str, object] | None:
        wanted = (task, str(tokens), method)
        return next((r for r in self.rows if (r["task"], str(r["tokens"]), r["method"]) == wanted), None)

    def left(self, task: str) -> list[tuple[int, str]]:
        """Lengths and methods of a task that are neither measured nor given up, shortest first."""
        pairs = [(tokens, method) for tokens in sorted(set(self._setup.lengths)) for method in self._setup.methods]
        return [(n, m) for n, m in pairs if self.find(task, n, m) is None and not self._given_up(task, n, m)]

    def _given_up(self, task: str, tokens: int, method: str) -> bool:
        """A shorter row failed or took longer than the limit."""
        shorter = [
            r for r in self.rows if (r["task"], r["method"]) == (task, method) and int(str(r["tokens"])) < tokens
        ]
        return any(r["note"] or float(str(r["seconds"])) > self._setup.step_limit for r in shorter)

    def affordable(self, task: str, tokens: int, method: str) -> bool:
        """Whether the time budget is likely to hold this one; else it is noted as left out."""
        budget = self._setup.time_budget
        if budget is None or self.elapsed() + self._estimate(task, tokens, method) <= budget:
            return True
        self.skipped.append(f"{task} {tokens} {method}")
        return False

    def _estimate(self, task: str, tokens: int, method: str) -> float:
        """Seconds, from the longest row that is no longer, of this task if it has one; 0 where there is none."""
        found = [
            (r["task"] == task, int(str(r["tokens"])), float(str(r["seconds"])))
            for r in self.rows
            if r["method"] == method and r["seconds"] and int(str(r["tokens"])) <= tokens
        ]
        if not found:
            return 0.0
        _, longest, seconds = max(found)
        # At most quadratic in the length; a step that warms up and one at least that is timed.
        return self._overhead.get(method, 0.0) + 2 * seconds * (tokens / longest) ** 2

    def measured(self, tokens: int, method: str, wall: float, steps: Sequence[float]) -> None:
        self._overhead[method] = max(0.0, wall - (len(steps) + 1) * (steps[-1] if steps else 0.0))
        self._worked += _work(tokens)

    def done(self, row: Mapping[str, object]) -> None:
        self.rows.append(row)
        left = sum(_work(n) for task in self._setup.tasks for n, _ in self.left(task))
        remaining = self.elapsed() * left / self._worked
        if self._setup.time_budget is not None:
            remaining = min(remaining, max(0.0, self._setup.time_budget - self.elapsed()))
        found = f"{row['seconds']} s a step, {row['tokens_per_s']} tokens/s" if row["seconds"] else row["note"]
        print(
            f"[{self.elapsed():.0f} s, about {remaining:.0f} s left] {row['task']}, {row['tokens']} tokens, "
            f"{row['method']}: {found}",
            file=sys.stderr,
            flush=True,
        )


def _work(tokens: int) -> float:
    """What a step costs beside others: linear layers, and attention that outweighs them at long rows."""
    return tokens * (1 + tokens / 65536)


# ---- one task --------------------------------------------------------------------------------------------------


def _task(setup: Setup, task: str, progress: _Progress) -> Iterator[Result]:
    """Rows of a task, shortest first."""
    trainee: _Trainee | None = None
    row: PackedRow | None = None
    gradient: tuple[str, Tensor] | None = None  # the reference's on this row
    for tokens, method in progress.left(task):
        if (tokens, method) not in progress.left(task) or not progress.affordable(task, tokens, method):
            continue
        begin = time.perf_counter()
        entry = _Entry(method)
        if row is None or row.tokens != tokens:
            row, gradient = PackedRow(questions(task, tokens), setup.vocab_size, setup.device), None
        if refusal := METHODS[method].refusal(task, setup.device):
            entry.note = refusal
        else:
            try:
                trainee = trainee or _Trainee(setup, task)
                trainee.use(method)
                _measure(setup, trainee, entry, row, gradient, _reference(progress, task, tokens))
            except Exception as error:
                entry.note = _note(error)
        if entry.gradient is not None and gradient is None and not entry.note:
            gradient = (entry.name, entry.gradient)
        release(setup.device)
        progress.measured(tokens, method, time.perf_counter() - begin, entry.seconds)
        yield _row(task, row, entry)
        if "CUDA error" in entry.note:  # nothing on this device can be trusted after it
            raise Refusal(f"{entry.note}\nrun the same command again to go on without {method} there")


def _reference(progress: _Progress, task: str, tokens: int) -> Mapping[str, object] | None:
    """The first that was measured on this row."""
    return next((r for m in METHODS if (r := progress.find(task, tokens, m)) is not None and r["seconds"]), None)


def _note(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) or OUT_OF_MEMORY in str(error).lower():
        return OUT_OF_MEMORY
    return failure(error)


class _Trainee:
    """A model, what of it is trained, and DPO's reference."""

    def __init__(self, setup: Setup, task: str) -> None:
        shape = train.Setup(
            layers=setup.layers, hidden=setup.hidden, heads=setup.heads, intermediate=setup.intermediate,
            vocab_size=setup.vocab_size, device=setup.device, dtype=setup.dtype,
        )  # fmt: skip
        self.task = task
        if TASKS[task].trained == "lora":
            self.model = train.build_model(shape).get_base_model()
        else:
            self.model = train.build_llama(shape, reward=task == "rm")
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if task == "dpo" else None
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        cuda = torch.device(setup.device).type == "cuda"
        # In place of the moments and the update one by one, whose temporary tensors would be in the peak.
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=True if cuda else None)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.update()  # makes the moments, so that their memory is in every peak

    def use(self, method: str) -> None:
        for model in (self.model, self.reference):
            if model is not None:
                model.set_attn_implementation(METHODS[method].implementation)

    def backward(self, row: PackedRow, method: str) -> Tensor:
        """Mask, loss and gradients; the loss."""
        arguments = METHODS[method].arguments(row)

        def hidden(model: Any) -> Tensor:
            out = model.model(
                input_ids=row.input_ids, position_ids=row.position_ids, use_cache=False, **arguments
            ).last_hidden_state
            result: Tensor = out
            return result

        value = loss(self.task, row, hidden, self.model, self.reference)
        value.backward()
        return value.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def checked_gradient(self) -> Tensor:
        """Of the first layer's attention, on the CPU."""
        named = self.model.named_parameters()
        found = [p.grad.flatten().float().cpu() for name, p in named if CHECKED in name and p.grad is not None]
        return torch.cat(found)


def _measure(
    setup: Setup,
    trainee: _Trainee,
    entry: _Entry,
    row: PackedRow,
    gradient: tuple[str, Tensor] | None,
    reference: Mapping[str, object] | None,
) -> None:
    """A step that compiles, warms up and is compared with the reference, then timed ones."""
    cuda = torch.device(setup.device).type == "cuda"
    try:
        entry.loss = float(trainee.backward(row, entry.name))
        entry.gradient = trainee.checked_gradient()
        entry.grad_norm = float(entry.gradient.norm())
        _compare(entry, gradient, reference)
        trainee.optimizer.zero_grad(set_to_none=True)
        if entry.note:
            return
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        while len(entry.seconds) < setup.steps and sum(entry.seconds) < setup.step_limit / 4:
            begin = time.perf_counter()
            trainee.backward(row, entry.name)
            trainee.update()
            if cuda:
                torch.cuda.synchronize()
            entry.seconds.append(time.perf_counter() - begin)
        if cuda:
            entry.peak = torch.cuda.max_memory_allocated()
    finally:
        trainee.optimizer.zero_grad(set_to_none=True)


def _compare(entry: _Entry, gradient: tuple[str, Tensor] | None, reference: Mapping[str, object] | None) -> None:
    """With the first method that was measured on this row; what is too far off gets a note instead of times."""
    if not (math.isfinite(entry.loss) and math.isfinite(entry.grad_norm)):
        entry.note = f"wrong: loss {entry.loss}, norm of gradients {entry.grad_norm}"
        return
    if reference is None:
        return
    entry.reference = str(reference["method"])
    expected = float(str(reference["loss"]))
    entry.loss_error = abs(entry.loss - expected) / abs(expected)
    if gradient is not None and entry.gradient is not None:
        entry.grad_error = float((entry.gradient - gradient[1]).norm() / gradient[1].norm())
    else:  # measured in another run, of which the norm is known alone
        norm = float(str(reference["grad_norm"]))
        entry.grad_error = abs(entry.grad_norm - norm) / norm
    if entry.loss_error > LOSS_TOLERANCE or entry.grad_error > GRAD_TOLERANCE:
        entry.note = (
            f"wrong: loss differs by {entry.loss_error:.2g} and gradients by {entry.grad_error:.2g} from "
            f"{entry.reference}'s; not timed"
        )


def _row(task: str, row: PackedRow, entry: _Entry) -> Result:
    seconds = statistics.median(entry.seconds) if entry.seconds and not entry.note else None

    def shown(value: float | None, form: str) -> str:
        return "" if value is None or not math.isfinite(value) else format(value, form)

    return {
        "task": task, "trained": TASKS[task].trained, "tokens": row.tokens, "questions": len(row.lengths),
        "visible": f"{row.visible:.4f}", "method": entry.name, "seconds": shown(seconds, ".4f"),
        "tokens_per_s": "" if seconds is None else f"{row.tokens / seconds:.1f}",
        "peak_mib": f"{entry.peak / 2**20:.0f}" if entry.peak and seconds is not None else "",
        "loss": shown(entry.loss, ".6f"), "grad_norm": shown(entry.grad_norm, ".6g"), "reference": entry.reference,
        "loss_error": shown(entry.loss_error, ".2e"), "grad_error": shown(entry.grad_error, ".2e"),
        "runs": len(entry.seconds), "note": entry.note,
    }  # fmt: skip


def summary(rows: Sequence[Mapping[str, object]]) -> str:
    """A line a task, length and method: speed beside sdpa and FlexAttention, memory, and errors."""
    found = {(r["task"], str(r["tokens"]), r["method"]): float(str(r["tokens_per_s"])) for r in rows if r["seconds"]}

    def times(row: Mapping[str, object], other: str) -> str:
        ours, theirs = (found.get((row["task"], str(row["tokens"]), m)) for m in (row["method"], other))
        return f"{ours / theirs:.2f}" if ours and theirs else "-"

    tasks, methods = list(TASKS), list(METHODS)
    ordered = sorted(
        rows, key=lambda r: (tasks.index(str(r["task"])), int(str(r["tokens"])), methods.index(str(r["method"])))
    )
    body = [
        [
            f"{r['task']} {int(str(r['tokens'])):,}", str(r["method"]), str(r["seconds"] or r["note"])[:40],
            str(r["tokens_per_s"] or "-"), times(r, "sdpa"), times(r, "flex_attention"), str(r["peak_mib"] or "-"),
            str(r["loss_error"] or "-"), str(r["grad_error"] or "-"),
        ]
        for r in ordered
    ]  # fmt: skip
    header = ["row", "method", "s/step", "tokens/s", "x sdpa", "x flex", "peak MiB", "loss error", "gradient error"]
    return table(header, body)
