"""Whole models with shared prompts against themselves without: hidden states, losses, every gradient."""

import copy
import functools

import pytest
import torch

from hf_flashmask import share_prompts
from hf_flashmask.prefix_sharing import MergedRows
from tests.huggingface.models import pair, tiny

SHARED = [
    "llama", "qwen2", "qwen3", "gemma", "deepseek_v3", "granite", "qwen3_moe", "stablelm", "gpt_neox", "smollm3",
    "gpt2",
    # Windows of 5 and 6 tokens, shorter than the prompts.
    "mistral", "mixtral", "phi3", "starcoder2", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "cohere2",
]  # fmt: skip


def groups(side, prompts=(11, 7), answers=(3, 6, 1), seed=3):
    """Rows of a prompt and one of its answers, padded on one side or, as GRPO's, prompts left and answers right."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(5, 95, (n,), generator=generator)

    rows, masks = [], []
    widest, longest = max(prompts), max(answers)
    for n in prompts:
        prompt = draw(n)
        for m in answers:
            left, right = {"right": (0, widest - n + longest - m), "left": (widest - n + longest - m, 0)}.get(
                side, (widest - n, longest - m)
            )
            rows.append(torch.nn.functional.pad(torch.cat((prompt, draw(m))), (left, right)))
            masks.append(torch.nn.functional.pad(torch.ones(n + m, dtype=torch.long), (left, right)))
    return torch.stack(rows), torch.stack(masks)


def loss_and_grads(model, ids, mask):
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    targets = ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]).bool(), -100)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return logits.detach(), loss.detach(), dict(zip((n for n, _ in model.named_parameters()), grads, strict=True))


def assert_same(actual, expected, mask):
    torch.testing.assert_close(actual[0][mask.bool()], expected[0][mask.bool()], rtol=1e-4, atol=1e-5)
    assert abs(float(actual[1] - expected[1])) <= 1e-6
    for name, wanted in expected[2].items():
        got = actual[2][name]
        if wanted is None:
            assert got is None, name
        else:
            assert float((got - wanted).norm()) <= 1e-5 * max(1e-2, float(wanted.norm())), name


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("model_type", SHARED)
def test_results_and_gradients(model_type, side):
    eager, ours = pair(model_type)
    ids, mask = groups(side)
    expected = loss_and_grads(eager, ids, mask)
    with share_prompts(ours) as shared:
        assert_same(loss_and_grads(ours, ids, mask), expected, mask)
        assert shared.rows_tokens == int(mask.sum())
        if side == "left":
            # Prompts of one group begin at other columns, so at other positions, and are not the same tokens.
            assert shared.merged_tokens == shared.rows_tokens
        else:
            assert shared.merged_tokens <= 11 + 7 + 2 * (3 + 6 + 1)


def test_rows_without_padding_and_hidden_states():
    eager, ours = pair("llama")
    ids, _ = groups("right", prompts=(9, 9), answers=(4, 4))
    wanted = eager(ids, output_hidden_states=True, use_cache=False)
    with share_prompts(ours) as shared:
        out = ours(ids, output_hidden_states=True)
        assert shared.merged_tokens == 2 * 9 + 4 * 4
    assert out.past_key_values is None
    for a, b in zip(out.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    eager, ours = pair("llama")
    ids, mask = groups("right")
    expected = loss_and_grads(eager, ids, mask)
    ours.train()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.enable_input_require_grads()
    with share_prompts(ours):
        logits = ours(ids, attention_mask=mask, use_cache=False).logits
        targets = ids[:, 1:].masked_fill(~(mask[:, 1:] & mask[:, :-1]).bool(), -100)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    assert_same((logits.detach(), expected[1], grads), expected, mask)


def test_lora():
    peft = pytest.importorskip("peft")

    def adapted(model):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config)

    eager, ours = (adapted(m) for m in pair("llama"))
    ids, mask = groups("right")
    with share_prompts(ours) as shared:
        assert share_prompts(ours.get_base_model()) is shared
        for model in (eager, ours):
            model.logits = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(ours.logits[mask.bool()], eager.logits[mask.bool()], rtol=1e-4, atol=1e-5)
        with ours.disable_adapter(), eager.disable_adapter():
            a, b = (m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (ours, eager))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(a, ours.logits[mask.bool()])
    prompt = peft.get_peft_model(
        tiny("llama", "flashmask"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    with pytest.raises(NotImplementedError, match="learned tokens"):
        share_prompts(prompt)


def test_generation_is_as_before_and_undo_undoes():
    ours = tiny("llama", "flashmask")
    backbone, stock = ours.model, ours.model.forward
    ids, mask = groups("left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = ours.generate(ids, **options)
    keys = list(ours.state_dict())
    shared = share_prompts(ours)
    assert share_prompts(ours) is shared
    assert torch.equal(ours.generate(ids, **options), expected)
    assert list(ours.state_dict()) == keys
    assert shared.merged_tokens == 0
    shared.undo()
    shared.undo()
    assert backbone.forward == stock
    assert share_prompts(ours) is not shared


def test_a_copy_computes_with_its_own_parameters():
    ours = tiny("llama", "flashmask")
    ids, mask = groups("right")
    shared = share_prompts(ours)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    hidden = copied.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert shared.merged_tokens == 0
    own = copied.model._hf_flashmask_shared
    assert own is not shared
    assert own.merged_tokens > 0
    own.undo()
    expected = copied.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert share_prompts(ours) is shared


def test_undo_keeps_what_stood_on_the_instance():
    ours = tiny("llama", "flashmask")
    calls, stock = [], ours.model.forward

    @functools.wraps(stock)
    def hooked(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    ours.model.forward = hooked
    ids, mask = groups("right")
    with share_prompts(ours) as shared:
        ours(ids, attention_mask=mask, use_cache=False)
        assert len(calls) == 1
        assert shared.merged_tokens > 0
    assert ours.model.forward is hooked


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("llama4_text", "chunked_attention"),
        ("opt", "counts positions from the attention mask"),
    ],
)
def test_models_that_are_refused(model_type, message):
    with pytest.raises(NotImplementedError, match=message):
        share_prompts(tiny(model_type, "flashmask"))


def test_calls_that_are_refused():
    with pytest.raises(ValueError, match="attn_implementation='eager'.*set_attn_implementation"):
        share_prompts(tiny("llama", "eager"))
    with pytest.raises(TypeError, match="must be a Transformers model, got str"):
        share_prompts("llama")
    with pytest.raises(NotImplementedError, match="balancing loss"):
        share_prompts(tiny("qwen3_moe", "flashmask", output_router_logits=True))
    ours = tiny("llama", "flashmask")
    ids, _ = groups("right")
    with share_prompts(ours):
        with pytest.raises(NotImplementedError, match="instead of inputs_embeds"):
            ours(inputs_embeds=torch.zeros(1, 3, 64), use_cache=False)
        with pytest.raises(NotImplementedError, match=r"attention_mask must be \[N, L\]"):
            ours(ids, attention_mask=torch.ones(6, 1, 17, 17), use_cache=False)
        with pytest.raises(NotImplementedError, match="packed already"):
            ours(ids, position_ids=torch.arange(17).remainder(9).expand(6, 17), use_cache=False)


def test_verify(monkeypatch):
    ids, mask = groups("right")
    # The second has dropout, which falls differently on merged rows and must not count.
    for model_type, options in (("llama", {}), ("gpt2", {"attn_pdrop": 0.0, "resid_pdrop": 0.3})):
        ours = tiny(model_type, "flashmask", **options).train()
        with share_prompts(ours, verify="first") as shared:
            ours(ids, attention_mask=mask, use_cache=False)
            tokens_once = shared.merged_tokens
            assert tokens_once > 0
            assert all(module.training for module in ours.modules())
            assert all(p.grad is None for p in ours.parameters())
            with torch.no_grad():
                ours(ids, attention_mask=mask, use_cache=False)
            assert shared.merged_tokens == 2 * tokens_once
    restore = MergedRows.restore
    monkeypatch.setattr(MergedRows, "restore", lambda rows, hidden: restore(rows, hidden.roll(1, 1)))
    with share_prompts(tiny("llama", "flashmask"), verify="first"):
        pass
    ours = tiny("llama", "flashmask")
    with (
        share_prompts(ours, verify="first"),
        pytest.raises(RuntimeError, match=r"LlamaModel.*in \d+ of \d+ tensors:\n  .*(hidden states|gradient of)"),
    ):
        ours(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match='verify must be "first" or None'):
        share_prompts(ours, verify="always")
