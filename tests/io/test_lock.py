"""The lock: one living process holds it, a crash releases it, and whoever is refused is told who holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from llmcompress.errors import OutputError
from llmcompress.io.lock import Holder, Lock

HOLDS = """
import sys, time
from pathlib import Path
from llmcompress.io.lock import Lock
lock = Lock(Path(sys.argv[1]), "the place", "wait")
print("held", flush=True)
time.sleep(600)
"""


def hold(file: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of a file."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(file)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def refusal(file: Path) -> str:
    with pytest.raises(OutputError) as caught:
        Lock(file, "the place", "wait for it")
    return str(caught.value)


@pytest.mark.slow
def test_a_lock_is_refused_while_its_process_lives_and_free_when_that_was_killed(tmp_path: Path) -> None:
    file = tmp_path / "work" / "lock"
    with hold(file) as process:
        told = refusal(file)
        assert told == f"the place is in use by process {process.pid} on {socket.gethostname()}; wait for it"
        os.utime(file, (0, 0))  # however old the file is
        assert refusal(file) == told
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert file.is_file(), "a crash leaves the file"
    lock = Lock(file, "the place", "wait")
    assert json.loads(file.read_text())["pid"] == os.getpid()
    assert str(os.getpid()) in refusal(file)
    lock.release()
    assert not file.exists()
    lock.release()


def test_a_lock_that_nobody_holds_any_more_is_released(tmp_path: Path) -> None:
    Lock(tmp_path / "lock", "the place", "wait")
    Lock(tmp_path / "lock", "the place", "wait").release()


def test_a_file_that_is_deleted_and_made_again_is_never_held_twice(tmp_path: Path) -> None:
    file, held = tmp_path / "work" / "lock", list[int]()

    def take_often(number: int) -> int:
        got = 0
        while got < 60:
            try:
                lock = Lock(file, "the place", "wait")
            except OutputError:
                continue
            held.append(number)
            assert held == [number]
            held.remove(number)
            lock.release()
            got += 1
        return got

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(take_often, range(4))) == [60] * 4


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe", b'{"pid": "x", "host": "", "started": 0}', b"[" * 900]
)
def test_a_lock_file_that_says_nothing_is_no_obstacle(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(text)
    assert Holder.read(text) is None
    Lock(tmp_path / "lock", "the place", "wait").release()


def no_flock(handle: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_where_the_file_system_can_not_lock_what_the_file_says_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", no_flock)
    file, parent = tmp_path / "lock", psutil.Process().parent()
    living = Holder(parent.pid, socket.gethostname(), parent.create_time())
    others = {
        "lives here": living,
        "had this number once": living._replace(started=living.started - 60),
        "is elsewhere": living._replace(host="another-machine"),
        "is gone": living._replace(pid=2**22 + 1),
    }
    for what, holder in others.items():
        file.write_text(json.dumps(holder._asdict()))
        if what in ("lives here", "is elsewhere"):
            assert (
                f"in use by process {parent.pid} on {holder.host} (if that is no run any more, delete {file})"
                in refusal(file)
            )
        else:
            caplog.clear()
            lock = Lock(file, "the place", "wait")
            assert "can't be locked (No locks available): start nothing else that works in" in caplog.text
            assert Holder.read(file.read_bytes()) == Holder.here()
            lock.release()
