"""Settings of the whole test run."""

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core: two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m cuda` reads no file without such tests: it may need packages that a bare GPU machine has not."""
    if config.option.markexpr != "cuda" or collection_path.suffix != ".py":
        return None
    here = "cuda" in collection_path.parts or "mark.cuda" in collection_path.read_text(encoding="utf-8")
    return None if here else True


@pytest.fixture
def one_thread():
    """As many threads as a process that trains beside another has."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
