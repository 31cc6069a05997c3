"""Tiny random models of many families."""

import copy

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_flashmask  # noqa: F401  (registers "flashmask")

COMMON = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {"vocab_size": 100, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 96}

# model_type: what makes it worth a test, and its configuration.
FAMILIES = {
    "llama": ("grouped queries", {}),
    "qwen2": ("biases", {}),
    "qwen3": ("norms on q and k", {"head_dim": 24}),
    "mistral": ("a window", {"sliding_window": 5}),
    "mixtral": ("a window and experts", {"sliding_window": 6, **MOE}),
    "gemma": ("one key/value head", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": ("softcap, a window in every second layer", {"head_dim": 16, "sliding_window": 5}),
    "gemma3_text": ("local and global layers", {"head_dim": 16, "sliding_window": 5}),
    "gemma4_text": (
        "shared keys, a head dim of their own in global layers",
        {"head_dim": 16, "global_head_dim": 32, "sliding_window": 5, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": 100, "num_kv_shared_layers": 0},
    ),
    "gpt_oss": ("sinks, a window in every second layer", {"head_dim": 16, "sliding_window": 5, **MOE}),
    "llama4_text": (
        "chunks, layers without positions",
        {"head_dim": 16, "attention_chunk_size": 6, "intermediate_size_mlp": 96, **MOE, "num_experts_per_tok": 1},
    ),
    "phi3": ("packed projections and a window", {"sliding_window": 5}),
    "deepseek_v3": (
        "keys wider than values",
        {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
         "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
         "num_key_value_heads": 4, **MOE},
    ),
    "granite": ("its own scale", {"attention_multiplier": 0.3}),
    "olmo3": ("local and global layers", {"sliding_window": 5}),
    "cohere2": ("local and global layers", {"sliding_window": 5}),
    "qwen3_moe": ("experts", {"head_dim": 16, **MOE}),
    "starcoder2": ("a window", {"sliding_window": 5}),
    "stablelm": ("partial rotation", {}),
    "gpt_neox": ("parallel blocks", {}),
    "smollm3": ("layers without positions", {}),
    "gpt2": ("learned positions", GPT2),
    "opt": (
        "positions that no mask is told of",
        {"ffn_dim": 96, "word_embed_proj_dim": 64},
    ),
    "biogpt": ("positions that no mask is told of", {}),
}  # fmt: skip


def tiny(model_type, implementation, seed=0, **changes):
    """A float32 model in eval mode; the same seed gives the same weights whatever the implementation."""
    options = {**COMMON, **FAMILIES.get(model_type, ("", {}))[1], **changes}
    config = CONFIG_MAPPING[model_type](**options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=implementation, dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1 or "sink" in name:
                parameter.normal_(0, 0.08 if parameter.dim() > 1 else 1.0, generator=generator)
    return model.eval()


def pair(model_type, **changes):
    """(eager, flashmask) with the same weights."""
    return tiny(model_type, "eager", **changes), tiny(model_type, "flashmask", **changes)


def tokens(batch, length, seed=1):
    return torch.randint(5, 95, (batch, length), generator=torch.Generator().manual_seed(seed))
