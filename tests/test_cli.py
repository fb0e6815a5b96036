"""The command `doconv` as a program: help, exit codes, one-line errors, whole files or none."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import pty
import re
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
import zipfile
from importlib.metadata import version

import click
import numpy as np
import pytest
from click.testing import CliRunner
from command_line import (
    BAD_FILE,
    KERNEL_SIZE,
    TARGET,
    USAGE,
    doconv,
    on_a_full_disk,
    save,
    state_dict,
)

from doconv_core.cli import command
from doconv_core.cli.command import SUBCOMMANDS, one_line

PROGRAM = [sys.executable, "-c", "from doconv_core.cli import main; main()"]


def run(*args, **options):
    """Run the program in a process of its own."""
    given = {"capture_output": True, "text": True, "check": False, **options}
    return subprocess.run([*PROGRAM, *map(str, args)], **given)


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model.safetensors", state_dict())


def test_help_shows_every_subcommand_with_an_example():
    text = doconv("--help").stdout
    for name in SUBCOMMANDS:
        assert f"\n  {name}" in text
        own = doconv(name, "--help").stdout
        assert f"\n  Examples:\n    doconv {name} " in own
        assert ("--json" in own) == (name not in ("train", "study"))  # whose folders hold JSON
    assert "\n  Examples:\n    doconv " in text
    assert "\n  Exit codes:\n    0  done " in text


def test_version():
    assert doconv("--version").stdout == f"doconv {version('overconv')}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["infold"], "No such command 'infold'.*See doconv --help"),
        (["fold", "--forec"], "No such option '--forec'"),
        (["fold"], "Missing argument 'IN'.*See doconv fold --help"),
        (["fold", "nothing.pt", "out.pt"], "'nothing.pt' does not exist"),
        (["inspect", "."], "is a folder; name a checkpoint file"),
        (["cost", "nothing.pt"], "'nothing.pt' is no file, and no layer such as 64,64,3x3"),
        (["verify", "pyproject.toml"], "Missing argument 'B'"),
    ],
)
def test_wrong_usage_is_one_line(args, message):
    doconv(*args, code=USAGE, error=message)


def test_no_arguments_show_the_help():
    done = doconv(code=USAGE)
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: doconv")


def test_starting_imports_no_framework():
    code = (
        "import sys; from doconv_core.cli import doconv\n"
        "doconv.main(['--help'], standalone_mode=False)\n"
        "print(*({'torch', 'tensorflow', 'keras', 'mxnet', 'jax', 'h5py'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.parametrize("way", ["script", "module"])
def test_the_installed_script_is_this_command(way):
    script = [os.path.join(os.path.dirname(sys.executable), "doconv")]
    command = script if way == "script" else [sys.executable, "-m", "doconv_core.cli"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"doconv {version('overconv')}\n"


def test_an_error_of_its_own_keeps_its_traceback(monkeypatch):
    @command.doconv.command("broken")
    def broken():
        raise ValueError("a fault")

    monkeypatch.setattr(
        command.Doconv, "get_command", lambda self, ctx, name: broken if name == "broken" else None
    )
    with pytest.raises(ValueError, match="a fault"):
        CliRunner().invoke(command.doconv, ["broken"], catch_exceptions=False)
    monkeypatch.setattr(sys, "argv", ["doconv", "broken"])
    with pytest.raises(SystemExit) as exit_code:
        command.main()
    assert exit_code.value.code == 70


def test_names_cannot_steer_the_terminal(tmp_path):
    arrays = {f"\x1b[31m{name}\n\u202e": array for name, array in state_dict().items()}
    model = save(tmp_path / "model.safetensors", arrays)
    text = doconv("inspect", model).stdout
    assert "\\x1b[31mconv1" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert one_line("a\r\n b\x07[bold]c[/bold]") == "a b\\x07[bold]c[/bold]"
    assert "[bold]" in _table_with("[bold]x[/bold]")


def _table_with(cell):
    @click.command()
    def table():
        from doconv_core.cli.command import print_table

        print_table(["a", "b"], [[cell, "1"]])

    return CliRunner().invoke(table, catch_exceptions=False).stdout


HOSTILE = {
    "empty": b"",
    "no checkpoint": b"hello, world" * 20,
    "truncated safetensors": struct.pack("<Q", 200) + b'{"a":{"dtype":"F32"',
    "huge safetensors header": struct.pack("<Q", 1 << 62) + b"{" + bytes(100),
    "lengths beyond the file": struct.pack("<Q", 80)
    + b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,39999996]}}'.ljust(80)
    + bytes(16),
    "Gluon, lengths beyond the file": struct.pack("<QQQ", 0x112, 0, 1 << 60),
    "truncated Gluon": struct.pack("<QQQI", 0x112, 0, 1, 0xF993FAC9),
    "truncated HDF5": b"\x89HDF\r\n\x1a\n" + bytes(8),
}


class Touch:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def hostile_file(kind, folder):
    path = folder / "hostile"
    if kind == "pickle with code":
        path.write_bytes(pickle.dumps(Touch(), protocol=2))
    elif kind == "PyTorch archive with code":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Touch(), protocol=2))
            archive.writestr("archive/version", "3\n")
    elif kind == "zip bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("metadata.json", "{}")
            archive.writestr("config.json", " " * 50_000_000)
            archive.writestr("model.weights.h5", b"")
    elif kind == "names that lead out":
        save(path, {"../../evil.weight": np.ones((2, 2), "float32")})
    else:
        path.write_bytes(HOSTILE[kind])
    return path


@pytest.mark.parametrize(
    "kind",
    [*HOSTILE, "pickle with code", "PyTorch archive with code", "zip bomb", "names that lead out"],
)
def test_a_hostile_file_gets_one_line(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, good = hostile_file(kind, tmp_path), save(tmp_path / "good", state_dict())
    for args in (
        ["inspect", file],
        ["fold", file, "out.pt"],
        ["convert", file, "out.params"],
        ["cost", file],
        ["convert", good, "out.params", "--like", file],
        ["verify", file, good],
        ["verify", good, file],
    ):
        doconv(*args, code=BAD_FILE, error="hostile")
    assert sorted(os.listdir()) == ["good", "hostile"]


def test_nothing_is_overwritten_without_force(model, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("precious")
    for subcommand in ("fold", "convert"):
        doconv(subcommand, model, out, *KERNEL_SIZE, code=TARGET, error="exists; use --force")
        assert out.read_text() == "precious"
    doconv("fold", model, out, *KERNEL_SIZE, "--force")
    assert out.read_bytes()[:4] != b"prec"


@pytest.mark.parametrize("subcommand", ["fold", "convert"])
def test_a_target_that_cannot_be_written(subcommand, model, tmp_path):
    def refused(out, message):
        before = sorted(tmp_path.rglob("*"))
        doconv(subcommand, model, out, *KERNEL_SIZE, code=TARGET, error=message)
        assert sorted(tmp_path.rglob("*")) == before

    refused(tmp_path / "missing" / "out.safetensors", "the folder .*missing of .* does not exist")
    refused(tmp_path / "model.safetensors" / "out.safetensors", "does not exist")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    refused(folder, "is a folder; name a file to write")
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to(tmp_path / "nowhere")
    refused(dangling, "exists; use --force")
    pipe = tmp_path / "pipe.safetensors"  # as /dev/null is: --force must not rename onto it
    os.mkfifo(pipe)
    doconv(
        subcommand, model, pipe, *KERNEL_SIZE, "--force", code=TARGET,
        error="pipe.safetensors is no ordinary file; name one to write",
    )  # fmt: skip
    assert pipe.is_fifo()
    link = tmp_path / "link.safetensors"
    link.symlink_to("linked.safetensors")
    doconv(subcommand, model, link, *KERNEL_SIZE, "--force")
    assert link.is_symlink()
    assert (tmp_path / "linked.safetensors").stat().st_size > 8


def test_out_that_may_not_be_read(model, tmp_path, monkeypatch):
    out, access = tmp_path / "out.safetensors", os.access
    out.write_text("another user's")
    monkeypatch.setattr(os, "access", lambda p, mode: p != out and access(p, mode))
    message = "out.safetensors may not be read by you, and is not replaced"
    doconv("fold", model, out, *KERNEL_SIZE, "--force", code=TARGET, error=message)


def test_a_pipe_is_not_waited_for(model, tmp_path):
    pipe = tmp_path / "pipe.pt"
    os.mkfifo(pipe)
    for args in (("inspect", pipe), ("fold", pipe, tmp_path / "out"), ("verify", model, pipe)):
        doconv(*args, code=BAD_FILE, error="pipe.pt is a pipe or a device, which")


def test_long_and_odd_names_are_told_whole_in_json_alone(tmp_path):
    layers = {f"{n}.fc.weight": np.zeros((2, 2), "float32") for n in range(50)}
    long = "a" * 5000
    model = save(
        tmp_path / "odd\x1b[31m\n.safetensors", {**layers, f"{long}.weight": np.ones((2, 2))}
    )
    out = tmp_path / "o\x1b\nut.safetensors"
    for args in (("inspect", model), ("convert", model, out), ("verify", model, model, "--all")):
        text = doconv(*args).stdout
        assert max(map(len, text.splitlines())) < 400
        assert re.search("a{40,}…a{40,}", text)
        assert "\x1b" not in text
    assert "odd\\x1b[31m .safetensors" in doconv("inspect", model).stdout.splitlines()[0]
    assert "\x1b" not in doconv("fold", model, tmp_path / "b\x1b").stdout
    found = json.loads(doconv("inspect", model, "--json").stdout)
    assert found["layers"][-1]["path"] == long or long in {x["path"] for x in found["layers"]}


@pytest.mark.parametrize("closed", ["0<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_shell_has_closed(model, tmp_path, closed):
    out = tmp_path / "out.safetensors"
    for args in (["inspect", model], ["fold", model, out, *KERNEL_SIZE]):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *PROGRAM, *map(str, args)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    assert doconv("inspect", out)


def test_streams_that_take_no_more():
    for stream, args, code in ((">", "--help", TARGET), ("2>", "nothing", USAGE)):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {stream}/dev/full', "sh", *PROGRAM, args],
            capture_output=True, text=True,
        )  # fmt: skip
        told = "doconv: No space left on device.\n" if stream == ">" else ""
        assert (done.returncode, done.stdout, done.stderr) == (code, "", told)


def test_an_unwritable_folder(model, tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(folder, os.W_OK):  # root may write anywhere, so it is asked what others are told
        access = os.access
        monkeypatch.setattr(os, "access", lambda p, mode: p != folder and access(p, mode))
    message = "the folder .*locked of .* is not writable"
    doconv("fold", model, folder / "out", *KERNEL_SIZE, code=TARGET, error=message)


def test_a_target_that_appears_meanwhile_is_kept(model, tmp_path, monkeypatch):
    from doconv_core.files import safetensors

    out, write = tmp_path / "out.safetensors", safetensors.SafetensorsCheckpoint.write_folded

    def and_meanwhile(self, target, report):
        write(self, target, report)
        out.write_text("precious")

    monkeypatch.setattr(safetensors.SafetensorsCheckpoint, "write_folded", and_meanwhile)
    doconv("fold", model, out, *KERNEL_SIZE, code=TARGET, error="exists; use --force")
    assert out.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [model, out]


def test_a_full_disk(model, tmp_path):
    out = tmp_path / "out.safetensors"
    arguments = [[subcommand, model, out, *KERNEL_SIZE] for subcommand in ("fold", "convert")]
    told = f"doconv: {out} could not be written: File too large.\n"
    assert on_a_full_disk(*((each, 1000) for each in arguments)) == [[TARGET, told]] * 2
    assert list(tmp_path.iterdir()) == [model]


def on_a_terminal(columns, *args):
    """Run the program on a terminal of so many columns, and return all that it printed."""
    pid, terminal = pty.fork()
    if not pid:  # the child
        os.environ.pop("COLUMNS", None)
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [*PROGRAM, *map(str, args)])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    printed = b""
    with contextlib.suppress(OSError):  # which tells that the child has closed its side
        while block := os.read(terminal, 4096):
            printed += block
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)
    return printed.decode()


def test_a_narrow_terminal_loses_no_digits(tmp_path):
    name = "a_path_that_is_longer_than_the_terminal." * 3
    model = save(tmp_path / "m", {f"{name}{key}": array for key, array in state_dict().items()})
    piped = doconv("inspect", model).stdout
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", on_a_terminal(40, "inspect", model))
    numbers = re.findall(r"(?<= )[\d.,]*\d(?= |$)", piped, re.MULTILINE)
    assert len(numbers) > 20
    for number in numbers:
        assert re.search(rf"(?<![\d.,]){re.escape(number)}(?![\d.,])", text), number
    assert f"{name}conv1 " in piped
    assert f"{name}conv1 " not in text  # it is folded


def test_a_bar_on_terminals_alone(model):
    assert "measuring" in on_a_terminal(80, "inspect", model)
    done = run("inspect", model)
    assert done.stderr == ""
    assert "\x1b" not in done.stdout


def large(path):
    """Write a network that takes a moment to fold, and return the path."""
    rng = np.random.default_rng(0)
    arrays = {}
    for number in range(12):
        arrays[f"{number:02}.weight"] = rng.random((192, 192, 3, 3), np.float32)
        arrays[f"{number:02}.depthwise_weight"] = rng.random((192, 9, 9), np.float32)
    return save(path, arrays)


def test_killed_at_any_moment_it_leaves_the_old_file_or_the_new(tmp_path):
    model, out = large(tmp_path / "model.safetensors"), tmp_path / "out.safetensors"
    start = time.monotonic()
    assert run("fold", model, out).returncode == 0
    whole, lasts = out.read_bytes(), time.monotonic() - start
    outcomes = set()
    for moment in np.linspace(0.4, 1.1, 6) * lasts:
        out.write_text("old")
        process = subprocess.Popen(
            [*PROGRAM, "fold", str(model), str(out), "--force"], stdout=subprocess.DEVNULL
        )
        time.sleep(moment)
        process.kill()
        process.wait()
        outcomes.add(out.read_bytes() in (b"old", whole))
        left = [p for p in tmp_path.iterdir() if p not in (model, out)]
        assert all(path.name.startswith(".out.safetensors.") for path in left)
    assert outcomes == {True}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_interrupted_it_leaves_nothing(number, tmp_path):
    model, out = large(tmp_path / "model.safetensors"), tmp_path / "out.safetensors"
    # Before it gives the new file its name it waits, so that it cannot be done too early.
    waiting = "import time, doconv_core.atomic as f; f._rename_to_new = lambda *_: time.sleep(60)"
    program = [sys.executable, "-c", f"{waiting}; {PROGRAM[-1]}"]
    process = subprocess.Popen(
        [*program, "fold", str(model), str(out)],
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests may ignore the signal, and a child would, too.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    while not any(path.name.startswith(".out") for path in tmp_path.iterdir()):
        assert process.poll() is None  # it is still at work when it is interrupted
        time.sleep(0.002)
    process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == [model]


def test_an_interruption_that_a_library_makes_another_error_of():
    """As h5py does, where the signal falls into what it calls back."""
    program = """
import os, signal
from doconv_core.cli import command
signal.signal(signal.SIGINT, signal.default_int_handler)
def doconv():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        while True: pass
    except KeyboardInterrupt:
        raise SystemError("returned a result with an exception set") from None
command.doconv = doconv
command.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "doconv: interrupted.\n")


def test_a_reader_that_stops_early(model):
    process = subprocess.Popen(
        [*PROGRAM, "inspect", str(model)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 128 + 13


def test_json_is_all_that_is_printed(model, tmp_path):
    for args in (
        ["inspect", model],
        ["fold", model, tmp_path / "folded.safetensors", *KERNEL_SIZE],
        ["convert", model, tmp_path / "model.params"],
        ["cost", model, *KERNEL_SIZE],
        ["verify", model, model, *KERNEL_SIZE],
    ):
        done = doconv(*args, "--json")
        assert isinstance(json.loads(done.stdout), dict)
        assert done.stderr == ""
