import json
import math
import os
import subprocess
import sys

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
    assert row["word perplexity"] == pytest.approx(math.exp(nats / 7), rel=1e-2)
    assert row["bits per byte"] == pytest.approx(nats / math.log(2) / (len(STREAM) - 3), rel=1e-5)


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
    m.save(str(workspace / "out/b.pt"), alibi, tokenizer="bytes", data="data/tiny", tokens=1_000_000, flops=2 * 10**15,
           lineage=[{"from": "out/a.pt", "tokens": 5_000_000, "flops": 5 * 10**15},
                    {"from": "out/a-init.pt", "tokens": 0}])
    return workspace, hf


def test_the_table(checkpoints, run):
    workspace, hf = checkpoints
    result = run("eval.py", "--ckpt", "out/a.pt", "out/b.pt", "--tasks", "none", "--block_size", 48, cwd=workspace)
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
    assert (a["trained on"], b["trained on"]) == ("5,000,000", "6,000,000")       # with its ancestors'
    assert (a["FLOPs"], b["FLOPs"]) == ("", "7.00e+15")
    assert b["checkpoint"] == "out/b.pt" and float(b["loss"]) == pytest.approx(math.log(257), abs=0.1)

    other = run("eval.py", "--ckpt", "out/a.pt", "--data", "data/tiny/train.bin", "--tasks", "none", cwd=workspace)
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
    assert continued("--top_p", 1e-6) == continued("--top_k", 1) == greedy
    assert continued("--seed", 1) == continued("--seed", 1) != continued("--seed", 2)


@pytest.mark.parametrize("pos", ["learned", "alibi"])
def test_generation_keeps_keys_and_values_and_changes_nothing(pos):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=12, vocab_size=257, n_layer=2, n_head=2, n_embd=16, pos=pos)).eval()
    torch.nn.init.normal_(model.wte.weight)
    idx = torch.randint(256, (2, 5))
    kept = model.generate(idx, 15, temperature=0)       # past block_size, where the window slides
    for _ in range(15):
        idx = torch.cat((idx, model(idx[:, -12:])[:, -1:].argmax(-1)), dim=1)
    assert kept.tolist() == idx.tolist()


def test_top_p_keeps_the_fewest_tokens_of_that_probability():
    model = GPT(GPTConfig(block_size=4, vocab_size=4, n_layer=1, n_head=1, n_embd=4)).eval()
    with torch.no_grad():       # whatever the input, probabilities 0.5, 0.3, 0.15, 0.05
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.wte.weight[:4, 0] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    idx = torch.zeros(2000, 1, dtype=torch.int64)
    for top_p, kept in ((0.4, {0}), (0.5, {0}), (0.6, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        drawn = model.generate(idx, 1, generator=torch.Generator().manual_seed(0), top_p=top_p)[:, 1]
        assert set(drawn.tolist()) == kept
    p = torch.bincount(model.generate(idx, 1, generator=torch.Generator().manual_seed(0), top_p=0.6)[:, 1]) / 2000
    assert p.tolist() == pytest.approx([5 / 8, 3 / 8], abs=0.04)


ITEMS = {       # in the layout of --eval_data
    "lambada/lambada_test.jsonl": [{"text": f"{n} letters come before x {x}"} for n, x in enumerate("abcdef")] + [
        {"text": "the old man of the sea told a long tale about the very last white whale"}],
    "piqa/valid.jsonl": [dict(goal=f"goal {n}", sol1="cut it", sol2="glue it together") for n in range(5)],
    "piqa/valid-labels.lst": [0, 1, 1, 0, 1],
    "hellaswag/hellaswag_val.jsonl": [dict(activity_label="Tea", ctx_a="A man drinks.", ctx_b="he", label=n % 4,
                                           endings=["drinks tea", "is a cup", "flies", "sings and sings"])
                                      for n in range(6)],
}
PAGES = " \n = First = \n \n A page , with words . \n = = Part = = \n more \n = Second = \n \n Last words . \n"


@pytest.fixture
def eval_data(checkpoints):
    workspace, hf = checkpoints
    for name, rows in ITEMS.items():
        path = workspace / "sets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workspace / "sets/wikitext-2").mkdir()
    (workspace / "sets/wikitext-2/test.txt").write_text(PAGES)
    return workspace, hf


def nats_of(hf, text, start=0):
    """Of text's bytes from `start` on, by their logits, as one window behind <|endoftext|>."""
    tokens = torch.tensor([256, *text.encode()])
    with torch.no_grad():
        logits = hf(tokens[None, -65:-1]).logits[0].double()
    losses = F.cross_entropy(logits, tokens[-64:] if len(tokens) > 64 else tokens[1:], reduction="none")
    return losses[start - len(text.encode()) if start else 0:].sum().item()


def test_the_four_tasks_and_what_else_is_asked(eval_data, run):
    workspace, hf = eval_data
    texts = "ab ü", "", "cd", "never"
    (workspace / "x.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    result = run("eval.py", "--ckpt", "out/a.pt", "--eval_data", "sets", "--out", "scores.json",
                 "--bpb", "my x=x.jsonl", "--max_docs", 2, cwd=workspace)
    assert result.returncode == 0, result.stderr
    report = json.loads((workspace / "scores.json").read_text())
    assert report["items"] == dict(lambada=7, piqa=5, hellaswag=6, wikitext2=2)
    (row,) = report["tables"]["tasks"]
    # PIQA by hand, with Hugging Face's logits
    gains = [[-nats_of(hf, f"Question: goal {n}\nAnswer: {sol}", len(f"Question: goal {n}\nAnswer:"))
              for sol in ("cut it", "glue it together")] for n in range(5)]
    labels = np.array([0, 1, 1, 0, 1])
    acc = (np.argmax(gains, 1) == labels)
    acc_norm = np.argmax(np.array(gains) / [6, 16], 1) == labels
    for metric, right in (("piqa acc", acc), ("piqa acc_norm", acc_norm)):
        assert row[metric] == pytest.approx([100 * right.mean(), 100 * right.std(ddof=1) / math.sqrt(5)])
    pages = [" = First = \n \n A page , with words . \n = = Part = = \n more ", " = Second = \n \n Last words . \n"]
    plain = [" = First =\n\nA page, with words.\n== Part ==\nmore ", " = Second =\n\nLast words.\n"]
    nats = sum(nats_of(hf, text) for text in plain)
    assert row["wikitext2 byte_perplexity"][0] == pytest.approx(math.exp(nats / len("".join(pages))), rel=1e-4)
    assert row["wikitext2 token_perplexity"][0] == pytest.approx(math.exp(nats / len("".join(plain))), rel=1e-4)
    nats = nats_of(hf, "ab ü") + nats_of(hf, "cd")
    assert report["tables"]["bits per byte"][0]["my x"][0] == pytest.approx(nats / math.log(2) / 7, rel=1e-4)
    assert report["tables"]["own data"][0]["data"] == "data/tiny/val.bin"
    for text in ("GPT-2 XL (quoted)", "12.97", "40.03", "items: lambada 7, piqa 5"):
        assert text in result.stdout


def test_processes_share_the_items(eval_data, run):
    workspace, _ = eval_data
    command = [str(m.__file__).replace("model.py", "eval.py"), "--ckpt", "out/a.pt", "--eval_data", "sets"]
    one = run("eval.py", *command[1:], "--out", "one.json", cwd=workspace)
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *command,
                          "--out", "two.json"], cwd=workspace, capture_output=True, text=True, timeout=300)
    assert (one.returncode, two.returncode) == (0, 0), two.stderr
    one, two = (json.loads((workspace / name).read_text())["tables"] for name in ("one.json", "two.json"))
    for table in ("tasks", "own data"):
        for key, value in one[table][0].items():
            assert two[table][0][key] == (pytest.approx(value, rel=1e-6) if isinstance(value, (float, list)) else value)


def test_audit_finds_what_was_planted(eval_data, run):
    workspace, _ = eval_data
    leak = "They say: The old MAN of the sea -- told a long tale about the very last (white) whale! And more."
    documents = [f"nothing of document {n} is a test item" for n in range(30)] + [leak]
    tokens = np.array([t for text in documents for t in (*text.encode(), 256)], "<u2")
    (workspace / "data/leaky").mkdir()
    tokens.tofile(workspace / "data/leaky/train.bin")
    (workspace / "data/leaky/meta.json").write_text(json.dumps(dict(tokenizer="bytes", vocab_size=257, splits={})))
    result = run("eval.py", "--ckpt", "out/a.pt", "--eval_data", "sets", "--tasks", "lambada", "--audit", "data/leaky",
                 "--out", "scores.json", cwd=workspace)
    assert result.returncode == 0, result.stderr
    report = json.loads((workspace / "scores.json").read_text())
    ((task, number, excerpt),) = report["leaked"]
    assert (task, number) == ("lambada", 6) and leak[10:-10] in excerpt
    every, clean, dirty = (report["tables"]["leaks"][0][f"{part} items"] for part in ("all", "clean", "dirty"))
    assert (every, clean, dirty) == (7, 6, 1)
    assert "last (white) whale" in result.stdout


def test_documents_of_a_bin_are_read_in_bounded_pieces():
    tokens = np.array([1, 2, 9, 9, 3, 9, *range(10, 24), 9, 4])
    documents = [d.tolist() for d in e.bin_documents(tokens, 9, size=6, overlap=2)]
    assert documents[:2] == [[1, 2], [3]] and documents[-1] == [4] and max(map(len, documents)) <= 6
    long = documents[2:-1]      # in pieces, each of which repeats two tokens, so that nothing at the seams is missed
    assert long[0] + [t for piece in long[1:] for t in piece[2:]] == list(range(10, 24))


def test_bad_input(checkpoints, refused):
    workspace, _ = checkpoints

    def line(*words):
        words += () if "--tasks" in words else ("--tasks", "none")
        return refused("eval.py", *words, cwd=workspace)
    assert "no such checkpoint" in line("--ckpt", "out/none.pt")
    assert "not a checkpoint" in line("--ckpt", "configs/tiny.py")
    assert "no such bin" in line("--ckpt", "out/a.pt", "--data", "data/none/val.bin")
    assert "learned positions end at block_size=64" in line("--ckpt", "out/a.pt", "--block_size", 65)
    assert "did you mean --block_size?" in line("--ckpt", "out/a.pt", "--blocksize", 8)
    assert "--block_size: invalid int value: 'x'" in line("--ckpt", "out/a.pt", "--block_size", "x")
    assert "--block_size=0" in line("--ckpt", "out/a.pt", "--block_size", 0)
    assert "--temperature" in line("--ckpt", "out/a.pt", "--prompt", "x", "--temperature", -1)
    assert "--top_p" in line("--ckpt", "out/a.pt", "--prompt", "x", "--top_p", 2)
    assert "--tasks pika: expected some of lambada, piqa" in line("--ckpt", "out/a.pt", "--tasks", "pika")
    assert "--bpb x.jsonl: expected NAME=FILE" in line("--ckpt", "out/a.pt", "--bpb", "x.jsonl")
    assert "x.csv: neither a file" in line("--ckpt", "out/a.pt", "--bpb", "x=x.csv")
    assert "no test items" in line("--ckpt", "out/a.pt", "--audit", "data/tiny")
    message = line("--ckpt", "out/a.pt", "--tasks", "lambada", "--eval_data", "none")
    assert "none/lambada/lambada_test.jsonl: no such file" in message and "--tasks none" in message
    (workspace / "none/lambada").mkdir(parents=True)
    (workspace / "none/lambada/lambada_test.jsonl").write_text('{"text": "a b"}\n{"txt": "a b"}\n')
    message = line("--ckpt", "out/a.pt", "--tasks", "lambada", "--eval_data", "none")
    assert "lambada_test.jsonl, item 2: expected text (str)" in message
    meta = json.loads((workspace / "data/tiny/meta.json").read_text())
    (workspace / "data/tiny/meta.json").write_text(json.dumps({**meta, "tokenizer": "gpt2"}))
    assert "holds gpt2 tokens" in line("--ckpt", "out/a.pt")
    os.truncate(workspace / "data/tiny/val.bin", 100)
    assert "cut short" in line("--ckpt", "out/a.pt")
