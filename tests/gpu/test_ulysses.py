"""DeepSpeed's Ulysses over NCCL, a GPU each."""

import pytest
import torch

from tests.distributed.processes import Processes

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.xdist_group("two GPUs, Ulysses"),
]
ulysses = pytest.importorskip("tests.distributed.test_ulysses")  # which skips without deepspeed


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("nccl"), ulysses.start_deepspeed, "nccl")
    yield started
    started.stop()


@pytest.mark.parametrize("case", ulysses.LENGTHS)
@pytest.mark.parametrize("model_type", ulysses.MODELS)
def test_logits_and_gradients_are_those_of_documents_alone(model_type, case, processes):
    lengths = ulysses.LENGTHS[case]
    ulysses.check(processes.run(ulysses.half_of_the_row, model_type, lengths), model_type, lengths, atol=1e-4)
