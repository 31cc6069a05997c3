"""TRL's stock trainers over models with shared prompts: the same losses, gradients and metrics."""

import contextlib
import copy
import random

import pytest
import torch

from hf_flashmask import share_prompts
from tests.huggingface.models import tiny

pytest.importorskip("trl")
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.prefix_sharing.trainers import dpo_trainer


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>"] + [f"w{i}" for i in range(90)])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def preferences(n=6):
    rng = random.Random(0)

    def words(low, high):
        return "".join(f"w{rng.randrange(90)} " for _ in range(rng.randrange(low, high)))

    rows = [{"prompt": words(6, 20), "chosen": words(2, 9), "rejected": words(2, 9)} for _ in range(n)]
    return Dataset.from_list(rows)


def step(trainer, model):
    """Loss, gradients and metrics of the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def assert_same(ours, stock):
    assert abs(float(ours[0] - stock[0])) <= 1e-6 * max(1.0, abs(float(stock[0])))
    assert ours[1].keys() == stock[1].keys()
    for name, wanted in stock[1].items():
        assert float((ours[1][name] - wanted).norm()) <= 1e-5 * max(1e-2, float(wanted.norm())), name
    assert ours[2].keys() == stock[2].keys()
    for name, wanted in stock[2].items():
        assert ours[2][name] == pytest.approx(wanted, abs=1e-5, rel=1e-5), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["ipo"]},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"gradient_checkpointing": True, "precompute_ref_log_probs": True},
        {"max_length": 16, "use_weighting": True},
    ],
    ids=str,
)
def test_dpo(options, tokenizer, tmp_path):
    def run(implementation, share):
        pair = [tiny("llama", implementation, seed=seed) for seed in (0, 1)]
        trainer, handles = dpo_trainer(*pair, preferences(), tokenizer, tmp_path, share=share, **options)
        result = step(trainer, pair[0])
        for handle in handles:
            assert handle.merged_tokens < 0.8 * handle.rows_tokens
        return result

    assert_same(run("flashmask", True), run("sdpa", False))


def test_reward(tokenizer, tmp_path):
    rows = preferences().map(lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")})
    rows = rows.remove_columns("prompt")
    base = tiny("llama", "sdpa").config

    def run(implementation, share):
        config = LlamaConfig(**{**copy.deepcopy(base).to_dict(), "num_labels": 1})
        config._attn_implementation = implementation
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config)
        handle = share_prompts(model) if share else None
        arguments = RewardConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=4, report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = RewardTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        result = step(trainer, model)
        assert handle is None or handle.merged_tokens < 0.8 * handle.rows_tokens
        return result

    assert_same(run("flashmask", True), run("sdpa", False))


def test_kto(tokenizer, tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in preferences()
        for side in ("chosen", "rejected")
    ]

    def run(implementation, share):
        model, reference = (tiny("llama", implementation, seed=seed) for seed in (0, 1))
        handles = [share_prompts(m) for m in (model, reference)] if share else []
        arguments = KTOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False,
            disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = KTOTrainer(
            model=model, ref_model=reference, args=arguments, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )  # fmt: skip
        result = step(trainer, model)
        assert all(handle.merged_tokens < handle.rows_tokens for handle in handles)
        return result

    assert_same(run("flashmask", True), run("sdpa", False))


def test_grpo_log_probabilities():
    """Groups of completions, prompts padded on the left and completions on the right, as GRPO's trainer has them."""
    completions, prompt_len, group = 10, 12, 4
    generator = torch.Generator().manual_seed(5)
    rows, masks = [], []
    for n in (12, 7):
        prompt = torch.randint(5, 95, (n,), generator=generator)
        for m in (2, 9, 10, 4)[:group]:
            row = torch.cat((prompt, torch.randint(5, 95, (m,), generator=generator)))
            padding = (prompt_len - n, completions - m)
            rows.append(torch.nn.functional.pad(row, padding))
            masks.append(torch.nn.functional.pad(torch.ones_like(row), padding))
    rows, masks = torch.stack(rows), torch.stack(masks)

    class Trainer:
        """What the method reads of its trainer."""

        args = type("Arguments", (), {"report_to": []})
        accelerator = type(
            "Accelerator", (), {"is_main_process": False, "autocast": staticmethod(contextlib.nullcontext)}
        )

    def run(implementation, share):
        model = tiny("llama", implementation)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        handle = share_prompts(model) if share else None
        compute = GRPOTrainer._get_per_token_logps_and_entropies
        log_probs, entropies, _ = compute(Trainer(), model, rows, masks, completions, compute_entropy=True)
        kept = masks[:, prompt_len:].bool()
        (log_probs[kept].sum() + entropies[kept].sum()).backward()
        assert handle is None or handle.merged_tokens == 12 + 7 + 2 * (2 + 9 + 10 + 4)
        grads = {name: p.grad for name, p in model.named_parameters()}
        return log_probs.detach()[kept], entropies.detach()[kept], grads

    ours, stock = run("flashmask", True), run("sdpa", False)
    for a, b in zip(ours[:2], stock[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for name, wanted in stock[2].items():
        assert float((ours[2][name] - wanted).norm()) <= 1e-5 * max(1e-2, float(wanted.norm())), name
