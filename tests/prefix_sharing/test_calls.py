"""Arguments, adapters and settings that a call of a sharing model comes with: kept exactly, or refused by name."""

import inspect

import pytest
import torch
from transformers import DynamicCache, MllamaForCausalLM
from transformers.integrations.neftune import activate_neftune
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from hf_flashmask import share_prompts
from tests.huggingface.models import pair, tiny
from tests.prefix_sharing.test_share import groups


def test_a_given_cache_is_of_rows():
    eager, ours = pair("llama")
    ids, _ = groups("right", prompts=(9, 9), answers=(4, 4))
    # What Transformers 5.24 calls it, and before; 5.24 takes both.
    names = (
        {"cache", "past_key_values"} if "cache" in inspect.signature(ours.forward).parameters else {"past_key_values"}
    )
    with share_prompts(ours) as shared:
        for name in names:
            results = []
            for model in (ours, eager):
                cache = DynamicCache(config=model.config)
                model(ids, **{name: cache})
                assert cache.get_seq_length() == ids.shape[1]
                results.append(model(ids[:, :1], **{name: cache}).logits)
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        assert shared.merged_tokens == 0


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_tuples_of_hidden_states(model_type):
    eager, ours = pair(model_type)
    ids, mask = groups("right")
    options = {"attention_mask": mask, "use_cache": False, "output_hidden_states": True, "return_dict": False}
    wanted = eager.base_model(ids, **options)
    with share_prompts(ours):
        got = ours.base_model(ids, **options)
    assert len(got) == len(wanted)
    for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=1e-4, atol=1e-5)


ROPES = {
    "dynamic": ("mistral", {"factor": 2.0}, {"max_position_embeddings": 22}),
    "longrope": (
        "phi3", {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}, {"original_max_position_embeddings": 22}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("explicit", [False, True])
def test_rope_that_looks_at_the_padding_too(kind, window, explicit):
    """Frequencies change at 22 tokens: rows have up to 17, and with their padding 27."""
    model_type, rope, options = ROPES[kind]
    rope = {**rope, "rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 22}
    eager, ours = pair(model_type, rope_parameters=rope, sliding_window=window, **options)
    for width in (0, 10, 0):
        ids, mask = (torch.nn.functional.pad(t, (0, width)) for t in groups("right"))
        positions = {"position_ids": torch.arange(ids.shape[1])[None]} if explicit else {}
        wanted = eager(ids, attention_mask=mask, use_cache=False, **positions).logits
        with share_prompts(ours) as shared:
            got = ours(ids, attention_mask=mask, use_cache=False, **positions).logits
            assert shared.merged_tokens < 0.6 * shared.rows_tokens
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)


def test_neftune_is_as_large_as_on_rows():
    ours = tiny("llama", "flashmask").train()
    ids, mask = groups("right")
    activate_neftune(ours, 5.0)
    embeddings = ours.get_input_embeddings()
    largest = []

    def measure(module, inputs, output):
        noise = output.detach() - torch.nn.functional.embedding(inputs[0], module.weight.detach())
        largest.append(float(noise.abs().max()))

    embeddings.register_forward_hook(measure)
    with share_prompts(ours) as shared:
        ours(ids, attention_mask=mask, use_cache=False)
        assert shared.merged_tokens > 2 * ids.shape[1]
        bound = 5.0 / (ids.shape[1] * ours.config.hidden_size) ** 0.5
        assert 0.99 * bound < largest[0] <= bound
        assert embeddings.neftune_noise_alpha == 5.0
        ours.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ours(ids, attention_mask=mask, use_cache=False)
        assert embeddings.neftune_noise_alpha == 5.0


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "encoder_hidden_states"])
def test_arguments_that_describe_rows_are_refused(name):
    ours = tiny("llama", "flashmask")
    ids, mask = groups("right")
    with share_prompts(ours), pytest.raises(NotImplementedError, match=f"come with {name}"):
        ours(ids, attention_mask=mask, use_cache=False, **{name: torch.zeros_like(ids)})


def test_another_implementation_set_later_is_refused():
    ours = tiny("llama", "flashmask")
    ids, mask = groups("right")
    with share_prompts(ours):
        ours.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="LlamaModel has attn_implementation='sdpa'.*set_attn_implementation"):
            ours(ids, attention_mask=mask, use_cache=False)
    ours(ids, attention_mask=mask, use_cache=False)


def test_adapters_that_act_by_row_are_refused():
    peft = pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}
    alora = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6], **lora)
    poly = peft.PolyConfig(task_type="CAUSAL_LM", r=4, n_tasks=2, target_modules=["q_proj"])
    for config, message in ((alora, "alora_invocation_tokens"), (poly, "a task for every row")):
        with pytest.raises(NotImplementedError, match=f"adapter 'default' .*{message}"):
            share_prompts(peft.get_peft_model(tiny("llama", "flashmask"), config))
    mixed = tiny("llama", "flashmask")
    mixed.peft_config = {"default": peft.XLoraConfig(hidden_size=64, adapters={"0": "somewhere"})}
    with pytest.raises(NotImplementedError, match="adapter 'default' mixes adapters"):
        share_prompts(mixed)
    ours = peft.get_peft_model(tiny("llama", "flashmask"), peft.LoraConfig(**lora)).eval()
    ids, mask = groups("right")
    with share_prompts(ours), pytest.raises(NotImplementedError, match="come with adapter_names"):
        ours(input_ids=ids, attention_mask=mask, use_cache=False, adapter_names=["default", "__base__"] * 3)


def test_models_with_layers_that_attend_to_images_are_refused():
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = MllamaTextConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, cross_attention_layers=[1], pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MllamaForCausalLM._from_config(config, attn_implementation="flashmask")
    for part in (model, model.model):
        with pytest.raises(NotImplementedError, match="attends to images"):
            share_prompts(part)
