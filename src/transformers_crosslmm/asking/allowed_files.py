"""Opens files named by untrusted users, within allowed folders only. POSIX only."""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..video_source import VideoOpenError, shown

SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)
"""Errors of a system without free file descriptors, processes or memory; the file is not at fault."""


class NotAllowedError(VideoOpenError):
    """The path is in none of the allowed folders; the file may or may not exist."""


def open_below(path: str | os.PathLike[str], roots: Sequence[Path]) -> BinaryIO:
    """Opens a regular file, unbuffered, within one of the roots (absolute, with their own links resolved).

    Links are resolved before the check. The resolved path is then opened folder by folder without following links, so
    a link created after the check is not followed.
    Raises VideoOpenError, its subclass NotAllowedError, and OSError only for one of `SHORTAGES`.
    """
    named = shown(os.fspath(path))
    try:
        resolved = Path(os.path.realpath(path))
        root = next((root for root in roots if resolved.is_relative_to(root)), None)
        if root is None:
            raise NotAllowedError(f"{named} must lie in {' or '.join(map(str, roots)) or 'an allowed folder'}.")
        descriptor = _open_step_by_step(root, resolved.relative_to(root).parts or (".",))
    except (OSError, ValueError) as error:
        if isinstance(error, VideoOpenError) or getattr(error, "errno", None) in SHORTAGES:
            raise
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in (errno.ELOOP, errno.ENOTDIR):  # a link created after the check
            raise NotAllowedError(f"{named} changed while it was opened.") from error
        raise VideoOpenError(f"Cannot open {named}: {reason}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VideoOpenError(f"{named} is not a regular file.")
    return open(descriptor, "rb", buffering=0)


def _open_step_by_step(root: Path, parts: Sequence[str]) -> int:
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        return os.open(parts[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    finally:
        os.close(folder)


__all__ = ["SHORTAGES", "NotAllowedError", "open_below"]
