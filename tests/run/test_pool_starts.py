"""Starts that fail, are interrupted or find an unusual machine: the reason in words, nothing left, another works."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from bpkit.run.errors import NoRoom
from bpkit.run.processes import launch
from bpkit.run.processes.pool import Pool
from bpkit.run.transports.shared import files as memory
from bpkit.run.transports.shared import names

from .pools import gone, our_files
from .test_pool_scripts import family, files_of, start

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", ["shm", "gloo"])
@pytest.mark.parametrize("where", ["_start", "_until_ready"])
def test_an_interrupted_start_is_an_interrupt(monkeypatch: pytest.MonkeyPatch, backend: str, where: str) -> None:
    original, seen = getattr(launch.Workers, where), []

    def interrupted(workers: launch.Workers, *args: object) -> None:
        original(workers, *args)
        seen.extend(process.pid for process in workers.processes)
        raise KeyboardInterrupt

    with Pool(2, backend) as pool:
        monkeypatch.setattr(launch.Workers, where, interrupted)
        with pytest.raises(KeyboardInterrupt) as info:
            pool.start()
        assert info.value.__context__ is None
        assert len(seen) == 2 and gone(seen, 2.0) and pool.pids == () and not our_files()
        monkeypatch.undo()
        assert pool.call(lambda comm: comm.rank) == [0, 1]


def test_an_interrupt_while_semaphores_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], names.create_semaphore

    def interrupted(name: str, value: int) -> object:
        made.append(original(name, value))
        if len(made) == 5:
            raise KeyboardInterrupt  # the fifth has been made, and nobody has been told
        return made[-1]

    monkeypatch.setattr(names, "create_semaphore", interrupted)
    with Pool(2) as pool:
        with pytest.raises(KeyboardInterrupt):
            pool.start()
        assert not our_files()
        monkeypatch.undo()
        assert pool.call(lambda comm: comm.rank) == [0, 1]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("seconds", [0.1, 1.0])
def test_ctrl_c_while_workers_start(tmp_path: Path, method: str, seconds: float) -> None:
    process = start(tmp_path, f"""
        from bpkit.run.processes.pool import Pool
        print("go")
        for go in (1, 2):
            try:
                with Pool(2, start_method={method!r}) as pool:
                    print(pool.call(lambda comm: comm.rank))
            except KeyboardInterrupt as error:
                print("interrupted", error.__context__)
        """)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    time.sleep(seconds)  # the fork server, or the workers, begin, or load torch
    for pid in [*family(process.pid), process.pid]:
        os.kill(pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert out.splitlines() == ["interrupted None", "[0, 1]"] and err == "", err
    assert not files_of(process.pid)


def test_a_worker_that_cannot_join_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with Pool(2) as pool:
        monkeypatch.setattr(launch.os, "getcwd", lambda: str(folder / "away"))
        with pytest.raises(RuntimeError, match=r"rank 0 could not join the others:\n(.|\n)*FileNotFoundError.*away"):
            pool.start()
        assert not our_files()
        monkeypatch.undo()
        assert pool.call(lambda comm: comm.rank) == [0, 1]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_a_long_path_for_temporary_files(tmp_path: Path, backend: str, method: str) -> None:
    long = tmp_path / ("x" * 110)
    long.mkdir()
    process = start(tmp_path, f"""
        from bpkit.run.processes.pool import Pool
        with Pool(2, {backend!r}, start_method={method!r}) as pool:
            print(pool.call(lambda comm: comm.rank))
        """, TMPDIR=str(long))  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert out == "[0, 1]\n" and process.returncode == 0, err
    assert not files_of(process.pid) and not list(long.iterdir())


def test_no_place_for_sockets_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "x" * 90)
    monkeypatch.setattr(memory, "SHORT", ("/nowhere",))
    with pytest.raises(OSError, match=r"no folder for the sockets of workers: the path of /tmp/x+ is too long, and "
                                      r"none of /nowhere can be written: set TMPDIR to one of at most 60 characters"):
        launch._meeting(-1)


def test_an_interface_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pool(2, "gloo") as pool:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,nic7")
        with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME='lo,nic7': no network interface 'nic7' is here, "
                                             r"there are .*lo.*; name one of them, or unset it"):
            pool.start()
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
        assert pool.call(lambda comm: comm.rank) == [0, 1]


SCARCE = """
    import os, subprocess, sys
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", "/dev/shm"], check=True)
    {fill}
    from bpkit.run.errors import NoRoom
    from bpkit.run.processes.pool import Pool
    import torch
    with Pool(2) as pool:
        print(pool.backend, pool.call(lambda comm, x: float(comm.all_reduce(x)[0]), torch.ones(100_000)))
        print(pool.backend_reason)
    try:
        Pool(2, "shm")
    except NoRoom as error:
        print(error)
    """


@pytest.mark.parametrize(("fill", "words"), [
    ("open('/dev/shm/full', 'wb').write(bytes(16384))", "0.0 MB are free in /dev/shm: enlarge it"),
    ("subprocess.run(['mount', '-o', 'remount,ro', '/dev/shm'], check=True)", "in /dev/shm, which is read-only: "),
])  # fmt: skip
def test_shared_memory_that_is_full_or_read_only(tmp_path: Path, fill: str, words: str) -> None:
    mount = ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    process = start(tmp_path, SCARCE.format(fill=fill), ["unshare", "-m"])
    out, err = process.communicate(timeout=60)
    lines = out.splitlines()
    assert lines[:1] == ["gloo [2.0, 2.0]"] and len(lines) == 3 and process.returncode == 0, err
    for line in lines[1:]:
        assert words in line and "docker run --shm-size=2g" in line and "backend='gloo'" in line


def test_shared_memory_that_fills_up_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str, value: int) -> object:
        raise OSError(28, "No space left on device")

    with Pool(2, "shm") as pool:
        monkeypatch.setattr(names, "create_semaphore", full)
        with pytest.raises(NoRoom, match=r"backend 'shm' with 2 workers needs .* --shm-size"):
            pool.start()
        monkeypatch.undo()
        assert pool.call(lambda comm: comm.rank) == [0, 1] and not our_files()


def test_no_file_is_left_open(tmp_path: Path) -> None:
    process = start(tmp_path, """
        import warnings
        from bpkit.run.processes.pool import Pool
        for backend in ("shm", "gloo"):
            with Pool(2, backend) as pool:
                pool.call(print, 1)
                try:
                    pool.call(lambda comm: 1 / comm.rank)
                except RuntimeError:
                    assert pool.logs == ["", ""]
                pool.start()
        """, flags=["-X", "dev", "-W", "error::ResourceWarning"])  # fmt: skip
    out, err = process.communicate(timeout=100)
    assert err == "" and process.returncode == 0, err
    assert out.count("[rank 0]") == 2


def test_what_a_failed_call_printed_is_kept(capsys: pytest.CaptureFixture) -> None:
    def fail(comm: object) -> None:
        print("last words")
        os.kill(os.getpid(), signal.SIGKILL)

    with Pool(1) as pool:
        with pytest.raises(RuntimeError):
            pool.call(fail)
        assert pool.logs == ["last words\n"] and "[rank 0] last words" in capsys.readouterr().out


def test_closing_ends_a_call_of_another_thread_in_words() -> None:
    from bpkit.run.errors import Stopped

    pool, outcome = Pool(2), []
    pool.start()
    pids = pool.pids

    def run() -> None:
        try:
            pool.call(lambda comm: time.sleep(60))
        except Stopped as error:
            outcome.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.3)
    pool.close()
    thread.join(5.0)
    assert outcome == ["<lambda>() was ended: its cluster was closed meanwhile"] and gone(pids, 2.0)


def test_a_watch_may_close_the_pool_that_it_watches() -> None:
    from bpkit.run.errors import Stopped

    pool = Pool(2)
    with pytest.raises(Stopped, match="was closed"):
        pool.call(lambda comm: time.sleep(60), watch=lambda marks: pool.close())
    assert pool.pids == ()


def test_files_of_another_container_are_let_alone(tmp_path: Path) -> None:
    """A namespace of pids of its own, in which the pid of a living program is nobody's here."""
    if subprocess.run(["unshare", "-p", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a namespace")
    code = """
        import os
        from bpkit.run.transports.shared import files as memory
        os.close(memory.create(path := os.path.join("/dev/shm", memory.unique_name()), 10, "a file"))
        print(path, flush=True)
        input()
        """
    process = start(tmp_path, code, ["unshare", "-p", "--fork", "--mount-proc"], stdin=subprocess.PIPE)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    pid = int(path.name.split("-")[1])
    assert pid < 100 and path.exists()
    stale = path.with_name(path.name.replace(f"-{pid}-", "-4194303-"))  # nobody's number in any namespace
    stale.touch()
    try:
        memory.sweep()
        assert path.exists() and stale.exists()  # neither is known to be dead
    finally:
        stale.unlink()
        path.unlink()
    process.communicate("\n", timeout=30)


@pytest.mark.parametrize("children", [0, 1])
def test_a_killed_caller_leaves_no_folder(tmp_path: Path, children: int) -> None:
    """However long a worker takes to remove it: what waits for calls, too, sees that the caller is gone."""
    process = start(tmp_path, f"""
        import os, time
        from bpkit.run.processes.pool import Pool
        def slow_disk(comm):
            import shutil
            remove = shutil.rmtree
            shutil.rmtree = lambda *args, **named: (time.sleep(0.3), remove(*args, **named))
        pool = Pool(2)
        pool.call(slow_disk)
        if {children} and os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        print(*pool.pids, flush=True)
        time.sleep(60)
        """)  # fmt: skip
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    everyone = family(process.pid)
    servers = [pid for pid in everyone if b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2 and set(workers) < set(everyone) and servers and files_of(process.pid)
    process.kill()
    process.wait()
    assert gone([*workers, *servers], 2.0)
    assert not files_of(process.pid)
    for pid in everyone:  # the forked child
        if pid not in workers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def test_the_folder_of_a_caller_killed_without_workers_is_swept(tmp_path: Path) -> None:
    process = start(tmp_path, """
        import time
        from bpkit.run.processes.pool import Pool
        with Pool(1) as pool:
            pool.start()
        print("closed", flush=True)
        time.sleep(60)
        """)  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "closed\n"
    process.kill()
    process.wait()
    assert files_of(process.pid)
    memory.sweep()
    assert not files_of(process.pid)
