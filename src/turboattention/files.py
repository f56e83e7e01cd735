"""Files that appear whole or not at all, whoever else reads or writes the same name.

A file is written under a name of its own in the same folder, flushed to the disk, and then takes the place of
the old one in one step: readers see the old file or the new one, and of several writers the last one wins.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

_LEFT_BEHIND = re.compile(r"\.turboattention-(\d+)-\w+\.partial")
_OLD = 3600.0  # seconds


def write_text(path: str | os.PathLike[str], text: str, argument: str = "path") -> None:
    """Write `text` as UTF-8; as `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), argument)


def write_figure(path: str | os.PathLike[str], figure: Any, argument: str = "path", **options: Any) -> None:
    """matplotlib's `figure` as the kind of file that `path` is named for; as `write_whole`."""
    kind = Path(path).suffix.removeprefix(".").lower()
    write_whole(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=110, **options), argument)


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object], argument: str = "path") -> None:
    """Have `write` make a file, given where, and put it at `path`. A link's target is written, not the link; access
    rights are those of the file that was there, and follow the umask where none was. What a process that was killed
    left behind in the folder goes away.

    Raises:
        InputError: it cannot be written, as the disk is full or its folder is not writable; or `path` is no regular
            file. What was there is then as it was. `argument` is what messages call it.
    """
    target = Path(os.path.realpath(path))
    name, folder = os.fspath(path), None
    if not os.path.isdir(target.parent):
        raise InputError(f"{argument}: expected a file in a folder that exists, got {name}")
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "a folder" if os.path.isdir(target) else "a device or pipe"
        raise InputError(f"{argument}: expected a file, got {kind}: {name}")
    try:
        _clean(target.parent)
        folder = Path(tempfile.mkdtemp(prefix=f".turboattention-{os.getpid()}-", suffix=".partial", dir=target.parent))
        temporary = folder / "file"
        write(temporary)
        _settle(temporary, folder, target)
        os.replace(temporary, target)
        _flush(target.parent)
    except OSError as error:
        raise InputError(f"{argument}: {name} cannot be written: {error.strerror or error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def standing_file(path: str | os.PathLike[str]) -> Iterator[str]:
    """A name under which the file now at `path` can be opened, however often, even where another takes its place.

    Raises OSError, without waiting, also where `path` is a folder, device or pipe.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is a folder, device or pipe")
        own = f"/dev/fd/{handle}"
        yield own if os.path.exists(own) else os.fspath(path)
    finally:
        os.close(handle)


def _settle(file: Path, folder: Path, target: Path) -> None:
    """Its bytes on the disk, and the access rights of the file that it replaces, or of any new file here."""
    try:
        rights = stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        # Only making a file tells the umask without changing it, which other threads would see.
        probe = os.open(folder / "probe", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        rights = os.fstat(probe).st_mode & 0o777
        os.close(probe)
    os.chmod(file, rights)
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def _flush(folder: Path) -> None:
    """The folder's entries on the disk, where a file system does that."""
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _clean(folder: Path) -> None:
    """Remove what writers left behind that are no more: their process is gone, here, and they began an hour ago, since
    on a shared disk it may run elsewhere."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            found = _LEFT_BEHIND.fullmatch(entry.name)
            if found and entry.is_dir(follow_symlinks=False) and not _runs(int(found[1])):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > _OLD:
                        shutil.rmtree(entry.path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True
