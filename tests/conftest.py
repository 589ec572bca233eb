"""Settings of the whole test run."""

import os
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core: two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As `--dist loadscope`, which pytest would not know where xdist is not installed."""
    from xdist.scheduler import LoadScopeScheduling

    return LoadScopeScheduling(config, log)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m cuda` reads no file without such tests: it may need packages that a bare GPU machine has not."""
    if config.option.markexpr != "cuda" or collection_path.suffix != ".py":
        return None
    here = "cuda" in collection_path.parts or "mark.cuda" in collection_path.read_text(encoding="utf-8")
    return None if here else True


@pytest.fixture(scope="session", autouse=True)
def quick_clock():
    """Files are timed as ever, but not for a second each, which hundreds of them would add up to."""
    from okdc.verification import alone, latency
    from tests.helpers import quick_clock

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alone, "_CLOCK", Path(quick_clock.__file__))
        patch.setattr(latency, "WARM_UP", 0.0)
        patch.setattr(latency, "SECONDS", 0.0)
        yield


@pytest.fixture
def one_thread():
    """As many threads as a process that trains beside another has."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
