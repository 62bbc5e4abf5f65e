import json
import os
import subprocess
import sys

import pytest
import torch

import fastattn
from fastattn.bench import model as bench
from fastattn.cli import doctor
from fastattn.cli import main as cli


def command(capsys, line):
    """Exit status, stdout and stderr of a command line, run in this process."""
    try:
        status = cli.main(line.split())
    except SystemExit as exit:  # argparse's way out
        status = exit.code
    out, err = capsys.readouterr()
    return status or 0, out, err


def test_version(capsys):
    assert command(capsys, "--version") == (0, f"fastattn {fastattn.__version__}\n", "")


@pytest.mark.parametrize("line", ["--help", "benchmark --help", "doctor --help", "explain --help"])
def test_help(capsys, line):
    status, out, err = command(capsys, line)
    assert (status, err) == (0, "")
    assert out.startswith("usage: fastattn")


@pytest.mark.parametrize("name, option", [("benchmark", "--prefill-step-size"), ("sweep", "--plot")])
def test_subcommands_import_what_is_heavy(name, option):
    """The parser, and with it every --help, needs neither torch nor transformers of its own."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"from fastattn.cli.main import main; main(['{name}', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert option in done.stdout


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "the following arguments are required: COMMAND"),
        ("nope", "invalid choice: 'nope'"),
        ("benchmark -p 0", "prompt_tokens: expected at least 1, got 0"),
        ("benchmark -p -5", "prompt_tokens: expected at least 1, got -5"),
        ("benchmark -p many", "argument -p/--prompt-tokens: invalid int value: 'many'"),
        ("benchmark -g 0", "generation_tokens: expected at least 1, got 0"),
        ("benchmark --batch-size 0", "batch_size: expected at least 1, got 0"),
        ("benchmark -n 0", "num_trials: expected at least 1, got 0"),
        ("benchmark --prefill-step-size 0", "prefill_step_size: expected at least 1, got 0"),
        ("benchmark --delay -1", "delay: expected 0 or more, got -1.0"),
        ("benchmark --fresh-lengths -1", "fresh_lengths: expected 0 or more, got -1"),
        ("benchmark --model tiny --attn nope", "attn: expected one of eager, fastattn,"),
        ("benchmark --model tiny --attn sdpa,sdpa", "attn: expected one or more names, each once"),
        ("benchmark --attn ,", "attn: expected one or more names"),
        ("benchmark --model nope", "model: expected a directory with config.json, *.safetensors and a tokenizer"),
        ("benchmark --model tiny -p 200000", "expected at most the model's 131072, got 201024"),
        ("benchmark --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("benchmark --model tiny --device cuda:99", "device: "),
        ("benchmark --model tiny --device tpu", "device: "),
        ("benchmark --json /no/such/place/x.json", "/no/such/place/x.json: cannot be written, there is no directory"),
        ("benchmark --json /", "/: expected the name of a file to write"),
        ("explain", "the following arguments are required: --q"),
        ("explain --q 1,32,2048", "argument --q: expected 4 whole numbers separated by commas, got '1,32,2048'"),
        ("explain --q 1,32,a,128", "argument --q: expected 4 whole numbers"),
        ("explain --q=-1,32,8,128", "--q: expected numbers >= 0"),
        ("explain --q 1,32,8,128 --kv-heads 5", "k: expected a number of heads that divides q's 32"),
        ("explain --q 1,32,8,128 --kv-heads 0", "k: expected a number of heads that divides q's 32"),
        ("explain --q 1,32,8,128 --kv-len -2", "--kv-len: expected 0 or more, got -2"),
        ("explain --q 1,32,8,128 --mask diagonal", "argument --mask: invalid choice: 'diagonal'"),
        ("explain --q 1,32,8,128 --window 4", "argument --window: expected 2 whole numbers"),
        ("explain --q 1,32,8,128 --window=-2,0", "window: expected left to be an int >= 0, or -1 for open"),
        ("explain --q 1,32,8,128 --softcap -3", "softcap: expected None or a finite number > 0"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, monkeypatch, line, message):
    monkeypatch.setattr(bench, "_measure", lambda *args: pytest.fail("it ran"))
    status, out, err = command(capsys, line)
    assert (status, out) == (2, "")
    assert err.startswith("fastattn: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_damaged_weights_are_one_line(capsys, tmp_path):
    from fastattn.lm import load

    load("tiny", attn="eager", device="cpu").model.save_pretrained(tmp_path)
    capsys.readouterr()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: 1 << 20])
    status, out, err = command(capsys, f"benchmark --model {tmp_path}")
    assert (status, out) == (2, "")
    assert err.startswith(f"fastattn: error: {weights}: expected a whole safetensors file")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "error, status, text",
    [
        (KeyboardInterrupt(), 130, "fastattn: interrupted\n"),
        (ValueError("one\n  two"), 2, "fastattn: error: one; two\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "fastattn: error: [Errno 2] No such file: 'x'\n"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 1,
         "fastattn: error: out of GPU memory: CUDA out of memory. Tried\n"),
    ],
)  # fmt: skip
def test_what_goes_wrong_later(capsys, monkeypatch, error, status, text):
    def fail(*args):
        raise error

    monkeypatch.delenv("FASTATTN_DEBUG", raising=False)
    monkeypatch.setattr(bench, "run", fail)
    assert command(capsys, "benchmark --model tiny") == (status, "", text)


def test_bugs_are_one_line_and_keep_their_traceback_for_who_asks(capsys, monkeypatch):
    def fail(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr(bench, "run", fail)
    monkeypatch.delenv("FASTATTN_DEBUG", raising=False)
    line = "fastattn: error: this should not have happened (RuntimeError: a bug): please report it, with what"
    assert command(capsys, "benchmark --model tiny") == (1, "", f"{line} FASTATTN_DEBUG=1 shows\n")
    monkeypatch.setenv("FASTATTN_DEBUG", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        command(capsys, "benchmark --model tiny")


def test_debugging_shows_every_traceback(capsys, monkeypatch):
    monkeypatch.setenv("FASTATTN_DEBUG", "1")
    with pytest.raises(ValueError, match="prompt_tokens"):
        command(capsys, "benchmark -p 0")


def test_an_interrupted_benchmark_writes_nothing(capsys, monkeypatch, tmp_path):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_trial", interrupt)
    status, _, err = command(capsys, f"benchmark --model tiny -p 4 -g 1 --attn sdpa --json {tmp_path}/x.json")
    assert (status, err) == (130, "fastattn: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_benchmark_from_the_shell(tmp_path):
    """The whole way, as a user goes it: a process of its own, comparison last, the result in a file."""
    path = tmp_path / "result.json"
    line = "benchmark --model tiny --device cpu -p 24 -g 3 -n 1 --attn fastattn,sdpa,eager --fresh-lengths 2"
    line += f" --json {path}"
    done = subprocess.run(
        [sys.executable, "-m", "fastattn", *line.split()], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[-6:-1]] == ["attention", "---------", "fastattn", "sdpa", "eager"]
    assert lines[-1] == f"Wrote {path}"
    found = json.loads(path.read_text())
    assert found["command"] == f"fastattn {line}"
    assert found["arguments"]["prompt_tokens"] == 24
    assert list(found["implementations"]) == ["fastattn", "sdpa", "eager"]
    lengths = [f["length"] for i in found["implementations"].values() for f in i["fresh_lengths"]["lengths"]]
    assert len(set(lengths) - {24}) == 6
    assert all(i["averages"]["prompt_tps"] > 0 for i in found["implementations"].values())


def test_explain_says_what_the_library_says(capsys):
    q = torch.empty(2, 8, 5, 64, requires_grad=True)
    k = torch.empty(2, 2, 9, 64, requires_grad=True)
    v = torch.empty(2, 2, 9, 32, requires_grad=True)
    expected = fastattn.explain(
        q, k, v, mask="causal", window=(3, -1), softcap=20.0, sinks=torch.empty(8), return_lse=True,
        kv_lengths=torch.empty(2, dtype=torch.int32),
    )  # fmt: skip
    status, out, err = command(
        capsys,
        "explain --q 2,8,5,64 --kv-heads 2 --kv-len 9 --value-dim 32 --dtype fp32 --mask causal --window 3,-1 "
        "--softcap 20 --sinks --kv-lengths --return-lse --grad --device cpu",
    )
    assert (status, err) == (0, "")
    assert out == f"{expected}\n"
    assert "-> reference" in out


@pytest.mark.parametrize("mask", cli.MASKS)
def test_explain_takes_every_mask_and_any_size(capsys, mask):
    status, out, _ = command(capsys, f"explain --q 64,128,1000000,128 --mask {mask} --device cpu")
    assert status == 0
    assert "-> " in out


def test_doctor_as_a_command(capsys):
    status, out, err = command(capsys, "doctor --json")
    assert (status, err) == (0, "")
    assert {"python", "torch", "backend reference"} <= {f["subject"] for f in json.loads(out)}
    assert {f["state"] for f in json.loads(out)} <= {"ok", "none", "off", "missing", "broken"}
    assert doctor.main() == 0
