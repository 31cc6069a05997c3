"""TRL's stock trainers with padding_free=True against themselves over sdpa without patches."""

import copy
import random

import pytest
import torch

from tests.huggingface.models import tiny

pytest.importorskip("trl")
pytest.importorskip("peft")
import peft
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from hf_flashmask import patches
from tests.trl_runs import (
    QUIET,
    assert_same,
    assert_shared,
    preferences,
    same_parameters,
    train,
    words_tokenizer,
)

# Gradients as they are, and steps that do not blow up rounding.
TRAINING = {
    **QUIET, "max_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.0, "optim": "sgd",
    "learning_rate": 0.05, "logging_steps": 1, "save_strategy": "no",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


def lora(**options):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


def both(run, most=0.85, losses=True):
    """The same run without patches over sdpa and with the flag over flashmask, of at most this share of tokens."""
    stock = run("sdpa", {})
    with patches.enabled():
        ours = run("flashmask", {"padding_free": True})
    assert_shared(ours[-1].shared_prompts, most)
    assert ours[-1].args.padding_free is True
    assert_same(ours, stock, losses)
    same_parameters(ours[-1].model, stock[-1].model)
    return ours[-1], stock[-1]


def dpo(implementation, flag, tokenizer, folder, options, model_type="llama", peft_config=None):
    model = tiny(model_type, implementation)
    reference = None if peft_config or options.get("precompute_ref_log_probs") else tiny(model_type, implementation, 1)
    trainer = DPOTrainer(
        model=model, ref_model=reference, processing_class=tokenizer, train_dataset=preferences(),
        args=DPOConfig(str(folder), **{**TRAINING, **flag, **options}), peft_config=peft_config,
    )  # fmt: skip
    return *train(trainer), trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["ipo"]},
        {"loss_type": ["hinge"]},
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
        {"ld_alpha": 0.5},
        {"use_weighting": True},
        {"f_divergence_type": "js_divergence"},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": True},
        {"max_length": 16},
        {"max_length": 16, "truncation_mode": "keep_end"},
    ],
    ids=str,
)
def test_dpo(options, tokenizer, tmp_path):
    # Answers of different lengths leave different ends of a prompt, which have nothing in common.
    most = 1.01 if options.get("truncation_mode") == "keep_end" else 0.85
    trainer, _ = both(lambda *how: dpo(*how, tokenizer, tmp_path, options), most)
    assert len(trainer.shared_prompts) == (1 if options.get("precompute_ref_log_probs") else 2)


@pytest.mark.parametrize("model_type", ["qwen3", "gpt2"])
def test_dpo_of_other_models(model_type, tokenizer, tmp_path):
    both(lambda *how: dpo(*how, tokenizer, tmp_path, {}, model_type))


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}], ids=str)
def test_dpo_with_the_adapter_off_as_reference(options, tokenizer, tmp_path):
    both(lambda *how: dpo(*how, tokenizer, tmp_path, options, peft_config=lora()))


def test_dpo_with_an_adapter_that_was_there(tokenizer, tmp_path):
    """TRL copies it to an adapter named "ref"."""

    def run(implementation, flag):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny("llama", implementation), lora(init_lora_weights=False))
        arguments = DPOConfig(str(tmp_path), **TRAINING, **flag)
        trainer = DPOTrainer(model, args=arguments, processing_class=tokenizer, train_dataset=preferences())
        assert "ref" in model.peft_config
        return *train(trainer), trainer

    both(run)


def test_dpo_of_models_that_the_trainer_makes_resumed(tokenizer, tmp_path):
    tiny("llama", "sdpa").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def run(implementation, flag, steps=4, **options):
        arguments = DPOConfig(
            str(tmp_path / implementation), model_init_kwargs={"attn_implementation": implementation},
            **{**TRAINING, **flag, "max_steps": steps, "save_strategy": "steps", "save_steps": 2,
               "lr_scheduler_type": "constant"},
        )  # fmt: skip
        trainer = DPOTrainer(str(tmp_path / "model"), args=arguments, train_dataset=preferences(8))
        return *train(trainer, **options), trainer

    ours, _ = both(run)
    assert len(ours.shared_prompts) == 2
    with patches.enabled():
        resumed = run("flashmask", {"padding_free": True}, resume_from_checkpoint=f"{tmp_path}/flashmask/checkpoint-2")
    assert_shared(resumed[-1].shared_prompts)
    same_parameters(resumed[-1].model, ours.model)


@pytest.mark.parametrize("pairs", [1, 2])
def test_reward(pairs, tokenizer, tmp_path):
    """Two answers a question, and four as two pairs."""
    rows = preferences(pairs=pairs).map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    )
    rows = rows.remove_columns("prompt")
    base = tiny("llama", "sdpa").config

    def run(implementation, flag):
        config = LlamaConfig(**{**copy.deepcopy(base).to_dict(), "num_labels": 1})
        config._attn_implementation = implementation
        torch.manual_seed(0)
        arguments = RewardConfig(
            str(tmp_path),
            **{**TRAINING, **flag, "per_device_train_batch_size": 4},
            train_sampling_strategy="sequential",
        )
        trainer = RewardTrainer(
            LlamaForSequenceClassification(config), args=arguments, train_dataset=rows, processing_class=tokenizer
        )
        return *train(trainer), trainer

    trainer, _ = both(run)
    (handle,) = trainer.shared_prompts
    assert handle.merged_tokens < (0.75 if pairs == 1 else 0.55) * handle.rows_tokens


@pytest.mark.parametrize("precompute", [False, True])
def test_kto(precompute, tokenizer, tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in preferences()
        for side in ("chosen", "rejected")
    ]

    def run(implementation, flag):
        arguments = KTOConfig(
            str(tmp_path), precompute_ref_log_probs=precompute,
            **{**TRAINING, **flag, "per_device_train_batch_size": 6},
        )  # fmt: skip
        trainer = KTOTrainer(
            tiny("llama", implementation), None if precompute else tiny("llama", implementation, 1), arguments,
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        )  # fmt: skip
        return *train(trainer), trainer

    # Rows of the KL estimate, a forward of their own, have other answers beside each prompt.
    both(run, most=0.95)


def fixed_completions(prompt_ids):
    """Answers of 2 to 8 tokens that depend on the prompt and their place in the batch alone."""
    rng = random.Random(str(prompt_ids))
    return [[rng.randrange(4, 94) for _ in range(rng.randrange(2, 9))] for _ in prompt_ids]


class FixedGRPO(GRPOTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        return fixed_completions(prompt_ids), None


class FixedRLOO(RLOOTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
        return fixed_completions(prompt_ids)


def lengths(completions, **_):
    return [float(len(text.split()) % 5) for text in completions]


@pytest.mark.parametrize(
    ("trainer_type", "options"),
    [
        ("grpo", {}),
        ("grpo", {"beta": 0.1, "num_iterations": 2}),
        ("grpo", {"loss_type": "grpo", "gradient_accumulation_steps": 2}),
        ("grpo", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
        ("grpo", {"peft": True, "beta": 0.1, "gradient_checkpointing": True}),
        ("rloo", {"beta": 0.1}),
        ("rloo", {"gradient_accumulation_steps": 2}),
    ],
    ids=str,
)
def test_groups_of_completions(trainer_type, options, tokenizer, tmp_path):
    """Gradients of optimizer steps that span a generation batch do not depend on its shuffle; single losses do."""
    options = dict(options)
    adapter = lora() if options.pop("peft", False) else None
    config_class, trainer_class = {"grpo": (GRPOConfig, FixedGRPO), "rloo": (RLOOConfig, FixedRLOO)}[trainer_type]
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in preferences(8)])
    tiny("llama", "sdpa").save_pretrained(tmp_path / "model")

    def run(implementation, flag):
        arguments = config_class(
            str(tmp_path / "out"), num_generations=8, max_completion_length=8,
            model_init_kwargs={"attn_implementation": implementation},
            **{**TRAINING, "per_device_train_batch_size": 8, **flag, **options},
        )  # fmt: skip
        torch.manual_seed(0)
        trainer = trainer_class(
            str(tmp_path / "model"), reward_funcs=lengths, args=arguments, train_dataset=prompts,
            processing_class=tokenizer, peft_config=adapter,
        )  # fmt: skip
        losses, gradients, metrics = train(trainer)
        # Of the last micro-batch, or of extremes within one: they depend on who is in it.
        own = ("loss", "clip_ratio", "entropy", "kl")
        metrics = [{k: v for k, v in log.items() if not any(o in k for o in own)} for log in metrics]
        return losses, gradients, metrics, trainer

    ours, _ = both(run, losses=False)
    per_device = options.get("per_device_train_batch_size", 8)
    assert all(h.merged_tokens < (0.6 if per_device == 8 else 0.75) * h.rows_tokens for h in ours.shared_prompts)
