"""Checkpoints: whole or not at all, never code, and a person is told what is wrong with a file."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import sys

import pytest
import torch

from okdc.errors import RunError
from okdc.system import files
from okdc.training import checkpoint

resource = pytest.importorskip("resource", reason="limits on the size of a file need POSIX")

PAYLOAD = {"state_dict": {"weight": torch.arange(60_000.0)}, "okdc": {"epoch": 1}}


@pytest.fixture
def small_disk():
    """While it is on, no file can grow beyond 64 KiB, as on a disk that is full."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def number(path) -> int:
    return checkpoint.load(path)["number"]


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "last.pth.tar", PAYLOAD)
    loaded = checkpoint.load_run(tmp_path / "last.pth.tar")
    assert torch.equal(loaded["state_dict"]["weight"], PAYLOAD["state_dict"]["weight"])
    assert loaded["okdc"] == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth.tar"]


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path, request):
    path = tmp_path / "last.pth.tar"
    checkpoint.save(path, PAYLOAD | {"number": 1})
    before = path.read_bytes()
    request.getfixturevalue("small_disk")
    with pytest.raises(RunError, match=r"could not write .*File too large.*is unharmed.*--resume auto"):
        checkpoint.save(path, PAYLOAD | {"number": 2}, keep=2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth.tar"]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RunError, match=r"could not write .*gone/last\.pth\.tar.*No such file"):
        checkpoint.save(tmp_path / "gone" / "last.pth.tar", PAYLOAD)


@pytest.mark.parametrize("mapped", [False, True])
def test_what_was_read_stays_when_the_file_is_replaced(tmp_path, mapped):
    path = tmp_path / "last.pth.tar"
    checkpoint.save(path, PAYLOAD)
    loaded = checkpoint.load(path, mapped)["state_dict"]["weight"]
    checkpoint.save(path, {"state_dict": {"weight": torch.zeros(60_000)}})
    assert torch.equal(loaded, PAYLOAD["state_dict"]["weight"])
    loaded.zero_()  # of a copy that is its own
    assert torch.equal(checkpoint.load(path)["state_dict"]["weight"], loaded)


def test_earlier_files_are_kept(tmp_path):
    path = tmp_path / "last.pth.tar"
    for i in range(4):
        checkpoint.save(path, {"state_dict": {}, "number": i}, keep=3)
    assert [number(p) for p in files.history(path, 3)] == [3, 2, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.1.pth.tar", "last.2.pth.tar", "last.pth.tar"]


def test_a_duplicate_survives_the_next_save(tmp_path):
    last, best = tmp_path / checkpoint.LAST, tmp_path / checkpoint.BEST
    checkpoint.save(best, {"state_dict": {}, "number": 1})
    files.duplicate(best, last)
    checkpoint.save(last, {"state_dict": {}, "number": 2})
    assert (number(best), number(last)) == (1, 2)


class Evil:
    def __init__(self, folder) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, write):
    write({"state_dict": {}, "okdc": Evil(tmp_path / "it_ran")}, tmp_path / "evil.pth.tar")
    with pytest.raises(RunError, match="was not loaded"):
        checkpoint.load(tmp_path / "evil.pth.tar")
    assert not (tmp_path / "it_ran").exists()


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    with pytest.raises(RunError, match=r"holds posix\.mkdir, .*get_extra_state"):
        checkpoint.save(tmp_path / "last.pth.tar", {"state_dict": {}, "okdc": Evil(tmp_path / "it_ran")})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_called_damaged(tmp_path, part):
    path = tmp_path / "last.pth.tar"
    checkpoint.save(path, PAYLOAD)
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(RunError, match="is empty" if part == 0 else r"damaged or cut short \([\d,]+ bytes\)"):
        checkpoint.load_run(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"epoch,loss\n0,1\n", r"not a file that torch\.save wrote"),
        ({"weight": torch.zeros(1)}, "has no 'state_dict'"),
        ([1, 2], "has no 'state_dict'"),
        ({"state_dict": {}}, "no okdc training state.*--initial-checkpoint"),
    ],
)
def test_a_foreign_file_is_told_apart(tmp_path, content, words):
    path = tmp_path / "other.pth.tar"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(RunError, match=words):
        checkpoint.load_run(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut short", {"state_dict": {}}], ids=["damaged", "foreign"])
def test_the_newest_good_file_stands_in_for_those_that_are_not(tmp_path, caplog, content):
    last, older = tmp_path / checkpoint.LAST, tmp_path / "last.1.pth.tar"
    for path in (last, older):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    checkpoint.save(tmp_path / checkpoint.BEST, PAYLOAD | {"number": 1})
    assert checkpoint.load_run(last)["number"] == 1
    assert (
        f"{last} " in caplog.text
        and f"kept before it, {tmp_path / checkpoint.BEST}, which takes its place" in caplog.text
    )
    checkpoint.save(tmp_path / "last.2.pth.tar", PAYLOAD | {"number": 2})
    last.unlink()
    shutil.copyfile(older, last)
    assert checkpoint.load_run(last)["number"] == 2
    assert number(last) == number(tmp_path / "last.2.pth.tar") == 2 and number(tmp_path / checkpoint.BEST) == 1
    with pytest.raises(RunError, match=r"last\.1\.pth\.tar"):  # nothing stands in for a file that was named itself
        checkpoint.load_run(older)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that can be opened and not read")
@pytest.mark.parametrize("unreadable", [checkpoint.LAST, "last.1.pth.tar"])
def test_nothing_stands_in_for_a_file_that_the_system_cannot_read(tmp_path, unreadable):
    last = tmp_path / checkpoint.LAST
    last.write_bytes(b"PK\x03\x04 cut short")
    (tmp_path / unreadable).unlink(missing_ok=True)
    (tmp_path / unreadable).symlink_to("/proc/self/mem")
    checkpoint.save(tmp_path / checkpoint.BEST, PAYLOAD)
    with pytest.raises(RunError, match=rf"{unreadable} cannot be read: Input/output error.*permissions"):
        checkpoint.load_run(last)
    assert (tmp_path / unreadable).is_symlink() and (unreadable == checkpoint.LAST or last.stat().st_size == 14)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), "Stale file handle"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "there is not enough memory"),
    ],
)
def test_nothing_stands_in_for_a_file_that_is_whole(tmp_path, monkeypatch, error, reason):
    last = tmp_path / checkpoint.LAST
    for i in range(2):
        checkpoint.save(last, PAYLOAD | {"number": i}, keep=2)
    load = torch.load

    def load_but_last(path, **options):
        if path == last:
            raise error
        return load(path, **options)

    monkeypatch.setattr(torch, "load", load_but_last)
    with pytest.raises(RunError, match=rf"last\.pth\.tar cannot be read: {reason}\. It may well be whole"):
        checkpoint.load_run(last)
    monkeypatch.undo()
    assert [number(path) for path in files.history(last, 2)] == [1, 0]


def test_the_other_ranks_read_what_the_first_one_chose(tmp_path, monkeypatch):
    last, older = tmp_path / checkpoint.LAST, tmp_path / "last.1.pth.tar"
    for i in range(2):
        checkpoint.save(last, PAYLOAD | {"number": i}, keep=2)
    monkeypatch.setattr(checkpoint, "first", lambda work: older)  # as it is on another rank
    assert checkpoint.load_run(last)["number"] == 0 and number(last) == 1


def test_a_missing_file_or_a_folder_is_told_apart(tmp_path):
    with pytest.raises(RunError, match=r"there is no checkpoint .*nowhere\.pth\.tar"):
        checkpoint.load(tmp_path / "nowhere.pth.tar")
    with pytest.raises(RunError, match=r"is a folder: give .*last\.pth\.tar"):
        checkpoint.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"there is no checkpoint .*file/last"):
        checkpoint.load(tmp_path / "file" / "last.pth.tar")


def test_differences_are_put_in_words():
    here = {"a": torch.zeros(2), "b": torch.zeros(3), "c": {"extra": 1}}
    assert checkpoint.difference(dict(here), here) is None
    saved = {"a": torch.zeros(4), "c": {"extra": 2}, "d": torch.zeros(1)}
    assert checkpoint.difference(saved, here) == (
        "b is missing from the checkpoint; d is only in the checkpoint; a is (4,) in the checkpoint and (2,) here"
    )
    assert checkpoint.difference({}, {str(i): torch.zeros(1) for i in range(5)}).endswith("; and 2 more")
