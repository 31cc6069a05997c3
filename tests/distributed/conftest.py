"""Two processes for all tests of this folder that need nothing special."""

import pytest

from tests.distributed.processes import Processes


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    started = Processes(tmp_path_factory.mktemp("gloo"))
    yield started
    started.stop()
