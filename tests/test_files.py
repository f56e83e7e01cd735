"""Files are written atomically, also if others use the same name."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import turboattention as ta
from turboattention.errors import FormatError, InputError
from turboattention.files import new_folder, read_json, read_text, write_figure, write_text, write_whole

ROOT = Path(__file__).parents[1]


def test_two_processes_that_save_to_one_path(tmp_path):
    """They wrote into each other's temporary file, and loaders found it damaged under the final name."""
    command = [sys.executable, ROOT / "tests/files_worker.py", tmp_path / "cache", "3"]
    environment = os.environ | {"PYTHONPATH": "src"}
    workers = [
        subprocess.Popen([*command, str(length)], stdout=subprocess.PIPE, env=environment, cwd=ROOT)
        for length in (100, 3000)
    ]
    met = [json.loads(worker.communicate(timeout=120)[0]) for worker in workers]
    assert all(set(one) == {"saves", "loads"} for one in met), met
    assert min(min(one.values()) for one in met) > 5
    assert len(ta.KVCache.load(tmp_path / "cache")) in (100, 3000)
    assert os.listdir(tmp_path) == ["cache"]


def test_threads_that_save_to_one_path(tmp_path):
    caches = []
    for length in (70, 500, 2000):
        caches.append(ta.KVCache(1, 1, 16))
        caches[-1].append(*torch.ones(2, 1, 1, length, 16))
    caches[0].save(tmp_path / "cache")
    failures, loaded = [], set()

    def work(cache: ta.KVCache) -> None:
        try:
            for _ in range(25):
                cache.save(tmp_path / "cache")
                loaded.add(len(ta.KVCache.load(tmp_path / "cache")))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert loaded <= {70, 500, 2000}
    assert os.listdir(tmp_path) == ["cache"]


def test_a_full_disk_leaves_the_old_file(tmp_path, file_limit):
    path = tmp_path / "report.html"
    write_text(path, "old")
    with file_limit(4096), pytest.raises(InputError, match=r"--html: .*report.html cannot be written: File too large"):
        write_text(path, "new" * 10_000, "--html")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "x", fail)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask, rights", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_access_rights_follow_the_umask(tmp_path, umask, rights):
    cache = ta.KVCache(1, 1, 16)
    before = os.umask(umask)
    try:
        cache.save(tmp_path / "cache")
        write_text(tmp_path / "text", "x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("cache", "text")] == [rights] * 2


@pytest.mark.parametrize("exists", [True, False], ids=["to a file", "dangling"])
def test_a_link_stays_a_link(tmp_path, exists):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "cache", tmp_path / "link"
    if exists:
        target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert os.listdir(target.parent) == ["cache"]


def test_links_that_lead_nowhere(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    for save in (lambda path: write_text(path, "x"), ta.KVCache(1, 1, 16).save):
        with pytest.raises(InputError, match=r"path: expected a file, got a symbolic link that leads .* itself: .*a$"):
            save(tmp_path / "a")
    with pytest.raises(FormatError, match=r"which cannot be read .*symbolic links"):
        ta.KVCache.load(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        ta.KVCache.load(tmp_path / "dangling")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "dangling"]


def test_what_is_no_file_stays_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a device or pipe"), ("folder", "a folder")):
        with pytest.raises(InputError, match=f"path: expected a file, got {kind}: .*{name}"):
            write_text(tmp_path / name, "x")
        with pytest.raises(InputError, match=f"path: expected a file, got {kind}"):
            ta.KVCache(1, 1, 16).save(tmp_path / name)
    with pytest.raises(InputError, match="a folder that exists"):
        write_text(tmp_path / "none" / "x", "x")
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="drops the rights of root")
def test_a_folder_without_permission(tmp_path):
    write_text(tmp_path / "x", "old")
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(InputError, match=r"x cannot be written: Permission denied|a folder that exists"):
            write_text(tmp_path / "x", "new")
    finally:
        os.seteuid(0)
    assert (tmp_path / "x").read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("rights", [0o600, 0o640, 0o666])
def test_a_file_that_is_replaced_keeps_its_rights(tmp_path, rights):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(rights)
    (tmp_path / "link").symlink_to(path)
    write_text(path, "new")
    write_text(tmp_path / "link", "newer")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("newer", rights)


def leftover(folder: Path, process: int, age: float) -> str:
    """What a process killed while it wrote leaves behind."""
    left = folder / f".turboattention-{process}-abc_d12.partial"
    left.mkdir()
    (left / "file").write_text("half")
    os.utime(left, (time.time() - age,) * 2)
    return left.name


def test_what_a_killed_process_left_behind_goes_away(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leftover(tmp_path, gone.pid, 7200)
    running = leftover(tmp_path, os.getpid(), 7200)
    other = tmp_path / ".turboattention-notes.partial"
    other.mkdir()
    write_text(tmp_path / "x", "new")
    assert sorted(os.listdir(tmp_path)) == sorted(["x", running, other.name])
    young = leftover(tmp_path, gone.pid, 60)  # by a process elsewhere that shares the disk, perhaps
    write_text(tmp_path / "x", "new")
    assert young in os.listdir(tmp_path)


def test_a_killed_saver(tmp_path):
    """Really killed, in the middle of writing."""
    code = (
        "import sys, os, signal; from turboattention.files import write_whole;"
        "write_whole(sys.argv[1], lambda file: (file.write_text('half'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    write_text(tmp_path / "x", "old")
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], env=os.environ | {"PYTHONPATH": "src"}, cwd=ROOT)
    assert ran.returncode == -signal.SIGKILL
    (left,) = {*os.listdir(tmp_path)} - {"x"}
    assert (tmp_path / "x").read_text() == "old"
    os.utime(tmp_path / left, (0, 0))
    write_text(tmp_path / "x", "new")
    assert os.listdir(tmp_path) == ["x"]


def test_file_and_folder_are_on_the_disk_before_the_call_returns(tmp_path, monkeypatch):
    seen, flush = [], os.fsync

    def note(handle: int) -> None:
        seen.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        flush(handle)

    monkeypatch.setattr(os, "fsync", note)
    write_text(tmp_path / "x", "new")
    assert seen == [False, True]


def test_figures_are_written_whole(tmp_path, file_limit):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.subplots()
    write_figure(tmp_path / "x.png", figure)
    before = (tmp_path / "x.png").read_bytes()
    with file_limit(1000), pytest.raises(InputError, match=r"--picture: .* cannot be written"):
        write_figure(tmp_path / "x.png", figure, "--picture")
    assert (tmp_path / "x.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["x.png"]


@pytest.mark.parametrize("read", [read_text, read_json])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(OSError, match="it is a folder, device or pipe"):
            read(path)
    with pytest.raises(OSError, match="null byte"):
        read("a\0b")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")


def test_a_text_is_read_up_to_a_limit(tmp_path):
    (tmp_path / "text").write_bytes("ä\r\nb\rc".encode())
    assert read_text(tmp_path / "text", 7) == "ä\nb\nc"
    with pytest.raises(OSError, match="it has more than 0 MiB"):
        read_text(tmp_path / "text", 6)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="it has more than 64 MiB"):
        read_json(tmp_path / "sparse")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000], ids=["lists", "objects"])
def test_json_that_is_nested_too_deeply(text, tmp_path):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "file")


def test_a_new_folder_goes_if_nothing_was_written(tmp_path):
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "old/a/b"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "old") == []
    with (
        pytest.raises(InputError, match=r"^--out: .* cannot be written: Not a directory"),
        new_folder(Path("/dev/null/a"), "--out"),
    ):
        pass
    with new_folder(tmp_path / "old/a"):
        (tmp_path / "old/a/file").touch()
    assert (tmp_path / "old/a/file").exists()
