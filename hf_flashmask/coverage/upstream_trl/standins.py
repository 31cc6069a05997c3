"""Stand-ins for the models and datasets that TRL's tests load from the hub: random weights, tokenizers trained here.

They lie in folders named like the hub's repositories. Run in the folder above, ``from_pretrained("owner/name")`` and
``load_dataset("owner/name", ...)`` take the folder, so neither the tests nor the libraries need to be changed.
"""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import torch

OWNER = "trl-internal-testing"
DATASETS = ("zen", "toolcall", "harmony")
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
# Tokens that random models draw from: so many that a completion as good as never ends, which tests of TRL's count on.
VOCABULARY = 16_384
# type of model: (chat template of TRL's, None = ChatML; end and pad tokens; what the configuration needs besides SIZES)
FAMILIES: dict[str, tuple[str | None, str, str, dict[str, Any]]] = {
    "cohere": ("cohere", "<|END_OF_TURN_TOKEN|>", "<PAD>", {}),
    "cohere2": ("cohere2", "<|END_OF_TURN_TOKEN|>", "<PAD>", {"sliding_window": 8}),
    "deepseek_v3": (
        "deepseekv3", "<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
        {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
         "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 16,
         **_EXPERTS},
    ),
    "gemma": ("gemma", "<eos>", "<pad>", {"head_dim": 8}),
    "gemma2": ("gemma", "<eos>", "<pad>", {"head_dim": 8, "sliding_window": 8}),
    "glm4_moe": (
        "glm4moe", "<|endoftext|>", "<|endoftext|>",
        {"head_dim": 8, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, **_EXPERTS},
    ),
    "gpt_neox": (None, "<|endoftext|>", "<|padding|>", {}),
    "gpt_oss": ("gptoss", "<|return|>", "<|endoftext|>", {"head_dim": 8, "sliding_window": 8, **_EXPERTS}),
    "lfm2": ("lfm2", "<|im_end|>", "<|pad|>", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "llama": ("llama3_2", "<|eot_id|>", "<|finetune_right_pad_id|>", {}),
    "mistral": (None, "</s>", "<unk>", {"sliding_window": 8}),
    "nemotron_h": (
        "nemotron_3_nano", "<|im_end|>", "<unk>",
        {"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 4,
         "mamba_n_groups": 1, "ssm_state_size": 8, "moe_intermediate_size": 16, "head_dim": 8,
         "moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False, **_EXPERTS},
    ),
    "olmo3": (None, "<|endoftext|>", "<|pad|>", {"sliding_window": 8}),
    "phi3": ("phi3", "<|endoftext|>", "<|endoftext|>", {"sliding_window": 8}),
    "qwen2": ("qwen2_5", "<|im_end|>", "<|endoftext|>", {}),
    "qwen3": ("qwen3", "<|im_end|>", "<|endoftext|>", {"head_dim": 8}),
    "qwen3_moe": ("qwen3", "<|im_end|>", "<|endoftext|>", {"head_dim": 8, "moe_intermediate_size": 16, **_EXPERTS}),
}  # fmt: skip
# repository (of OWNER's where it says none): its type of model, and the chat template where it is not the family's
MODELS: dict[str, tuple[str, str | None]] = {
    "Qwen/Qwen3-4B": ("qwen3", None),
    "tiny-CohereForCausalLM": ("cohere", None),
    "tiny-Cohere2ForCausalLM": ("cohere2", None),
    "tiny-DeepseekV3ForCausalLM": ("deepseek_v3", None),
    "tiny-DeepseekV3ForCausalLM-0528": ("deepseek_v3", None),
    "tiny-GemmaForCausalLM": ("gemma", None),
    "tiny-Gemma2ForCausalLM": ("gemma2", None),
    "tiny-Glm4MoeForCausalLM": ("glm4_moe", None),
    "tiny-GPTNeoXForCausalLM": ("gpt_neox", None),
    "tiny-GptOssForCausalLM": ("gpt_oss", None),
    "tiny-Lfm2ForCausalLM": ("lfm2", None),
    "tiny-Lfm2ForCausalLM-2.5": ("lfm2", "lfm2_2_5"),
    "tiny-LlamaForCausalLM-3": ("llama", "llama3"),
    "tiny-LlamaForCausalLM-3.1": ("llama", "llama3_1"),
    "tiny-LlamaForCausalLM-3.2": ("llama", None),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", None),
    "tiny-MistralForCausalLM-0.1": ("mistral", None),
    "tiny-MistralForCausalLM-0.2": ("mistral", None),
    "tiny-NemotronHForCausalLM-nano": ("nemotron_h", None),
    "tiny-Olmo3ForCausalLM": ("olmo3", None),
    "tiny-Phi3ForCausalLM": ("phi3", None),
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", None),
    "tiny-Qwen2ForSequenceClassification-2.5": ("qwen2", None),
    "tiny-Qwen3ForCausalLM": ("qwen3", None),
    "tiny-Qwen3ForSequenceClassification": ("qwen3", None),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", None),
    "tiny-Qwen3MoeForSequenceClassification": ("qwen3_moe", None),
}
# Tokens that TRL's templates write, each to be one of the vocabulary.
_MARKS = r"<[|｜][^ ,\"<>]*[|｜]>|</?(?:think|tool_call|tool_response)>|<(?:start|end)_of_turn>"


def build(checkout: Path, folder: Path) -> None:
    """Fill ``folder``, which must be empty, with all of them; the datasets as the checkout's own scripts make them."""
    scripts = [checkout / "scripts" / f"generate_{name}_dataset.py" for name in DATASETS]
    tokenizer = _tokenizer([path.read_text(encoding="utf-8") for path in scripts])
    for name in MODELS:
        _model(name, folder / (name if "/" in name else f"{OWNER}/{name}"), tokenizer)
    _datasets(scripts, folder)


def _templates() -> dict[str, str]:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.jinja")}


def _tokenizer(corpus: list[str]) -> Any:
    """Byte pairs of the corpus, words up to VOCABULARY that no text has, and all special tokens of all families."""
    from hf_flashmask.bench.demo import train_tokenizer

    tokenizer = train_tokenizer([*corpus, *_templates().values()], vocab_size=2048)
    tokenizer = _with_words(tokenizer, VOCABULARY)
    marks = {mark for text in _templates().values() for mark in re.findall(_MARKS, text)}
    marks |= {token for _, *ends, _ in FAMILIES.values() for token in ends}
    tokenizer.add_tokens(sorted(marks), special_tokens=True)
    return tokenizer


def _with_words(tokenizer: Any, size: int) -> Any:
    """The same tokens and then words up to ``size`` tokens, none of which a merge makes: read, but never written."""
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for i in range(len(vocabulary), size):
        vocabulary[f"Ġ#{i}"] = i  # "Ġ" is a byte-level space
    backend = Tokenizer.from_str(json.dumps(state))
    return type(tokenizer)(tokenizer_object=backend, pad_token=tokenizer.pad_token, eos_token=tokenizer.eos_token)


def _model(name: str, folder: Path, tokenizer: Any) -> None:
    import transformers

    model_type, own_template = MODELS[name]
    template, eos, pad, changes = FAMILIES[model_type]
    template = own_template or template
    tokenizer.eos_token, tokenizer.pad_token = eos, pad
    tokenizer.chat_template = _CHATML if template is None else _templates()[template]
    if model_type == "gpt_neox":
        tokenizer.chat_template = None
    classifies = "ForSequenceClassification" in name
    options = {**SIZES, **changes, "vocab_size": len(tokenizer), "bos_token_id": None}
    options |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if "layers_block_type" in options:  # which counts the layers
        del options["num_hidden_layers"]
    config = transformers.AutoConfig.for_model(model_type, **options, **({"num_labels": 1} if classifies else {}))
    kind = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _datasets(scripts: list[Path], folder: Path) -> None:
    """What scripts of the checkout would push to the hub, as files of a folder."""
    from datasets import DatasetDict

    configs: dict[Path, list[str]] = {}

    def save(self: Any, repo_id: str, config_name: str, **_: Any) -> None:
        for split, rows in self.items():
            rows.to_parquet(str(_parent(folder / repo_id / config_name / f"{split}.parquet")))
        configs.setdefault(folder / repo_id, []).append(config_name)

    with mock.patch.object(DatasetDict, "push_to_hub", save):
        for name, script in zip(DATASETS, scripts, strict=True):
            runpy.run_path(str(script))["main"](0.1, True, f"{OWNER}/{name}")
    for repository, names in configs.items():
        listed = "".join(f"- config_name: {n}\n  data_files:\n" + _splits(repository / n) for n in names)
        (repository / "README.md").write_text(f"---\nconfigs:\n{listed}---\n", encoding="utf-8")


def _splits(folder: Path) -> str:
    files = sorted(folder.glob("*.parquet"), reverse=True)
    return "".join(f"  - split: {file.stem}\n    path: {folder.name}/{file.name}\n" for file in files)


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
