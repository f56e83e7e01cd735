"""Atomic file writes, and reads of files that a user named.

A file is written to a temporary folder next to the target, flushed to disk, and renamed to the target. Readers see
either the old or the new file; of several concurrent writers, the last one wins.

Only regular files are read: a pipe may block forever, and a device may have no end.
"""

from __future__ import annotations

import contextlib
import json
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
LARGEST_TEXT = 2**26
"""Bytes of the largest text or JSON file that is read. A calibration of a large model has about 2**24."""
_LOOKED_AT = 4096
"""Bytes at the beginning of a file by which its kind is recognized."""


def write_text(path: str | os.PathLike[str], text: str, argument: str = "path") -> None:
    """Write `text` as UTF-8, as `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), argument)


def append_text(path: str | os.PathLike[str], text: str, argument: str = "path") -> None:
    """Append `text` as UTF-8. After an error, the file may end with a part of it.

    Raises:
        InputError: the file cannot be written. `argument` names it in the message.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{argument}: {os.fspath(path)} cannot be written: {error.strerror or error}") from error


def write_figure(path: str | os.PathLike[str], figure: Any, argument: str = "path", **options: Any) -> None:
    """Write a matplotlib figure in the format of `path`'s suffix, as `write_whole`."""
    kind = Path(path).suffix.removeprefix(".").lower()
    write_whole(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=110, **options), argument)


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object], argument: str = "path") -> None:
    """Call `write` with a temporary path and move the file it writes to `path`.

    Follows symbolic links. The new file has the permissions of the file it replaces, or those of the umask. Temporary
    files that killed processes left in the folder are removed.

    Raises:
        InputError: the file cannot be written, for example because the disk is full or the folder is not writable, or
            `path` is not a regular file. An existing file is then unchanged. `argument` names it in the message.
    """
    target = Path(os.path.realpath(path))
    name, folder = os.fspath(path), None
    if not os.path.isdir(target.parent):
        raise InputError(f"{argument}: expected a file in a folder that exists, got {name}")
    if os.path.islink(target):  # after all links were followed
        raise InputError(f"{argument}: expected a file, got a symbolic link that leads back to itself: {name}")
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
def new_folder(path: Path, argument: str = "path") -> Iterator[None]:
    """Create a folder and those above it for what the block writes there; if it fails, remove those that stay empty.

    Raises:
        InputError: the folder cannot be created. `argument` names it in the message.
    """
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for folder in created:
            with contextlib.suppress(OSError):  # it does not exist, or is not empty
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(f"{argument}: {path} cannot be written: {error.strerror or error}") from error
        raise


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a name under which the current file at `path` can be opened repeatedly, even if it is replaced meanwhile.

    Raises OSError, without blocking, also if `path` is a folder, device or pipe.
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # the name has a zero byte
        raise OSError(str(error)) from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is a folder, device or pipe")
        own = f"/dev/fd/{handle}"
        yield own if os.path.exists(own) else os.fspath(path)
    finally:
        os.close(handle)


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """The kind of a file, for messages: "a folder", "an empty file" or "a text file"; None for other kinds."""
    if os.path.isdir(path):
        return "a folder"
    try:
        with open_regular(path) as opened, open(opened, "rb") as file:
            begin = file.read(_LOOKED_AT)
    except OSError:
        return None
    text = begin.decode("utf-8", "replace")
    if len(begin) == _LOOKED_AT:
        text = text[:-4]  # a character may be cut off
    is_text = not any(letter == "�" or (letter < " " and letter not in "\t\n\r\f") for letter in text)
    return "an empty file" if not begin else "a text file" if is_text else None


def read_text(path: str | os.PathLike[str], limit: int = LARGEST_TEXT) -> str:
    """A regular file of UTF-8, with "\\n" at the ends of its lines.

    Raises:
        OSError: as `open_regular`, and if the file has more than `limit` bytes. UnicodeDecodeError: other bytes.
    """
    with open_regular(path) as opened, open(opened, "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(f"it has more than {limit >> 20} MiB")
    return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a regular file of JSON. Raises OSError as `read_text`, and ValueError if it is not JSON."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """Raises ValueError if `text` is not JSON, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _settle(file: Path, folder: Path, target: Path) -> None:
    """Flush the file to disk and set the permissions of the file that it replaces, or those of a new file."""
    try:
        rights = stat.S_IMODE(os.stat(target).st_mode)
    except FileNotFoundError:
        # Reading the umask means changing it, which other threads would see, so create a file to find it.
        probe = os.open(folder / "probe", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        rights = os.fstat(probe).st_mode & 0o777
        os.close(probe)
    os.chmod(file, rights)
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def _flush(folder: Path) -> None:
    """Flush the folder's entries to disk, if the file system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _clean(folder: Path) -> None:
    """Remove temporary folders whose process no longer runs on this machine. On a shared disk, it may run on another
    one, so only those that are over an hour old."""
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
    except OSError:  # the process belongs to another user
        return True
    return True
