"""``flashmask bench trainers``: TRL's stock trainers on GSM8K, flashmask against dense attention, curve on curve.

Packed SFT of all weights and of LoRA adapters, DPO, and a reward model: each once with sdpa, as TRL ships it, and twice
with flashmask, where DPO and the reward model share their prompts. The model is small and random, in float32; the texts
ship with the package. flashmask's two runs must agree in every bit.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .convergence import AGAIN, OURS, SDPA, SEED, Run, gap, hashes, reproducible
from .demo import preferences, texts, train_tokenizer
from .measure import table
from .records import ENVIRONMENT, Log, Refusal, check_device, check_known, environment

METHODS = (SDPA, OURS, AGAIN)
VOCAB_SIZE = 1024
ROW_LEN = 512
WARM_UP = 4
# The reward model is unstable at 1e-3: there eager and sdpa part as well, by 2e-2 within 35 steps.
LEARNING_RATES = {"sft": 1e-3, "lora": 1e-3, "dpo": 1e-3, "reward": 3e-4}
_SHAPE = ("layers", "hidden", "heads", "steps", "batch_size")
COLUMNS = (*ENVIRONMENT, "transformers", "trl", "task", *_SHAPE, "lr", "method", "step", "loss", "checksum")


@dataclass(frozen=True)
class Setup:
    tasks: tuple[str, ...] = ("sft", "lora", "dpo", "reward")
    layers: int = 3
    hidden: int = 128
    heads: int = 4
    steps: int = 60
    batch_size: int = 4  # rows of SFT, pairs of DPO and the reward model
    lr: float | None = None  # that of LEARNING_RATES
    device: str = "cpu"
    out: Path = Path("trainers.csv")
    plot: Path | None = None
    time_budget: float | None = None  # seconds
    commit: str | None = None
    command: str = ""

    def __post_init__(self) -> None:
        check_known("tasks", self.tasks, TASKS)
        if self.hidden % (2 * self.heads):
            raise Refusal(f"hidden must be an even multiple of the {self.heads} heads, got {self.hidden}")
        check_device(self.device)


def run(setup: Setup) -> str:
    """Every task with every method, losses written as each is done; the table."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")
    import transformers
    import trl
    from datasets.utils.logging import disable_progress_bar

    transformers.logging.set_verbosity_error()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    begin = time.perf_counter()
    log = Log(setup.out, COLUMNS)
    origin: dict[str, object] = dict(environment(setup.device, setup.command, setup.commit))
    origin |= {"transformers": transformers.__version__, "trl": trl.__version__}
    origin |= {name: getattr(setup, name) for name in _SHAPE}
    tokenizer = train_tokenizer(texts(), VOCAB_SIZE)
    done: dict[str, dict[str, Run]] = {}
    left: list[str] = []
    for task in setup.tasks:
        if setup.time_budget is not None and time.perf_counter() - begin > setup.time_budget:
            left.append(task)
            continue
        done[task] = {}
        for method in METHODS:
            print(f"[{time.perf_counter() - begin:.0f} s] {task}, {method}", file=sys.stderr)
            done[task][method] = finished = train(task, method, tokenizer, setup)
            facts = {"task": task, "lr": _learning_rate(task, setup), "method": method, "checksum": finished.checksum()}
            log.append([origin | facts | {"step": i + 1, "loss": f"{x:.9g}"} for i, x in enumerate(finished.losses)])
    if setup.plot is not None and done:
        from . import plots

        plots.plot(setup.out, setup.plot)
    return report(done) + (f"\nout of time; left out: {', '.join(left)}" if left else "")


def _learning_rate(task: str, setup: Setup) -> float:
    return LEARNING_RATES[task] if setup.lr is None else setup.lr


def train(task: str, method: str, tokenizer: Any, setup: Setup) -> Run:
    """One training: the same first weights, rows and optimizer whatever the method."""
    from transformers import PrinterCallback

    from hf_flashmask import patches

    implementation = SDPA if method == SDPA else OURS
    shared = {} if method == SDPA else {"padding_free": True}
    common = {
        "max_steps": setup.steps, "per_device_train_batch_size": setup.batch_size,
        "learning_rate": _learning_rate(task, setup), "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": min(WARM_UP, setup.steps), "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "bf16": False, "use_cpu": setup.device == "cpu",
        "gradient_checkpointing": False, "dataloader_pin_memory": False, "seed": SEED,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # of TRL's own use of Transformers
        stack.enter_context(reproducible(setup.device))
        stack.enter_context(patches.enabled())
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        torch.manual_seed(SEED)
        trainer = TASKS[task](implementation, shared, folder, tokenizer, setup, common)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return Run(losses, hashes(trainer.model), sum(p.numel() for p in trainer.model.parameters()))


def _config(tokenizer: Any, setup: Setup, **options: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=setup.hidden, intermediate_size=setup.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=setup.layers, num_attention_heads=setup.heads, num_key_value_heads=max(1, setup.heads // 2),
        max_position_embeddings=ROW_LEN, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **options,
    )  # fmt: skip


def _model(implementation: str, tokenizer: Any, setup: Setup) -> Any:
    from transformers import LlamaForCausalLM

    torch.manual_seed(SEED)
    config = _config(tokenizer, setup)
    return LlamaForCausalLM._from_config(config, attn_implementation=implementation, dtype=torch.float32)


def _sft(implementation: str, _: Any, folder: str, tokenizer: Any, setup: Setup, common: Any, **options: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    # A batch of one packed row holds as many tokens as several pairs.
    common = common | {"per_device_train_batch_size": 1}
    return SFTTrainer(
        model=_model(implementation, tokenizer, setup),
        args=SFTConfig(folder, packing=True, max_length=ROW_LEN, **common),
        train_dataset=Dataset.from_list([{"text": text} for text in texts()]),
        processing_class=tokenizer,
        **options,
    )


def _lora(implementation: str, shared: Any, folder: str, tokenizer: Any, setup: Setup, common: Any) -> Any:
    from peft import LoraConfig

    # Random weights have no embeddings worth keeping, so those are trained as they are.
    adapter = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["embed_tokens", "lm_head"])
    return _sft(implementation, shared, folder, tokenizer, setup, common, peft_config=adapter)


def _dpo(implementation: str, shared: Any, folder: str, tokenizer: Any, setup: Setup, common: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    return DPOTrainer(
        model=_model(implementation, tokenizer, setup),
        ref_model=_model(implementation, tokenizer, setup),
        args=DPOConfig(folder, max_length=ROW_LEN, **shared, **common),
        train_dataset=Dataset.from_list(preferences()),
        processing_class=tokenizer,
    )


def _reward(implementation: str, shared: Any, folder: str, tokenizer: Any, setup: Setup, common: Any) -> Any:
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    config = _config(tokenizer, setup, num_labels=1)
    return RewardTrainer(
        model=LlamaForSequenceClassification._from_config(
            config, attn_implementation=implementation, dtype=torch.float32
        ),
        args=RewardConfig(folder, max_length=ROW_LEN, **shared, **common),
        train_dataset=Dataset.from_list(preferences()),
        processing_class=tokenizer,
    )


TASKS: Mapping[str, Callable[..., Any]] = {"sft": _sft, "lora": _lora, "dpo": _dpo, "reward": _reward}


def report(done: Mapping[str, Mapping[str, Run]]) -> str:
    """A line a task: first and last loss, how far flashmask is from sdpa at most, whether it repeats its bits."""
    rows: list[Sequence[str]] = []
    for task, runs in done.items():
        ours, again = runs[OURS], runs[AGAIN]
        same = ours.losses == again.losses and ours.hashes == again.hashes
        ends = [f"{run.losses[i]:.6f}" for run in (runs[SDPA], ours) for i in (0, -1)]
        rows.append((task, *ends, f"{gap(ours.losses, runs[SDPA].losses):.1e}", "bit-identical" if same else "DIFFERS"))
    header = ("task", "sdpa, first", "last", "flashmask, first", "last", "largest difference", "flashmask twice")
    return table(header, rows)
