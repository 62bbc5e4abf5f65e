"""Files of several kinds in one folder, and which process makes one. What is trusted: tests of cuDNN plans."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fastattn.common import disk
from fastattn.common.disk import Files

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")

PLANS, KERNELS = Files("plan", 1 << 20), Files("kernel", 1 << 20)
LABEL = b"a label"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(disk, "POLL", 0.01)
    return tmp_path / "kept"


def test_kinds_do_not_meet(folder: Path) -> None:
    PLANS.store(LABEL, b"plan")
    assert KERNELS.load(LABEL) is None
    KERNELS.store(LABEL, b"kernel")
    assert (PLANS.load(LABEL), KERNELS.load(LABEL)) == (b"plan", b"kernel")
    (plan,), (kernel,) = folder.glob("*.plan"), folder.glob("*.kernel")
    kernel.write_bytes(plan.read_bytes())  # the user's own, whole, and of this label
    assert KERNELS.load(LABEL) is None
    KERNELS.discard(LABEL)
    assert not kernel.exists() and plan.exists()


def test_one_bound_for_all_kinds(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for number in range(6):
        (PLANS if number % 2 else KERNELS).store(b"%d" % number, bytes(10_000))
        for path in folder.iterdir():  # older than what comes
            then = path.stat().st_mtime - 10
            os.utime(path, (then, then))
    monkeypatch.setattr(disk, "MAX_BYTES", 35_000)
    KERNELS.store(b"last", bytes(10_000))
    left = [n for n in range(6) if (PLANS if n % 2 else KERNELS).load(b"%d" % n) is not None]
    assert left == [4, 5] and KERNELS.load(b"last") is not None


def test_files_of_others_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    PLANS.store(LABEL, b"x")
    others = [folder / name for name in ("notes.kernel", "0" * 63 + ".kernel", "0" * 64 + ".cubin", "x.lock")]
    for path in others:
        path.write_bytes(bytes(1000))
    monkeypatch.setattr(disk, "MAX_BYTES", 1)
    KERNELS.store(LABEL, b"x")
    assert all(path.exists() for path in others) and not list(folder.glob("*.plan"))


def test_what_a_killed_writer_left_is_removed_and_never_read(folder: Path) -> None:
    KERNELS.store(LABEL, b"whole")
    (path,) = folder.glob("*.kernel")
    half = path.with_name(f"{path.name}.{'0' * 16}.tmp")
    half.write_bytes(path.read_bytes()[:40])
    os.utime(half, (1, 1))
    assert KERNELS.load(LABEL) == b"whole"
    KERNELS.store(b"another", b"x")
    assert not half.exists() and KERNELS.load(LABEL) == b"whole"


# Claims.


def holder(code: str) -> subprocess.Popen[str]:
    """Another process that holds the claim when it has printed a line."""
    text = (
        "from fastattn.common.disk import Files\nimport time, os\n"
        f"with Files('kernel', 1 << 20).claimed({LABEL!r}):\n    print('held', flush=True)\n    {code}\n"
    )
    path = os.pathsep.join([str(Path(disk.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    found = subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert found.stdout is not None and found.stdout.readline() == "held\n"
    return found


def waited(limit: float = 60.0, **arguments: object) -> float:
    start = time.monotonic()
    with KERNELS.claimed(LABEL, timeout=limit, **arguments):  # type: ignore[arg-type]
        return time.monotonic() - start


def test_one_at_a_time_and_each_label_by_itself() -> None:
    with KERNELS.claimed(LABEL):
        with KERNELS.claimed(b"another"):
            assert waited(0.2) >= 0.2  # not for ever
    assert waited() < 0.2


def test_a_process_that_is_killed_gives_its_claim_up() -> None:
    other = holder("time.sleep(60)")
    done: list[float] = []
    thread = threading.Thread(target=lambda: done.append(waited()))
    thread.start()
    time.sleep(0.2)
    assert not done
    other.kill()
    other.wait()
    thread.join(10.0)
    assert done and 0.2 <= done[0] < 9.0
    assert other.stdout is not None
    other.stdout.close()


def test_a_forked_child_does_not_keep_it(folder: Path) -> None:
    with KERNELS.claimed(LABEL):
        pid = os.fork()
        if not pid:
            time.sleep(30)
            os._exit(0)
    try:
        assert waited() < 5.0
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_waiting_can_be_stopped() -> None:
    with KERNELS.claimed(LABEL):
        assert waited(stop=lambda: True) < 5.0


@pytest.mark.parametrize("what", ["off", "a file", "no locks"])
def test_without_claims_nobody_waits(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "off":
        monkeypatch.setenv("FASTATTN_PLAN_CACHE", "off")
    elif what == "a file":
        folder.write_text("x")
    else:

        def flock(handle: int, how: int) -> None:
            raise OSError("no locks here")

        monkeypatch.setattr(disk.fcntl, "flock", flock)
    with KERNELS.claimed(LABEL):
        assert waited() < 5.0
