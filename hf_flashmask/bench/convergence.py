"""``flashmask bench convergence``: one training, several exact attentions, the same losses up to rounding.

A Llama with random weights is trained on packed GSM8K rows: once with sdpa and the dense block-causal mask, twice with
flashmask, which gets no mask but ``position_ids``, and with two more exact arithmetics under the same dense mask. How
far those lie from sdpa and from each other is what rounding alone does to the curve; flashmask must lie no farther.
Its two runs must agree in every bit. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flashmask.masks.intervals import run_spans

from .demo import texts, train_tokenizer
from .kernels import release
from .measure import table
from .records import ENVIRONMENT, Log, Refusal, check_device, environment

SEED = 0
VOCAB_SIZE = 2048
WARM_UP = 4  # steps in which the learning rate rises to its value
# How many times the spread between other exact methods flashmask may lie from sdpa: both are maxima of few samples.
NOISE_FACTOR = 2.0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SHAPE = ("layers", "hidden", "heads", "intermediate", "row_len", "steps", "lr", "dtype")
COLUMNS = (*ENVIRONMENT, "transformers", *_SHAPE, "parameters", "method", "step", "loss", "checksum")
# With it cuBLAS gives the same bits on every run. It is read when a process first uses cuBLAS.
_CUBLAS, _CUBLAS_VALUE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_IGNORED = -100  # a label that is not trained on


@dataclass(frozen=True)
class Setup:
    layers: int = 8
    hidden: int = 4096
    heads: int = 32
    intermediate: int = 11008
    row_len: int = 4096
    steps: int = 20
    lr: float = 1e-4
    device: str = "cuda"
    dtype: str = "bfloat16"
    out: Path = Path("convergence.csv")
    plot: Path | None = None
    time_budget: float | None = None  # seconds
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads):
            raise Refusal(f"hidden must be an even multiple of the {self.heads} heads, got {self.hidden}")
        if self.dtype not in DTYPES:
            raise Refusal(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype}")
        check_device(self.device)


@dataclass(frozen=True)
class Method:
    attention: str  # attn_implementation
    dense: bool  # whether it is given the dense mask
    math: bool = False  # whether sdpa must take its "math" backend, float32 inside


SDPA, OURS, AGAIN = "sdpa", "flashmask", "flashmask again"
METHODS = {
    SDPA: Method("sdpa", dense=True),
    OURS: Method("flashmask", dense=False),
    AGAIN: Method("flashmask", dense=False),
    "eager": Method("eager", dense=True),
    "sdpa math": Method("sdpa", dense=True, math=True),
}


@dataclass(frozen=True)
class Row:
    """A packed row: ``[1, N]`` each, positions from 0 in every document."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    documents: Tensor  # number of the document that a token is in

    def to(self, device: str) -> Row:
        return Row(*(t.to(device) for t in (self.input_ids, self.position_ids, self.labels, self.documents)))


@dataclass(frozen=True)
class Run:
    losses: tuple[float, ...]
    hashes: Mapping[str, str]  # SHA-256 of the bytes of every parameter after the last step
    parameters: int  # numbers

    def checksum(self) -> str:
        return hashlib.sha256("".join(self.hashes.values()).encode()).hexdigest()[:16]


def pack(documents: Sequence[Sequence[int]], row_len: int) -> list[Row]:
    """Full rows of documents end to end. One that a row's end cuts goes on in the next row as a document of its own.

    Raises:
        Refusal: the documents do not fill a row.
    """
    tokens = torch.tensor([token for document in documents for token in document])
    numbers = torch.repeat_interleave(torch.tensor([len(document) for document in documents]))
    if row_len > len(tokens):
        raise Refusal(f"the text has {len(tokens)} tokens, rows of {row_len} are too long")
    rows = []
    at = torch.arange(row_len)
    for ids, number in zip(tokens.split(row_len), numbers.split(row_len), strict=True):
        if len(ids) == row_len:
            first = torch.ones(row_len, dtype=torch.bool)
            first[1:] = number[1:] != number[:-1]
            positions = at - run_spans(first[None])[0][0]
            # The last token of a document must not learn how the next one begins.
            rows.append(Row(ids[None], positions[None], ids.masked_fill(first, _IGNORED)[None], number[None]))
    return rows


def dense_mask(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive ``[1, 1, N, N]``: a token sees those before it in its own document."""
    visible = (documents[:, :, None] == documents[:, None, :]).tril()
    return torch.zeros((), dtype=dtype, device=documents.device).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


@contextlib.contextmanager
def reproducible(device: str) -> Iterator[None]:
    """Torch's deterministic algorithms, cuBLAS's too, and random state that does not leak; all as before afterwards.

    What has no such algorithm goes on with a warning: the backward pass of memory-efficient sdpa.
    """
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    workspace = os.environ.get(_CUBLAS)
    os.environ.setdefault(_CUBLAS, _CUBLAS_VALUE)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        devices = [torch.cuda.current_device()] if torch.device(device).type == "cuda" else []
        with torch.random.fork_rng(devices):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        if workspace is None:
            del os.environ[_CUBLAS]


def run(setup: Setup) -> str:
    """Train with every method, write the losses as each is done, draw them if asked; the table and the verdict."""
    begin = time.perf_counter()
    corpus = texts()
    tokenizer = train_tokenizer(corpus, VOCAB_SIZE)
    rows = pack([[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in corpus], setup.row_len)
    log = Log(setup.out, COLUMNS)
    with reproducible(setup.device):
        runs, left = _train_all(setup, rows, log, begin)
    if setup.plot is not None and runs:
        from . import plots

        plots.plot(setup.out, setup.plot)
    return report(runs, left, rows, setup)


def _train_all(setup: Setup, rows: Sequence[Row], log: Log, begin: float) -> tuple[dict[str, Run], dict[str, str]]:
    """What was trained, and why the rest was not."""
    import transformers

    origin: dict[str, object] = {
        **environment(setup.device, setup.command, setup.commit),
        "transformers": transformers.__version__,
        **{name: getattr(setup, name) for name in _SHAPE},
    }
    runs: dict[str, Run] = {}
    left: dict[str, str] = {}
    for name, method in METHODS.items():
        if setup.time_budget is not None and time.perf_counter() - begin > setup.time_budget:
            left[name] = "out of time"
            continue
        try:
            runs[name] = done = train(name, method, rows, setup, begin)
        except torch.OutOfMemoryError:
            left[name] = "out of memory"
        else:
            facts = {"parameters": done.parameters, "method": name, "checksum": done.checksum()}
            log.append([origin | facts | {"step": i + 1, "loss": f"{x:.9g}"} for i, x in enumerate(done.losses)])
        release(setup.device)
    return runs, left


def train(name: str, method: Method, rows: Sequence[Row], setup: Setup, begin: float) -> Run:
    """One training: always the same first weights, rows and optimizer. ``begin`` is where progress counts from."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=setup.hidden,
        intermediate_size=setup.intermediate,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.heads,
        max_position_embeddings=setup.row_len,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    dtype = DTYPES[setup.dtype]
    torch.manual_seed(SEED)
    with torch.device(setup.device):
        model: Any = LlamaForCausalLM._from_config(config, attn_implementation=method.attention, dtype=dtype)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.lr)
    losses = []
    with sdpa_kernel(SDPBackend.MATH) if method.math else contextlib.nullcontext():
        for step in range(setup.steps):
            for group in optimizer.param_groups:
                group["lr"] = setup.lr * min(1.0, (step + 1) / WARM_UP)
            row = rows[step % len(rows)].to(setup.device)
            loss = model(
                input_ids=row.input_ids,
                position_ids=row.position_ids,
                labels=row.labels,
                attention_mask=dense_mask(row.documents, dtype) if method.dense else None,
                use_cache=False,
            ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds = time.perf_counter() - begin
            print(f"[{name}, {step + 1}/{setup.steps}, {seconds:.0f} s] loss {losses[-1]:.6f}", file=sys.stderr)
    return Run(tuple(losses), hashes(model), sum(p.numel() for p in model.parameters()))


def hashes(model: torch.nn.Module) -> dict[str, str]:
    """SHA-256 of the bytes of every parameter."""

    def digest(parameter: Tensor) -> str:
        return hashlib.sha256(parameter.detach().reshape(-1).view(torch.uint8).cpu().numpy().data).hexdigest()

    named = dict(model.named_parameters())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(named, pool.map(digest, named.values()), strict=True))


def gap(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference of two curves; infinite where one is not finite."""
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def verdict(runs: Mapping[str, Run], dtype: str) -> list[str]:
    """How far flashmask lies from sdpa, how far exact methods lie from each other, and whether it repeats its bits."""
    exact = {name: done.losses for name, done in runs.items() if METHODS[name].dense}
    spreads = {(a, b): gap(exact[a], exact[b]) for a, b in itertools.combinations(exact, 2)}
    lines = []
    if OURS in runs and SDPA in runs:
        ours = gap(runs[OURS].losses, runs[SDPA].losses)
        lines.append(f"largest difference of the losses: {OURS} - {SDPA}: {ours:.2e}")
        lines += [f"largest difference of the losses: {b} - {a}: {spread:.2e}" for (a, b), spread in spreads.items()]
        if spreads:
            noise = max(spreads.values())
            within = ours <= NOISE_FACTOR * noise < math.inf
            ratio = f"{ours / noise:.2f} times" if 0 < noise < math.inf and ours < math.inf else f"{ours:.2e} against"
            lines.append(
                f"{OURS} is {'within' if within else 'NOT within'} {dtype} noise: {ratio} the largest spread between "
                f"other exact methods, {noise:.2e} (at most {NOISE_FACTOR:g} times)"
            )
    if OURS in runs and AGAIN in runs:
        lines.append(_identity(runs[OURS], runs[AGAIN]))
    return lines


def _identity(a: Run, b: Run) -> str:
    steps = sum(x != y for x, y in zip(a.losses, b.losses, strict=True))
    tensors = sum(digest != b.hashes[name] for name, digest in a.hashes.items())
    if steps or tensors:
        return (
            f"{OURS} twice: NOT bit-identical: {steps} of {len(a.losses)} losses and {tensors} of {len(a.hashes)} "
            "parameter tensors differ"
        )
    return (
        f"{OURS} twice: bit-identical: {len(a.losses)} losses and, after the last step, all {len(a.hashes)} parameter "
        f"tensors ({a.parameters:,} numbers, checksum {a.checksum()})"
    )


def report(runs: Mapping[str, Run], left: Mapping[str, str], rows: Sequence[Row], setup: Setup) -> str:
    used = rows[: setup.steps]
    n_documents = sum(int((row.position_ids == 0).sum()) for row in used) / len(used)
    shape = f"Llama of {setup.layers} layers x {setup.hidden}, {setup.heads} heads, {setup.dtype}"
    parts = [f"{shape}, AdamW; rows of {setup.row_len} tokens, {n_documents:.1f} documents each"]
    if runs:
        body = [[str(i + 1), *(f"{done.losses[i]:.6f}" for done in runs.values())] for i in range(setup.steps)]
        parts.append(table(("step", *runs), body))
    lines = [*verdict(runs, setup.dtype), *(f"{name} left out: {reason}" for name, reason in left.items())]
    return "\n\n".join((*parts, "\n".join(lines)))
