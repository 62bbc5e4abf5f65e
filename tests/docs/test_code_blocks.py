"""Every python and console block of README.md and docs/*.md runs.

The python blocks of a page run one after another in one namespace, as a reader would type them. Of console blocks each
`fastattn` line runs; what needs a GPU or a model's directory gets a small stand-in (`STAND_INS`). A block that cannot
run at all says why, in a comment in the line above it: `<!-- not run: REASON -->`; its `fastattn` lines must at least
be understood.
"""

import glob
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fastattn.drop_in
from fastattn.cli import main as cli

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "benchmarks.md"  #: by `make docs`; git does not have it
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page != GENERATED)]
BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<why>.*?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
CONSOLE = ("console", "shell", "sh", "bash")
#: First words of what is never run here: it installs, needs root or several processes, is a target that runs these very
#: tests, or has tests of its own (tests/test_examples.py, tests/parallel).
ELSEWHERE = ("python", "make", "pip", "docker", "git", "cd", ".venv/bin/pip", "torchrun", "mkdir", "export")
#: What lines name, and what stands in for it here: (pattern, instead).
STAND_INS = [
    (r"llama-3\.\d-\d+b|\bDIR\b|path/to/model|/models/\S+", "{model}"),
    (r"cuda(:\d)?", "cpu"),
    (r"(-p|--prompt-tokens) \d+", r"\1 17"),
    (r"(-g|--generation-tokens) \d+", r"\1 3"),
    (r"(-n|--num-trials) \d+", r"\1 1"),
    (r"(-b|--batch-size) \d+", r"\1 2"),
    (r"--batch-sizes \S+", "--batch-sizes 1,2"),
    (r"--max-length \d+", "--max-length 32"),
    (r"--fresh-lengths \d+", "--fresh-lengths 1"),
    (r"--variable-lengths \S+", "--variable-lengths 8,16"),
    (r"--dtype \w+", "--dtype fp32"),
    (r"--max-tokens \d+", "--max-tokens 3"),
    (r"^fastattn sweep", "fastattn sweep --quick --device cpu"),
    (r"^fastattn benchmark", "fastattn benchmark --device cpu --dtype fp32"),
]
#: The same of python blocks.
PYTHON_STAND_INS = [
    (r'"DIR"', '"path/to/model"'),
    (r"max_length=\d+", "max_length=64"),
    (r"max_tokens=\d+", "max_tokens=4"),
    (r"batch_size=\d+", "batch_size=2"),
    (r"capacity=\d{4,}", "capacity=64"),
    (r"make_engine\(loaded, \d+, \d+\)", "make_engine(loaded, 2, 64)"),
]
#: What the reader of a page is taken to have already.
BEFORE = {
    "docs/generate.md": 'prompts = ["one prompt", "another"]\n',
    "docs/transformers.md": """
import torch
path = "path/to/model"
inputs = {"input_ids": torch.tensor([[1, 2, 3]] * 4), "max_new_tokens": 3}
prompt, tokens = torch.tensor([[5, 6, 7]]), torch.tensor([[1]] * 4)
""",
}
#: Pages whose python is only compiled, and why.
SEVERAL = {"docs/parallel.md": "each block is one rank of several: tests/parallel runs the same calls in processes"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    why: str | None  #: why it is not run

    @property
    def is_console(self) -> bool:
        first = self.text.lstrip().partition("\n")[0]
        known = r"(\$ |(fastattn|" + "|".join(map(re.escape, ELSEWHERE)) + r") )"
        return self.language in CONSOLE or (not self.language and re.match(known, first) is not None)

    def commands(self) -> list[str]:
        """The lines that are typed: those after `$ ` if there are any, else all; continued lines joined."""
        lines = re.sub(r"\\\n *", "", self.text).splitlines()
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        found = prompted or [line for line in lines if line.strip() and not line.startswith("#")]
        return [re.sub(r"\s+#.*$", "", line).strip() for line in found]


def blocks_of(page):
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        indent = match["indent"]
        body = "".join(line.removeprefix(indent) for line in match["text"].splitlines(keepends=True))
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"], body, match["why"])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = {page: [b for b in BLOCKS if b.page == page and b.language == "python"] for page in PAGES}
TYPED = [(block, line) for block in BLOCKS if block.is_console for line in block.commands()]


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A directory with a tiny model and a tokenizer that knows some bytes: what stands in for a real one."""
    pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from fastattn.lm import load

    folder = tmp_path_factory.mktemp("model") / "path" / "to" / "model"
    loaded = load("tiny", attn="eager", device="cpu")
    loaded.model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
    bytes_only = Tokenizer(models.BPE(words, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def nothing_stays_patched():
    """A page may put fastattn in the place of torch's function."""
    yield
    fastattn.drop_in.unpatch()


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """An empty directory with the stand-ins in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "model").symlink_to(model)
    (tmp_path / "prompts.txt").write_text("one prompt\nanother\n", encoding="utf-8")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    for name in ("FASTATTN_BACKENDS", "FASTATTN_CUDNN", "FASTATTN_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FASTATTN_PLAN_CACHE", str(tmp_path / "plans"))
    return tmp_path


def test_there_is_something_to_test():
    assert len([block for found in PYTHON.values() for block in found]) >= 15
    assert {line.split()[1] for _, line in TYPED if line.startswith("fastattn ")} >= {
        "benchmark", "doctor", "explain", "generate", "sweep", "warmup",
    }  # fmt: skip


def test_a_reason_is_a_reason():
    for block in BLOCKS:
        assert block.why is None or len(block.why) >= 10, f"{block.page}:{block.line}"


@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON[page]], ids=name_of)
def test_python_runs(page, folder):
    namespace = {"__name__": "__main__"}
    exec(BEFORE.get(name_of(page), ""), namespace)
    for block in PYTHON[page]:
        text = block.text
        for pattern, instead in PYTHON_STAND_INS:
            text = re.sub(pattern, instead, text)
        # Empty lines before it: a traceback then names the line of the page.
        code = compile("\n" * block.line + text, str(page), "exec")
        on_a_gpu = "torch.cuda." in text and not torch.cuda.is_available()
        if block.why is None and not on_a_gpu and name_of(page) not in SEVERAL:
            exec(code, namespace)


def understood(line):
    """The command line parsed, or a failed test."""
    try:
        cli._parser().parse_args(shlex.split(line)[1:])
    except SystemExit as stop:
        pytest.fail(f"not understood (exit {stop.code}): {line}")


def stood_in(line, model):
    for pattern, instead in STAND_INS:
        line = re.sub(pattern, instead.replace("{model}", str(model)), line)
    return line


def expanded(words):
    """As a shell expands `*`."""
    found = []
    for word in words:
        found += (sorted(glob.glob(word)) or [word]) if "*" in word else [word]
    return found


@pytest.mark.parametrize(
    "block, line", TYPED, ids=[f"{name_of(block.page)}:{block.line}: {line[:60]}" for block, line in TYPED]
)
def test_commands_run(block, line, model, folder, capsys):
    first = line.split()[0]
    if first in ELSEWHERE:
        return
    if block.why is not None:
        if first == "fastattn":
            understood(line)
        return
    assert first == "fastattn", f"{block.page}:{block.line}: cannot be run here, and does not say why: {line}"
    understood(line)
    there = torch.cuda.is_available()
    argv = expanded(shlex.split(line if there and "explain" in line else stood_in(line, model))[1:])
    assert cli.main(argv) == 0, capsys.readouterr()
    shown = block.text.partition(f"$ {line}\n")[2]
    if argv[0] == "explain" and shown.strip() and not there:
        assert capsys.readouterr().out.strip("\n") == shown.strip("\n"), "the page shows something else"


def test_links_lead_somewhere():
    """Links and pictures within the repository, headings included."""
    for page in PAGES:
        text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"(?<!`)\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            path, _, heading = target.partition("#")
            found = (page.parent / path).resolve() if path else page
            if found == GENERATED:
                continue
            assert found.exists(), f"{name_of(page)}: {target}"
            if heading:
                there = {
                    slug(line) for line in re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                }
                assert heading in there, f"{name_of(page)}: {target}"


def slug(heading):
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")
