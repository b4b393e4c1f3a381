"""The lock of an output folder: two trainings that write to it at once would delete each other's checkpoints."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gradaug_hf.trainer.checkpoints import CheckpointError, remove_partial

# Begins with an underscore, as what is never pushed does.
LOCK = "_training.lock"
# Errors of file systems without locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other trainings out of a folder while the block runs; what a killed one had begun to write is removed.

    The lock is the operating system's and ends with its process, however that ends: a file that a killed training left
    behind is taken over. Worker processes, which may outlive it for a moment, do not hold it.

    Args:
        run_dir: made if it is missing. On a file system without locks a warning says so.

    Raises:
        CheckpointError: a training in another process holds the lock; names host and process.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / LOCK
    with _opened(file) as lock:
        lock.truncate(0)
        lock.write(f"{socket.gethostname()} {os.getpid()}\n")
        lock.flush()
        remove_partial(run_dir)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _opened(file: Path) -> IO[str]:
    """Return the file of a lock, open and locked, that no other training has removed meanwhile."""
    import fcntl  # which Windows lacks, where all but training works

    while True:
        lock = file.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            host, _, process = lock.read().strip().partition(" ")
            lock.close()
            raise CheckpointError(
                f"output_dir is {str(file.parent)!r}, where process {process or '?'} on {host or 'some host'} is "
                "training; give another output_dir, or end that training first"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                lock.close()
                raise
            warnings.warn(
                f"{file.parent} lies on a file system without locks ({error}), so that another training in it would "
                "not be noticed; make sure that there is none",
                stacklevel=5,
            )
        if file.exists() and file.stat().st_ino == os.fstat(lock.fileno()).st_ino:
            return lock
        lock.close()
