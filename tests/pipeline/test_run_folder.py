"""A run folder is one run's at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from okdc.errors import RunError
from okdc.pipeline import run_folder
from okdc.recipe import Recipe

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("process 7 on node", file=file, end="", flush=True)
print("locked", flush=True)
time.sleep(600)
"""


def test_a_folder_is_trained_by_one_run_at_a_time(tmp_path):
    (tmp_path / ".last.pth.tar.7.tmp").touch()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout and holder.stdout.readline() == "locked\n"
    with ExitStack() as held:
        with pytest.raises(RunError, match="is in use by process 7 on node"):
            run_folder.begin(tmp_path, Recipe(), {}, held)
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".last.pth.tar.7.tmp"}
        holder.kill()
        holder.communicate()
        run_folder.begin(tmp_path, Recipe(), {}, held)
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
        assert {path.name for path in tmp_path.iterdir()} == {".lock", "recipe.yaml", "student.json"}


def test_where_there_are_no_locks_what_a_killed_run_left_is_removed_too(tmp_path, monkeypatch):
    (tmp_path / ".last.pth.tar.7.tmp").touch()
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with ExitStack() as held:
        run_folder.begin(tmp_path, Recipe(), {}, held)
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "student.json"}
