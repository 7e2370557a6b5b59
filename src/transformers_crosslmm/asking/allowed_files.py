"""Files that strangers name, opened below the folders that they may read. POSIX only."""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO


class NotAllowedError(PermissionError):
    """The file lies in none of the allowed folders, whether or not it exists."""


def open_below(path: str | os.PathLike[str], roots: Sequence[Path]) -> BinaryIO:
    """Opens a regular file, unbuffered, that lies below one of the roots (absolute, their own links resolved).

    Links are resolved before the check. What is then opened is opened folder by folder without following any, so that
    one that somebody puts there in between leads nowhere.
    Raises NotAllowedError, OSError for what cannot be opened, and ValueError for what is no path.
    """
    resolved = Path(os.path.realpath(path))
    root = next((root for root in roots if resolved.is_relative_to(root)), None)
    if root is None:
        raise NotAllowedError(errno.EACCES, "The file must lie in an allowed folder", os.fspath(path))
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        *parents, name = resolved.relative_to(root).parts or (".",)
        for parent in parents:
            inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Without O_NONBLOCK a named pipe would wait here for a writer.
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link, or a file as a folder: not what was resolved
            raise NotAllowedError(error.errno, "The file changed while it was opened", os.fspath(path)) from error
        raise
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", os.fspath(path))
    return open(descriptor, "rb", buffering=0)


__all__ = ["NotAllowedError", "open_below"]
