"""``flashmask bench train``: whole training steps of one model under several attention implementations.

A Llama of Llama-2-7B's width with random weights, LoRA on its attention projections, bfloat16, full recomputation.
Tokens a second count the tokens of the trainer's own rows for every method, so computing less of them is a gain.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_flashmask.prefix_sharing import share_prompts

from .kernels import release
from .measure import table
from .records import ENVIRONMENT, Log, check_device, check_known, environment, failure
from .train_cases import CASES, Case, Step

COLUMNS = (
    *ENVIRONMENT, "transformers", "peft", "case", "layers", "hidden", "tokens", "method", "seconds", "tokens_per_s",
    "peak_mib", "activation_mib", "token_ratio", "loss", "grad_error", "runs", "note",
)  # fmt: skip
SHARED = "flashmask_shared"
METHODS = ("sdpa", "flex_attention", "flashmask", SHARED)
# Gradients of a bfloat16 model differ by a few percent between exact attentions; what is further off is not timed.
TOLERANCE = 0.2
Result = dict[str, object]


@dataclass(frozen=True)
class Setup:
    cases: tuple[str, ...] = tuple(CASES)
    methods: tuple[str, ...] = METHODS
    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    intermediate: int = 11008
    vocab_size: int = 32000
    scale: int = 1  # divides every length
    steps: int = 3
    device: str = "cuda"
    dtype: str = "bfloat16"
    out: Path = Path("train.csv")
    time_budget: float | None = None  # seconds
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_known("cases", self.cases, CASES)
        check_known("methods", self.methods, METHODS)
        check_device(self.device)


@dataclass
class _Entry:
    """What is known of one method in one case."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    activations: int = 0
    token_ratio: float = 1.0
    loss: float = float("nan")
    gradient: Tensor | None = None
    error: float = 0.0
    note: str = ""


def run(setup: Setup) -> str:
    """Measure every case, write rows as they come; the table."""
    import peft
    import transformers

    log = Log(setup.out, COLUMNS)
    origin = environment(setup.device, setup.command, setup.commit)
    origin |= {"transformers": transformers.__version__, "peft": peft.__version__}
    begin = time.perf_counter()
    model = build_model(setup)
    rows: list[Result] = []
    left: list[str] = []
    for name in setup.cases:
        if setup.time_budget is not None and time.perf_counter() - begin > setup.time_budget:
            left.append(name)
            continue
        case = CASES[name] if setup.scale == 1 else CASES[name].scaled(setup.scale)
        entries = _measure(setup, model, case)
        new = [origin | _row(setup, name, case, entry) for entry in entries]
        log.append(new)
        rows += new
        shown = ", ".join(f"{e.name} {e.note or f'{statistics.median(e.seconds):.3f} s'}" for e in entries)
        print(f"[{time.perf_counter() - begin:.0f} s] {name}: {shown}", file=sys.stderr)
    text = summary(rows) if rows else ""
    return text + (f"\nout of time; left out: {', '.join(left)}" if left else "")


def build_model(setup: Setup) -> Any:
    """A PEFT model with random weights, made on its device."""
    from peft import LoraConfig, get_peft_model

    causal = build_llama(setup)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(causal, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(causal.dtype)
        if "lora_B" in parameter_name:
            parameter.data.normal_(0, 0.02)  # zeros would leave half of the gradients zero
    return model


def build_llama(setup: Setup, reward: bool = False) -> Any:
    """A Llama with random weights, made on its device, that recomputes every layer in the backward.

    Args:
        reward: with a head of one score in place of a vocabulary.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(
        vocab_size=setup.vocab_size, hidden_size=setup.hidden, intermediate_size=setup.intermediate,
        num_hidden_layers=setup.layers, num_attention_heads=setup.heads, num_key_value_heads=setup.heads,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    config.num_labels = 1  # of a reward model
    torch.manual_seed(0)
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    with torch.device(setup.device):
        model = auto.from_config(config, attn_implementation="sdpa", dtype=getattr(torch, setup.dtype))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _measure(setup: Setup, model: Any, case: Case) -> list[_Entry]:
    """Every method once, compared, then in turns."""
    torch._dynamo.reset()  # the limit on recompilations counts over all cases
    step = Step(case, setup.vocab_size, setup.hidden, setup.device, next(model.parameters()).dtype)
    entries = [_Entry(name) for name in setup.methods if case.shares or name != SHARED]
    for entry in entries:
        _attempt(setup, entry, model, step, keep_gradient=True)
    expected = next((e.gradient for e in entries if e.gradient is not None), None)
    for entry in entries:
        if entry.gradient is not None and expected is not None:
            entry.error = float((entry.gradient - expected).norm() / expected.norm())
            if not entry.error <= TOLERANCE:
                entry.note = f"wrong: gradients differ by {entry.error:.2g} from {entries[0].name}'s; not timed"
    for entry in entries:
        entry.gradient = None
    expected = None
    for number in range(setup.steps):
        for entry in entries[:: 1 if number % 2 == 0 else -1]:  # no method always runs on the warmer chip
            if not entry.note:
                _attempt(setup, entry, model, step)
    return entries


def _attempt(setup: Setup, entry: _Entry, model: Any, step: Step, keep_gradient: bool = False) -> None:
    """One step; a failure becomes a note. The first one compiles and warms up: its gradient is kept, not its time."""
    try:
        _step(setup, entry, model, step, keep_gradient)
    except Exception as error:
        entry.note = failure(error)
    for parameter in model.parameters():
        parameter.grad = None
    if entry.note:
        release(setup.device)


def _step(setup: Setup, entry: _Entry, model: Any, step: Step, keep_gradient: bool) -> None:
    cuda = torch.device(setup.device).type == "cuda"
    with _method(model, entry) as merged:
        gc.collect()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        loss = step(model)
        loss.backward()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        if merged is not None and merged.merged_tokens:
            entry.token_ratio = merged.rows_tokens / merged.merged_tokens
    if keep_gradient:
        entry.loss = float(loss.detach())
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        entry.gradient = torch.cat(grads).float()
        return
    entry.seconds.append(seconds)
    if cuda:
        entry.peak = torch.cuda.max_memory_allocated()
        entry.activations = entry.peak - before


@contextlib.contextmanager
def _method(model: Any, entry: _Entry) -> Iterator[Any]:
    """The model under the method's attention; what counts its merged tokens, if it merges."""
    causal = model.get_base_model()
    if entry.name == SHARED:
        causal.set_attn_implementation("flashmask")
        with share_prompts(causal) as merged:
            yield merged
    else:
        causal.set_attn_implementation(entry.name)
        yield None


def _row(setup: Setup, name: str, case: Case, entry: _Entry) -> Result:
    seconds = statistics.median(entry.seconds) if entry.seconds and not entry.note else None
    return {
        "case": name, "layers": setup.layers, "hidden": setup.hidden, "tokens": case.tokens, "method": entry.name,
        "seconds": "" if seconds is None else f"{seconds:.4f}",
        "tokens_per_s": "" if seconds is None else f"{case.tokens / seconds:.1f}",
        "peak_mib": f"{entry.peak / 2**20:.0f}" if entry.peak else "",
        "activation_mib": f"{entry.activations / 2**20:.0f}" if entry.peak else "",
        "token_ratio": f"{entry.token_ratio:.4f}", "loss": f"{entry.loss:.6f}", "grad_error": f"{entry.error:.4f}",
        "runs": len(entry.seconds), "note": entry.note,
    }  # fmt: skip


def summary(rows: Sequence[Mapping[str, object]]) -> str:
    """A line a case and method: speed beside sdpa and FlexAttention, memory, and how much of the token ratio it is."""
    seconds = {(r["case"], r["method"]): float(str(r["seconds"])) for r in rows if r["seconds"]}
    memory = {(r["case"], r["method"]): float(str(r["activation_mib"])) for r in rows if r["activation_mib"]}

    def times(found: Mapping[tuple[object, object], float], row: Mapping[str, object], other: str) -> str:
        ours, theirs = (found.get((row["case"], method)) for method in (row["method"], other))
        return f"{theirs / ours:.2f}" if ours and theirs else "-"

    body = [
        [
            str(r["case"]), str(r["method"]), str(r["seconds"] or r["note"])[:40], str(r["tokens_per_s"] or "-"),
            times(seconds, r, "sdpa"), times(seconds, r, "flex_attention"), f"{float(str(r['token_ratio'])):.2f}",
            str(r["peak_mib"] or "-"), str(r["activation_mib"] or "-"), times(memory, r, "sdpa"),
            times(memory, r, "flex_attention"),
        ]
        for r in rows
    ]  # fmt: skip
    header = [
        "case", "method", "s/step", "tokens/s", "x sdpa", "x flex", "token ratio", "peak MiB", "activations",
        "sdpa / it", "flex / it",
    ]  # fmt: skip
    return table(header, body)
