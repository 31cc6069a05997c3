"""TRL's DPOTrainer honours ``padding_free=True``. The policy, and the reference: given, made by the trainer, or the
policy with its adapter off, precomputed too.
"""

from __future__ import annotations

from collections.abc import Iterator

from .padding_free import PaddingFree
from .replacing import Replacement

_PATCH = PaddingFree(
    trainer_module="trl.trainer.dpo_trainer",
    trainer="DPOTrainer",
    config_module="trl.trainer.dpo_config",
    config="DPOConfig",
    parameters=(
        "self",
        "model",
        "ref_model",
        "args",
        "data_collator",
        "train_dataset",
        "eval_dataset",
        "processing_class",
        "compute_metrics",
        "callbacks",
        "optimizers",
        "quantization_config",
        "peft_config",
    ),
    fused_head=True,
)


def replacements() -> Iterator[Replacement]:
    yield from _PATCH.replacements()
