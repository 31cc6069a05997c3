"""``flashmask bench serving``: ``generate_batch`` on GSM8K prompts of mixed lengths, flashmask against sdpa.

Prompts have 0 to 7 solved problems before the question, other ones in every prompt, so that none share a beginning. The
model is a Llama with random weights that generates a fixed number of tokens for every prompt. Nothing is downloaded.
"""

from __future__ import annotations

import inspect
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .demo import texts, train_tokenizer
from .kernels import release
from .measure import PeakMemory, mib, table
from .records import ENVIRONMENT, Log, Refusal, check_device, check_known, environment, failure

SHOTS = 8  # prompts have fewer solved problems than this
PAGE = 256  # tokens; what Transformers takes by itself
VOCAB_SIZE = 2048
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
METHODS = ("sdpa", "flashmask")
_SHAPE = ("layers", "hidden", "heads", "kv_heads", "intermediate", "dtype", "requests", "new_tokens", "step_tokens")
COLUMNS = (
    *ENVIRONMENT, "transformers", *_SHAPE, "cuda_graphs", "prompt_tokens", "method", "seconds", "tokens_per_s",
    "peak_mib", "same", "runs", "note",
)  # fmt: skip
Result = dict[str, object]


@dataclass(frozen=True)
class Setup:
    methods: tuple[str, ...] = METHODS
    layers: int = 16
    hidden: int = 2048
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 8192
    requests: int = 64
    new_tokens: int = 128
    step_tokens: int = 4096  # most new tokens of a step
    cuda_graphs: str = "none"  # or "decode" or "all" steps
    runs: int = 3
    device: str = "cuda"
    dtype: str = "bfloat16"
    out: Path = Path("serving.csv")
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.hidden % (2 * self.heads):
            raise Refusal(
                f"heads must be a multiple of kv_heads and hidden an even one of heads, got {self.heads}, "
                f"{self.kv_heads} and {self.hidden}"
            )
        from transformers import AttentionInterface

        # A name with a "/" is a kernel of the Hub, which Transformers loads.
        local = [name for name in self.methods if "/" not in name]
        check_known("methods", local, ["eager", *sorted(AttentionInterface().valid_keys())])
        check_device(self.device)


@dataclass
class _Entry:
    """What is known of one method."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    tokens: list[list[int]] | None = None
    note: str = ""


def prompts(requests: int) -> list[list[int]]:
    """Token ids. Request i has i mod 8 solved problems before its question.

    Raises:
        Refusal: the problems that ship with the package do not suffice.
    """
    corpus = texts()
    tokenizer = train_tokenizer(corpus, VOCAB_SIZE)
    left = iter(corpus)
    made = []
    for i in range(requests):
        problems = list(itertools.islice(left, i % SHOTS + 1))
        if len(problems) <= i % SHOTS:
            raise Refusal(f"there are problems for {i} prompts, got requests={requests}")
        question, _ = problems.pop().split("\nAnswer:")
        made.append(tokenizer("\n\n".join([*problems, f"{question}\nAnswer:"]))["input_ids"])
    return made


def run(setup: Setup) -> str:
    """Measure every method, write a row each; the table."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    if "auto_switch_to_flash" not in inspect.signature(transformers.ContinuousBatchingConfig).parameters:
        raise Refusal(f"needs transformers 5.23, which can be told to keep sdpa; found {transformers.__version__}")
    log = Log(setup.out, COLUMNS)
    ids = prompts(setup.requests)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=setup.hidden, intermediate_size=setup.intermediate,
        num_hidden_layers=setup.layers, num_attention_heads=setup.heads, num_key_value_heads=setup.kv_heads,
        max_position_embeddings=1 << 16, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(setup.device):
        model = LlamaForCausalLM._from_config(config, dtype=DTYPES[setup.dtype]).eval()
    entries = [_Entry(name) for name in setup.methods]
    for number in range(setup.runs + 1):  # the first warms up
        for entry in entries[:: 1 if number % 2 else -1]:
            if not entry.note:
                _measure(setup, model, ids, entry, warm_up=number == 0)
    origin = environment(setup.device, setup.command, setup.commit) | {"transformers": transformers.__version__}
    rows = [origin | _row(setup, ids, entry, entries[0]) for entry in entries]
    log.append(rows)
    return summary(rows)


def _measure(setup: Setup, model: Any, ids: list[list[int]], entry: _Entry, *, warm_up: bool) -> None:
    from transformers import ContinuousBatchingConfig, GenerationConfig

    pages = sum(-(-(len(prompt) + setup.new_tokens) // PAGE) for prompt in ids)
    batching = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=pages, max_batch_tokens=setup.step_tokens, auto_switch_to_flash=False,
        use_cuda_graph=(setup.cuda_graphs == "all", setup.cuda_graphs != "none"),  # with prompts, decoding
    )  # fmt: skip
    greedy = GenerationConfig(max_new_tokens=setup.new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    try:
        model.set_attn_implementation(entry.name)
        with PeakMemory() as memory:
            begin = time.perf_counter()
            outputs = model.generate_batch(
                ids, generation_config=greedy, continuous_batching_config=batching, progress_bar=False
            )
            seconds = time.perf_counter() - begin
        results = [outputs[f"req_{i}"] for i in range(len(ids))]
        if errors := [result.error for result in results if result.error]:
            raise RuntimeError(errors[0])
    except Exception as error:
        entry.note = failure(error)
        return
    finally:
        release(setup.device)
    entry.tokens = [result.generated_tokens for result in results]
    if warm_up:
        entry.peak = memory.growth
    else:
        entry.seconds.append(seconds)
    print(f"{entry.name}{', warm-up' if warm_up else ''}: {seconds:.2f} s", file=sys.stderr)


def _row(setup: Setup, ids: list[list[int]], entry: _Entry, first: _Entry) -> Result:
    done = bool(entry.seconds)
    seconds = statistics.median(entry.seconds) if done else 0.0
    same = None
    if entry.tokens is not None and first.tokens is not None:
        same = sum(a == b for a, b in zip(entry.tokens, first.tokens, strict=True))
    return {
        **{name: getattr(setup, name) for name in _SHAPE},
        "cuda_graphs": setup.cuda_graphs,
        "prompt_tokens": sum(map(len, ids)),
        "method": entry.name,
        "seconds": f"{seconds:.3f}" if done else "",
        "tokens_per_s": f"{setup.requests * setup.new_tokens / seconds:.1f}" if done else "",
        "peak_mib": "" if entry.peak is None else f"{entry.peak / 2**20:.0f}",
        "same": "" if same is None else same,
        "runs": len(entry.seconds),
        "note": entry.note,
    }


def summary(rows: Sequence[Mapping[str, object]]) -> str:
    """A line a method: new tokens a second, how much faster than the first, peak memory, requests answered alike."""
    first = rows[0]
    head = (
        f"{first['requests']} prompts of {first['prompt_tokens']} tokens together, {first['new_tokens']} new tokens "
        f"each; steps of up to {first['step_tokens']} tokens; {first['gpu']}, {first['dtype']}"
    )
    body = []
    for row in rows:
        speed, base = str(row["tokens_per_s"]), str(first["tokens_per_s"])
        body.append([
            str(row["method"]), speed or str(row["note"])[:60],
            f"{float(speed) / float(base):.2f}x" if speed and base else "-",
            mib(int(str(row["peak_mib"])) << 20) if row["peak_mib"] else "-",
            f"{row['same']} of {row['requests']}" if row["same"] != "" else "-",
        ])  # fmt: skip
    name = f"as {first['method']}"
    return f"{head}\n\n" + table(["attention", "new tokens/s", "speed-up", "peak memory growth", name], body)
