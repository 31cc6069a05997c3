"""Every block of Python in the README and the docs runs as it stands there; commands of shell blocks parse.

Blocks of a page share their names and run in order, in a folder where the models that pages name are tiny local ones.
What a block needs that is not here, its title says to the reader: ``title="needs ..."``.
"""

import logging
import shlex

import pytest
import torch

from hf_flashmask import ColumnMask, flashmask_attention
from hf_flashmask.bench import demo
from hf_flashmask.cli import main, parser
from tests.docs.pages import PAGES, ROOT, blocks

PYTHON = [page for page in PAGES if any(blocks(page, "python"))]
SHELL = [block for page in PAGES for block in blocks(page, "bash")]
# More would be a habit.
MOST_LEFT_OUT = 1


def save_language_model(folder):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = demo.train_tokenizer(demo.texts(), 512)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_vision_language_model(folder):
    """A Gemma 3, and what its processor makes of a text with an image."""
    from hf_flashmask.coverage import build

    config = next(build.candidates("gemma3"))
    build.build(config, "multimodal", "eager").save_pretrained(folder)
    image = [config.image_token_id] * config.mm_tokens_per_image
    ids = torch.tensor([[5, 6, *image, 7, 8, 9]])
    side = config.vision_config.image_size
    return {
        "input_ids": ids,
        "token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(1, config.vision_config.num_channels, side, side),
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_language_model(folder / "Qwen" / "Qwen3-0.6B")
    return folder, save_vision_language_model(folder / "google" / "gemma-3-4b-it")


@pytest.fixture
def names(models, monkeypatch):
    """What pages leave to the reader: data, and a machine with a GPU for the trainers' defaults."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer import base_config

    from hf_flashmask import patches

    folder, images = models
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    few = {"texts": demo.texts()[:8], "preferences": demo.preferences()[:8]}
    monkeypatch.setattr(demo, "texts", lambda: few["texts"])
    monkeypatch.setattr(demo, "preferences", lambda: few["preferences"])
    checked = base_config._BaseConfig.__post_init__

    def on_a_cpu(config):
        config.use_cpu, config.bf16, config.max_steps = not torch.cuda.is_available(), False, 1
        config.report_to, config.save_strategy, config.disable_tqdm = [], "no", True
        checked(config)

    monkeypatch.setattr(base_config._BaseConfig, "__post_init__", on_a_cpu)
    loggers = [(logger, logger.level, list(logger.handlers)) for logger in map(logging.getLogger, ("", "hf_flashmask"))]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {
        "__name__": "__main__",
        "dataset": Dataset.from_list([{"text": text} for text in demo.texts()]),
        "rows": torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 12, 0]]),
        "inputs": images,
        "prompts": [[5, 6, 7], [8, 9]],
        "pairs": Dataset.from_list(demo.preferences()),
        **dict.fromkeys(("q", "k", "v"), torch.randn(1, 8192, 1, 16)),
        "input_ids": torch.randint(5, 500, (1, 8192)),
        "dense": torch.ones(1, 1, 9, 9, dtype=torch.bool).tril(),
        "idx": torch.full((1, 1, 9, 1), 9, dtype=torch.int32),
    }  # fmt: skip
    torch.set_num_threads(threads)
    for logger, level, handlers in loggers:
        logger.setLevel(level)
        logger.handlers[:] = handlers
    patches.disable()


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python(page, names, capsys):
    for block in blocks(page, "python"):
        if not block.options:
            exec(compile("\n" * (block.line - 1) + block.code, block.where, "exec"), names)


def test_parts_are_merged_where_rows_see_nothing():
    """The block of the page, over a mask whose rows 600 to 699 see no key."""
    q, k, v = (torch.randn(1, 1024, 2, 8, requires_grad=True) for _ in range(3))
    i, j = torch.arange(1024)[:, None], torch.arange(1024)[None]
    mask = ColumnMask.from_dense(((j <= i) & ((i < 600) | (i >= 700)))[None, None])
    out = flashmask_attention(q, k, v, mask)
    (block,) = (b for b in blocks(ROOT / "docs" / "recipes" / "own_model.md", "python") if "logaddexp" in b.code)
    names = {"flashmask_attention": flashmask_attention, "torch": torch} | {
        "q": q,
        "k": k,
        "v": v,
        "mask": mask,
        "out": out,
    }
    exec(block.code, names)
    for merged, whole in zip(*(torch.autograd.grad(t.sum(), (q, k, v)) for t in (names["merged"], out)), strict=True):
        torch.testing.assert_close(merged, whole, rtol=1e-4, atol=1e-4)


def test_the_drawing_is_what_the_command_prints(capsys):
    main(["show", "--lengths", "5", "3", "8"])
    assert f"\n```\n{capsys.readouterr().out}```\n" in (ROOT / "docs" / "commands.md").read_text()


def test_few_blocks_are_left_out():
    left_out = [block for page in PYTHON for block in blocks(page, "python") if block.options]
    assert all(block.options.startswith('title="needs ') for block in left_out), left_out
    assert len(left_out) <= MOST_LEFT_OUT


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_shell(block):
    makefile = (ROOT / "Makefile").read_text()
    for line in block.code.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and words[0] == "flashmask":
                parser().parse_args(words[1:])
            elif words and words[0] == "make":
                assert all(f"\n{target}:" in makefile for target in words[1:])
