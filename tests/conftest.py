"""Settings of the whole test run."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core: two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def one_thread():
    """As many threads as a process that trains beside another has."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
