import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import eval as e
import model as m
from model import GPT, GPTConfig
from prepare import get_tokenizer

DOCUMENTS = ["one  two\nthree\t", "", "ünï \u00a0 → 🎉\x1f四"]     # 3, 0 and 4 words by str.split
STREAM = np.array([t for text in DOCUMENTS for t in (*text.encode(), 256)], dtype=np.uint16)


def hugging_face(n_positions=16):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=n_positions, n_embd=32, n_layer=2, n_head=4,
                                      initializer_range=0.3)).eval()


def nats_by_hand(hf, tokens, block_size):
    """Their logits, one window at a time; each token is predicted once, the first from <|endoftext|>."""
    stream, total = torch.tensor([256, *tokens.tolist()]), 0.0
    for start in range(0, len(tokens), block_size):
        window = stream[start:start + block_size + 1]
        with torch.no_grad():
            logits = hf(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("block_size, batch_size", [(16, 8), (5, 2), (1, 3)])
def test_score_is_hugging_faces_sum_over_every_token(block_size, batch_size, tmp_path):
    hf = hugging_face()
    hf.save_pretrained(tmp_path)
    counts = e.score(GPT.from_pretrained(str(tmp_path)), STREAM, get_tokenizer("bytes"), block_size, batch_size)
    nats = nats_by_hand(hf, STREAM, block_size)
    assert counts["nats"] == pytest.approx(nats, rel=1e-5)
    assert (counts["tokens"], counts["bytes"], counts["words"]) == (len(STREAM), len(STREAM) - 3, 7)

    row = e.summary(counts)
    assert row["loss"] == pytest.approx(nats / len(STREAM), rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(nats / len(STREAM)), rel=1e-4)
    assert row["word_perplexity"] == pytest.approx(math.exp(nats / 7), rel=1e-2)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(STREAM) - 3), rel=1e-5)


def test_an_untrained_model_costs_log2_of_the_vocabulary_per_token():
    model = GPT(GPTConfig(block_size=8, vocab_size=257, n_layer=1, n_head=1, n_embd=8, pos="alibi"))
    torch.nn.init.zeros_(model.wte.weight)
    counts = e.score(model, STREAM, get_tokenizer("bytes"), 8, 4)
    assert counts["nats"] == pytest.approx(len(STREAM) * math.log(257), rel=1e-6)


def columns(stdout):
    """The rows of the printed table as dicts."""
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")]
             for line in stdout.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]


@pytest.fixture
def checkpoints(workspace):
    """Two checkpoints in workspace/out whose own data is data/tiny; a.pt is a Hugging Face model."""
    hf = hugging_face(64)
    hf.save_pretrained(workspace / "hf")
    model = GPT.from_pretrained(str(workspace / "hf"))
    m.save(str(workspace / "out/a.pt"), model, tokenizer="bytes", data="data/tiny", tokens=5_000_000)
    alibi = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16, pos="alibi"))
    m.save(str(workspace / "out/b.pt"), alibi, tokenizer="bytes", data="data/tiny", tokens=1_000_000,
           lineage=[{"from": "out/a.pt", "tokens": 5_000_000}, {"from": "out/a-init.pt", "tokens": 0}])
    return workspace, hf


def test_the_table(checkpoints, run):
    workspace, hf = checkpoints
    result = run("eval.py", "--ckpt", "out/a.pt", "out/b.pt", "--block_size", 48, cwd=workspace)
    assert result.returncode == 0, result.stderr
    a, b = columns(result.stdout)
    tokens = np.fromfile(workspace / "data/tiny/val.bin", dtype="<u2")
    counts = json.loads((workspace / "data/tiny/meta.json").read_text())["splits"]["val"]
    nats = nats_by_hand(hf, tokens, 48)
    words = sum(len(bytes(d.astype(np.uint8)).decode().split())
                for d in np.split(tokens[:-1], np.flatnonzero(tokens[:-1] == 256)) for d in [d[d < 256]])
    assert a["checkpoint"] == "out/a.pt" and a["context"] == "48" and a["tokens"] == f"{counts['tokens']:,}"
    assert float(a["loss"]) == pytest.approx(nats / counts["tokens"], abs=1e-4)
    assert float(a["perplexity"]) == pytest.approx(math.exp(nats / counts["tokens"]), abs=0.02)
    assert float(a["word perplexity"]) == pytest.approx(math.exp(nats / words), rel=1e-3)
    assert float(a["bits per byte"]) == pytest.approx(nats / math.log(2) / counts["bytes"], abs=1e-4)
    assert a["trained on"] == "5.0M tokens" and b["trained on"] == "6.0M tokens"      # with its ancestors'
    assert b["checkpoint"] == "out/b.pt" and float(b["loss"]) == pytest.approx(math.log(257), abs=0.1)

    other = run("eval.py", "--ckpt", "out/a.pt", "--data", "data/tiny/train.bin", cwd=workspace)
    row = columns(other.stdout)[0]
    assert row["context"] == "64" and row["data"] == "data/tiny/train.bin"


def test_prompt_continues_the_text(checkpoints, run):
    workspace, hf = checkpoints
    def continued(*words):
        return run("eval.py", "--ckpt", "out/a.pt", "--prompt", "def f", "--max_new_tokens", 12, *words,
                   cwd=workspace).stdout
    greedy = continued("--temperature", 0)
    theirs = hf.generate(torch.tensor([list(b"def f")]), max_new_tokens=12, do_sample=False, eos_token_id=None,
                         pad_token_id=256)
    assert greedy == get_tokenizer("bytes").decode(theirs[0].tolist()) + "\n"
    assert continued("--seed", 1) == continued("--seed", 1) != continued("--seed", 2)


def test_bad_input(checkpoints, refused):
    workspace, _ = checkpoints

    def line(*words):
        return refused("eval.py", *words, cwd=workspace)
    assert "no such checkpoint" in line("--ckpt", "out/none.pt")
    assert "not a checkpoint" in line("--ckpt", "configs/tiny.py")
    assert "no such bin" in line("--ckpt", "out/a.pt", "--data", "data/none/val.bin")
    assert "learned positions end at block_size=64" in line("--ckpt", "out/a.pt", "--block_size", 65)
    assert "did you mean --block_size?" in line("--ckpt", "out/a.pt", "--blocksize", 8)
    assert "--block_size: invalid int value: 'x'" in line("--ckpt", "out/a.pt", "--block_size", "x")
    assert "--block_size=0" in line("--ckpt", "out/a.pt", "--block_size", 0)
    assert "--temperature" in line("--ckpt", "out/a.pt", "--prompt", "x", "--temperature", -1)
    meta = json.loads((workspace / "data/tiny/meta.json").read_text())
    (workspace / "data/tiny/meta.json").write_text(json.dumps({**meta, "tokenizer": "gpt2"}))
    assert "holds gpt2 tokens" in line("--ckpt", "out/a.pt")
    os.truncate(workspace / "data/tiny/val.bin", 100)
    assert "cut short" in line("--ckpt", "out/a.pt")
