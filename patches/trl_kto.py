"""TRL's KTOTrainer honours ``padding_free=True``. Completions of one prompt are shared where a batch holds several;
rows of the KL estimate run in a forward of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

from .padding_free import PaddingFree
from .replacing import Replacement

_PATCH = PaddingFree(
    trainer_module="trl.trainer.kto_trainer",
    trainer="KTOTrainer",
    config_module="trl.trainer.kto_config",
    config="KTOConfig",
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
