"""share_prompts by hand under TRL's stock code; tests/patches has the trainers with padding_free=True."""

import contextlib

import pytest
import torch

from hf_flashmask import share_prompts
from tests.huggingface.models import tiny

pytest.importorskip("trl")
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tests.prefix_sharing.trainers import dpo_trainer
from tests.trl_runs import assert_same, assert_shared, preferences, step, words_tokenizer


def test_dpo(tmp_path):
    def run(implementation, share):
        model, reference = (tiny("llama", implementation, seed=seed) for seed in (0, 1))
        trainer, handles = dpo_trainer(model, reference, preferences(), words_tokenizer(), tmp_path, share=share)
        result = step(trainer, model)
        if share:
            assert_shared(handles)
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
