"""Files that commands write: whole or not at all, over files alone, and never over what is read."""

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from other_users import MALLORY, as_root, user

pytest.importorskip("matplotlib", reason="reports need matplotlib")
pytest.importorskip("jinja2", reason="reports need jinja2")

from benchmarks.report.__main__ import main as report
from fastattn.bench import output
from fastattn.cli import main as cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
SOURCE = str(Path(output.__file__).parents[2])
ROOT = Path(__file__).parents[2]


def report_process(*argv, **more):
    """`benchmarks.report` as one runs it, on the result file that the tests made."""
    environment = os.environ | {"PYTHONPATH": f"{SOURCE}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.report", *map(str, argv)]
    return subprocess.run(
        command, capture_output="stdout" not in more, text=True, timeout=120, env=environment, check=False, **more
    )


@pytest.fixture
def result(tmp_path):
    path = tmp_path / "r.json"
    data = {"benchmark": "new", "environment": {"gpu": "G"}, "command": "c", "date": "2026-01-02", "figures": {"a": 1}}
    path.write_text(json.dumps(data))
    return path


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# --- files


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        old = os.umask(mask)
        try:
            output.write(tmp_path / f"{mask}", "x")
        finally:
            os.umask(old)
        assert stat.S_IMODE((tmp_path / f"{mask}").stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755])
def test_a_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(mode)
    output.write(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)
    assert left(tmp_path) == ["x"]


def test_no_set_user_bits_are_kept(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o6755)
    output.write(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


@as_root
def test_a_file_of_another_stays_theirs(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    os.chown(path, MALLORY, MALLORY)
    output.write(path, "new")
    assert (path.stat().st_uid, path.read_text()) == (MALLORY, "new")


def test_a_reader_keeps_the_old_file_whole(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")
    with path.open() as reader:
        output.write(path, "new")
        assert reader.read() == "old"


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("old")
    (tmp_path / "middle").symlink_to("there/file")
    (tmp_path / "link").symlink_to("middle")
    output.check([tmp_path / "link"])
    output.write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "middle").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "new"
    assert left(tmp_path / "there") == ["file"]


@pytest.mark.parametrize("target", ["nothing", "link"])
def test_a_link_to_nothing_is_refused(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ValueError, match="cannot be written: "):
        output.check([tmp_path / "link"])
    with pytest.raises(OSError, match="cannot be written: "):
        output.write(tmp_path / "link", "x")
    assert left(tmp_path) == ["link"]


# --- what is no file


def test_the_null_device_stays(tmp_path):
    before = os.stat(os.devnull)
    output.check([os.devnull, os.devnull])
    output.write(os.devnull, "x")
    (tmp_path / "link").symlink_to(os.devnull)
    output.write(tmp_path / "link", "x")
    after = os.stat(os.devnull)
    assert stat.S_ISCHR(after.st_mode) and (before.st_ino, before.st_rdev) == (after.st_ino, after.st_rdev)


@as_root
def test_a_null_device_elsewhere_stays(tmp_path):
    """The same, where to fail breaks no machine: a rename over it would leave a file."""
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.open("wb").close()
    except OSError:
        pytest.skip("this container makes no devices: not tried")
    output.check([device])
    output.write(device, "x")
    assert stat.S_ISCHR(device.stat().st_mode)


@as_root
@pytest.mark.parametrize("kind, number", [(stat.S_IFBLK, (7, 200)), (stat.S_IFCHR, (1, 5)), (stat.S_IFCHR, (1, 7))])
def test_other_devices_are_refused(tmp_path, kind, number):
    device = tmp_path / "device"
    try:
        os.mknod(device, kind | 0o666, os.makedev(*number))
    except OSError:
        pytest.skip("this container makes no devices: not tried")
    with pytest.raises(ValueError, match="neither a file nor a pipe"):
        output.check([device])
    with pytest.raises(OSError, match="neither a file nor a pipe"):
        output.write(device, "x")
    assert stat.S_IFMT(device.lstat().st_mode) == kind


def test_a_socket_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")
        with pytest.raises(ValueError, match="neither a file nor a pipe"):
            output.check(["socket"])
    assert stat.S_ISSOCK(os.stat("socket").st_mode)


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    output.check([pipe])  # opens nothing: a reader would see an end
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    output.write(pipe, "x" * 200_000)
    reader.join(10)
    assert got == [b"x" * 200_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_the_own_output_is_written_into(result, tmp_path, name):
    done = report_process(result, "--html", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("<!DOCTYPE html>") and done.stdout.endswith(f"Wrote {name}\n")
    with (tmp_path / "out").open("w") as file:  # the same where it is a file: one that is replaced is lost to stdout
        assert report_process(result, "--html", name, stdout=file).returncode == 0
    assert (tmp_path / "out").read_text() == done.stdout


def test_the_own_output_is_written_into_by_the_name_of_its_file(result, tmp_path):
    with (tmp_path / "out").open("w") as file:
        assert report_process(result, "--html", tmp_path / "out", stdout=file).returncode == 0
    assert (tmp_path / "out").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "out").read_text().endswith(f"Wrote {tmp_path / 'out'}\n")


# --- disks that do not take it


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "open", "fchmod"])
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_leaves_the_old_file(tmp_path, monkeypatch, step, reason):
    path = tmp_path / "x"
    path.write_text("old")

    def fail(*args, **kwargs):
        raise OSError(reason, os.strerror(reason))

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(output.NotWrittenError) as caught:
            output.write(path, "new")
    assert str(caught.value) == f"{path}: cannot be written: {os.strerror(reason)}"
    assert caught.value.errno == reason
    assert path.read_text() == "old"
    assert left(tmp_path) == ["x"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            output.write(path, "new")
    assert path.read_text() == "old" and left(tmp_path) == ["x"]


def test_a_full_disk_by_the_systems_own_hand(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "x"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written: File too large"):
            output.write(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and left(tmp_path) == ["x"]


@as_root
def test_a_small_disk(tmp_path, result):
    """64 KB of it: the command says so in one line, status 1, and the old file is there."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this container mounts nothing: not tried")
    try:
        (disk / "page.html").write_text("old")
        (disk / "filler").write_bytes(bytes(58_000))
        done = report_process(result, "--html", disk / "page.html")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"fastattn: error: {disk / 'page.html'}: cannot be written: No space left on device\n"
        assert (disk / "page.html").read_text() == "old" and left(disk) == ["filler", "page.html"]
    finally:
        subprocess.run(["umount", disk], check=True)


@as_root
def test_a_file_that_is_mounted_by_itself_is_written_over(tmp_path):
    """`docker run -v $PWD/r.json:/r.json`: it cannot be renamed over."""
    (tmp_path / "outside").write_text("old and longer")
    (tmp_path / "inside").write_text("")
    command = ["mount", "--bind", tmp_path / "outside", tmp_path / "inside"]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this container mounts nothing: not tried")
    try:
        output.check([tmp_path / "inside"])
        output.write(tmp_path / "inside", "new")
        assert left(tmp_path) == ["inside", "outside"]
    finally:
        subprocess.run(["umount", tmp_path / "inside"], check=True)
    assert (tmp_path / "outside").read_text() == "new"


def test_a_pipe_that_nobody_reads_any_more(tmp_path):
    read, write = os.pipe()
    os.close(read)
    try:
        with pytest.raises(OSError, match="cannot be written: Broken pipe"):
            output.write(f"/proc/self/fd/{write}", "x")
    finally:
        os.close(write)


# --- before the measurement


@as_root
def test_what_may_not_be_written_is_refused_before(tmp_path):
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o1777)
        (place / "roots").write_text("old")
        (place / "roots").chmod(0o666)
        with user(MALLORY):
            # The folder is as /tmp: one may write into the file, and not rename over it.
            with pytest.raises(ValueError, match="cannot be written: Operation not permitted"):
                output.check([place / "roots"])
            (place / "mine").write_text("old")
            output.check([place / "mine", place / "new"])
            (place / "mine").chmod(0o444)
            with pytest.raises(ValueError, match="cannot be written: Permission denied"):
                output.check([place / "mine"])
        place.chmod(0o755)
        with user(MALLORY):
            with pytest.raises(ValueError, match="cannot be written: Permission denied"):
                output.check([place / "new"])
    finally:
        for path in place.iterdir():
            path.unlink()
        place.rmdir()


def test_to_check_changes_nothing(tmp_path):
    (tmp_path / "x").write_text("old")
    output.check([tmp_path / "x", tmp_path / "new"])
    assert (tmp_path / "x").read_text() == "old" and left(tmp_path) == ["x"]


def test_a_name_of_nothing_is_refused(capsys):
    for argv in (["sweep", "--json", ""], ["sweep", "--plot", ""], ["benchmark", "--json="]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2
        assert "expected a name, got an empty one" in capsys.readouterr().err


# --- what is read


@pytest.mark.parametrize(
    "argv",
    [
        ("--html", "{r}"),
        ("--html", "{d}/./r.json"),
        ("--html", "{d}/link.json"),
        ("--html", "{d}/hard.json"),
        ("--html", "{d}/x", "--picture", "a", "{d}/x"),
        ("--html", "{d}/x", "--picture", "a", "{d}/../{n}/x"),
    ],
)
def test_inputs_and_outputs_are_different_files(argv, result, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "link.json").symlink_to("r.json")
    (tmp_path / "hard.json").hardlink_to(result)
    before, names = result.read_text(), left(tmp_path)
    argv = [text.format(r=result, d=tmp_path, n=tmp_path.name) for text in argv]
    assert report([str(result), *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("fastattn: error: ")
    assert result.read_text() == before and left(tmp_path) == names


def test_two_outputs_of_a_sweep_are_different_files(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = str(tmp_path / "x.png")
    assert cli.main(["sweep", "--device", "cpu", "--json", path, "--plot", path]) == 2
    assert "expected another name for each file" in capsys.readouterr().err
    assert left(tmp_path) == []


def test_files_of_the_model_are_not_replaced(tmp_path, result, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "old.json").write_text(result.read_text())
    (tmp_path / "link").symlink_to("model")
    for path in (model / "config.json", tmp_path / "link" / "config.json"):
        assert cli.main(["benchmark", "--model", str(model), "--json", str(path)]) == 2
        assert "this one is read" in capsys.readouterr().err
    assert (model / "config.json").read_text() == "{}"
    output.check([model / "new.json", model / "old.json"], inputs=[str(model)])  # a result is replaced by a new one


# --- the command


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, result):
    pytest.importorskip("matplotlib")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "x.html").write_text("old")
    assert report([str(result), "--html", str(tmp_path / "x.html")]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"fastattn: error: {tmp_path / 'x.html'}: cannot be written: No space left on device\n"
    assert (tmp_path / "x.html").read_text() == "old"


def test_nothing_else_in_the_benchmarks_writes_files():
    """Each call that writes a file, but for those in output.py, where a grep would find it."""
    calls = ("write_text", "write_bytes", '"w"', '"wb"', "savefig(path", ".unlink(")
    for path in Path(output.__file__).parent.rglob("*.py"):
        if path.name in ("output.py", "peer_mlx.py"):  # (that one in a temporary folder of its own)
            continue
        for line in path.read_text().splitlines():
            assert not any(call in line for call in calls), (path, line)
