import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
from conftest import ROOT, write_corpus
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare as p
from prepare import DataError, get_tokenizer, open_bin, token_bytes

EOT = 256   # of the bytes tokenizer


def documents_of(path):
    """The documents of a bin of byte tokens, decoded by hand."""
    tokens = np.fromfile(path, dtype="<u2")
    assert tokens[-1] == EOT and tokens.max() == EOT
    ends = np.flatnonzero(tokens == EOT)
    starts = [0, *(ends[:-1] + 1)]
    return [bytes(tokens[s:e].astype(np.uint8)).decode() for s, e in zip(starts, ends)]


def gpt2():
    try:
        return get_tokenizer("gpt2")
    except DataError:
        pytest.skip("GPT-2's vocabulary is not at hand")


def test_bins_hold_every_document_once_and_meta_tells_the_truth(tmp_path, run):
    folder = write_corpus(tmp_path / "text")
    (folder / "more.jsonl").write_text('{"text": "uno\\r\\ndos"}\n\n{"text": "", "meta": 1}\n{"text": "tres 🎉"}\n')
    with gzip.open(folder / "zipped.txt.gz", "wt", encoding="utf-8") as f:
        f.write("in a .gz")
    with gzip.open(folder / "zipped.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write('{"text": "a literal <|endoftext|> is plain text"}\n')
    result = run("prepare.py", folder, "--out", "out", "--tokenizer", "bytes", cwd=tmp_path)
    assert result.returncode == 0 and 'data = "out"' in result.stdout, result.stderr

    out = tmp_path / "out"
    assert sorted(f.name for f in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    train, val = documents_of(out / "train.bin"), documents_of(out / "val.bin")
    expected = [f.read_text() for f in folder.glob("*.txt")] + \
        ["uno\r\ndos", "tres 🎉", "in a .gz", "a literal <|endoftext|> is plain text"]
    assert sorted(train + val) == sorted(expected) and train and val

    meta = json.loads((out / "meta.json").read_text())
    assert meta["tokenizer"] == "bytes" and meta["vocab_size"] == 257
    for side, texts in (("train", train), ("val", val)):
        raw = (out / f"{side}.bin").read_bytes()
        assert meta["splits"][side] == dict(documents=len(texts), bytes=sum(len(t.encode()) for t in texts),
                                            tokens=len(raw) // 2, sha256=hashlib.sha256(raw).hexdigest())


def test_a_document_falls_on_the_same_side_in_any_corpus(tmp_path):
    folder = write_corpus(tmp_path / "a", 60)
    p.prepare([str(folder)], str(tmp_path / "one"), "bytes", 0.2)
    for i in range(0, 60, 3):
        os.remove(folder / f"{i:03}.txt")
    (folder / "000-new.txt").write_text("something else")
    p.prepare([str(folder)], str(tmp_path / "two"), "bytes", 0.2)
    for side in ("train", "val"):
        one, two = (documents_of(tmp_path / n / f"{side}.bin") for n in ("one", "two"))
        assert set(two) - {"something else"} <= set(one)
    assert 4 <= len(documents_of(tmp_path / "one" / "val.bin")) <= 22      # 12 expected, sd 3.1


def test_the_same_command_gives_the_same_bytes(tmp_path):
    folder = write_corpus(tmp_path / "a")
    bins = []
    for out in ("one", "two"):
        p.prepare([str(folder)], str(tmp_path / out), "bytes", 0.1)
        bins.append([(tmp_path / out / f).read_bytes() for f in ("train.bin", "val.bin", "meta.json")])
    assert bins[0] == bins[1]


def test_small_corpora_still_get_both_sides(tmp_path, monkeypatch):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.txt").write_text(text)
    p.prepare([str(tmp_path / "one.txt")], str(tmp_path / "out"), "bytes", 0.1)
    train, val = documents_of(tmp_path / "out/train.bin"), documents_of(tmp_path / "out/val.bin")
    assert train[0] + val[0] == text and train[0].endswith("\n") and 0.05 < len(val[0]) / len(text) < 0.15

    monkeypatch.setattr(p, "PIECE", 64)         # the same, of a text that comes in pieces
    p.prepare([str(tmp_path / "one.txt")], str(tmp_path / "out"), "bytes", 0.1, keep_duplicates=True)
    train, val = documents_of(tmp_path / "out/train.bin"), documents_of(tmp_path / "out/val.bin")
    assert train[0] + val[0] == text and train[0].endswith("\n") and 0.05 < len(val[0]) / len(text) < 0.15

    folder = write_corpus(tmp_path / "three", 3)
    p.prepare([str(folder)], str(tmp_path / "out"), "bytes", 1e-9)
    train, val = documents_of(tmp_path / "out/train.bin"), documents_of(tmp_path / "out/val.bin")
    assert len(train) == 2 and len(val) == 1


def test_python_is_the_standard_library_without_its_tests(tmp_path):
    p.prepare(["python"], str(tmp_path), "bytes", 0.05)
    texts = set(documents_of(tmp_path / "train.bin")) | set(documents_of(tmp_path / "val.bin"))
    root = Path(sysconfig.get_paths()["stdlib"])
    assert (root / "argparse.py").read_bytes().decode() in texts
    assert (root / "json" / "decoder.py").read_bytes().decode() in texts
    assert not any(t.startswith('"""Unit tests for') for t in texts)


def test_shakespeare_splits_like_nanogpt(tmp_path, monkeypatch):
    text = "First Citizen:\nSpeak, speak.\n\n" * 50
    monkeypatch.setattr(p, "DOWNLOADS", tmp_path / "raw")
    (tmp_path / "raw" / "shakespeare").mkdir(parents=True)
    (tmp_path / "raw" / "shakespeare" / "input.txt").write_text(text)
    p.prepare(["shakespeare"], str(tmp_path / "out"), "bytes", 0.05)
    assert documents_of(tmp_path / "out/train.bin") == [text[:int(len(text) * 0.9)]]
    assert documents_of(tmp_path / "out/val.bin") == [text[int(len(text) * 0.9):]]


def test_wikitext_is_cut_into_articles(tmp_path, monkeypatch):
    train = " \n = Homarus = \n \n Text with = signs = . \n \n = = Section = = \n \n More . \n \n = Other = \n \n Words \n"
    monkeypatch.setattr(p, "DOWNLOADS", tmp_path / "raw")
    (tmp_path / "raw" / "wikitext-2").mkdir(parents=True)
    (tmp_path / "raw" / "wikitext-2" / "train.txt").write_text(train)
    (tmp_path / "raw" / "wikitext-2" / "valid.txt").write_text(" = A = \n b \n")
    p.prepare(["wikitext-2"], str(tmp_path / "out"), "bytes", 0.05)
    articles = documents_of(tmp_path / "out/train.bin")
    assert "".join(articles) == train
    assert [a.split("\n")[0] for a in articles] == [" ", " = Other = "]
    assert documents_of(tmp_path / "out/val.bin") == [" = A = \n b \n"]


def test_bytes_tokenizer_is_lossless():
    tokenizer = get_tokenizer("bytes")
    text = "tab\tnul\0 é→🎉 \r\n" + "x" * 100 + "<|endoftext|>"
    assert isinstance(tokenizer, tiktoken.Encoding) and tokenizer.n_vocab == 257
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert token_bytes(tokenizer).tolist() == [1] * 256 + [0]


def test_gpt2_bins_are_nanogpts_format(tmp_path):
    """nanoGPT: np.array(enc.encode_ordinary(text) + [enc.eot_token], dtype=np.uint16).tofile(path)"""
    encoding = gpt2()
    folder = write_corpus(tmp_path / "text", 30)
    p.prepare([str(folder)], str(tmp_path / "out"), "gpt2", 0.1)
    tokens = np.memmap(tmp_path / "out/train.bin", dtype=np.uint16, mode="r")
    texts = encoding.decode(tokens.tolist()).split("<|endoftext|>")
    assert texts.pop() == ""
    assert set(texts) <= {f.read_text() for f in folder.iterdir()}
    expected = [token for text in texts for token in [*encoding.encode_ordinary(text), 50256]]
    assert tokens.tolist() == expected
    sizes = token_bytes(encoding)
    assert sizes[tokens].sum() == sum(len(t.encode()) for t in texts) and sizes[50256] == 0


def test_nanogpts_bins_are_read(tmp_path, capsys):
    np.array([1, 50256, 7], dtype=np.uint16).tofile(tmp_path / "train.bin")
    tokens, meta = open_bin(tmp_path / "train.bin")
    assert tokens.tolist() == [1, 50256, 7] and meta["tokenizer"] == "gpt2"
    assert "no meta.json" in capsys.readouterr().out


# ---- sources and formats


def sentences(seed, n):
    """n words of text that repeats nothing by accident."""
    words = random.Random(seed)
    return " ".join("".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randint(3, 9))) for _ in range(n))


TEXTS = [f"{sentences(i, 40)}\r\n\0 é {i}\n" for i in range(6)]


def written_as(kind, folder):
    lines = "".join(json.dumps({"body": text, "text": 3}) + "\r\n" for text in TEXTS).encode()
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow
        parquet.write_table(pyarrow.table({"body": TEXTS, "id": list(range(6))}), folder / "a.parquet")
    elif kind == "zst":
        (folder / "a.jsonl.zst").write_bytes(pytest.importorskip("backports.zstd").compress(lines))
    else:
        compress = {"jsonl": bytes, "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}[kind]
        (folder / ("a.jsonl" + f".{kind}" * (kind != "jsonl"))).write_bytes(compress(lines))


@pytest.mark.parametrize("kind", ["jsonl", "gz", "xz", "bz2", "zst", "parquet"])
def test_every_format_holds_the_same_documents(kind, tmp_path):
    written_as(kind, tmp_path)
    p.prepare([str(tmp_path / "a*")], str(tmp_path / "out"), "bytes", 0.3, field="body")
    found = [documents_of(tmp_path / "out" / f"{side}.bin") for side in ("train", "val")]
    assert sorted(found[0] + found[1]) == sorted(TEXTS) and found[0] and found[1]


@pytest.mark.parametrize("kind", ["gz", "xz", "bz2", "zst"])
def test_files_cut_short_are_refused(kind, tmp_path):
    written_as(kind, tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"not a whole {kind} file"):
        p.prepare([str(path)], str(tmp_path / "out"), "bytes", 0.3, field="body")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("data, expected", [(b"one text\nof two lines\n" * 3, ["one text\nof two lines\n" * 3]),
                                            (b'{"text": "a"}\n{"text": "b"}\n', ["a", "b"])])
def test_standard_input_is_a_text_or_lines_of_json(data, expected, tmp_path):
    words = ["-", "--out", "out", "--tokenizer=bytes", "--val_fraction=0.4"]
    subprocess.run([sys.executable, ROOT / "prepare.py", *words], input=data, cwd=tmp_path, check=True, capture_output=True)
    found = [documents_of(tmp_path / "out" / f"{side}.bin") for side in ("train", "val")]
    assert "".join(sorted(found[0]) + sorted(found[1])) == "".join(expected) or sorted(found[0] + found[1]) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_lines_are_whole_and_numbered_however_they_are_handed_out(workers, tmp_path, monkeypatch):
    monkeypatch.setattr(p, "BATCH", 64)
    texts = [sentences(i, i % 40) for i in range(1, 90)]        # longer and shorter than a batch
    lines = [json.dumps({"text": text, "score": float("nan")}) for text in texts]
    for name, compress in ("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress):
        (tmp_path / name).write_bytes(compress("\n".join(lines).encode()))
        p.prepare([str(tmp_path / name)], str(tmp_path / "out"), "bytes", 0.3, keep_duplicates=True, workers=workers)
        found = [documents_of(tmp_path / "out" / f"{side}.bin") for side in ("train", "val")]
        assert sorted(found[0] + found[1]) == sorted(filter(None, texts))
        (tmp_path / name).write_bytes(compress("\n".join([*lines[:70], "cut", *lines[70:]]).encode()))
        with pytest.raises(DataError, match=f"{name}, line 71:"):
            p.prepare([str(tmp_path / name)], str(tmp_path / "out"), "bytes", 0.3, workers=workers)


def test_bad_lines_are_skipped_and_counted_when_asked(tmp_path, run, refused):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "first \xff"}\n{"text": 3}\n[]\n{"text": "\\ud800"}\n'
                                       b'{"text": "last"}\n{"text": "cut')
    words = ["prepare.py", "a.jsonl", "--out", "out", "--tokenizer=bytes"]
    assert "not UTF-8 at byte 16" in refused(*words, cwd=tmp_path)
    assert "a.jsonl, line 2" in refused(*words, "--errors=replace", cwd=tmp_path)
    result = run(*words, "--errors=replace", "--skip_bad", cwd=tmp_path)
    assert "4 bad lines, 1 not UTF-8" in result.stdout, result.stderr
    found = [documents_of(tmp_path / "out" / f"{side}.bin") for side in ("train", "val")]
    assert sorted(found[0] + found[1]) == ["first \ufffd", "last"]


def test_list_names_every_corpus(tmp_path, run):
    result = run("prepare.py", "--list", cwd=tmp_path)
    for name in ("python", "shakespeare", "wikitext-2", "wikitext-103", "openwebtext", "fineweb-edu-10B", "pg19",
                 "pile"):
        assert f"\n{name} " in f"\n{result.stdout}"


HUB = """
import os, shutil
from types import SimpleNamespace as Entry
class HfApi:
    def list_repo_tree(self, repo_id, repo_type, revision, path_in_repo):
        assert (repo_id, repo_type, path_in_repo) == ("monology/pile-uncopyrighted", "dataset", "train")
        return [Entry(path="train/00.jsonl.zst", lfs=Entry(sha256=os.environ["SHA256"])),
                Entry(path="train/x.md", lfs=None)]
def hf_hub_download(repo_id, repo_type, revision, filename, local_dir):
    if os.environ["SHA256"] == "none": raise OSError("unreachable")
    os.makedirs(local_dir / ".cache", exist_ok=True)
    os.makedirs(local_dir / "train", exist_ok=True)
    return shutil.copy("there.zst", local_dir / filename)
"""


def test_corpora_of_the_hub_are_checked_by_what_it_lists(tmp_path):
    """On a stand-in for huggingface_hub; of the Pile, one component."""
    zstd = pytest.importorskip("backports.zstd")
    lines = [json.dumps({"text": f"{sentences(i, 30)}", "meta": {"pile_set_name": "ArXiv" if i % 3 else "Github"}})
             for i in range(60)]
    (tmp_path / "there.zst").write_bytes(zstd.compress("\n".join(lines).encode()))
    (tmp_path / "huggingface_hub.py").write_text(HUB)

    def prepare(sha256):
        env = {**os.environ, "PYTHONPATH": str(tmp_path), "SHA256": sha256}
        return subprocess.run([sys.executable, ROOT / "prepare.py", "pile:ArXiv", "--out", "out", "--tokenizer=bytes"],
                              cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "not the file that monology/pile-uncopyrighted lists" in prepare("0" * 64).stderr
    assert not list((tmp_path / "data/raw/pile").rglob("*.zst")) and not list((tmp_path / "out").iterdir())
    line = prepare("none").stderr.splitlines()[-1]
    assert "unreachable" in line and "into data/raw/pile" in line
    result = prepare(hashlib.sha256((tmp_path / "there.zst").read_bytes()).hexdigest())
    assert result.returncode == 0, result.stderr
    found = documents_of(tmp_path / "out/train.bin") + documents_of(tmp_path / "out/val.bin")
    assert sorted(found) == sorted(sentences(i, 30) for i in range(60) if i % 3)
    assert prepare("none").returncode == 0      # what is there is not downloaded again


# ---- the same bytes, always


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=30), st.sampled_from(["bytes", "gpt2"]))
def test_tokens_decode_to_the_documents_exact_bytes(texts, tokenizer):
    encoding = gpt2() if tokenizer == "gpt2" else get_tokenizer("bytes")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        p.prepare([f"{folder}/a.jsonl"], folder, tokenizer, 0.3, keep_duplicates=True)
        found = []
        for side in ("train", "val"):
            tokens = np.fromfile(f"{folder}/{side}.bin", "<u2")
            for document in np.split(tokens, np.flatnonzero(tokens == encoding.eot_token) + 1)[:-1]:
                found.append(encoding.decode_bytes(document[:-1].tolist()))
    assert sorted(found) == sorted(text.encode() for text in texts)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Some thousand short documents, a few of them twice; and batches so small that there are many."""
    monkeypatch.setattr(p, "BATCH", 2000)
    monkeypatch.setattr(p, "COMMIT", 20000)
    lines = [json.dumps({"text": sentences(i % 1400, 20)}) + "\n" for i in range(1500)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    p.prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "whole"), "bytes", 0.1, workers=1)
    return tmp_path


def same_bins(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in ("train.bin", "val.bin"))


def test_the_number_of_workers_changes_no_byte(corpus):
    for workers in (2, 3):
        p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, workers=workers)
        assert same_bins(corpus / "out", corpus / "whole")


def slow_digest(batch, digest=p.digest):
    time.sleep(0.03)
    return digest(batch)


def alive(group):
    """Whether a process of this group still runs (a zombie does not)."""
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return any(state != "Z" and int(pgrp) == group for state, _, pgrp, *_ in stats)


def test_a_killed_run_goes_on_to_the_same_bytes_and_leaves_no_process(corpus, monkeypatch):
    monkeypatch.setattr(p, "digest", slow_digest)
    moments, killed = random.Random(0), 0
    for n in range(50):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, workers=1 + n % 2, resume=True)
            os._exit(0)
        time.sleep(moments.uniform(0.05, 0.5))
        os.kill(pid, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        killed += 1
        end = time.monotonic() + 30
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert not alive(pid)
    assert 2 <= killed < 50 and same_bins(corpus / "out", corpus / "whole")
    assert sorted(f.name for f in (corpus / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_resume_skips_what_is_done_and_refuses_other_options(corpus, refused, run):
    with open(corpus / "a.jsonl", "a") as f:
        f.write("broken\n")
    words = ["prepare.py", "a.jsonl", "--out", "out", "--tokenizer=bytes", "--val_fraction=0.1", "--workers=1"]
    with pytest.raises(DataError):      # in this process, where batches are small
        p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1)
    done = json.loads((corpus / "out/prepare.work/done.json").read_text())
    assert 1400 < done["rows"] < 1500
    (corpus / "out/prepare.work/done.json").write_text(json.dumps(done | {"layout": "another"}))
    with pytest.raises(DataError, match="written by another version"):
        p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, resume=True)
    (corpus / "out/prepare.work/done.json").write_text(json.dumps(done))
    with pytest.raises(DataError, match="field was text, now it is body"):
        p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, field="body", resume=True)
    p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, resume=True, skip_bad=True)
    assert same_bins(corpus / "out", corpus / "whole")
    assert "a.jsonl, line 1501" in refused(*words, cwd=corpus)


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    encoding = gpt2()
    texts = ["".join(f"{sentences(i, 9)},  and\n\n    {i}'s  {'=' * i}\t \u3000{'é' * (i % 5)} " for i in range(60))
             + str(k) for k in range(4)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, newline="")
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text[::-1]}) + "\n" for text in texts))
    monkeypatch.setattr(p, "PIECE", 300)
    p.prepare([str(tmp_path)], str(tmp_path / "out"), "gpt2", 0.4, keep_duplicates=True)
    tokens = np.concatenate([np.fromfile(tmp_path / "out" / f"{side}.bin", "<u2") for side in ("train", "val")])
    documents = np.split(tokens, np.flatnonzero(tokens == 50256) + 1)[:-1]
    assert len(documents) == 8
    by_text = {encoding.decode(d[:-1].tolist()): d[:-1].tolist() for d in documents}
    assert by_text == {text: encoding.encode_ordinary(text) for t in texts for text in (t, t[::-1])}

    (tmp_path / "dense.txt").write_text("日本語" * 500)       # nowhere to cut but between characters
    p.prepare([str(tmp_path / "dense.txt")], str(tmp_path / "out"), "bytes", 0.1, keep_duplicates=True)
    found = documents_of(tmp_path / "out/train.bin") + documents_of(tmp_path / "out/val.bin")
    assert "".join(found) == "日本語" * 500


def test_shards_are_read_as_one(corpus):
    meta = p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, shard_tokens=50000)
    names = sorted(f.stem for f in (corpus / "out").glob("train*.bin"))
    assert len(names) > 3 and names == [f"train-{i:05}" for i in range(len(names))] and set(names) < set(meta["splits"])
    sources, _ = p.open_data(str(corpus / "out"), "train")
    (bins,) = sources.values()
    assert np.array_equal(np.concatenate(bins), np.fromfile(corpus / "whole/train.bin", "<u2"))
    assert all(tokens[-1] == EOT and len(tokens) < 51000 for tokens in bins)
    p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1)         # the old shards go
    assert sorted(f.name for f in (corpus / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_a_corpus_larger_than_the_memory_it_may_use(tmp_path):
    """120 MB as 100,000 documents, and as a single one in pieces of 1 MB, in a process that may have 100 MB above what
    it needs for a small corpus."""
    line = json.dumps({"text": sentences(1, 180)}) + "\n"
    for name, n in (("a.jsonl", 100_000), ("b.jsonl", 100), ("c.txt", 100_000)):
        with open(tmp_path / name, "w") as f:
            f.writelines(line.replace('": "', f'": "{i} ', 1) for i in range(n))
    peak = "import resource, prepare as p; p.PIECE = 2**{}; " \
           "p.prepare({!r}, 'out', 'bytes', 0.05, keep_duplicates=True); " \
           "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = [int(subprocess.run([sys.executable, "-c", peak.format(size, [name])], cwd=tmp_path, check=True, text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True).stdout)
             for size, name in ((24, "b.jsonl"), (24, "a.jsonl"), (20, "c.txt"))]
    assert (tmp_path / "c.txt").stat().st_size > 120e6 and max(peaks) - peaks[0] < 100_000       # KiB


# ---- what is left out


def test_words_are_compared_without_case_and_punctuation():
    every = "".join(f"{chr(i)} x{chr(i)}Y" for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    expected = "".join(c for c in every.lower() if c.isalnum() or c.isspace()).split()
    assert [word.decode() for word in p.normalise(every)] == expected


def test_repeated_documents_are_left_out(tmp_path):
    """Once as it is, once re-wrapped and re-punctuated, once in another source; and near ones by how near."""
    base = [sentences(i, 400).split() for i in range(300)]
    lines, near = [" ".join(words) for words in base], {}
    for i, words in enumerate(base):        # the last n words are others: of 396 5-grams n differ on either side
        n = (0, 20, 80, 200)[i % 4]
        near[i] = " ".join(words[:400 - n] + sentences(1000 + i, n).split())
        lines.append(near[i].replace(" ", " \n", 3).title() + "!")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    (tmp_path / "b.txt").write_text(lines[7])
    meta = p.prepare([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], str(tmp_path / "out"), "bytes", 0.05)
    kept = set(documents_of(tmp_path / "out/train.bin") + documents_of(tmp_path / "out/val.bin"))
    assert set(lines[:300]) <= kept         # the first of each stays
    gone = [(0, 20, 80, 200)[i % 4] for i in range(300) if lines[300 + i] not in kept]
    # Jaccard 1, 376/416 = 0.90, 316/476 = 0.66 and 0.33: precision is exact, recall at 0.90 by the bands 0.9999
    assert (gone.count(0), gone.count(20), gone.count(80), gone.count(200)) == (75, 75, 0, 0)
    assert [source["duplicates"] for source in meta["sources"]] == [150, 1]
    assert len(meta["examples"]["duplicates"]) == 10
    p.prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), "bytes", 0.05, keep_duplicates=True)
    assert len(documents_of(tmp_path / "out/train.bin") + documents_of(tmp_path / "out/val.bin")) == 600


def test_a_corpus_with_its_own_split_keeps_its_documents(tmp_path, monkeypatch):
    """But another source does not bring them in again."""
    monkeypatch.setattr(p, "DOWNLOADS", tmp_path / "raw")
    text = sentences(3, 900)
    (tmp_path / "raw" / "shakespeare").mkdir(parents=True)
    (tmp_path / "raw" / "shakespeare" / "input.txt").write_text(text)
    lines = [text[int(len(text) * 0.9):], *(sentences(i, 30) for i in range(50, 80))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    p.prepare([str(tmp_path / "a.jsonl"), "shakespeare"], str(tmp_path / "out"), "bytes", 0.1)
    train, val = documents_of(tmp_path / "out/train.bin"), documents_of(tmp_path / "out/val.bin")
    assert lines[0] in val and lines[0] not in train
    assert sorted(train + val) == sorted([text[:int(len(text) * 0.9)], *lines])


@pytest.fixture
def test_set(tmp_path):
    """A folder with a LAMBADA of 40 items of 70 words."""
    items = [sentences(5000 + i, 70) for i in range(40)]
    (tmp_path / "sets/lambada").mkdir(parents=True)
    (tmp_path / "sets/lambada/lambada_test.jsonl").write_text("".join(json.dumps({"text": i}) + "\n" for i in items))
    return items


def test_planted_test_items_are_cut_and_nothing_else(tmp_path, test_set):
    """Some whole, some in part, re-wrapped and re-punctuated; a document full of them goes altogether."""
    clean = [sentences(i, 300) for i in range(100)]
    lines = list(clean)
    for i, item in enumerate(test_set[:30]):
        if i % 3 == 1:
            item = " ".join(item.split()[20:34])        # 14 words of it
        if i % 3 == 2:
            item = item.replace(" ", ",\n  ", 30).upper()
        lines[i] = clean[i][:1000] + f" {item} " + clean[i][1000:]
    lines.append(" ".join(f"{item} {sentences(200 + i, 90)}" for i, item in enumerate(test_set[:15])))
    twelve = lines[50] = clean[50] + " " + " ".join(test_set[31].split()[:12])      # too little to tell
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    meta = p.prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), "bytes", 0.1, decontaminate=["lambada"],
                     eval_data=str(tmp_path / "sets"), keep_duplicates=True)
    found = documents_of(tmp_path / "out/train.bin") + documents_of(tmp_path / "out/val.bin")
    expected = [*clean[30:50], twelve, *clean[51:]]
    for text in clean[:30]:         # 200 characters less on both sides; the space before the item is the last of them
        expected += [text[:1000 - 199], text[1000 + 199:]]
    assert sorted(found) == sorted(expected)
    assert meta["sources"][0]["contaminated"] == 31 and len(meta["examples"]["contaminated"]) == 10
    assert ["lambada", 0] in meta["examples"]["contaminated"][0][1]

    meta = p.prepare([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), "bytes", 0.1, keep_duplicates=True,
                     decontaminate=[str(tmp_path / "sets/lambada/lambada_test.jsonl")])        # the same as any file
    again = documents_of(tmp_path / "out/train.bin") + documents_of(tmp_path / "out/val.bin")
    assert sorted(again) == sorted(found)


def test_wrong_test_sets_are_refused(tmp_path, refused):
    (tmp_path / "a.txt").write_text(sentences(1, 100))
    words = ["prepare.py", "a.txt", "--out", "out", "--tokenizer=bytes"]
    assert "lambda" in refused(*words, "--decontaminate=lambda", cwd=tmp_path)
    assert "lambada_test.jsonl: no such file" in refused(*words, "--decontaminate=lambada", "--eval_data=.",
                                                         cwd=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) in (["a.txt"], ["a.txt", "out"])


# ---- what bad input gets: one line, status 1, and what was there before stays


@pytest.fixture
def existing(tmp_path):
    """tmp_path/out as an earlier, good run left it."""
    p.prepare([str(write_corpus(tmp_path / "old"))], str(tmp_path / "out"), "bytes", 0.1)
    return {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}


BAD = {     # files, expected words in the message
    "not UTF-8": ({"a.txt": b"abc\n\xff\xfe"}, "a.txt: not UTF-8 at byte 4"),
    "jsonl not UTF-8": ({"a.jsonl": b'{"text": "x"}\n{"text": "\xe9"}\n'}, "a.jsonl: not UTF-8 at byte 24"),
    "broken json": ({"a.jsonl": b'{"text": "x"}\n{"text": "cut of'}, "a.jsonl, line 2"),
    "no text field": ({"a.jsonl": b'{"body": "x"}\n'}, "a.jsonl, line 1"),
    "text is no string": ({"a.jsonl": b'{"text": 3}\n'}, "a.jsonl, line 1"),
    "half a surrogate pair": ({"a.jsonl": b'{"text": "\\ud800"}\n'}, "a.jsonl, line 1"),
    "truncated gz": ({"a.txt.gz": gzip.compress(b"hello" * 1000)[:-9]}, "a.txt.gz: not a whole gz file"),
    "no gz at all": ({"a.txt.gz": b"hello"}, "a.txt.gz: not a whole gz file"),
    "empty": ({"a.txt": b""}, "no text"),
    "nothing there": ({"a.csv": b"x"}, "no .txt"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(case, tmp_path, existing, refused):
    files, message = BAD[case]
    (tmp_path / "new").mkdir()
    for name, data in files.items():
        (tmp_path / "new" / name).write_bytes(data)
    assert message in refused("prepare.py", "new", "--out", "out", "--tokenizer", "bytes", cwd=tmp_path)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == existing


def test_bad_words(tmp_path, refused):
    (tmp_path / "a.csv").write_text("x")
    assert "missing.txt" in refused("prepare.py", "missing.txt", "--out", "out", "--tokenizer", "bytes", cwd=tmp_path)
    assert ".jsonl" in refused("prepare.py", "a.csv", "--out", "out", "--tokenizer", "bytes", cwd=tmp_path)
    assert '"bytes"' in refused("prepare.py", "python", "--out", "out", "--tokenizer", "bites", cwd=tmp_path)
    assert "did you mean --tokenizer?" in refused("prepare.py", "python", "--out", "out", "--tokeniser=bytes",
                                                  cwd=tmp_path)
    assert "--out DIR" in refused("prepare.py", "python", cwd=tmp_path)
    assert "did you mean openwebtext?" in refused("prepare.py", "openwebtxt", "--out", "out", "--tokenizer=bytes",
                                                      cwd=tmp_path)
    assert "--workers=0" in refused("prepare.py", "python", "--out", "out", "--workers=0", cwd=tmp_path)
    assert "--val_fraction" in refused("prepare.py", "python", "--out", "out", "--val_fraction", "2", cwd=tmp_path)


def test_vocabulary_too_large_for_uint16(tmp_path, monkeypatch):
    big = tiktoken.Encoding("big", pat_str="(?s:.)", special_tokens={"<|endoftext|>": 70000},
                            mergeable_ranks={bytes([i]): i for i in range(256)})
    monkeypatch.setattr(p, "get_tokenizer", lambda name: big)
    with pytest.raises(DataError, match="70001 tokens do not fit"):
        p.prepare(["python"], str(tmp_path / "out"), "big", 0.1)
    assert not (tmp_path / "out").exists()


def test_no_network_for_gpt2_says_which_files_go_where(monkeypatch, tmp_path):
    def unreachable(name):
        raise requests.ConnectionError("unreachable")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(DataError) as e:
        get_tokenizer("gpt2")
    # the names tiktoken's cache gives these two files
    for word in ("vocab.bpe as 6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
                 "encoder.json as 6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", str(tmp_path)):
        assert word in str(e.value)


def test_no_network_for_a_corpus_says_where_to_put_it(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise OSError("unreachable")
    monkeypatch.setattr(p.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(p, "DOWNLOADS", tmp_path)
    with pytest.raises(DataError, match=f"put that file at {tmp_path}/shakespeare/input.txt"):
        p.prepare(["shakespeare"], str(tmp_path / "out"), "bytes", 0.1)


def test_a_corpus_is_downloaded_once_and_checked(monkeypatch, tmp_path):
    (tmp_path / "there").mkdir()
    text = "First Citizen:\nSpeak, speak.\n\n" * 9
    (tmp_path / "there" / "input.txt").write_text(text)
    blob = subprocess.run(["git", "hash-object", "--no-filters", tmp_path / "there" / "input.txt"],
                          capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setattr(p, "DOWNLOADS", tmp_path / "raw")
    monkeypatch.setitem(p.FILES, "shakespeare", ((tmp_path / "there").as_uri(), {"input.txt": "0" * 40}))
    with pytest.raises(DataError, match="its hash differs"):
        p.prepare(["shakespeare"], str(tmp_path / "out"), "bytes", 0.1)
    assert not (tmp_path / "raw").exists() and not list((tmp_path / "out").iterdir())
    monkeypatch.setitem(p.FILES, "shakespeare", ((tmp_path / "there").as_uri(), {"input.txt": blob}))
    p.prepare(["shakespeare"], str(tmp_path / "out"), "bytes", 0.1)
    assert (tmp_path / "raw" / "shakespeare" / "input.txt").read_text() == text
    (tmp_path / "there" / "input.txt").unlink()
    p.prepare(["shakespeare"], str(tmp_path / "again"), "bytes", 0.1)
    assert (tmp_path / "again" / "train.bin").read_bytes() == (tmp_path / "out" / "train.bin").read_bytes()


def test_a_killed_run_leaves_no_half_written_bin(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "text")
    replace = os.replace        # dies with all written, none renamed
    monkeypatch.setattr(os, "replace", lambda a, b: os._exit(9) if str(b).endswith(".bin") else replace(a, b))
    pid = os.fork()
    if pid == 0:
        p.prepare([str(folder)], str(tmp_path / "out"), "bytes", 0.1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not [f.name for f in (tmp_path / "out").iterdir() if f.suffix != ".tmp" and f.name != "prepare.work"]


def test_damaged_bins_are_refused(tmp_path, existing):
    path, good = tmp_path / "out" / "val.bin", existing["val.bin"]
    tokens, meta = open_bin(path)
    assert tokens.tolist() == np.frombuffer(good, dtype="<u2").tolist()
    path.write_bytes(good[:-2])
    with pytest.raises(DataError, match="cut short"):
        open_bin(path)
    path.write_bytes(good[:-1])
    with pytest.raises(DataError, match="cut short"):
        open_bin(path)
    path.write_bytes(good[:4] + b"\x01\x00" + good[6:])
    with pytest.raises(DataError, match="sha256"):
        open_bin(path)
    path.write_bytes(good[:4] + b"\x01\x01" + good[6:])
    with pytest.raises(DataError, match="token 257 at position 2 is outside the vocabulary of 257"):
        open_bin(path)
    path.write_bytes(good)
    with pytest.raises(DataError, match="outside the vocabulary of 100"):
        open_bin(path, vocab_size=100)
    path.unlink()
    with pytest.raises(DataError, match="no such bin"):
        open_bin(path)
    meta["vocab_size"] = 70000
    (tmp_path / "out" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="70000 does not fit"):
        open_bin(tmp_path / "out" / "train.bin")
    (tmp_path / "out" / "meta.json").write_text("{")
    with pytest.raises(DataError, match="not written by prepare.py"):
        open_bin(tmp_path / "out" / "train.bin")
