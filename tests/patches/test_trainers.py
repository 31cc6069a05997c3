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
from hf_flashmask.patches import whole_groups
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
        {"label_smoothing": 0.1},
        {"f_divergence_type": "js_divergence"},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "alpha_divergence"},
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

    stock = run("sdpa", {})
    with patches.enabled():
        ours = run("flashmask", {"padding_free": True})
        resumed = run("flashmask", {"padding_free": True}, resume_from_checkpoint=f"{tmp_path}/flashmask/checkpoint-2")
    for losses, gradients, metrics, trainer in (ours, resumed):
        assert len(trainer.shared_prompts) == 2
        assert_shared(trainer.shared_prompts)
        # The state that a checkpoint brings has the log of the steps before it; the summary at the end is of the rest.
        # TRL counts its tokens anew after a checkpoint.
        curves = [[{k: v for k, v in log.items() if k != "num_tokens"} for log in m[:4]] for m in (metrics, stock[2])]
        assert_same((losses[-2:], gradients[-2:], curves[0]), (stock[0][-2:], stock[1][-2:], curves[1]))
        assert len(metrics) == 5
        same_parameters(trainer.model, stock[-1].model)
    assert len(ours[0]) == len(stock[0]) == 4
    assert len(resumed[0]) == 2
    assert_same(ours[:3], stock[:3])


@pytest.mark.parametrize(("pairs", "options"), [(1, {}), (2, {}), (2, {"peft": True, "gradient_checkpointing": True})])
def test_reward(pairs, options, tokenizer, tmp_path):
    """Two answers a question with a margin, which TRL hands to the model too, and four as two pairs."""
    rows = preferences(pairs=pairs).map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
    )
    rows = rows.remove_columns("prompt")
    if pairs == 1:
        rows = rows.add_column("margin", [0.1 * i for i in range(len(rows))])
    base = tiny("llama", "sdpa").config
    options = dict(options)
    adapter = peft.LoraConfig(r=4, task_type="SEQ_CLS") if options.pop("peft", False) else None

    def run(implementation, flag):
        config = LlamaConfig(**{**copy.deepcopy(base).to_dict(), "num_labels": 1})
        config._attn_implementation = implementation
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        arguments = RewardConfig(
            str(tmp_path),
            **{**TRAINING, **flag, "per_device_train_batch_size": 4, **options},
            train_sampling_strategy="sequential",
        )
        torch.manual_seed(0)
        trainer = RewardTrainer(
            model, args=arguments, train_dataset=rows, processing_class=tokenizer, peft_config=adapter
        )
        return *train(trainer), trainer

    trainer, _ = both(run)
    (handle,) = trainer.shared_prompts
    assert handle.merged_tokens < (0.75 if pairs == 1 else 0.55) * handle.rows_tokens


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precompute_ref_log_probs": True},
        {"peft": True, "gradient_checkpointing": True},
        {"loss_type": "apo_zero_unpaired"},
    ],
    ids=str,
)
def test_kto(options, tokenizer, tmp_path):
    options = dict(options)
    adapter = lora() if options.pop("peft", False) else None
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in preferences()
        for side in ("chosen", "rejected")
    ]

    def run(implementation, flag):
        arguments = KTOConfig(str(tmp_path), **{**TRAINING, **flag, "per_device_train_batch_size": 6, **options})
        own_reference = adapter is None and "precompute_ref_log_probs" not in options
        torch.manual_seed(0)
        trainer = KTOTrainer(
            tiny("llama", implementation), tiny("llama", implementation, 1) if own_reference else None, arguments,
            train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter,
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


GROUPS = {"grpo": (GRPOConfig, FixedGRPO), "rloo": (RLOOConfig, FixedRLOO)}


def group_trainer(trainer_type, implementation, given, adapter, tokenizer, folder):
    """GRPO or RLOO of the model in ``folder / "model"`` on eight prompts."""
    config_class, trainer_class = GROUPS[trainer_type]
    arguments = config_class(
        str(folder / "out"), max_completion_length=8, model_init_kwargs={"attn_implementation": implementation},
        **{**TRAINING, **given},
    )  # fmt: skip
    torch.manual_seed(0)
    return trainer_class(
        str(folder / "model"), reward_funcs=lengths, args=arguments, processing_class=tokenizer, peft_config=adapter,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in preferences(8)]),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("trainer_type", "model_type", "options"),
    [
        ("grpo", "llama", {}),
        ("grpo", "qwen3", {"beta": 0.1, "loss_type": "bnpo"}),
        ("grpo", "gpt2", {"loss_type": "dr_grpo", "epsilon_high": 0.3, "importance_sampling_level": "sequence"}),
        ("grpo", "llama", {"peft": True, "beta": 0.1, "top_entropy_quantile": 0.5}),
        ("rloo", "llama", {"beta": 0.1}),
        ("rloo", "qwen3", {"peft": True, "beta": 0.1}),
        ("rloo", "gpt2", {"beta": 0.1, "normalize_advantages": True}),
    ],
    ids=str,
)
def test_one_loss_of_groups(trainer_type, model_type, options, tokenizer, tmp_path):
    """Loss, gradients, metrics and log-probabilities of the same completions, away from the policy that made them."""
    options = dict(options)
    adapter = lora(init_lora_weights=False) if options.pop("peft", False) else None
    tiny(model_type, "sdpa").save_pretrained(tmp_path / "model")

    def run(implementation, flag):
        given = {"num_generations": 4, "disable_dropout": True, "per_device_train_batch_size": 16, **flag, **options}
        trainer = group_trainer(trainer_type, implementation, given, adapter, tokenizer, tmp_path)
        passes, compute = [], trainer._get_per_token_logps_and_entropies

        def recorded(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
            results = compute(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            real = attention_mask[:, -logits_to_keep:].bool()
            passes.append([t.detach()[real] for t in results[:2] if t is not None])
            return results

        trainer._get_per_token_logps_and_entropies = recorded
        trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it
        model = trainer.model.train()
        inputs = trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad():
            ids, mask = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask"))
            sampled = compute(model, ids, mask, inputs["completion_ids"].shape[1])[0]
            # As if the completions were of another policy, so that ratios are clipped here and there.
            noise = torch.randn(sampled.shape, generator=torch.Generator().manual_seed(0))
            inputs["old_per_token_logps"] = sampled + 0.3 * noise
        if trainer_type == "rloo":
            inputs["old_logps"] = (inputs.pop("old_per_token_logps") * inputs["completion_mask"]).sum(1)
        loss = trainer.compute_loss(model, inputs)
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if "time" not in name}
        return [loss.detach()], [gradients], [metrics], passes, trainer

    stock = run("sdpa", {})
    with patches.enabled():
        ours = run("flashmask", {"padding_free": True})
    assert_shared(ours[-1].shared_prompts)
    assert float(stock[0][0]) != 0
    assert_same(ours[:3], stock[:3])
    assert len(ours[3]) == len(stock[3]) > 0
    for got, wanted in zip(ours[3], stock[3], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("trainer_type", "options"),
    [
        ("grpo", {}),
        ("grpo", {"beta": 0.1, "num_iterations": 2}),
        ("grpo", {"loss_type": "grpo", "gradient_accumulation_steps": 2}),
        ("grpo", {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}),
        ("grpo", {"peft": True, "beta": 0.1, "gradient_checkpointing": True}),
        ("rloo", {"beta": 0.1}),
        ("rloo", {"peft": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_groups_of_completions(trainer_type, options, tokenizer, tmp_path):
    """Gradients of optimizer steps that span a generation batch do not depend on its shuffle; single losses do."""
    options = dict(options)
    adapter = lora() if options.pop("peft", False) else None
    tiny("llama", "sdpa").save_pretrained(tmp_path / "model")

    def run(implementation, flag):
        given = {"num_generations": 8, "per_device_train_batch_size": 8, **flag, **options}
        trainer = group_trainer(trainer_type, implementation, given, adapter, tokenizer, tmp_path)
        losses, gradients, metrics = train(trainer)
        # Of the last micro-batch, or of extremes within one: they depend on who is in it.
        own = ("loss", "clip_ratio", "entropy", "kl")
        metrics = [{k: v for k, v in log.items() if not any(o in k for o in own)} for log in metrics]
        return losses, gradients, metrics, trainer

    ours, _ = both(run, losses=False)
    per_device = options.get("per_device_train_batch_size", 8)
    assert all(h.merged_tokens < (0.6 if per_device == 8 else 0.75) * h.rows_tokens for h in ours.shared_prompts)


@pytest.mark.parametrize(
    "options", [{"loss_type": "bnpo"}, {"top_entropy_quantile": 0.3}, {"entropy_coef": 0.1}], ids=str
)
def test_losses_of_micro_batch_statistics_keep_their_micro_batches(options, tokenizer, tmp_path, monkeypatch):
    """Every loss is that of stock, so each micro-batch has the same rows."""
    whole_groups.logger.warning_once.cache_clear()
    said = []
    monkeypatch.setattr(whole_groups.logger, "warning", lambda message, *args: said.append(message % args))
    tiny("llama", "sdpa").save_pretrained(tmp_path / "model")

    def run(implementation, flag):
        given = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
        trainer = group_trainer("grpo", implementation, {**given, **flag, **options}, None, tokenizer, tmp_path)
        return *train(trainer), trainer

    both(run, most=1.0)
    (message,) = said
    assert next(iter(options)) in message


@pytest.mark.parametrize("trainer_class", [GRPOTrainer, RLOOTrainer])
def test_continuous_batching_generates_what_it_does_without_sharing(trainer_class, tokenizer, tmp_path):
    tiny("llama", "sdpa").save_pretrained(tmp_path / "model")
    config_class = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[trainer_class]
    seen = []

    def reward(completion_ids, **_):
        seen[-1].append(completion_ids)
        return [float(len(ids) % 5) for ids in completion_ids]

    with patches.enabled():
        for flag in (False, True):
            arguments = config_class(
                str(tmp_path / "out"), max_completion_length=6, model_init_kwargs={"attn_implementation": "flashmask"},
                padding_free=flag, use_transformers_continuous_batching=True,
                **{**TRAINING, "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 1},
            )  # fmt: skip
            trainer = trainer_class(
                str(tmp_path / "model"), reward_funcs=reward, args=arguments, processing_class=tokenizer,
                train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in preferences(8)]),
            )  # fmt: skip
            seen.append([])
            torch.manual_seed(0)
            trainer.train()
    assert seen[0] == seen[1]
    assert any(seen[0][0])
    assert_shared(trainer.shared_prompts)
