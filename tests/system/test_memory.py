"""What is free is what the container may still have, where it has less than the machine."""

from __future__ import annotations

import pytest

from okdc.system import memory


@pytest.mark.parametrize("names", [group[1:] for group in memory._GROUPS], ids=["v2", "v1"])
def test_a_container_has_what_its_group_leaves(tmp_path, monkeypatch, names):
    monkeypatch.setattr(memory, "_GROUPS", ((tmp_path, *names),))
    machine = memory.total()
    limit, used, cached = names
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("700000\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{cached} 200000\nother 7\n")
    assert (memory.total(), memory.free()) == (1_000_000, 500_000)
    (tmp_path / limit).write_text("max\n")
    assert memory.total() == machine and (memory.free() or 10**9) > 1_000_000
