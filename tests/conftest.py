"""Settings of the whole test run."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core: two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
