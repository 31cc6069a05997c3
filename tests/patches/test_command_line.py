"""``flashmask trl``: TRL's own scripts, in the processes that accelerate starts."""

import json
import os
import subprocess
import sys

import pytest

from tests.huggingface.models import tiny

pytest.importorskip("trl")
from tests.trl_runs import preferences, words_tokenizer

COMMON = [
    "--max_steps", "2", "--logging_steps", "1", "--save_steps", "2", "--use_cpu", "true", "--bf16", "false",
    "--report_to", "none", "--learning_rate", "0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    tiny("llama", "sdpa").save_pretrained(folder / "model")
    words_tokenizer().save_pretrained(folder / "model")
    (folder / "preferences").mkdir()
    (folder / "preferences" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in preferences()))
    return folder


def run(folder, command, *arguments, out="out"):
    command = [
        *command, "--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / out), *COMMON,
        *arguments,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=folder)
    return done.returncode, done.stdout + done.stderr


def logs(folder, out="out"):
    state = json.loads((folder / out / "checkpoint-2" / "trainer_state.json").read_text())
    return [{k: v for k, v in log.items() if isinstance(v, float)} for log in state["log_history"]]


FLASHMASK = [sys.executable, "-c", "from hf_flashmask.cli import main; main()", "trl", "dpo"]


def test_dpo(folder):
    data = ["--dataset_name", str(folder / "preferences")]
    flags = ["--attn_implementation", "flashmask", "--padding_free", "true", "--num_processes", "1"]
    code, output = run(folder, FLASHMASK, *data, *flags)
    assert code == 0, output[-3000:]
    assert "temporarily unavailable" not in output
    stock = [sys.executable, "-m", "trl.scripts.dpo"]
    code, output = run(folder, stock, *data, "--attn_implementation", "sdpa", out="stock")
    assert code == 0, output[-3000:]
    ours, wanted = logs(folder), logs(folder, "stock")
    assert len(ours) == len(wanted) == 2
    for a, b in zip(ours, wanted, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_the_flag_arrives_in_the_child(folder):
    """Only a patched trainer refuses sdpa."""
    data = ["--dataset_name", str(folder / "preferences")]
    child = [sys.executable, "-m", "hf_flashmask.trl_script", "kto"]
    code, output = run(folder, child, *data, "--attn_implementation", "sdpa", "--padding_free", "true")
    assert code != 0
    assert "padding_free=True: LlamaModel has attn_implementation='sdpa'" in output
