"""TRL's trainers in two processes: padding_free=True over flashmask against stock over sdpa."""

import pytest

pytest.importorskip("trl")
pytest.importorskip("peft")
from datasets import Dataset
from trl import GRPOConfig

from hf_flashmask import patches
from tests.huggingface.models import tiny
from tests.patches.test_trainers import TRAINING, FixedGRPO, dpo, fixed_completions, lengths, lora
from tests.trl_runs import assert_same, assert_shared, preferences, same_parameters, train, words_tokenizer

pytestmark = pytest.mark.xdist_group("distributed")


def both(run, losses=True):
    stock = run("sdpa", {})
    with patches.enabled():
        ours = run("flashmask", {"padding_free": True})
    trainer = ours[-1]
    assert trainer.accelerator.num_processes == 2
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    assert_shared(trainer.shared_prompts)
    assert_same(ours, stock, losses)
    same_parameters(trainer.model, stock[-1].model)
    # A data loader's batches differ between processes, or nothing was distributed.
    return [float(loss) for loss in ours[0]]


def dpo_in_two(folder, options, adapter):
    peft_config = lora() if adapter else None
    return both(lambda *how: dpo(*how, words_tokenizer(), folder, options, peft_config=peft_config))


class Fixed(FixedGRPO):
    """Other answers in each process, also to the same prompts."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return fixed_completions([*prompt_ids, self.accelerator.process_index])[:-1], None


def grpo_in_two(folder, options):
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in preferences(8)])

    def run(implementation, flag):
        arguments = GRPOConfig(
            str(folder), num_generations=8, max_completion_length=8, **{**TRAINING, **flag, **options}
        )
        trainer = Fixed(
            tiny("llama", implementation), reward_funcs=lengths, args=arguments, train_dataset=prompts,
            processing_class=words_tokenizer(),
        )  # fmt: skip
        losses, gradients, metrics = train(trainer)
        # Of the last micro-batch, or of extremes within one: they depend on who is in it.
        own = ("loss", "clip_ratio", "entropy", "kl")
        return (
            losses,
            gradients,
            [{k: v for k, v in log.items() if not any(o in k for o in own)} for log in metrics],
            trainer,
        )

    return both(run, losses=False)


@pytest.mark.parametrize(
    ("options", "adapter"),
    [({"gradient_checkpointing": True}, False), ({}, True)],
    ids=str,
)
def test_dpo(options, adapter, processes, tmp_path):
    first, second = processes.run(dpo_in_two, tmp_path, options, adapter)
    assert first != second


@pytest.mark.parametrize(
    "options",
    [
        # Half of a group in each process.
        {"per_device_train_batch_size": 4},
        # Whole groups, each in two micro-batches of one process.
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ],
    ids=str,
)
def test_grpo_keeps_its_gradients(options, processes, tmp_path):
    """An optimizer step spans the generation batch, so its gradient does not depend on who meets whom."""
    first, second = processes.run(grpo_in_two, tmp_path, options)
    assert first != second
