"""eval.py by its functions and its command line, against Hugging Face's logits and hand-worked cases."""
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import eval as e
import model as m
import prepare
from model import GPT, GPTConfig
from prepare import DataError, get_tokenizer

EVAL = e.__file__

DOCUMENTS = ["one  two\nthree\t", "", "ünï \u00a0 → 🎉\x1f四"]     # 3, 0 and 4 words by str.split
STREAM = np.array([t for text in DOCUMENTS for t in (*text.encode(), 256)], dtype=np.uint16)
ITEMS = {       # in the layout of --eval_data
    "lambada/lambada_test.jsonl": [{"text": f"{n} letters come before x {x}"} for n, x in enumerate("abcdef")] + [
        {"text": "the old man of the sea told a long tale about the very last white whale"}],
    "piqa/valid.jsonl": [dict(goal=f"goal {n}", sol1="cut it", sol2="glue it together") for n in range(5)],
    "piqa/valid-labels.lst": [0, 1, 1, 0, 1],
    "hellaswag/hellaswag_val.jsonl": [dict(activity_label="Tea", ctx_a="A man drinks.", ctx_b="he", label=n % 4,
                                           endings=["drinks tea", "is a cup", "flies", "sings and sings"])
                                      for n in range(6)],
    "arc.jsonl": [dict(question="What falls?", answers=["rain", "the sky"], label=n % 2) for n in range(3)],
}
PAGES = " \n = First = \n \n A page , with words . \n = = Part = = \n more \n = Second = \n \n Last words . \n"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_data):
    """(folder, Hugging Face model): data/tiny, test sets, out/a.pt, which is that model, and out/b.pt with ALiBi."""
    root = tmp_path_factory.mktemp("eval")
    shutil.copytree(tiny_data, root / "data/tiny")
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4,
                                    initializer_range=0.3)).eval()
    hf.save_pretrained(root / "hf")
    model = GPT.from_pretrained(str(root / "hf"))
    m.save(str(root / "out/a.pt"), model, tokenizer="bytes", data="data/tiny", tokens=5_000_000)
    alibi = GPT(GPTConfig(block_size=16, vocab_size=257, n_layer=1, n_head=2, n_embd=16, pos="alibi", bias=False))
    m.save(str(root / "out/b.pt"), alibi, tokenizer="bytes", data="data/gone", tokens=1_000_000, flops=2 * 10**15,
           lineage=[{"from": "out/a.pt", "tokens": 5_000_000, "flops": 5 * 10**15},
                    {"from": "out/a-init.pt", "tokens": 0}])
    for name, rows in ITEMS.items():
        (root / "sets" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sets" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "sets/wikitext-2").mkdir()
    (root / "sets/wikitext-2/test.txt").write_text(PAGES)
    (root / "texts").mkdir()
    (root / "texts/x.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in ("ab ü", "cd", "no")))
    np.array([t for text in ("ab ü", "", "cd", "no") for t in (*text.encode(), 256)], "<u2").tofile(root / "texts.bin")
    (root / "meta.json").write_text(json.dumps(dict(tokenizer="bytes", vocab_size=257, splits={})))
    return root, hf


@pytest.fixture
def scored(place, monkeypatch, capsys):
    """scored("--tasks", ...) of out/a.pt: (what --out holds, standard output, standard error)."""
    monkeypatch.chdir(place[0])

    def scored(*words, ckpt=("out/a.pt",)):
        e.main(["--ckpt", *ckpt, "--eval_data", "sets", "--out", "scores.json", *map(str, words)])
        return json.loads((place[0] / "scores.json").read_text()), *capsys.readouterr()
    return scored


def nats_by_hand(hf, tokens, block_size):
    """Their logits, one window at a time; each token is predicted once, the first from <|endoftext|>."""
    stream, total = torch.tensor([256, *tokens.tolist()]), 0.0
    for start in range(0, len(tokens), block_size):
        window = stream[start:start + block_size + 1]
        with torch.no_grad():
            logits = hf(window[None, :-1]).logits[0]
        total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
    return total


def nats_of(hf, text, start=0):
    """Of the bytes of text from `start` on, by their logits, as one window behind <|endoftext|>."""
    tokens = torch.tensor([256, *text.encode()])
    with torch.no_grad():
        logits = hf(tokens[None, -65:-1]).logits[0].double()
    losses = F.cross_entropy(logits, tokens[-64:] if len(tokens) > 64 else tokens[1:], reduction="none")
    return losses[start - len(text.encode()) if start else 0:].sum().item()


@pytest.mark.parametrize("block_size, batch_size", [(16, 8), (5, 2), (1, 3)])
def test_own_data_is_hugging_faces_loss_of_every_token(block_size, batch_size, place):
    root, hf = place
    example = STREAM, 7, len(STREAM) - 3        # tokens, words, bytes
    model, _ = m.load(str(root / "out/a.pt"))
    found = e.scores("bin", e.run_task("bin", [example], model, get_tokenizer("bytes"), block_size, batch_size))
    nats = nats_by_hand(hf, STREAM, block_size)
    assert found["loss"][0] == pytest.approx(nats / len(STREAM), rel=1e-5)
    assert found["perplexity"][0] == pytest.approx(math.exp(nats / len(STREAM)), rel=1e-4)
    assert found["word perplexity"][0] == pytest.approx(math.exp(nats / 7), rel=1e-2)
    assert found["bits per byte"][0] == pytest.approx(nats / math.log(2) / (len(STREAM) - 3), rel=1e-5)


def test_every_table(scored, place):
    """PIQA, WikiText-2 and documents by hand, with Hugging Face's logits."""
    root, hf = place
    report, printed, _ = scored("--bpb", "my x=texts/x.jsonl", "pattern=texts/*.jsonl", "folder=texts", "bin=texts.bin",
                                "--max_docs", 2)
    assert report["items"] == dict(lambada=7, piqa=5, hellaswag=6, wikitext2=2)
    (row,) = report["tables"]["tasks"]
    gains = [[-nats_of(hf, f"Question: goal {n}\nAnswer: {sol}", len(f"Question: goal {n}\nAnswer:"))
              for sol in ("cut it", "glue it together")] for n in range(5)]
    labels = np.array([0, 1, 1, 0, 1])
    for metric, right in (("piqa acc", np.argmax(gains, 1) == labels),
                          ("piqa acc_norm", np.argmax(np.array(gains) / [6, 16], 1) == labels)):
        assert row[metric] == pytest.approx([100 * right.mean(), 100 * right.std(ddof=1) / math.sqrt(5)])
    pages = [" = First = \n \n A page , with words . \n = = Part = = \n more ", " = Second = \n \n Last words . \n"]
    plain = [" = First =\n\nA page, with words.\n== Part ==\nmore ", " = Second =\n\nLast words.\n"]
    nats = sum(nats_of(hf, text) for text in plain)
    assert row["wikitext2 byte_perplexity"][0] == pytest.approx(math.exp(nats / len("".join(pages))), rel=1e-4)
    assert row["wikitext2 token_perplexity"][0] == pytest.approx(math.exp(nats / len("".join(plain))), rel=1e-4)
    nats = nats_of(hf, "ab ü") + nats_of(hf, "cd")
    (row,) = report["tables"]["bits per byte"]
    for name in ("my x", "pattern", "folder", "bin"):
        assert row[name][0] == pytest.approx(nats / math.log(2) / 7, rel=1e-4)
    (row,) = report["tables"]["own data"]
    tokens = np.fromfile(root / "data/tiny/val.bin", "<u2")
    nats, val = nats_by_hand(hf, tokens, 64), json.loads((root / "data/tiny/meta.json").read_text())["splits"]["val"]
    documents = bytes(tokens[tokens != 256].astype(np.uint8)).decode()      # each ends in a line feed
    assert (row["data"], row["tokens"]) == ("data/tiny", len(tokens))
    assert row["loss"][0] == pytest.approx(nats / len(tokens), rel=1e-5)
    assert row["bits per byte"][0] == pytest.approx(nats / math.log(2) / val["bytes"], rel=1e-5)
    assert row["word perplexity"][0] == pytest.approx(math.exp(min(nats / len(documents.split()), 700)), rel=1e-3)
    for text in ("GPT-2 XL (quoted)", "12.97", "40.03", "'lambada': 7, 'piqa': 5"):
        assert text in printed


def test_requests_by_hand():
    def requests(kind, *example, block_size=4):
        return [([*context], [bytes([*tokens]) for tokens in continuations]) for context, continuations
                in e.make_requests(kind, example, get_tokenizer("bytes"), block_size)]
    assert requests("choice", "a ", ["b", " cd"], 0) == [([*b"a"], [b" b", b"  cd"])]       # the space is answered
    assert requests("cloze", "", ["b"], 0) == [([256], [b"b"])]
    assert requests("choice", "12345", ["6", "78"], 0) == [([*b"2345"], [b"6"]), ([*b"345"], [b"78"])]
    assert requests("text", "abcdef") == [([256], [b"abcd"]), ([*b"bcd"], [b"ef"])]         # filled with context
    assert requests("bin", list(b"abcdef")) == [([256], [b"abcd"]), ([*b"d"], [b"ef"])]


def test_the_space_before_an_answer_is_no_character(monkeypatch):
    monkeypatch.setattr(e, "log_likelihoods", lambda *args: (np.array([-1.0, -2.5]), np.zeros(2, bool)))
    example = "a", [" b", " cde"], 1        # per character -1 and -0.83; with the space -0.5 and -0.63
    columns = e.run_task("choice", [example], None, get_tokenizer("bytes"), 16, 8)
    assert (columns["correct"].tolist(), columns["correct_norm"].tolist()) == ([False], [True])


def test_own_data_that_is_damaged_stops(place, scored):
    """Only data that is not there is left out."""
    model, meta = m.load(str(place[0] / "out/b.pt"))
    (place[0] / "data/odd").mkdir()
    (place[0] / "data/odd/val.bin").write_bytes(b"odd")
    m.save(str(place[0] / "out/odd.pt"), model, **meta | dict(data="data/odd"))
    with pytest.raises(DataError, match="data/odd/val.bin"):
        scored("--tasks", "none", ckpt=("out/a.pt", "out/odd.pt"))


def test_several_checkpoints_with_their_ancestors_cost(scored):
    report, printed, noted = scored("--tasks", "lambada,piqa", "hellaswag", "--limit", 2, "--block_size", 48,
                                    ckpt=("out/a.pt", "out/b.pt"))
    a, b = report["tables"]["tasks"]
    assert (a["checkpoint"], b["checkpoint"], a["context"]) == ("out/a.pt", "out/b.pt", 48)
    assert (a["trained on"], b["trained on"]) == (5_000_000, 6_000_000)
    assert (a["FLOPs"], b["FLOPs"]) == (None, 7e15)
    assert {"lambada acc", "piqa acc", "hellaswag acc"} <= b.keys()
    assert len(report["tables"]["own data"]) == 1 and "data/gone" in noted      # b's own is not here
    assert "| out/b.pt |" in printed


def test_processes_share_the_items(scored, place):
    ckpt = "out/a.pt", "out/b.pt"
    def torchrun(*words):
        result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", EVAL, *words],
                                cwd=place[0], capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout
    one, *_ = scored("--data", "data/tiny/val.bin", "--block_size", 64, "--limit", 4, ckpt=ckpt)
    torchrun("--ckpt", *ckpt, "--data", "data/tiny/val.bin", "--block_size=64", "--limit=4", "--eval_data=sets",
             "--out=two.json")
    assert torchrun("--ckpt", "out/a.pt", "--prompt=once", "--max_new_tokens=3").count("once") == 1
    two = json.loads((place[0] / "two.json").read_text())
    for table in ("tasks", "own data"):
        for mine, theirs in zip(one["tables"][table], two["tables"][table], strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                if isinstance(value, list):         # None is no standard error
                    np.testing.assert_allclose(np.array(theirs[key], float), np.array(value, float), rtol=1e-6)
                else:
                    assert theirs[key] == value


def test_data_is_a_bin_or_a_folder_of_several(scored, place):
    root, _ = place
    shutil.copytree(root / "data/tiny", root / "data/two")
    tokens = np.fromfile(root / "data/tiny/val.bin", "<u2")
    (root / "data/two/val.bin").unlink()
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 400                       # llm.c's
    for name, part in (("val_0.bin", tokens[:400]), ("val_1.bin", tokens[400:])):
        (root / "data/two" / name).write_bytes((header.tobytes() if name == "val_0.bin" else b"") + part.tobytes())
    rows = [scored("--tasks", "none", "--data", data)[0]["tables"]["own data"][0]
            for data in ("data/tiny/val.bin", "data/two")]
    assert [row.pop("data") for row in rows] == ["data/tiny/val.bin", "data/two"] and rows[0] == rows[1]


def test_audit_finds_what_was_planted(scored, place):
    leak = "They say: The old MAN of the sea -- told a long tale about the very last (white) whale! And more."
    documents = [f"nothing of document {n} is a test item" for n in range(30)] + [leak]
    folder = place[0] / "data/leaky"
    folder.mkdir()
    np.array([t for text in documents for t in (*text.encode(), 256)], "<u2").tofile(folder / "train.bin")
    (folder / "meta.json").write_text(json.dumps(dict(tokenizer="bytes", vocab_size=257, splits={})))
    report, printed, _ = scored("--tasks", "lambada", "--audit", "data/leaky", "--data", "none")
    ((task, number, excerpt),) = report["leaked"]
    assert (task, number) == ("lambada", 6) and leak[10:-10] in excerpt and "last (white) whale" in printed
    clean, leaked = report["tables"]["leaks"]
    assert (clean["items"], leaked["items"], leaked["part"]) == (6, 1, "leaked")
    (row,) = report["tables"]["tasks"]
    logs = [part["items"] * math.log(part["perplexity"][0]) for part in (clean, leaked)]
    assert sum(logs) == pytest.approx(7 * math.log(row["lambada perplexity"][0]))
    sources, _ = prepare.open_data("data/leaky", "train")
    size = len(sources["data/leaky"][0]) - 60           # a seam in the middle of the passage
    assert e.audit("data/leaky", ("lambada",), "sets", size, overlap=0) == {}
    assert e.audit("data/leaky", ("lambada",), "sets", size).keys() == {("lambada", 6)}


def test_a_new_task_is_a_function_and_a_row(scored, monkeypatch):
    def arc(item):
        return item["question"], [f" {answer}" for answer in item["answers"]], item["label"]
    monkeypatch.setitem(e.TASKS, "arc", (arc, "choice"))
    report, *_ = scored("--tasks", "arc", "--data", "none")
    assert report["items"] == dict(arc=3)
    assert report["tables"]["tasks"][0]["arc acc"][0] == pytest.approx(100 / 3, abs=34)     # 1 or 2 of 3
    assert list(report["sha256"]) == ["sets/arc.jsonl"]


# ---------------------------------------------------------------------------------------------
# Nothing measured is lost, and what cannot be scored is refused before the first batch


def test_what_cannot_be_had_or_does_not_fit_is_left_out(scored, place, capsys):
    (place[0] / "few/lambada").mkdir(parents=True)
    shutil.copy(place[0] / "sets/lambada/lambada_test.jsonl", place[0] / "few/lambada")
    report, _, noted = scored("--eval_data", "few")
    assert list(report["items"]) == ["lambada"] and "few/piqa/valid.jsonl" in noted and "few/wikitext-2" in noted
    report, _, noted = scored("--block_size", 12)       # PIQA's and HellaSwag's longest answers are 17 and 16 bytes
    assert {key.split()[0] for key in report["tables"]["tasks"][0] if " " in key} == {"lambada", "wikitext2", "trained"}
    assert "piqa is left out" in noted and "hellaswag is left out" in noted and "block_size=12" in noted


def test_a_failure_keeps_what_was_measured(scored, place, monkeypatch, capsys):
    load, run_task, calls = m.load, e.run_task, []

    def gone_later(name, *device):
        calls.append(name)
        if calls.count("out/b.pt") > 1:
            raise m.ModelError("out/b.pt: gone")
        return load(name, *device)
    monkeypatch.setattr(e, "load", gone_later)
    with pytest.raises(m.ModelError, match="gone"):
        scored("--tasks", "lambada", ckpt=("out/a.pt", "out/b.pt"))
    report = json.loads((place[0] / "scores.json").read_text())
    assert [row["checkpoint"] for row in report["tables"]["tasks"]] == ["out/a.pt"]
    assert "| out/a.pt |" in capsys.readouterr().out

    monkeypatch.setattr(e, "load", load)
    monkeypatch.setattr(e, "run_task", lambda *args: 1 / 0 if args[-1] == "hellaswag" else run_task(*args))
    with pytest.raises(ZeroDivisionError):
        scored()
    report = json.loads((place[0] / "scores.json").read_text())
    assert {"lambada acc", "piqa acc"} <= report["tables"]["tasks"][0].keys()


def test_a_closed_pipe_and_a_console_without_plus_minus(place):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, EVAL, "--ckpt=out/a.pt", "--eval_data=sets", "--tasks=lambada",
               "--data=none", "--out=pipe.json"]
    result = subprocess.run(command, cwd=place[0], env=os.environ | {"PYTHONIOENCODING": "ascii"}, stdout=writer,
                            stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert json.loads((place[0] / "pipe.json").read_text())["tables"]["tasks"]


@pytest.mark.parametrize("words, named", [
    (["--ckpt", "out/a.pt", "out/none.pt"], "out/none.pt"),
    (["--ckpt", "out/not.pt"], "out/not.pt"),
    (["--data", "data/none"], "data/none/val.bin"),
    (["--data", "data/gpt2"], "data/gpt2: gpt2 tokens"),
    (["--data", "data/short"], "data/short/val.bin"),
    (["--block_size", "65"], "block_size=65"),
    (["--block_size", "0"], "--block_size=0"),
    (["--limit", str(10**30)], "--limit="),
    (["--tasks", "lambada,pika"], "--tasks pika"),
    (["--bpb", "x.jsonl"], "--bpb x.jsonl"),
    (["--bpb", "x=texts", "x=sets"], "--bpb x=sets"),
    (["--bpb", "context=texts"], "--bpb context=texts"),
    (["--bpb", "x=none.txt"], "none.txt"),
    (["--tasks", "none", "--audit", "data/tiny"], "--audit data/tiny"),
    (["--audit", "data/none"], "data/none/train.bin"),
    (["--tasks", "lambada", "--eval_data", "none", "--data", "none"], "nothing to score"),
    (["--out", "sets"], "'sets'"),
    (["--prompt", ""], "--prompt"),
    (["--prompt", "x" * 65], "--prompt: 65 tokens"),
    (["--prompt", "x", "--temperature", "nan"], "--temperature=nan"),
    (["--prompt", "x", "--seed", "12345678901234567890"], "--seed=12345678901234567890"),
])
def test_refused_before_the_first_batch(words, named, place, monkeypatch):
    root, _ = place
    monkeypatch.chdir(root)
    (root / "out/not.pt").write_text("not a checkpoint")
    for name in ("gpt2", "short"):
        shutil.copytree(root / "data/tiny", root / "data" / name, dirs_exist_ok=True)
    meta = json.loads((root / "data/tiny/meta.json").read_text())
    (root / "data/gpt2/meta.json").write_text(json.dumps(meta | {"tokenizer": "gpt2"}))
    os.truncate(root / "data/short/val.bin", 100)
    monkeypatch.setattr(e, "run_task", lambda *args: pytest.fail("a batch was run"))
    with pytest.raises((DataError, m.ModelError, OSError)) as error:
        e.main(["--ckpt", "out/a.pt", "--eval_data", "sets", *words])
    assert named in str(error.value) and "\n" not in str(error.value)


def test_errors_are_one_line(place, refused):
    assert "out/none.pt" in refused("eval.py", "--ckpt", "out/none.pt", cwd=place[0])


def test_a_checkpoint_is_read_by_its_own_tokens(scored, place):
    root, _ = place
    m.export(m.load(str(root / "out/a.pt"))[0], str(root / "exported"), get_tokenizer("bytes"))
    try:
        m.load(str(root / "exported"))
    except m.ModelError as error:
        if "no such checkpoint" in str(error):
            pytest.skip("this model.load reads no folders yet")
        raise
    ours, theirs = (scored("--tasks", "lambada", "--bpb", "x=texts", "--data", "none", ckpt=(name,))[0]["tables"]
                    for name in ("out/a.pt", "exported"))
    for table, key in (("tasks", "lambada perplexity"), ("bits per byte", "x")):
        assert theirs[table][0][key] == pytest.approx(ours[table][0][key], rel=1e-5)
    shutil.copytree(root / "exported", root / "foreign")
    for path in (root / "foreign").glob("*token*"):
        path.unlink()
    checkpoint = torch.load(root / "out/a.pt", weights_only=True)
    del checkpoint["meta"]["tokenizer"]
    torch.save(checkpoint, root / "out/untold.pt")
    for name in ("foreign", "out/untold.pt"):
        with pytest.raises(m.ModelError, match=name):
            scored(ckpt=(name,))


# ---------------------------------------------------------------------------------------------
# Generation


def test_prompt_continues_the_text(place, monkeypatch, capsys):
    root, hf = place
    monkeypatch.chdir(root)

    def continued(*words):
        e.main(["--ckpt", "out/a.pt", "--prompt", "def f", "--max_new_tokens", "12", *map(str, words)])
        return capsys.readouterr().out
    greedy = continued("--temperature", 0)
    theirs = hf.generate(torch.tensor([list(b"def f")]), max_new_tokens=12, do_sample=False, eos_token_id=None,
                         pad_token_id=256)
    assert greedy == get_tokenizer("bytes").decode(theirs[0].tolist()) + "\n"
    assert continued("--top_k", 1) == greedy
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
