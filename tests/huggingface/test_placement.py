"""Masks on their way through accelerate's hooks, and queries in float32 where a model computes in less."""

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import send_to_device

from hf_flashmask.huggingface import attention
from hf_flashmask.huggingface.masking import flashmask_mask
from hf_flashmask.huggingface.packing import BuiltMask
from hf_flashmask.huggingface.tree_mask import TreeMask, TreeRows
from hf_flashmask.prefix_sharing.merge import merge_rows
from tests.huggingface.models import pair, tiny, tokens

POSITIONS = torch.cat([torch.arange(n) for n in (5, 9, 9)])[None]


def test_masks_move_with_what_accelerate_moves():
    built = flashmask_mask(batch_size=1, q_length=23, kv_length=23)
    rows = merge_rows(tokens(2, 9))
    tree = TreeMask(rows.mask.bounds, causal=True, tree_rows=TreeRows(rows.places, rows.real))
    given = {"attention_mask": {"full_attention": built, "sliding_attention": [tree, tree.within(3)]}, "flag": True}
    moved = send_to_device(given, "meta")["attention_mask"]
    masks = [moved["full_attention"], *moved["sliding_attention"]]
    assert [type(mask) for mask in masks] == [BuiltMask, TreeMask, type(tree.within(3))]
    assert all(mask.device.type == "meta" for mask in masks)
    assert masks[1].tree_rows.places.device.type == masks[2].tree_rows.real.device.type == "meta"
    assert masks[2].window == 3
    # Every layer's hook moves it: one copy, and one plan, for all layers of a device.
    assert built.to("meta") is masks[0]


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt_oss"])
def test_layers_kept_on_a_disk(model_type, tmp_path):
    """Hooks of device_map around every module."""
    eager, ours = pair(model_type)
    ids = tokens(1, 23)
    expected = torch.cat([eager(part, use_cache=False).logits for part in ids.split((5, 9, 9), 1)], 1)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    ours = dispatch_model(ours, places, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
    assert next(ours.model.layers[1].parameters()).device.type == "meta"
    torch.testing.assert_close(ours(ids, position_ids=POSITIONS).logits, expected, rtol=0, atol=1e-5)


class Int8Linear(torch.nn.Linear):
    """Weights in int8 with a scale; computes in bfloat16 and gives back its input's dtype, as k-bit layers do."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = torch.nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), False)

    def forward(self, x):
        weight = self.weight.to(torch.bfloat16) * self.scale
        return torch.nn.functional.linear(x.to(torch.bfloat16), weight).to(x.dtype)


def quantized(implementation):
    """A bfloat16 model with weights of layers in int8 and norms in float32, under LoRA, as QLoRA trains it."""
    peft = pytest.importorskip("peft")
    model = tiny("llama", implementation).to(torch.bfloat16)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, Int8Linear(linear))
    model.model.config._is_quantized = True
    model.model.config.dtype = torch.bfloat16
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )


def seen_dtypes(monkeypatch):
    seen, real = [], attention.attention_of_heads
    monkeypatch.setattr(
        attention,
        "attention_of_heads",
        lambda q, k, v, *a, **o: seen.append((q.dtype, k.dtype, v.dtype)) or real(q, k, v, *a, **o),
    )
    return seen


def test_float32_activations_of_a_quantized_model(monkeypatch):
    seen, said = seen_dtypes(monkeypatch), []
    monkeypatch.setattr(attention.logger, "warning", lambda message, *args: said.append(message % args))
    attention.logger.warning_once.cache_clear()
    ids = tokens(2, 23)
    losses, grads = {}, {}
    for implementation in ("eager", "flashmask"):
        model = quantized(implementation)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses[implementation] = float(loss.detach())
        grads[implementation] = {n: p.grad for n, p in model.named_parameters() if "lora" in n}
    assert seen == [(torch.bfloat16,) * 3] * 4
    assert losses["flashmask"] == pytest.approx(losses["eager"], rel=2e-2)
    for name, expected in grads["eager"].items():
        assert float((grads["flashmask"][name] - expected).norm()) <= 0.1 * float(expected.norm()), name
    assert len(said) == 1
    assert "float32 queries in a model of torch.bfloat16" in said[0]


def test_float32_queries_go_where_the_model_computes(monkeypatch):
    seen = seen_dtypes(monkeypatch)
    ids = tokens(1, 9)
    with torch.no_grad():
        tiny("llama", "flashmask")(ids)
        with torch.autocast("cpu", torch.bfloat16):
            tiny("qwen3", "flashmask")(ids)
        # Norms of queries and keys in float32, values in bfloat16.
        model = tiny("qwen3", "flashmask").to(torch.bfloat16)
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.data = layer.self_attn.q_norm.weight.data.float()
            layer.self_attn.k_norm.weight.data = layer.self_attn.k_norm.weight.data.float()
        assert model(ids).logits.dtype == torch.bfloat16
    kinds = [torch.float32] * 4 + [torch.bfloat16] * 8
    assert seen == [(kind,) * 3 for kind in kinds]
