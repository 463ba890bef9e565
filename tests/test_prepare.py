import gzip
import hashlib
import json
import os
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
from conftest import write_corpus

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


def test_small_corpora_still_get_both_sides(tmp_path):
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.txt").write_text(text)
    p.prepare([str(tmp_path / "one.txt")], str(tmp_path / "out"), "bytes", 0.1)
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
    "truncated gz": ({"a.txt.gz": gzip.compress(b"hello" * 1000)[:-9]}, "a.txt.gz: not a whole gzip"),
    "no gz at all": ({"a.txt.gz": b"hello"}, "a.txt.gz: not a whole gzip"),
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
    assert "required: --out" in refused("prepare.py", "python", cwd=tmp_path)
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
    monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))      # dies with all written, none renamed
    pid = os.fork()
    if pid == 0:
        p.prepare([str(folder)], str(tmp_path / "out"), "bytes", 0.1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert not [f.name for f in (tmp_path / "out").iterdir() if not f.name.endswith(".tmp")]


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
