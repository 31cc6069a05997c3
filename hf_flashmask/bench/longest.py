"""``flashmask bench longest``: the longest packed row that one device trains on, by attention implementation.

The model is that of ``flashmask bench train``. A step of few layers is run; the weights of the layers left out and the
inputs that recomputation saves for them are held in memory beside it, so the peak is that of the whole model.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import train
from .kernels import release
from .measure import table
from .records import ENVIRONMENT, Log, Refusal, check_device, check_known, environment, failure
from .train_cases import Case, Step, backbone

COLUMNS = (
    *ENVIRONMENT, "transformers", "peft", "layers", "layers_run", "hidden", "document", "method", "tokens", "fits",
    "seconds", "peak_mib", "note",
)  # fmt: skip
METHODS = ("sdpa", "flex_attention", "flashmask")


@dataclass(frozen=True)
class Setup:
    methods: tuple[str, ...] = METHODS
    layers: int = 32
    layers_run: int = 2
    hidden: int = 4096
    heads: int = 32
    intermediate: int = 11008
    vocab_size: int = 32000
    document: int = 32768  # tokens of a document; the last one of a row may be shorter
    step: int = 32768  # lengths tried are multiples of it
    most: int = 1 << 21  # no longer rows are tried
    device: str = "cuda"
    dtype: str = "bfloat16"
    out: Path = Path("longest.csv")
    time_budget: float | None = None  # seconds
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_known("methods", self.methods, METHODS)
        if not 1 <= self.layers_run <= self.layers:
            raise Refusal(f"layers run must be between 1 and the {self.layers} of the model, got {self.layers_run}")
        check_device(self.device)


def run(setup: Setup) -> str:
    """Find the longest row of every method, write every length tried as it is; the table."""
    import peft
    import transformers

    log = Log(setup.out, COLUMNS)
    origin: dict[str, object] = {**environment(setup.device, setup.command, setup.commit)}
    origin |= {"transformers": transformers.__version__, "peft": peft.__version__, "layers": setup.layers}
    origin |= {"layers_run": setup.layers_run, "hidden": setup.hidden, "document": setup.document}
    begin = time.perf_counter()
    model = train.build_model(
        train.Setup(
            layers=setup.layers_run, hidden=setup.hidden, heads=setup.heads, intermediate=setup.intermediate,
            vocab_size=setup.vocab_size, device=setup.device, dtype=setup.dtype,
        )
    )  # fmt: skip
    left_out = setup.layers - setup.layers_run
    dtype = getattr(torch, setup.dtype)
    weights = sum(p.numel() for p in backbone(model).layers[0].parameters()) * left_out
    _held = torch.empty(weights, dtype=dtype, device=setup.device)
    body = []
    for method in setup.methods:
        model.get_base_model().set_attn_implementation(method)
        torch._dynamo.reset()

        def fits(tokens: int, method: str = method) -> bool | None:
            """None: stopped for another reason than memory."""
            if setup.time_budget is not None and time.perf_counter() - begin > setup.time_budget:
                return None
            row = _try(setup, model, tokens, left_out, dtype)
            log.append([origin | row | {"method": method, "tokens": tokens}])
            print(f"[{time.perf_counter() - begin:.0f} s] {method}, {tokens} tokens: {row}", file=sys.stderr)
            return {"yes": True, "no": False}.get(str(row["fits"]))

        found, sure = search(fits, setup.step, setup.most)
        body.append([method, f"{found:,}" if found else "none", "yes" if sure else "no: a longer one may fit"])
    return table(["method", "longest row", "the longest"], body)


def search(fits: Callable[[int], bool | None], step: int, most: int) -> tuple[int, bool]:
    """The largest multiple of ``step`` up to ``most`` that fits (0 if none), and whether the next one was refused."""
    good, bad = 0, most // step + 1
    doubling = True
    while bad - good > 1:
        at = min(max(1, 2 * good), bad - 1) if doubling else (good + bad) // 2
        answer = fits(at * step)
        if answer is None:
            return good * step, False
        if answer:
            good = at
        else:
            bad, doubling = at, False
    return good * step, not doubling


def _try(setup: Setup, model: Any, tokens: int, left_out: int, dtype: torch.dtype) -> dict[str, object]:
    """One training step of a row; whether memory sufficed."""
    cuda = torch.device(setup.device).type == "cuda"
    whole, rest = divmod(tokens, setup.document)
    documents = (setup.document,) * whole + ((rest,) if rest else ())
    row: dict[str, object] = {"fits": "yes", "seconds": "", "peak_mib": "", "note": ""}
    begin = time.perf_counter()
    try:
        saved = torch.empty(left_out, tokens, setup.hidden, dtype=dtype, device=setup.device)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        step = Step(Case("sft", documents=documents), setup.vocab_size, setup.hidden, setup.device, dtype)
        step(model).backward()
        del saved
        if cuda:
            torch.cuda.synchronize()
            row["peak_mib"] = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
        row["seconds"] = f"{time.perf_counter() - begin:.3f}"
    except torch.OutOfMemoryError as error:
        row |= {"fits": "no", "note": failure(error)[:120]}
    except Exception as error:
        row |= {"fits": "", "note": failure(error)}
    for parameter in model.parameters():
        parameter.grad = None
    release(setup.device)
    return row
