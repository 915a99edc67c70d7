"""A lock on a file that one process holds while it lives; a crash releases it.

The lock is flock's, on a file that stays open: the kernel drops it when the process ends, for whatever
reason. The age of the file has no meaning. The file also says who holds the lock, to name that process to
whoever is refused. On a network disk, flock works between machines if the server does the locking: NFS since
Linux 2.6.12 (not mounted with `local_lock`), CephFS, GPFS, Lustre mounted with `flock`. If a file system
refuses flock, the content of the file decides, with a warning: a process of this machine that has ended holds
nothing, and one of another machine holds the lock until its file is deleted. Two processes that start at the
same moment there are not kept apart.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import psutil

from llmcompress.errors import OutputError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
LONGEST = 1000  # bytes of what a lock file says
TRIES = 50  # attempts to lock a file that other processes delete
MOMENT = 0.02  # seconds between attempts to read who has just got a lock


class Holder(NamedTuple):
    """The process that holds a lock; `started` is its start time, in seconds since 1970."""

    pid: int
    host: str
    started: float

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(os.getpid(), socket.gethostname(), psutil.Process().create_time())

    @classmethod
    def read(cls, text: bytes) -> Holder | None:
        """The holder that a lock file names; None if its content can't be read."""
        try:
            said = json.loads(text)
            return cls(int(said["pid"]), str(said["host"]), float(said["started"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    @property
    def lives(self) -> bool:
        """Whether the process may still be running; a process of another machine always may."""
        if self.host != socket.gethostname():
            return True
        try:
            return abs(float(psutil.Process(self.pid).create_time()) - self.started) < 1
        except (psutil.Error, ValueError, OverflowError):
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Lock:
    """A lock that is held from its creation until `release`, or until the process ends.

    Errors: OutputError if another process holds it, which names that process; OSError if there can be no such
    file.
    """

    def __init__(self, file: Path, what: str, advice: str) -> None:
        self.file, self.what, self.advice = file, what, advice
        handle = self._open()
        self._close = weakref.finalize(self, os.close, handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(Holder.here()._asdict()).encode(), 0)

    def release(self) -> None:
        """Release the lock; the file is deleted before another process can hold it."""
        if self._close.alive:
            with contextlib.suppress(OSError):
                self.file.unlink()
            self._close()

    def _open(self) -> int:
        """Open and lock the file, and make sure that its name still leads to it."""
        for _ in range(TRIES):
            try:
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                handle = os.open(self.file, flags, 0o644)
            except FileNotFoundError:  # the previous holder has just removed the folder
                self.file.parent.mkdir(parents=True, exist_ok=True)
                continue
            try:
                self._lock(handle)
                if self._is(handle):
                    return handle
                os.close(handle)  # it was deleted before it was locked: others will lock another file
            except BaseException:
                os.close(handle)
                raise
        raise OutputError(f"{self.file} is made and deleted by others all the time; {self.advice}")

    def _lock(self, handle: int) -> None:
        if fcntl is None:
            return self._believe(handle, "this system has no flock")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(self._said(handle, patient=True)) from None
        except OSError as error:
            self._believe(handle, error.strerror or str(error))

    def _believe(self, handle: int, why: str) -> None:
        """Without flock: the process that the file names holds the lock, unless it has ended."""
        holder = self._said(handle)
        if holder is not None and holder.lives:
            raise self._refusal(holder, f" (if that is no run any more, delete {self.file})")
        place = self.file.parent
        logger.warning("%s can't be locked (%s): start nothing else that works in %s", self.file, why, place)

    def _said(self, handle: int, *, patient: bool = False) -> Holder | None:
        """The holder that the file names, which is written a moment after it is locked."""
        for _ in range(10 if patient else 1):
            if (holder := Holder.read(os.pread(handle, LONGEST, 0))) is not None or not patient:
                return holder
            time.sleep(MOMENT)
        return None

    def _refusal(self, holder: Holder | None, more: str = "") -> OutputError:
        return OutputError(f"{self.what} is in use by {holder or 'another process'}{more}; {self.advice}")

    def _is(self, handle: int) -> bool:
        """Whether the name still leads to the open file."""
        with contextlib.suppress(OSError):
            ours, named = os.fstat(handle), self.file.lstat()
            return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)
        return False
