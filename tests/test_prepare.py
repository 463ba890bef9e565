import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
from conftest import ROOT, gpt2, write_corpus
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


def prepared(sources, out, val_fraction=0.1, **options):
    """(train, val): the documents on both sides of what prepare makes of sources, of byte tokens."""
    p.prepare([str(source) for source in sources], str(out), "bytes", val_fraction, **options)
    return documents_of(out / "train.bin"), documents_of(out / "val.bin")


def found(*args, **options):
    train, val = prepared(*args, **options)
    return sorted(train + val)


def write_lines(path, texts, **fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))
    return path


def sentences(seed, n):
    """n words of text that repeats nothing by accident."""
    words = random.Random(seed)
    return " ".join("".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randint(3, 9))) for _ in range(n))


# ---- bins


def test_bins_hold_every_document_once_and_meta_tells_the_truth(tmp_path, run):
    folder = write_corpus(tmp_path / "text", 20)
    (folder / "more.jsonl").write_text('\ufeff{"text": "uno\\r\\ndos"}\n\n{"text": "", "meta": NaN}\n{"text": "tres 🎉"}')
    with gzip.open(folder / "zipped.txt.gz", "wt", encoding="utf-8") as f:
        f.write("a literal <|endoftext|> is plain text")
    result = run("prepare.py", folder, "--out", "out", "--tokenizer", "bytes", cwd=tmp_path)
    assert result.returncode == 0 and 'data = "out"' in result.stdout, result.stderr

    out = tmp_path / "out"
    assert sorted(f.name for f in out.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    train, val = documents_of(out / "train.bin"), documents_of(out / "val.bin")
    expected = [f.read_text() for f in folder.glob("*.txt")] + \
        ["uno\r\ndos", "tres 🎉", "a literal <|endoftext|> is plain text"]
    assert sorted(train + val) == sorted(expected) and train and val
    meta = json.loads((out / "meta.json").read_text())
    assert meta["tokenizer"] == "bytes" and meta["vocab_size"] == 257
    for side, texts in (("train", train), ("val", val)):
        raw = (out / f"{side}.bin").read_bytes()
        assert meta["splits"][side] == dict(documents=len(texts), bytes=sum(len(t.encode()) for t in texts),
                                            tokens=len(raw) // 2, sha256=hashlib.sha256(raw).hexdigest())


def test_a_document_falls_on_the_same_side_in_any_corpus(tmp_path):
    texts = [sentences(i, 20) for i in range(60)]
    one = prepared([write_lines(tmp_path / "a.jsonl", texts)], tmp_path / "one", 0.2)
    two = prepared([write_lines(tmp_path / "b.jsonl", ["something else", *texts[::3]])], tmp_path / "two", 0.2)
    for before, after in zip(one, two):
        assert set(after) - {"something else"} <= set(before)
    assert 4 <= len(one[1]) <= 22           # 12 expected, standard deviation 3.1


@pytest.mark.parametrize("n", [2, 3, 20, 40])
@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_a_corpus_of_any_size_gets_both_sides(tmp_path, n, val_fraction):
    """Whole documents, one of them where none would be."""
    texts = [sentences(i, 20) for i in range(n)]
    train, val = prepared([write_lines(tmp_path / "a.jsonl", texts)], tmp_path / "out", val_fraction)
    assert sorted(train + val) == sorted(texts) and min(len(train), len(val)) == 1


@pytest.mark.parametrize("piece", [64, 2**24])
def test_a_lone_document_is_cut_at_a_line_end(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(p, "PIECE", piece)
    text = "".join(f"line {i}\n" for i in range(100))
    (tmp_path / "one.txt").write_text(text)
    (train,), (val,) = prepared([tmp_path / "one.txt"], tmp_path / "out")
    assert train + val == text and train.endswith("\n") and 0.05 < len(val) / len(text) < 0.15
    both = prepared([write_lines(tmp_path / "same.jsonl", [text, text])], tmp_path / "same", keep_duplicates=True)
    assert "".join(both[0] + both[1]) == text + text


def test_the_corpora_that_have_a_name(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    monkeypatch.setattr(p, "DOWNLOADS", raw)
    monkeypatch.chdir(tmp_path)
    for name in ("shakespeare", "wikitext-2"):
        (raw / name).mkdir(parents=True)
    text = "First Citizen:\nSpeak, speak.\n\n" * 50            # split as in nanoGPT: the first 90% of the characters
    (raw / "shakespeare/input.txt").write_text(text)
    cut = int(len(text) * 0.9)
    assert prepared(["shakespeare"], tmp_path / "out") == ([text[:cut]], [text[cut:]])

    train = " \n = Homarus = \n \n Text with = signs = . \n \n = = Section = = \n \n More . \n \n = Other = \n \n W \n"
    (raw / "wikitext-2/train.txt").write_text(train)
    (raw / "wikitext-2/valid.txt").write_text(" = A = \n b \n")
    articles, val = prepared(["wikitext-2"], tmp_path / "out")
    assert "".join(articles) == train and val == [" = A = \n b \n"]
    assert [article.split("\n")[0] for article in articles] == [" ", " = Other = "]

    (tmp_path / "pg19").write_text("a file here comes before a corpus of that name")
    assert "".join(sum(prepared(["pg19"], tmp_path / "out"), [])) == (tmp_path / "pg19").read_text()

    texts = found(["python"], tmp_path / "out", keep_duplicates=True)
    for module in ("argparse", "json.decoder"):
        assert Path(__import__(module, fromlist=["x"]).__file__).read_text() in texts
    assert not any(text.startswith('"""Unit tests for') for text in texts)


def test_a_corpus_with_its_own_split_keeps_its_documents(tmp_path, monkeypatch):
    """But another source does not bring them in again."""
    monkeypatch.setattr(p, "DOWNLOADS", tmp_path / "raw")
    (tmp_path / "raw/shakespeare").mkdir(parents=True)
    text = sentences(3, 900)
    cut = int(len(text) * 0.9)
    (tmp_path / "raw/shakespeare/input.txt").write_text(text)
    lines = [text[cut:], *(sentences(i, 30) for i in range(50, 80))]
    train, val = prepared([write_lines(tmp_path / "a.jsonl", lines), "shakespeare"], tmp_path / "out")
    assert lines[0] in val and sorted(train + val) == sorted([text[:cut], *lines])


def test_bytes_tokenizer_is_lossless():
    tokenizer = get_tokenizer("bytes")
    text = "tab\tnul\0 é→🎉 \r\n" + "x" * 100 + "<|endoftext|>"
    assert isinstance(tokenizer, tiktoken.Encoding) and tokenizer.n_vocab == 257
    assert tokenizer.encode_ordinary(text) == list(text.encode())
    assert token_bytes(tokenizer).tolist() == [1] * 256 + [0]


def test_gpt2_bins_are_nanogpts_format(tmp_path):
    """nanoGPT: np.array(enc.encode_ordinary(text) + [enc.eot_token], dtype=np.uint16).tofile(path)"""
    encoding = gpt2()
    folder = write_corpus(tmp_path / "text", 30)
    p.prepare([str(folder)], str(tmp_path / "out"), "gpt2", 0.1, keep_duplicates=True)
    tokens = np.memmap(tmp_path / "out/train.bin", dtype=np.uint16, mode="r")
    texts = encoding.decode(tokens.tolist()).split("<|endoftext|>")
    assert texts.pop() == "" and set(texts) <= {f.read_text() for f in folder.iterdir()}
    assert tokens.tolist() == [token for text in texts for token in [*encoding.encode_ordinary(text), 50256]]
    sizes = token_bytes(encoding)
    assert sizes[tokens].sum() == sum(len(t.encode()) for t in texts) and sizes[50256] == 0


def test_a_megabyte_of_one_character_takes_seconds():
    """tiktoken 0.9 and 0.12 take hours."""
    began = time.monotonic()
    assert len(gpt2().encode_ordinary("^" * 2**20)) > 1000
    assert time.monotonic() - began < 60


# ---- sources and formats

TEXTS = [f"{sentences(i, 40)}\r\n\0 é {i}\n" for i in range(6)]


def compressors():
    zstd = pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    long = {zstd.CompressionParameter.window_log: 31, zstd.CompressionParameter.enable_long_distance_matching: 1}
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstd.compress,
            ".ZST": lambda data: zstd.compress(data, options=long)}


def test_every_format_gives_the_same_bytes(tmp_path):
    """JSON lines by all their endings, compressed in every way, and parquet."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = "".join(json.dumps({"body": text, "text": 3}) + "\r\n" for text in TEXTS).encode()
    bins = set()
    names = [f"a.jsonl{ending}" for ending in compressors()] + ["a.ndjson", "a.JSON", "a.parquet", "b.parquet", "c.parquet"]
    for name in names:
        path = tmp_path / name
        if name.endswith(".parquet"):
            kind = {"a": pa.string(), "b": pa.large_binary(), "c": pa.dictionary(pa.int32(), pa.string())}[name[0]]
            texts = [text.encode() for text in TEXTS] if name[0] == "b" else TEXTS
            parquet.write_table(pa.table({"body": pa.array(texts).cast(kind), "id": list(range(6))}), path)
        else:
            path.write_bytes(compressors().get(Path(name).suffix, bytes)(lines))
        assert found([path], tmp_path / "out", 0.3, field="body") == sorted(TEXTS)
        bins.add((tmp_path / "out/train.bin").read_bytes())
    assert len(bins) == 1


def test_a_zst_with_a_long_window_is_read(tmp_path):
    """Reddit's dumps are written with --long=31, which a reader must allow: 2 GiB of window in the frame's header."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00" + bytes([(31 - 10) << 3]) + b"\x29\x00\x00" + b"hello"
    pytest.importorskip("backports.zstd" if sys.version_info < (3, 14) else "compression.zstd")
    (tmp_path / "a.txt.zst").write_bytes(frame)
    assert list(p.texts(str(tmp_path / "a.txt.zst"))) == ["hello"]


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".zst"])
def test_files_cut_short_are_refused(ending, tmp_path):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compressors()[ending](sentences(1, 400).encode())[:-9])
    with pytest.raises(DataError, match=re.escape(str(path))):
        prepared([path], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_is_searched_for_text_and_says_what_it_passes_over(tmp_path, run):
    folder = tmp_path / "text"
    (folder / "sub.jsonl").mkdir(parents=True)          # a folder's name means nothing
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.TXT", "b.md", "sub.jsonl/c.py", "../elsewhere/d.rst", "data[1].txt"):
        (folder / name).write_text(f"text of {name}")
    (folder / "link").symlink_to("../elsewhere")
    (folder / "link.txt").symlink_to("../elsewhere/d.rst")
    (folder / "round").symlink_to(".")
    (tmp_path / "e.json").write_text('{"text": "text of e"}\n')
    for name in ("x.png", "y.png", "README", "config.json"):
        (folder / name).write_text("[\n1]")
    result = run("prepare.py", "text", "e.json", "--out=out", "--tokenizer=bytes", cwd=tmp_path)
    documents = documents_of(tmp_path / "out/train.bin") + documents_of(tmp_path / "out/val.bin")
    names = ("a.TXT", "b.md", "sub.jsonl/c.py", "../elsewhere/d.rst", "data[1].txt", "e")
    assert sorted(documents) == sorted(f"text of {name}" for name in names), result.stderr
    source, _ = json.loads((tmp_path / "out/meta.json").read_text())["sources"]
    assert source["passed_over"] == {".png": 2, "no ending": 1, ".json": 1}
    assert "2 .png" in result.stdout
    assert list(p.texts(str(folder / "data[1].txt"))) == ["text of data[1].txt"]        # a name before a pattern
    assert sorted(p.texts(str(folder / "*.[tm]*"))) == sorted(f"text of {name}" for name in (
        "b.md", "data[1].txt", "../elsewhere/d.rst"))


def test_a_separator_makes_documents_of_one_text(tmp_path, monkeypatch, run):
    monkeypatch.setattr(p, "PIECE", 50)
    texts = [sentences(i, i * 3) for i in range(1, 30)]
    (tmp_path / "stories.txt").write_text("<|endoftext|>".join(texts))
    assert found([tmp_path / "stories.txt"], tmp_path / "out", separator="<|endoftext|>") == sorted(texts)
    result = run("prepare.py", "stories.txt", "--out=whole", "--tokenizer=bytes", cwd=tmp_path)
    assert "--separator" in result.stdout


@pytest.mark.parametrize("data, where", [
    (b'{"text": "first \xff"}\n', "line 3"), (b'{"text": 3}\n', "line 3"), (b'{"body": ""}\n', "line 3"),
    (b"[1, 2]\n", "line 3"), (b'{"text": "\\ud800"}\n', "line 3"), (b'{"text": "cut', "line 3"), (b"[" * 100_000, "line 3")])
def test_bad_lines_stop_with_their_number_or_are_skipped_and_counted(tmp_path, refused, data, where):
    good = '{"text": "first"}\n{"text": "second"}\n'
    (tmp_path / "a.jsonl").write_bytes(good.encode() + data)
    line = refused("prepare.py", "a.jsonl", "--out", "out", "--tokenizer=bytes", cwd=tmp_path)
    assert "a.jsonl" in line and where in line and "--skip_bad" in line
    assert found([tmp_path / "a.jsonl"], tmp_path / "out", skip_bad=True) == ["first", "second"]
    (source,) = json.loads((tmp_path / "out/meta.json").read_text())["sources"]
    assert source["left out by --skip_bad"] == 1


@pytest.mark.parametrize("column, named", [([1, 2], "int64"), ([1.5], "double"), ([["a"]], "list"), ([True], "bool")])
def test_parquet_columns_that_are_no_text_are_refused_by_their_type(tmp_path, column, named):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet.*{named}"):
        prepared([tmp_path / "a.parquet"], tmp_path / "out")
    with pytest.raises(DataError, match="body"):
        prepared([tmp_path / "a.parquet"], tmp_path / "out", field="body")
    parquet.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="row 1"):
        prepared([tmp_path / "b.parquet"], tmp_path / "out")
    assert found([tmp_path / "b.parquet"], tmp_path / "out", skip_bad=True) == ["one", "two"]


def test_any_address_that_fsspec_opens_is_a_source(tmp_path):
    import fsspec
    memory = fsspec.filesystem("memory")
    for name in ("/corpus/a.txt", "/corpus/b.jsonl.gz", "/corpus/c.png"):
        data = b'{"text": "text of b"}\n' if "b" in name else b"text of a"
        memory.pipe(name, gzip.compress(data) if name.endswith("gz") else data)
    assert found(["memory://corpus"], tmp_path / "out") == ["text of a", "text of b"]
    assert list(p.texts("memory://corpus/*.txt")) == ["text of a"]
    with pytest.raises(DataError, match="nosuch://x"):
        prepared(["nosuch://x"], tmp_path / "out")


# ---- the same bytes, always


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=30), st.sampled_from(["bytes", "gpt2"]))
def test_tokens_decode_to_the_documents_exact_bytes(texts, tokenizer):
    encoding = gpt2() if tokenizer == "gpt2" else get_tokenizer("bytes")
    with tempfile.TemporaryDirectory() as folder:
        p.prepare([str(write_lines(Path(folder, "a.jsonl"), texts))], folder, tokenizer, 0.3, keep_duplicates=True)
        result = []
        for side in ("train", "val"):
            tokens = np.fromfile(f"{folder}/{side}.bin", "<u2")
            for document in np.split(tokens, np.flatnonzero(tokens == encoding.eot_token) + 1)[:-1]:
                result.append(encoding.decode_bytes(document[:-1].tolist()))
    if len(set(texts)) > 1:
        assert sorted(result) == sorted(text.encode() for text in texts)
    else:                   # equal documents fall on one side, so one is cut
        assert b"".join(result) == "".join(texts).encode()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab \n|é", max_size=40), min_size=1, max_size=8), st.integers(8, 30))
def test_pieces_join_to_the_documents(texts, size):
    piece, p.PIECE = p.PIECE, size
    try:
        parts = list(p.pieces(io.BytesIO("|||".join(texts).encode()), b"|||"))
    finally:
        p.PIECE = piece
    documents = []
    for _, data, first, _ in parts:
        documents += [b""] if first else []
        documents[-1] += data
        data.decode()
    assert documents == "|||".join(texts).encode().split(b"|||")


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """Some thousand short documents, a few of them twice; groups so small that there are many. whole/: its bins."""
    monkeypatch.setattr(p, "GROUP", 2000)
    lines = [sentences(i % 700, 20) for i in range(750)]
    p.prepare([str(write_lines(tmp_path / "a.jsonl", lines))], str(tmp_path / "whole"), "bytes", 0.1, workers=1)
    return tmp_path


def same_bins(a, b):
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in ("train.bin", "val.bin"))


def test_the_number_of_workers_changes_no_byte(corpus):
    for workers in (2, 3):
        p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, workers=workers)
        assert same_bins(corpus / "out", corpus / "whole")


def slow_part(*args, make_part=p.make_part):
    time.sleep(0.03)
    return make_part(*args)


def alive(group):
    """Whether a process of this group still runs (a zombie does not)."""
    stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return any(state != "Z" and int(pgrp) == group for state, _, pgrp, *_ in stats)


def test_a_killed_run_goes_on_to_the_same_bytes_and_leaves_no_process(corpus, monkeypatch):
    monkeypatch.setattr(p, "make_part", slow_part)
    moments, killed = random.Random(0), 0
    for n in range(50):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            try:
                p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, workers=1 + n % 2)
                os._exit(0)
            finally:        # never back into pytest
                os._exit(1)
        time.sleep(moments.uniform(0.1, 0.6 + n / 20))
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        if status == 0:
            break
        killed += 1
        end = time.monotonic() + 30
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert not alive(pid)
    assert 2 <= killed < 50 and same_bins(corpus / "out", corpus / "whole")
    assert sorted(f.name for f in (corpus / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_only_parts_of_the_same_input_and_options_are_used_again(corpus):
    made = []

    def counted(path, *args, make_part=p.make_part):
        made.extend([path] * (not path.exists()))
        return make_part(path, *args)

    def prepare(**options):
        made.clear()
        p.prepare([str(corpus / "a.jsonl")], str(corpus / "out"), "bytes", 0.1, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p, "make_part", counted)
        patch.setattr(p, "write_bin", lambda *_: 1 / 0)          # stops when all parts are made
        for options, n in ((dict(), 1), (dict(), 0), (dict(field="text", keep_duplicates=True), 1), (dict(), 1)):
            with pytest.raises(ZeroDivisionError):
                prepare(**options)
            assert bool(made) == n
        with open(corpus / "a.jsonl", "a") as f:
            f.write('{"text": "one more"}\n')
        with pytest.raises(ZeroDivisionError):
            prepare()
        assert made
    prepare()
    assert "one more" in documents_of(corpus / "out/train.bin") + documents_of(corpus / "out/val.bin")


def test_what_was_done_before_a_bad_line_is_kept_and_skip_bad_goes_on(corpus):
    with open(corpus / "a.jsonl", "a") as f:
        f.write("broken\n")
    with pytest.raises(DataError, match="line 751"):
        prepared([corpus / "a.jsonl"], corpus / "out")
    assert len(list((corpus / "out/prepare.work").glob("*/*.npz"))) > 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(p, "write_bin", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared([corpus / "a.jsonl"], corpus / "out", skip_bad=True)
    with pytest.raises(DataError, match="--skip_bad"):          # not silently with what that run left out
        prepared([corpus / "a.jsonl"], corpus / "out")
    prepared([corpus / "a.jsonl"], corpus / "out", skip_bad=True)
    assert same_bins(corpus / "out", corpus / "whole")


def test_a_second_run_on_the_same_out_is_refused(tmp_path, refused):
    write_corpus(tmp_path / "text", 3)
    words = ["prepare.py", "text", "--out", "out", "--tokenizer=bytes"]
    with p.lock(tmp_path / "out/prepare.lock"):
        assert "prepare.lock" in refused(*words, cwd=tmp_path)
    assert not (tmp_path / "out/train.bin").exists()
    prepared([tmp_path / "text"], tmp_path / "out")


def test_a_long_document_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    encoding = gpt2()
    texts = ["".join(f"{sentences(i, 9)},  and\n\n    {i}'s  {'=' * i}\t \u3000{'é' * (i % 5)} " for i in range(60))
             + str(k) for k in range(4)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text, newline="")
    write_lines(tmp_path / "all.jsonl", [text[::-1] for text in texts])
    monkeypatch.setattr(p, "PIECE", 300)
    p.prepare([str(tmp_path)], str(tmp_path / "out"), "gpt2", 0.4, keep_duplicates=True)
    tokens = np.concatenate([np.fromfile(tmp_path / "out" / f"{side}.bin", "<u2") for side in ("train", "val")])
    documents = np.split(tokens, np.flatnonzero(tokens == 50256) + 1)[:-1]
    by_text = {encoding.decode(d[:-1].tolist()): d[:-1].tolist() for d in documents}
    assert by_text == {text: encoding.encode_ordinary(text) for t in texts for text in (t, t[::-1])}


def test_a_corpus_larger_than_the_memory_it_may_use(tmp_path):
    """60 MB as 50,000 documents, and as a single one in pieces of 1 MB, in a process that may have 50 MB above what
    it needs for a small corpus."""
    line = json.dumps({"text": sentences(1, 180)}) + "\n"
    for name, n in (("a.jsonl", 50_000), ("b.jsonl", 10_000), ("c.txt", 50_000)):
        with open(tmp_path / name, "w") as f:
            f.writelines(line.replace('": "', f'": "{i} ', 1) for i in range(n))
    peak = "import resource, prepare as p; p.PIECE = 2**{}; " \
           "p.prepare({!r}, 'out', 'bytes', 0.05, keep_duplicates=True); " \
           "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = [int(subprocess.run([sys.executable, "-c", peak.format(size, [name])], cwd=tmp_path, check=True, text=True,
                                env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True).stdout)
             for size, name in ((24, "b.jsonl"), (24, "a.jsonl"), (20, "c.txt"))]
    assert (tmp_path / "c.txt").stat().st_size > 60e6 and max(peaks) - peaks[0] < 50_000       # KiB


# ---- what is left out


def test_near_and_equal_documents_are_left_out(tmp_path):
    """Once re-wrapped and in other case, once in another source; and near ones by how near."""
    base = [sentences(i, 400).split() for i in range(300)]
    lines = [" ".join(words) for words in base]
    changed = [(0, 20, 80, 200)[i % 4] for i in range(300)]
    for i, (words, n) in enumerate(zip(base, changed)):     # the last n words are others: of 396 5-grams n differ
        near = words[:400 - n] + sentences(1000 + i, n).split()
        lines.append(" ".join(near).replace(" ", " \n", 3).title())
    (tmp_path / "b.txt").write_text(lines[7])
    sources = [write_lines(tmp_path / "a.jsonl", lines), tmp_path / "b.txt"]
    kept = set(found(sources, tmp_path / "out", workers=2))
    assert set(lines[:300]) <= kept         # the first of each stays
    gone = [n for n, line in zip(changed, lines[300:]) if line not in kept]
    # Jaccard 1, 376/416 = 0.90, 316/476 = 0.66 and 0.33: precision is exact, recall at 0.90 by the bands 0.9999
    assert (gone.count(0), gone.count(20), gone.count(80), gone.count(200)) == (75, 75, 0, 0)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert [source["duplicates"] for source in meta["sources"]] == [150, 1]
    assert len(found(sources, tmp_path / "out", keep_duplicates=True)) == 601


def test_recall_at_the_limit(tmp_path):
    """Of 400 pairs at a Jaccard similarity of just over 0.8, 95% are found; just under it none is."""
    lines, pairs = [], []
    for i in range(800):
        words, n = sentences(i, 404).split(), 44 if i < 400 else 45     # (400 - n) / (400 + n): 0.802, 0.798
        pairs.append((" ".join(words), " ".join(words[:404 - n] + sentences(10_000 + i, n).split())))
        lines += pairs[-1]
    kept = set(found([write_lines(tmp_path / "a.jsonl", lines)], tmp_path / "out"))
    gone = [sum(pair[1] not in kept for pair in half) for half in (pairs[:400], pairs[400:])]
    assert gone[0] >= 372 and gone[1] == 0          # 380 expected, standard deviation 4.4


def test_a_row_goes_only_if_it_repeats_one_that_stays(tmp_path):
    """Of texts each 0.87 like the one before and 0.74 like the one before that, every second goes."""
    words = sentences(0, 3000).split()
    lines = [" ".join(words[28 * i:28 * i + 404]) for i in range(7)]
    assert found([write_lines(tmp_path / "a.jsonl", lines)], tmp_path / "out") == sorted(lines[::2])


def test_equal_means_equal_text(tmp_path):
    """Case and white space aside; but neither operators, accents nor vowel signs."""
    texts = [f"return a {op} b" for op in "+ - * / // % ** @ & | ^ << >> < > <= >= == !=".split()]
    texts += ["दिन", "दीन", "nino", "niño"]
    again = ["RETURN a\n+  B", " दिन "]
    assert found([write_lines(tmp_path / "a.jsonl", texts + again)], tmp_path / "out") == sorted(texts)


def han(seed, n):
    return "".join(map(chr, random.Random(seed).choices(range(0x4e00, 0x9fff), k=n)))


def test_scripts_without_spaces_have_a_word_a_character(tmp_path):
    texts = [han(i, 300) for i in range(30)]
    near = [text[:150] + "一" + text[151:] for text in texts]
    assert found([write_lines(tmp_path / "a.jsonl", texts + near)], tmp_path / "out") == sorted(texts)
    items = write_lines(tmp_path / "items.jsonl", [han(100, 200)])
    text = han(101, 400) + han(100, 200)[20:180] + han(102, 400)
    assert found([write_lines(tmp_path / "b.jsonl", [text, "x y z"])], tmp_path / "out", decontaminate=[str(items)]) == \
        sorted([text[:200], text[-200:], "x y z"])


def test_words_of_test_items_are_without_case_and_punctuation():
    every = "".join(f"{chr(i)} x{chr(i)}Y" for i in range(0x250) if not 0xD800 <= i < 0xE000)
    expected = "".join(c for c in every.lower() if c.isalnum() or c.isspace() or unicodedata.combining(c)).split()
    assert p.split_words(p.without_punctuation(every.lower())) == expected


@pytest.fixture
def test_set(tmp_path):
    """A folder with a LAMBADA of 40 items of 70 words, and one too short to look for."""
    items = [sentences(5000 + i, 70) for i in range(40)]
    write_lines(tmp_path / "sets/lambada/lambada_test.jsonl", [*items, "only five words of it"])
    return items


def test_planted_test_items_are_cut_and_nothing_else(tmp_path, test_set):
    """Some whole, some in part, re-wrapped and re-punctuated; a document full of them goes altogether."""
    clean = [sentences(i, 300) for i in range(60)]
    lines = list(clean)
    for i, item in enumerate(test_set[:30]):
        if i % 3 == 1:
            item = " ".join(item.split()[20:34])        # 14 words of it
        if i % 3 == 2:
            item = item.replace(" ", ",\n  ", 30).upper()
        lines[i] = clean[i][:1000] + f" {item} " + clean[i][1000:]
    lines.append(" ".join(f"{item} {sentences(200 + i, 90)}" for i, item in enumerate(test_set[:15])))
    twelve = lines[50] = clean[50] + " " + " ".join(test_set[31].split()[:12])      # too little to tell
    expected = [*clean[30:50], twelve, *clean[51:]]
    for text in clean[:30]:         # 200 characters less on both sides; the space before the item is the last of them
        expected += [text[:1000 - 199], text[1000 + 199:]]
    source = write_lines(tmp_path / "a.jsonl", lines)
    assert found([source], tmp_path / "out", decontaminate=["lambada"], eval_data=str(tmp_path / "sets"),
                 keep_duplicates=True) == sorted(expected)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["sources"][0]["documents with test items"] == 31 and meta["items_too_short"] == 1
    items = str(tmp_path / "sets/lambada/lambada_test.jsonl")       # the same as any file
    assert found([source], tmp_path / "out", decontaminate=[items], keep_duplicates=True) == sorted(expected)


def test_wrong_test_sets_are_refused(tmp_path, refused):
    (tmp_path / "a.txt").write_text(sentences(1, 100))
    words = ["prepare.py", "a.txt", "--out", "out", "--tokenizer=bytes"]
    assert "lambda" in refused(*words, "--decontaminate=lambda", cwd=tmp_path)
    assert "lambada_test.jsonl" in refused(*words, "--decontaminate=lambada", "--eval_data=.", cwd=tmp_path)
    write_lines(tmp_path / "lambada/lambada_test.jsonl", ["x", 3])
    assert "item 2" in refused(*words, "--decontaminate=lambada", "--eval_data=.", cwd=tmp_path)


# ---- what bad input gets: one line, status 1, and what was there before stays


@pytest.fixture
def existing(tmp_path):
    """tmp_path/out as an earlier, good run left it."""
    prepared([write_corpus(tmp_path / "old")], tmp_path / "out")
    return {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}


BAD = {     # files, what the message names
    "not UTF-8": ({"a.txt": b"abc\n\xff\xfe"}, "a.txt"),
    "truncated gz": ({"a.txt.gz": gzip.compress(b"hello" * 1000)[:-9]}, "a.txt.gz"),
    "no gz at all": ({"a.txt.gz": b"hello"}, "a.txt.gz"),
    "no parquet": ({"a.parquet": b"hello"}, "a.parquet"),
    "empty": ({"a.txt": b""}, "no text"),
    "nothing to read": ({"a.csv": b"x"}, "new"),
    "an array": ({"a.jsonl": b'[{"text": "x"}]\n'}, "a.jsonl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(case, tmp_path, existing, refused):
    files, message = BAD[case]
    (tmp_path / "new").mkdir()
    for name, data in files.items():
        (tmp_path / "new" / name).write_bytes(data)
    assert message in refused("prepare.py", "new", "--out", "out", "--tokenizer", "bytes", cwd=tmp_path)
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir() if f.is_file()} == existing


@pytest.mark.parametrize("words, named", [
    (["missing.txt", "--tokenizer=bytes"], "missing.txt"), (["a.zip", "--tokenizer=bytes"], "a.zip"),
    (["array.json", "--tokenizer=bytes"], "array.json"),
    (["python", "--tokenizer", "bites"], '"bytes"'), (["python", "--tokeniser=bytes"], "--tokeniser"),
    (["openwebtxt", "--tokenizer=bytes"], "openwebtxt"), (["python", "--workers=0"], "--workers"),
    (["python", "--workers=inf"], "--workers"), (["python", "--val_fraction=2"], "--val_fraction"),
    (["python", "--val_fraction=nan"], "--val_fraction"), ([], "SOURCE")])
def test_bad_words(words, named, tmp_path, refused):
    (tmp_path / "a.zip").write_bytes(b"PK")
    (tmp_path / "array.json").write_text('[\n{"text": "x"}\n]\n')
    assert named in refused("prepare.py", *words, "--out", "out", cwd=tmp_path)


def test_no_name_to_decontaminate_is_no_test_item(tmp_path, run):
    """An empty name is not the folder at hand."""
    write_lines(tmp_path / "a.jsonl", [sentences(i, 50) for i in range(3)])
    for words in ("", "a.jsonl,"):
        result = run("prepare.py", "a.jsonl", "--out=out", "--tokenizer=bytes", f"--decontaminate={words}", cwd=tmp_path)
        assert (result.returncode == 0) == (words == ""), result.stderr


def test_a_console_that_cannot_print_a_name(tmp_path):
    (tmp_path / "é.txt").write_text(sentences(1, 50))
    for name in ("é.txt", "ü.txt"):
        result = subprocess.run([sys.executable, ROOT / "prepare.py", name, "--out=out", "--tokenizer=bytes"],
                                cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
        assert result.returncode == (name != "é.txt") and b"Traceback" not in result.stderr, result.stderr


def test_no_network_says_what_to_bring_along(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise requests.ConnectionError("unreachable")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    get_tokenizer.cache_clear()
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR"):
        get_tokenizer("gpt2")
    monkeypatch.setattr(p.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(p, "DOWNLOADS", tmp_path)
    with pytest.raises(DataError, match=f"{tmp_path}/shakespeare/input.txt"):
        prepared(["shakespeare"], tmp_path / "out")


def test_a_corpus_is_downloaded_once_and_checked(monkeypatch, tmp_path):
    there = tmp_path / "input.txt"
    there.write_text("First Citizen:\nSpeak, speak.\n\n" * 9)
    blob = subprocess.run(["git", "hash-object", "--no-filters", there], capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(p, "DOWNLOADS", tmp_path / "raw")
    monkeypatch.setitem(p.CORPORA, "shakespeare", [(there.as_uri(), "0" * 40, p.nine_tenths)])
    with pytest.raises(DataError, match="input.txt"):
        prepared(["shakespeare"], tmp_path / "out")
    assert not (tmp_path / "raw").exists()
    monkeypatch.setitem(p.CORPORA, "shakespeare", [(there.as_uri(), blob, p.nine_tenths)])
    before = prepared(["shakespeare"], tmp_path / "out")
    there.unlink()
    assert prepared(["shakespeare"], tmp_path / "again") == before


# ---- reading bins


def test_verify_checks_every_byte(tmp_path, run, refused):
    prepared([write_corpus(tmp_path / "text")], tmp_path / "out")
    assert "train.bin" in run("prepare.py", "--verify=out", cwd=tmp_path).stdout
    path = tmp_path / "out/train.bin"
    good = path.read_bytes()
    path.write_bytes(good[:4] + b"\x01\x00" + good[6:])
    open_bin(path)
    assert "train.bin" in refused("prepare.py", "--verify", "out", cwd=tmp_path)
    path.write_bytes(good)
    (tmp_path / "out/val.bin").unlink()
    assert "val.bin" in refused("prepare.py", "--verify", "out", cwd=tmp_path)


def test_bins_that_are_not_what_they_should_be_are_refused(tmp_path, existing, refused):
    path, good = tmp_path / "out/val.bin", existing["val.bin"]
    tokens, meta = open_bin(path)
    assert tokens.tolist() == np.frombuffer(good, dtype="<u2").tolist()
    assert meta["splits"]["val"]["sha256"] == hashlib.sha256(good).hexdigest()
    for bad in (good[:-2], good[:-1], b""):
        path.write_bytes(bad)
        with pytest.raises(DataError, match="val.bin"):
            open_bin(path)
    path.write_bytes(good[:4] + b"\x01\x01" + good[6:])
    with pytest.raises(DataError, match="token 257"):
        open_bin(path)
    path.write_bytes(good)
    with pytest.raises(DataError, match="vocabulary of 100"):
        open_bin(path, vocab_size=100)
    for text in ("{", "[]", "null", '{"tokenizer": "bytes"}', json.dumps({**meta, "splits": []})):
        (tmp_path / "out/meta.json").write_text(text)
        with pytest.raises(DataError, match="meta.json"):
            open_bin(path)
        assert "meta.json" in refused("prepare.py", "--verify", "out", cwd=tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="val.bin"):
        open_bin(path)


def test_bins_of_other_projects(tmp_path, capsys):
    tokens = np.array([1, 50256, 7] * 1000, dtype=np.uint16)
    tokens.tofile(tmp_path / "train.bin")           # nanoGPT's, of GPT-2 tokens
    read, meta = open_bin(tmp_path / "train.bin")
    assert np.array_equal(read, tokens) and meta["tokenizer"] == "gpt2" and "GPT-2" in capsys.readouterr().out
    tokens.astype(np.uint32).tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match="uint32"):
        open_bin(tmp_path / "train.bin")
    header = np.zeros(256, np.int32)                # llm.c's
    header[:3] = 20240520, 1, len(tokens)
    (tmp_path / "train.bin").write_bytes(header.tobytes() + tokens.tobytes())
    assert np.array_equal(open_bin(tmp_path / "train.bin")[0], tokens)
    (tmp_path / "meta.pkl").write_bytes(b"")        # nanoGPT's characters
    with pytest.raises(DataError, match="meta.pkl"):
        open_bin(tmp_path / "train.bin")


def test_several_bins_of_a_side_are_one(tmp_path, capsys):
    for i in range(3):
        np.full(100, 10 + i, np.uint16).tofile(tmp_path / f"corpus_train_{i:06}.bin")
    np.full(100, 9, np.uint16).tofile(tmp_path / "corpus_val_000000.bin")
    sources, meta = p.open_data(str(tmp_path), "train")
    assert [bins[0] for bins in sources[str(tmp_path)]] == [10, 11, 12]
    assert [bins[0] for bins in p.open_data(str(tmp_path), "val")[0][str(tmp_path)]] == [9]
    np.full(100, 13, np.uint16).tofile(tmp_path / "corpus_train_000001.bin")
    assert p.open_data(str(tmp_path), "train")[1]["fingerprint"] != meta["fingerprint"]
    assert capsys.readouterr().out.count("meta.json") == 3      # said once for each time they are opened
    with pytest.raises(DataError, match="corpus_train_000000.bin"):
        prepared([write_corpus(tmp_path / "text")], tmp_path)
