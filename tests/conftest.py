"""Shared by the tests: the repository on the path, a tiny data set, and the scripts as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "PYTEST_XDIST_WORKER" in os.environ:     # python -m pytest -n auto: a core each, also for what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def gpt2():
    """GPT-2's tokenizer; without a network or a copy of its vocabulary, the test is skipped."""
    import prepare
    try:
        return prepare.get_tokenizer("gpt2")
    except prepare.DataError:
        pytest.skip("GPT-2's vocabulary is not at hand")


@pytest.fixture
def run():
    """run("train.py", "configs/x.py", cwd=...) -> CompletedProcess with text output."""
    def run(script, *words, cwd):
        return subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], cwd=cwd,
                              capture_output=True, text=True, timeout=300)
    return run


@pytest.fixture
def refused(run):
    """A call that must end in status 1, one line and no traceback; returns that line."""
    def refused(script, *words, cwd):
        result = run(script, *words, cwd=cwd)
        assert result.returncode == 1, (result.stdout, result.stderr)
        assert "Traceback" not in result.stderr
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith(f"{script}: ")
        return line
    return refused


def write_corpus(folder, documents=40):
    """Some text files of letters, words and a few non-ASCII characters; returns the folder."""
    folder.mkdir(parents=True)
    for i in range(documents):
        lines = [f"def f{i}(x):  # número {i}→{j}\n    return x * {i * j}\n" for j in range(12)]
        (folder / f"{i:03}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


TINY = """
data = "data/tiny"
block_size = 32
batch_size = 8
max_steps = 6
eval_interval = 3
eval_tokens = 512
save_interval = 2
log_interval = 1
warmup_steps = 2
learning_rate = 1e-2
min_lr = 1e-3
dropout = 0.1
dtype = "float32"
n_layer = 2
n_head = 2
n_embd = 32
"""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    import prepare
    root = tmp_path_factory.mktemp("tiny")
    prepare.prepare([str(write_corpus(root / "text"))], str(root / "bins"), "bytes", 0.1)
    return root / "bins"


@pytest.fixture
def workspace(tmp_path, tiny_data):
    """A folder with data/tiny (a private copy) and configs/tiny.py, to run the scripts in."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(TINY)
    (tmp_path / "data" / "tiny").mkdir(parents=True)
    for path in tiny_data.iterdir():
        (tmp_path / "data" / "tiny" / path.name).write_bytes(path.read_bytes())
    return tmp_path
