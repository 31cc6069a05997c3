"""Tiny random models of any model type that Transformers has, built offline from its configuration class alone.

No two families name their sizes alike, so every configuration is offered the values of ``TINY`` that it knows. Where
sizes do not fit together a few variants are tried; a type that none builds is reported with the first error.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .outcome import sentence

# kind: the tables of Transformers that list its types, and the class that builds them.
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "causal": (("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",), "AutoModelForCausalLM"),
    "seq2seq": (("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",), "AutoModelForSeq2SeqLM"),
    "masked": (("MODEL_FOR_MASKED_LM_MAPPING_NAMES",), "AutoModelForMaskedLM"),
    "multimodal": (("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",), "AutoModelForImageTextToText"),
    "vision": (("MODEL_FOR_IMAGE_MAPPING_NAMES",), "AutoModel"),
    "tower": (("MODEL_MAPPING_NAMES",), "AutoModel"),
}

# Ids of words are below this; the ones above are for the special tokens of multimodal models.
WORDS = 80
MOST_PARAMETERS = 40_000_000

TINY: dict[str, Any] = {
    # sizes of decoders
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "n_embd": 64, "n_layer": 4, "n_head": 4,
    "n_positions": 128, "n_inner": 96, "d_model": 64, "num_layers": 4, "num_heads": 4, "d_ff": 96, "ffn_dim": 96,
    "hidden_dim": 64, "n_layers": 4, "n_heads": 4, "max_seq_len": 128, "rotary_dim": 8, "word_embed_proj_dim": 64,
    "mlp_hidden_size": 96, "ffn_hidden_size": 96, "multi_query": False, "emb_dim": 64, "embedding_size": 64,
    # encoder-decoders
    "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": 2,
    "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "d_kv": 16, "num_decoder_layers": 2,
    # windows and chunks, shorter than the rows
    "sliding_window": 5, "attention_chunk_size": 6, "local_attention": 6, "window_size": 5,
    # experts
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_num_experts": 4, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "shared_expert_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "first_k_dense_replace": 1,
    # latent attention and sparse indexers
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
    # gemma 3n and 4
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "laurel_rank": 4, "num_kv_shared_layers": 0,
    "global_head_dim": 16, "num_global_key_value_heads": 2,
    # recurrent layers beside attention
    "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 1,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8, "expand": 1,
    "attention_hidden_size": 64, "attention_head_dim": 16, "adapter_rank": 4, "use_mamba_kernels": False,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "lru_width": 64, "attn_layer_period": 2, "attn_layer_offset": 1, "attn_layer_indices": [1, 3],
    "full_attn_idxs": [1, 3],
    "n_groups": 1, "mamba_n_groups": 1,
    # no randomness
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "dropout": 0.0, "activation_dropout": 0.0,
    "dropout_rate": 0.0, "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "drop_path_rate": 0.0,
    # images
    "image_size": 32, "patch_size": 8, "num_channels": 3, "in_channels": 3, "in_chans": 3, "depth": 2,
    "embed_dim": 64, "out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_frames": 4,
    "tubelet_size": 2, "projection_dim": 64, "vision_feature_layer": -1, "mm_tokens_per_image": 4,
    "mlp_ratio": 2.0, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
    "fullatt_block_indexes": [1], "deepstack_visual_indexes": [1], "num_query_tokens": 4, "depths": [1, 1],
    "num_mel_bins": 16, "encoder_hidden_size": 64, "num_position_embeddings": 64, "position_embedding_size": 16,
    "output_dim": 64,
    # special tokens
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "image_token_id": 90, "image_token_index": 90, "video_token_id": 91, "video_token_index": 91,
    "audio_token_id": 92, "audio_token_index": 92, "vision_start_token_id": 93, "vision_end_token_id": 94,
    "boi_token_index": 95, "eoi_token_index": 96, "boi_token_id": 95, "eoi_token_id": 96, "boa_token_id": 97,
    "eoa_token_id": 98, "boa_token_index": 97, "eoa_token_index": 98, "image_start_token_id": 99,
    "image_end_token_id": 100, "video_start_token_id": 101, "video_end_token_id": 102, "vision_token_id": 103,
    "audio_start_token_id": 104, "audio_end_token_id": 105, "mask_token_id": 3, "user_token_id": 106,
}  # fmt: skip

_HALF_ATTENTION = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
# What single types need beside TINY, also as a part of others.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _HALF_ATTENTION,
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": _SECTIONS, "full_attention": _SECTIONS}},
    "dots1": {"n_shared_experts": 1},
    "granitemoehybrid": _HALF_ATTENTION,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2, "index_block_size": 2, "index_topk_blocks": 2,
    },
    "exaone4_5_vision": {"window_size": 32},
    "qwen2_5_omni_vision_encoder": {"window_size": 32},
    "qwen2_5_vl_vision": {"window_size": 32},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}  # fmt: skip

# Changes of TINY, and keys left to the configuration's own defaults: tried in turn.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"head_dim": None},
    {"head_dim": None, "num_key_value_heads": 4},
    {"num_experts_per_tok": 1},
    {"hidden_size": 128, "head_dim": 32, "num_key_value_heads": 4, "intermediate_size": 128},
)
_LEFT_OUT: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("num_key_value_heads",),
    ("head_dim", "num_key_value_heads"),
)


class NotBuildable(Exception):
    """No tiny configuration of the type works with eager attention."""


def model_types(kind: str) -> list[str]:
    """The model types of a kind that the installed Transformers has configurations for."""
    names: set[str] = set()
    for table in KINDS[kind][0]:
        names |= set(getattr(modeling_auto, table))
    if kind == "tower":
        names = {name for name in names if "vision" in name}
    return sorted(names & set(CONFIG_MAPPING))


def candidates(model_type: str, changes: Mapping[str, Any] | None = None) -> Iterator[PretrainedConfig]:
    """Tiny configurations, the likeliest first; ``changes`` of ``TINY`` hold in all of them.

    Raises:
        NotBuildable: the configuration class accepts none; with its first error.
    """
    first_error: Exception | None = None
    found = False
    for variant in _VARIANTS:
        for left_out in _LEFT_OUT:
            values = {
                k: v for k, v in {**TINY, **variant, **(changes or {})}.items() if v is not None and k not in left_out
            }
            try:
                config = _config(CONFIG_MAPPING[model_type], values)
            except Exception as error:
                first_error = first_error or error
                continue
            found = True
            yield config
            break
    if not found:
        raise NotBuildable(f"configuration: {sentence(first_error)}")


def _config(cls: type[PretrainedConfig], values: dict[str, Any]) -> PretrainedConfig:
    values = dict(values)
    while True:
        try:
            config = cls(**_options(cls, values))
            break
        except Exception as error:
            # A value of another type than this configuration wants, e.g. a list: its own default then.
            wrong = re.search(r"for field '(\w+)'", str(error))
            if wrong is None or wrong[1] not in values:
                raise
            del values[wrong[1]]
    for part in _parts(config):
        _fit_lists(part)
        _fit_mrope(part)
    return config


def _options(cls: type[PretrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    known = set(inspect.signature(cls.__init__).parameters)
    if dataclasses.is_dataclass(cls):
        known |= {field.name for field in dataclasses.fields(cls)}
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    options = {name: value for name, value in values.items() if name in known}
    options |= OVERRIDES.get(cls.model_type, {})
    sub_configs = getattr(cls, "sub_configs", None) or {}
    default = _default(cls) if sub_configs else None
    for name, declared in sub_configs.items():
        # "AutoConfig" says nothing: what the default configuration holds there does.
        held = getattr(default, name, None)
        actual = type(held) if isinstance(held, PretrainedConfig) else declared
        if isinstance(actual, type) and issubclass(actual, PretrainedConfig) and actual.model_type:
            options[name] = {"model_type": actual.model_type, **_options(actual, values)}
    return options


def _default(cls: type[PretrainedConfig]) -> PretrainedConfig | None:
    try:
        return cls()
    except Exception:  # classes that need arguments have no default
        return None


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for name in getattr(config, "sub_configs", None) or {}:
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig):
            yield from _parts(part)


def _fit_lists(config: PretrainedConfig) -> None:
    """Per-layer lists at the length of the tiny model, every kind of layer kept where there is room."""
    layers = getattr(config, "num_hidden_layers", None)
    for name in ("layer_types", "mlp_layer_types"):
        given = getattr(config, name, None)
        if isinstance(layers, int) and given and len(given) != layers:
            different = list(dict.fromkeys(given))
            setattr(config, name, (different * layers)[:layers])


def _fit_mrope(config: PretrainedConfig) -> None:
    """Sections of multi-axis rotary positions that add up to the tiny head dim."""
    ropes = getattr(config, "rope_parameters", None)
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(ropes, dict) or not isinstance(heads, int) or not isinstance(width, int):
        return
    source = _modeling_source(type(config))
    if "mrope_section" in source and not any(isinstance(value, dict) for value in ropes.values()):
        half = int((getattr(config, "head_dim", None) or width // heads) * ropes.get("partial_rotary_factor", 1.0)) // 2
        side = (half * 3) // 8
        ropes["mrope_section"] = [half - 2 * side, side, side]


def _modeling_source(cls: type[PretrainedConfig]) -> str:
    name = cls.__module__.replace(".configuration_", ".modeling_")
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).read_text() if spec is not None and spec.origin else ""


def build(config: PretrainedConfig, kind: str, implementation: str) -> PreTrainedModel:
    """A float32 model in eval mode."""
    torch.manual_seed(0)
    auto = getattr(transformers, KINDS[kind][1])
    model = auto.from_config(copy.deepcopy(config), attn_implementation=implementation, dtype=torch.float32)
    return model.eval()


def parameters_of(config: PretrainedConfig, kind: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(config, kind, "eager").parameters())


def randomize(model: nn.Module) -> None:
    """Weights large enough that attention is far from uniform; the same for the same names and shapes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.is_floating_point() and (parameter.dim() > 1 or "sink" in name):
                parameter.normal_(0, 0.08 if parameter.dim() > 1 else 1.0, generator=generator)
