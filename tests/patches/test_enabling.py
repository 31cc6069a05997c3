"""What enable() changes, refuses and gives back."""

import copy
import dataclasses
import importlib
import importlib.metadata

import pytest
import torch

import hf_flashmask
from hf_flashmask import patches, share_prompts
from tests.huggingface.models import tiny

pytest.importorskip("trl")
pytest.importorskip("peft")
import peft
import trl
from hf_flashmask.patches.whole_groups import shuffle_blocks
from trl.experimental.gmpo import GMPOConfig
from trl.trainer.utils import shuffle_sequence_dict

from tests.trl_runs import QUIET, preferences, words_tokenizer

NAMES = ["DPO", "Reward", "KTO", "GRPO", "RLOO"]


def touched():
    """Everything that the patches replace attributes of."""
    for name in NAMES:
        yield importlib.import_module(f"trl.trainer.{name.lower()}_trainer")
        yield getattr(trl, f"{name}Trainer")
        yield getattr(trl, f"{name}Config")
    yield importlib.import_module("trl.cli.accelerate_launcher")


def attributes():
    # __slotnames__ is copyreg's cache.
    return [{k: v for k, v in vars(owner).items() if k != "__slotnames__"} for owner in touched()]


def assert_unchanged(before):
    for then, now in zip(before, attributes(), strict=True):
        assert then.keys() == now.keys()
        assert all(then[k] is now[k] for k in then)


def test_everything_is_given_back():
    before = attributes()
    assert hf_flashmask.patches is patches
    patches.enable()
    during = attributes()
    assert any(a != b for a, b in zip(before, during, strict=True))
    patches.enable()
    assert_unchanged(during)
    with patches.enabled():
        pass
    assert_unchanged(during)  # a block inside leaves what was there
    patches.disable()
    patches.disable()
    assert_unchanged(before)
    with pytest.raises(KeyError), patches.enabled():
        raise KeyError
    assert_unchanged(before)


@pytest.mark.parametrize("name", NAMES)
def test_the_flag_is_a_field_like_any_other(name, tmp_path):
    config = getattr(trl, f"{name}Config")
    with patches.enabled():
        given = config(str(tmp_path), padding_free=True, **QUIET)
        for one in (given, copy.copy(given), copy.deepcopy(given)):
            assert one.padding_free is True
        assert given.to_dict()["padding_free"] is True
        assert "padding_free=True" in repr(given)
        if name in ("DPO", "Reward", "KTO"):  # stock GRPOConfig and RLOOConfig refuse to be replaced
            assert dataclasses.replace(given).padding_free is True
            assert given != dataclasses.replace(given, padding_free=False)
        assert config(str(tmp_path), **QUIET).padding_free is False
        line = ["--output_dir", str(tmp_path), "--bf16", "false", "--padding_free", "true"]
        (parsed,) = trl.TrlParser(config).parse_args_and_config(line)
        assert parsed.padding_free is True


def test_configs_made_from_theirs_before_have_the_flag(tmp_path):
    """TRL's own (GMPO), a user's dataclass, one with an __init__ of its own, and a plain class."""

    @dataclasses.dataclass
    class Ours(trl.RewardConfig):
        scale: float = 2.0

    @dataclasses.dataclass
    class Deeper(Ours):
        shift: float = 1.0

    @dataclasses.dataclass
    class OwnInit(trl.RewardConfig):
        def __init__(self, *args, scale=1.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = scale

    class Plain(trl.RewardConfig):
        pass

    configs = [GMPOConfig, Ours, Deeper, OwnInit, Plain]
    before = [dict(vars(config)) for config in configs]
    with patches.enabled():
        for config in configs:
            given = config(str(tmp_path), padding_free=True, **QUIET)
            assert given.padding_free is True
            assert given.to_dict()["padding_free"] is True
            assert config(str(tmp_path), **QUIET).padding_free is False
        assert Deeper(str(tmp_path), scale=3.0, padding_free=True, **QUIET).scale == 3.0
        assert OwnInit(str(tmp_path), scale=3.0, **QUIET).scale == 3.0
        (parsed,) = trl.TrlParser(Deeper).parse_args_and_config(
            ["--output_dir", str(tmp_path), "--bf16", "false", "--padding_free", "true", "--shift", "2"]
        )
        assert (parsed.padding_free, parsed.shift) == (True, 2.0)
    for config, then in zip(configs, before, strict=True):
        assert {k: v for k, v in vars(config).items() if k != "__slotnames__"} == then
        with pytest.raises(TypeError, match="padding_free"):
            config(str(tmp_path), padding_free=True, **QUIET)


@pytest.mark.parametrize("version", ["1.15.2", "1.17.0", "2.0"])
def test_an_unknown_release_is_refused(version, monkeypatch):
    before = attributes()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(RuntimeError, match=rf"trl>=1.16,<1.17 and does not know trl {version}.*share_prompts"):
        patches.enable()
    assert_unchanged(before)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("trl.trainer.rloo_trainer", "shuffle_sequence_dict"),
        ("trl.trainer.kto_trainer", "add_fused_lm_head"),
        ("trl.cli.accelerate_launcher", "launch_training_script"),
    ],
)
def test_an_unknown_function_is_refused(owner, name, monkeypatch):
    monkeypatch.setattr(importlib.import_module(owner), name, lambda other: None)
    before = attributes()
    with pytest.raises(RuntimeError, match=r"it takes \(other\), expected \("):
        patches.enable()
    assert_unchanged(before)


def build(model, tmp_path, **options):
    arguments = trl.DPOConfig(str(tmp_path), padding_free=options.pop("padding_free", True), **QUIET)
    return trl.DPOTrainer(
        model, args=arguments, processing_class=words_tokenizer(), train_dataset=preferences(), **options
    )


def test_models_that_cannot_share_are_refused(tmp_path):
    with patches.enabled():
        with pytest.raises(ValueError, match=r"padding_free=True: .*attn_implementation='sdpa'"):
            build(tiny("llama", "sdpa"), tmp_path)
        with pytest.raises(NotImplementedError, match=r"padding_free=True: .*chunked_attention"):
            build(tiny("llama4_text", "flashmask"), tmp_path)
        policy = tiny("llama", "flashmask")
        with pytest.raises(ValueError, match=r"padding_free=True: .*attn_implementation='eager'"):
            build(policy, tmp_path, ref_model=tiny("llama", "eager"))
        assert "forward" not in vars(policy.model)  # what was shared before the error no longer is
        handle = share_prompts(policy)
        with pytest.raises(ValueError, match=r"padding_free=True: .*attn_implementation='eager'"):
            build(policy, tmp_path, ref_model=tiny("llama", "eager"))
        assert "forward" in vars(policy.model)  # what was shared before stays so
        handle.release()
        assert "forward" not in vars(policy.model)
        prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        with pytest.raises(NotImplementedError, match=r"padding_free=True: PromptTuningConfig"):
            build(tiny("llama", "flashmask"), tmp_path, peft_config=prompt)
        alora = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
        with pytest.raises(NotImplementedError, match=r"padding_free=True: LoraConfig .*alora_invocation_tokens"):
            build(tiny("llama", "flashmask"), tmp_path, peft_config=alora)


def test_without_the_flag_the_trainer_is_stock(tmp_path):
    with patches.enabled():
        policy, reference = (tiny("llama", "flashmask", seed) for seed in (0, 1))
        trainer = build(policy, tmp_path, ref_model=reference, padding_free=False)
        assert not hasattr(trainer, "shared_prompts")
        assert "forward" not in vars(policy.model)
        assert "forward" not in vars(reference.model)


def test_no_warning_and_what_is_shared_already_stays(tmp_path, caplog):
    policy, reference = (tiny("llama", "flashmask", seed) for seed in (0, 1))
    keys = list(policy.state_dict())
    handle = share_prompts(policy)
    with patches.enabled():
        trainer = build(policy, tmp_path, ref_model=reference)
    assert trainer.shared_prompts[0] is handle
    handle.release()
    assert "forward" in vars(policy.model)  # the trainer's own call is still there
    assert len(trainer.shared_prompts) == 2
    assert "temporarily unavailable" not in caplog.text
    assert list(policy.state_dict()) == keys


def test_blocks_are_shuffled_whole():
    batch = {"rows": torch.arange(24).view(12, 2), "names": list(range(12)), "none": None, "total": torch.tensor(7)}
    torch.manual_seed(0)
    shuffle_sequence_dict(batch)
    stock = torch.get_rng_state()
    torch.manual_seed(0)
    shuffle_blocks(batch, 4)
    assert torch.equal(torch.get_rng_state(), stock)  # completions of the next batch are those of the stock shuffle
    orders = set()
    for _ in range(60):
        out = shuffle_blocks(batch, 4)
        assert out["none"] is None
        assert out["total"] == 7
        assert out["rows"][:, 0].tolist() == [2 * n for n in out["names"]]
        assert [n // 4 for n in out["names"]] == [n // 4 for n in out["names"][::4] for _ in range(4)]
        assert sorted(out["names"]) == list(range(12))
        orders.add(tuple(out["names"]))
    assert len(orders) == 6
    with pytest.raises(ValueError, match="multiple of 5 rows, got 12"):
        shuffle_blocks(batch, 5)
