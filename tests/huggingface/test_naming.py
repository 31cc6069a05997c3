"""The name "flashmask" in every place that takes a name, each in a fresh process: first use and later uses."""

import subprocess
import sys
import textwrap

import pytest

SET_UP = """
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
import hf_flashmask
calls = []
from transformers import AttentionInterface
stock = AttentionInterface._global_mapping["flashmask"]
AttentionInterface.register("flashmask", lambda *a, **k: calls.append(1) or stock(*a, **k))
SMALL = dict(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=2)
ids = torch.arange(6)[None]
def check(model):
    assert model.config._attn_implementation == "flashmask", model.config._attn_implementation
    before = len(calls)
    model.eval()(input_ids=ids)
    assert len(calls) > before, "flashmask was not called"
"""


def run(code, tmp_path):
    script = textwrap.dedent(SET_UP) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize(
    "code",
    {
        "from_config": """
            for _ in range(2):
                check(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), attn_implementation="flashmask"))
        """,
        "from_pretrained": """
            LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained("model")
            for _ in range(2):
                check(AutoModelForCausalLM.from_pretrained("model", attn_implementation="flashmask"))
        """,
        "config": """
            for _ in range(2):
                check(LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="flashmask")))
        """,
        "set_attn_implementation": """
            for _ in range(2):
                model = LlamaForCausalLM(LlamaConfig(**SMALL))
                model.set_attn_implementation("flashmask")
                check(model)
                model.set_attn_implementation("sdpa")
                assert model.config._attn_implementation == "sdpa"
        """,
        "dict of submodels": """
            from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
            vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                          image_size=8, patch_size=4, projection_dim=8)
            config = LlavaConfig(vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**SMALL),
                                 image_token_index=49)
            for text, tower in (("flashmask", "sdpa"), ("flashmask", "flashmask"), ("sdpa", "flashmask")):
                choice = {"text_config": text, "vision_config": tower}
                model = LlavaForConditionalGeneration._from_config(config, attn_implementation=choice)
                assert model.config.text_config._attn_implementation == text
                assert model.config.vision_config._attn_implementation == tower
                model.set_attn_implementation({"text_config": "flashmask", "vision_config": "sdpa"})
                assert model.config.text_config._attn_implementation == "flashmask"
                assert model.config.vision_config._attn_implementation == "sdpa"
                model.set_attn_implementation("flashmask")
                before = len(calls)
                pixels = torch.randn(1, 3, 8, 8)
                image = torch.tensor([[49] * 4 + [1, 2]])
                model.eval()(input_ids=image, pixel_values=pixels)
                assert len(calls) >= before + 2
        """,
        "models that choose another FlashAttention": """
            from transformers import GptOssConfig, GptOssForCausalLM, AutoConfig
            moe = dict(head_dim=8, num_local_experts=2, num_experts_per_tok=1)
            check(GptOssForCausalLM._from_config(GptOssConfig(**SMALL, **moe), attn_implementation="flashmask"))
            from transformers.models.auto.configuration_auto import CONFIG_MAPPING
            if "granite_swa" in CONFIG_MAPPING:
                config = CONFIG_MAPPING["granite_swa"](**SMALL)
                check(AutoModelForCausalLM.from_config(config, attn_implementation="flashmask"))
            chunked = dict(head_dim=8, attention_chunk_size=4, intermediate_size_mlp=16, num_local_experts=2)
            config = CONFIG_MAPPING["llama4_text"](**SMALL, **chunked)
            check(AutoModelForCausalLM.from_config(config, attn_implementation="flashmask"))
        """,
        "models that compute attention themselves": """
            from transformers import FalconConfig, FalconForCausalLM
            config = FalconConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
            for _ in range(2):
                try:
                    FalconForCausalLM._from_config(config, attn_implementation="flashmask")
                except NotImplementedError as error:
                    assert "computes attention itself" in str(error)
                else:
                    raise AssertionError("not refused")
            FalconForCausalLM._from_config(config, attn_implementation="eager")(ids)
        """,
        "imported after Transformers": """
            import importlib
            from hf_flashmask import _register
            from hf_flashmask.huggingface import register
            before = transformers.PreTrainedModel.get_correct_attn_implementation
            register()
            _register.when_transformers_loads()
            assert transformers.PreTrainedModel.get_correct_attn_implementation is before
            AttentionInterface.register("flashmask", lambda *a, **k: calls.append(1) or stock(*a, **k))
            check(LlamaForCausalLM(LlamaConfig(**SMALL, attn_implementation="flashmask")))
        """,
        "other names keep their meaning": """
            from transformers.utils.generic import is_flash_attention_requested as asked
            assert asked(requested_attention_implementation="flash_attention_2")
            assert asked(requested_attention_implementation="flash_attention_3", version=3)
            assert not asked(requested_attention_implementation="flashmask")
            assert not asked(requested_attention_implementation="sdpa")
            assert not asked(requested_attention_implementation=None)
            config = LlamaConfig(**SMALL, attn_implementation="flash_attention_2")
            assert asked(config) and asked(config, version=[2])
            assert not asked(LlamaConfig(**SMALL, attn_implementation="flashmask"))
            try:
                asked(config, "flashmask")
            except ValueError as error:
                assert "ambiguous" in str(error)
            else:
                raise AssertionError
        """,
    }.items(),
    ids=lambda item: item[0],
)
def test_name(code, tmp_path):
    run(code[1], tmp_path)
