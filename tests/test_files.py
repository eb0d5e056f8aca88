"""Locks: held by one process, seen by others, gone with their process, and done without where there are none."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from anomaly_lab import sweep
from anomaly_lab.errors import shortened
from anomaly_lab.files import is_locked, locked, remove_parts, take_lock, write_text

HOLD = """
import sys, time
from pathlib import Path
from anomaly_lab.files import locked
with locked(Path(sys.argv[1])) as mine:
    print(bool(mine), flush=True)
    time.sleep(600)
"""


def test_a_folder_is_locked_by_one_process_until_it_dies(tmp_path: Path) -> None:
    part = tmp_path / ".scores.npz.0123abcd.part"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "True\n"
            part.write_bytes(b"half")
            assert is_locked(tmp_path / ".lock")
            with locked(tmp_path) as mine:
                assert not mine and part.exists(), "another process may be writing it"
        finally:
            other.kill()
    assert not is_locked(tmp_path / ".lock")
    with locked(tmp_path) as mine:
        assert mine and not part.exists(), "what a killed process left half-written"
        assert is_locked(tmp_path / ".lock")


def test_a_lock_goes_with_the_folder_it_lay_in(tmp_path: Path) -> None:
    with locked(tmp_path / "run") as lock:
        assert lock is not None and lock.kept()
        shutil.rmtree(tmp_path / "run")
        assert not lock.kept()
        with locked(tmp_path / "run") as other:  # as another process that starts the run anew
            assert other is not None and other.kept() and not lock.kept()


def test_to_ask_takes_no_lock_away(tmp_path: Path) -> None:
    assert not is_locked(tmp_path / ".lock"), "no file, no lock"
    with open(tmp_path / ".lock", "w") as file:
        assert not is_locked(tmp_path / ".lock") and take_lock(file) and is_locked(tmp_path / ".lock")
        assert take_lock(file), "its own"


def test_without_locks_a_folder_is_ones_own_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    part = tmp_path / "new" / ".scores.npz.0123abcd.part"
    part.parent.mkdir()
    part.write_bytes(b"half")
    with locked(tmp_path / "new") as mine:
        assert mine and part.exists(), "without a lock it might be somebody's"
    assert "cannot be locked" in caplog.text
    assert not is_locked(tmp_path / "new" / ".lock")


def test_what_is_printed_to_a_reader_that_has_left_goes_nowhere() -> None:
    read, write = os.pipe()
    with open(write, "w") as stream:
        os.close(read)
        sweep._show("a line", stream)
        sweep._show("another", stream)


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="it is a folder, name a file in it"):
        write_text(tmp_path, "")
    assert not list(tmp_path.parent.glob(".*.part"))


def test_parts_of_a_given_age_go(tmp_path: Path) -> None:
    old, new = tmp_path / "a/.report.md.0123abcd.part", tmp_path / ".report.md.4567abcd.part"
    old.parent.mkdir()
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    remove_parts(tmp_path, seconds=3600)
    assert not old.exists() and new.exists()
    remove_parts(tmp_path)
    assert not new.exists()


def test_an_error_in_its_first_words() -> None:
    assert shortened(ValueError("two\n lines")) == "two lines"
    assert shortened(ValueError("x" * 1000)) == "x" * 200
    assert shortened(EOFError()) == "EOFError"
