"""``flashmask demo``: packed SFT on real text, checked against the same documents run one by one.

A byte-pair tokenizer and a small Llama are trained from scratch on GSM8K problems that ship with the package, with
TRL's stock SFTTrainer. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_flashmask import masks

from .measure import PeakMemory, in_fresh_process, mib, table


@dataclass(frozen=True)
class Setup:
    row_len: int = 4096
    steps: int = 16
    sdpa_steps: int = 4
    vocab_size: int = 2048
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    threads: int = 2


@dataclass(frozen=True)
class Result:
    losses: tuple[float, ...]
    seconds: tuple[float, ...]  # per step
    peak_growth: int | None
    position_ids: tuple[int, ...]  # of the first row
    device: str


# How each run computes attention: (attn_implementation, whether documents are run one by one).
FLASHMASK, ONE_BY_ONE, DENSE = ("flashmask", False), ("eager", True), ("sdpa", False)


def texts() -> list[str]:
    """GSM8K problems with their solutions (MIT licence, beside the data)."""
    return [f"Question: {item['question']}\nAnswer: {item['answer']}" for item in _items("gsm8k_extract.jsonl")]


def preferences() -> list[dict[str, str]]:
    """GSM8K problems with a right and a wrong solution each, as DPO's prompt, chosen and rejected.

    The solutions are those that GSM8K's authors sampled from their models and rated
    (``example_model_solutions.jsonl``; MIT licence, beside the data); of each problem the first right and wrong one.
    The first 160 problems with both whose question has at least three quarters of the longer solution's characters,
    and at most 560 together with it.
    """
    return [
        {
            "prompt": f"Question: {item['question']}\nAnswer:",
            "chosen": f" {item['chosen']}",
            "rejected": f" {item['rejected']}",
        }
        for item in _items("gsm8k_pairs.jsonl")
    ]


def _items(name: str) -> list[dict[str, str]]:
    path = resources.files("hf_flashmask") / "data" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_tokenizer(corpus: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[1])


def run(attention: tuple[str, bool], steps: int, setup: Setup) -> Result:
    """One SFT run. Same seed, same data order, same trainer; only the attention differs."""
    # TRL asks for these before it is imported.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    import transformers
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(setup.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of TRL's own use of Transformers
    transformers.logging.set_verbosity_error()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    implementation, one_by_one = attention
    corpus = texts()
    tokenizer = train_tokenizer(corpus, setup.vocab_size)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=setup.hidden_size,
        intermediate_size=setup.hidden_size * 8 // 3 // 16 * 16,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.kv_heads,
        max_position_embeddings=setup.row_len,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=implementation, dtype=torch.float32)
    if one_by_one:
        _run_documents_one_by_one(model.model)
    first_row: list[Tensor] = []
    seconds: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.begin)

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_length=setup.row_len,
                packing=True,
                per_device_train_batch_size=1,
                max_steps=steps,
                # The learning-rate schedule must not depend on how many steps this run takes.
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=4,
                learning_rate=1.5e-3,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                disable_tqdm=False,
                bf16=False,
                gradient_checkpointing=False,
                dataloader_pin_memory=False,
                seed=0,
            ),
            train_dataset=Dataset.from_list([{"text": text} for text in corpus]),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        inner = model.model.forward

        def remember_first_row(*args: Any, **kwargs: Any) -> Any:
            if not first_row:
                first_row.append(kwargs["position_ids"][0].cpu())
            return inner(*args, **kwargs)

        model.model.forward = remember_first_row
        # The progress bar goes to standard error; the trainer's log lines are in the table below.
        with PeakMemory() as memory, open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
            trainer.train()
        losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return Result(losses, tuple(seconds), memory.growth, tuple(first_row[0].tolist()), str(model.device))


def _run_documents_one_by_one(backbone: Any) -> None:
    """Cut every packed row at its documents and run each alone, so that no mask is needed to keep them apart."""
    inner = backbone.forward

    def forward(input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        starts = (position_ids[0] == 0).nonzero()[:, 0].tolist()
        ends = [*starts[1:], input_ids.shape[1]]
        kwargs = {"use_cache": False, "output_hidden_states": kwargs.get("output_hidden_states")}
        parts = [
            inner(input_ids=input_ids[:, a:b], position_ids=position_ids[:, a:b], **kwargs)
            for a, b in zip(starts, ends, strict=True)
        ]
        out = parts[0]
        out.last_hidden_state = torch.cat([part.last_hidden_state for part in parts], 1)
        return out

    backbone.forward = forward


def report(results: dict[tuple[str, bool], Result], setup: Setup) -> str:
    ours, alone, dense = results[FLASHMASK], results[ONE_BY_ONE], results[DENSE]
    gaps = [abs(a - b) for a, b in zip(ours.losses, alone.losses, strict=True)]
    shown = sorted(
        {0, 1, 2, *range(3, setup.steps, max(1, setup.steps // 6)), setup.steps - 1} & set(range(setup.steps))
    )
    steps = [
        (str(i + 1), f"{ours.losses[i]:.6f}", f"{alone.losses[i]:.6f}", f"{gaps[i]:.1e}") for i in shown
    ]  # fmt: skip

    def speed(result: Result) -> float:
        return setup.row_len / statistics.median(result.seconds[1:] or result.seconds)

    costs = [
        (name, f"{speed(r):,.0f}", f"{speed(r) / speed(dense):.2f}x", mib(r.peak_growth))
        for name, r in (("flashmask", ours), ("sdpa, dense block mask", dense))
    ]
    n_documents = sum(p == 0 for p in ours.position_ids)
    return "\n".join(
        (
            f"Packed SFT on GSM8K: rows of {setup.row_len} tokens, {n_documents} documents in the first; "
            f"Llama of {setup.layers} layers x {setup.hidden_size}, float32, {ours.device}",
            f"torch {torch.__version__}, "
            + ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("transformers", "trl")),
            "",
            table(("step", "flashmask, packed", "eager, one by one", "difference"), steps),
            f"largest difference over {setup.steps} steps: {max(gaps):.1e}",
            "",
            table(("attention", "tokens/s", "speed-up", "peak memory growth"), costs),
        )
    )


def draw(results: dict[tuple[str, bool], Result], path: Path) -> None:
    """The first row's mask and the loss curves, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 5.2), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    mask = masks.causal_document(position_ids=torch.tensor(results[FLASHMASK].position_ids))
    mask.plot(title="Mask of the first packed row", ax=left)
    for key, label, style in (
        (ONE_BY_ONE, "documents one by one, eager", {"linewidth": 5, "alpha": 0.35, "color": "#f2a65a"}),
        (FLASHMASK, "packed, flashmask", {"linewidth": 1.6, "color": "#2f6690"}),
    ):
        losses = results[key].losses
        right.plot(range(1, len(losses) + 1), losses, label=label, **style)
    right.set_xlabel("step")
    right.set_ylabel("training loss")
    right.set_title("Same documents, same loss", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def demo(path: Path, setup: Setup) -> str:
    """Run all three trainings in fresh processes, write the picture, return the tables."""
    plan = (
        (FLASHMASK, setup.steps, "flashmask, packed"),
        (ONE_BY_ONE, setup.steps, "the same documents one by one, eager"),
        (DENSE, min(setup.steps, setup.sdpa_steps), "sdpa with the dense block mask, packed"),
    )
    results = {}
    for key, steps, title in plan:
        print(f"{title}: {steps} steps", flush=True)
        results[key] = in_fresh_process(run, key, steps, setup)
    draw(results, path)
    return report(results, setup)
