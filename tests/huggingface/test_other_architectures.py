"""Beyond decoders: encoders, encoder-decoders with cross-attention, vision towers that attend image by image."""

import copy

import pytest
import torch
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_flashmask.coverage.build import candidates
from tests.huggingface.models import tokens

ENCODERS = {
    "bert": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "roberta": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "modernbert": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
    },
}
SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
SEQ2SEQ |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}


def build(config, implementation):
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders(model_type):
    config = CONFIG_MAPPING[model_type](vocab_size=100, pad_token_id=0, **ENCODERS[model_type])
    eager, ours = build(config, "eager"), build(config, "flashmask")
    ids = tokens(2, 20)
    keep = torch.ones_like(ids)
    keep[1, -7:] = 0
    ids = ids * keep
    close(ours(ids).last_hidden_state, eager(ids).last_hidden_state)
    expected = eager(ids, attention_mask=keep).last_hidden_state[keep.bool()]
    close(ours(ids, attention_mask=keep).last_hidden_state[keep.bool()], expected)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bart", "marian", "pegasus"])
def test_encoder_decoders(model_type):
    config = CONFIG_MAPPING[model_type](vocab_size=100, pad_token_id=0, decoder_start_token_id=1, **SEQ2SEQ)
    eager, ours = build(config, "eager"), build(config, "flashmask")
    ids = tokens(2, 12)
    keep = torch.ones_like(ids)
    keep[1, -5:] = 0
    for length in (5, 12):
        given = {"input_ids": ids, "attention_mask": keep, "decoder_input_ids": tokens(2, length, seed=3)}
        close(ours(**given).last_hidden_state, eager(**given).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_decoders_with_cross_attention(model_type):
    """Of BERT's kind, whose modules do not say that keys are another's: padding on the left, an encoder as long."""
    config = CONFIG_MAPPING[model_type](
        vocab_size=100, pad_token_id=0, is_decoder=True, add_cross_attention=True, **ENCODERS[model_type]
    )
    keep, encoded = (torch.ones(2, 12, dtype=torch.long) for _ in range(2))
    keep[1, :4], encoded[0, -3:] = 0, 0
    given = {
        "attention_mask": keep, "position_ids": (keep.cumsum(1) - 1).clamp(min=0), "use_cache": False,
        "encoder_hidden_states": torch.randn(2, 12, 32), "encoder_attention_mask": encoded,
    }  # fmt: skip
    eager, ours = (build(copy.deepcopy(config), name)(tokens(2, 12), **given)[0] for name in ("eager", "flashmask"))
    close(ours[keep.bool()], eager[keep.bool()])


@torch.no_grad()
def test_vision_towers_keep_images_apart():
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    config = Qwen2VLVisionConfig(depth=2, embed_dim=32, num_heads=2, hidden_size=32, patch_size=2, mlp_ratio=2)
    towers = {}
    for implementation in ("eager", "flashmask"):
        torch.manual_seed(0)
        towers[implementation] = Qwen2VisionTransformerPretrainedModel._from_config(
            config, attn_implementation=implementation
        ).eval()
    grid = torch.tensor([[1, 4, 4], [1, 2, 6]])
    patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 2 * 2)

    def features(tower, pixels, sizes):
        out = tower(pixels, grid_thw=sizes)
        return getattr(out, "pooler_output", out)

    both = features(towers["flashmask"], patches, grid)
    close(both, features(towers["eager"], patches, grid))
    first = features(towers["flashmask"], patches[:16], grid[:1])
    close(both[: first.shape[0]], first)


@torch.no_grad()
def test_masks_of_keys_only():
    """LayoutLM hands its layers [B, 1, 1, S]: the same keys for every query."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CONFIG_MAPPING["layoutlm"](vocab_size=100, **small)
    eager, ours = build(config, "eager"), build(config, "flashmask")
    ids = tokens(2, 12)
    keep = torch.ones_like(ids)
    keep[1, -5:] = 0
    expected = eager(ids, attention_mask=keep).last_hidden_state
    close(ours(ids, attention_mask=keep).last_hidden_state, expected)


@pytest.mark.parametrize("model_type", ["doge", "deepseek_v32", "nllb-moe", "git"])
def test_models_that_take_masks_apart_are_refused(model_type):
    """Their masks must be tensors, or their attention classes are picked by name: said when the model is made."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this Transformers has no {model_type}")
    config = next(candidates(model_type))
    with pytest.raises(NotImplementedError, match='does not support attn_implementation="flashmask"'):
        AutoModel.from_config(config, attn_implementation="flashmask")
