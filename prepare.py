"""Text to token bins that train.py reads.

    python prepare.py python --out data/python --tokenizer bytes
    python prepare.py notes.txt dump.jsonl.gz folder/ 'more/*.parquet' --out data/mine
    python prepare.py openwebtext pg19 --decontaminate=lambada,hellaswag --out data/corpus
    python prepare.py --list                                            the corpora that have a name

A source is a name, a file, a folder or a pattern of files, or - for standard input. A .txt is one
document; a .jsonl is one a line, in its field "text" (or --field), and so is standard input where
it begins with a brace; a .parquet is one a row. The first two also as .gz, .xz, .bz2 or .zst.

Writes OUT/train.bin and OUT/val.bin: the documents' tokens, each document followed by
<|endoftext|>, as headerless little-endian uint16 (nanoGPT's format, readable by either project),
and OUT/meta.json: tokenizer, counts, sha256 of each bin, sources, options, and what was left out.
Documents that repeat an earlier one, or nearly, are left out; a run that was stopped goes on with
--resume. Neither the number of workers nor a kill changes a byte.
"""
import argparse
import bz2
import difflib
import fcntl
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import urllib.request
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import lru_cache
from itertools import chain, islice, pairwise
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import orjson
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
DOWNLOADS = Path("data/raw")
FORMATS = re.compile(r"\.(txt|jsonl)(\.(gz|xz|bz2|zst))?$|\.parquet$")
PIECE = 2**24           # bytes of a longer document are handled so many at a time
BATCH = 2**20           # bytes of text that a worker takes at once
COMMIT = 2**26          # bytes of text after which what is done is safe from a kill


class DataError(ValueError):
    """Data or a source that cannot be used; the message is one line for the user."""


class NoBin(DataError):
    """There is no such bin here, rather than a damaged one."""


@contextmanager
def lock(path):
    """Hold the file `path`, made if missing, for this process; a kill releases it. Raises DataError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DataError(f"{path}: another process is at work here; wait for it, or choose another folder") from None
        yield


# ---------------------------------------------------------------------------------------------
# Tokenizers: both are tiktoken encodings, byte-level and lossless


def get_tokenizer(name):
    """The tiktoken.Encoding called "gpt2" or "bytes" (256 bytes and <|endoftext|>). Raises DataError."""
    if name == "bytes":
        # no merges, so each byte is a token; the pattern only cuts the text into easy pieces
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,16})", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name != "gpt2":
        raise DataError(f'tokenizer "{name}": expected "gpt2" or "bytes"')
    try:
        return tiktoken.get_encoding("gpt2")
    except OSError:     # all that requests, by which tiktoken downloads, raises for a network
        cache = (os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
                 or os.path.join(tempfile.gettempdir(), "data-gym-cache"))
        base = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
        names = " and ".join(f"{base}/{file} as {hashlib.sha1(f'{base}/{file}'.encode()).hexdigest()}"
                             for file in ("vocab.bpe", "encoder.json"))
        raise DataError(f"no network for GPT-2's vocabulary; put {names} into {cache}, "
                        "or into a folder that TIKTOKEN_CACHE_DIR names") from None


def token_bytes(tokenizer):
    """Bytes of text that each token stands for: (n_vocab,) int64, 0 for <|endoftext|>."""
    lengths = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for token in range(tokenizer.n_vocab):
        if token != tokenizer.eot_token:
            lengths[token] = len(tokenizer.decode_single_token_bytes(token))
    return lengths


def count_words(tokens, tokenizer):
    """Words, split on white space as str.split does, in the documents of a token stream (n,)."""
    ends = np.append(np.flatnonzero(tokens == tokenizer.eot_token), len(tokens))
    start = words = 0
    for end in tqdm(ends, desc="words", unit="doc", delay=3, leave=False):
        words += len(tokenizer.decode(tokens[start:end].tolist()).split())
        start = end + 1
    return words


# ---------------------------------------------------------------------------------------------
# Sources. A record is (side, data, first, (path, line, offset)). side: "train" or "val" where the source
# has its own, else None. data: a text, or bytes: of a .txt, or, where line is a number, lines of JSON from
# that line on; of a file that is not compressed only their number, for a worker reads them faster than it is handed
# them. first: whether a document begins here, for a .txt of more than PIECE bytes comes in pieces.


def python_files(root):
    """The .py files under root, tests left out."""
    skip = {"test", "tests", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not skip & set(path.relative_to(root).parts):
            yield path


def standard_library():
    """The running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in python_files(root):
        if not {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            yield None, read_text(path)


def packages():
    """The Python packages installed beside the running interpreter."""
    for path in python_files(Path(sysconfig.get_paths()["purelib"])):
        try:
            yield None, path.read_bytes().decode()
        except UnicodeDecodeError:      # a few packages ship files in older encodings
            pass


def shakespeare():
    """Tiny Shakespeare, split as in nanoGPT: the first 90% of its characters are for training."""
    text = read_text(download("shakespeare", "input.txt"))
    cut = int(0.9 * len(text))
    yield "train", text[:cut]
    yield "val", text[cut:]


def articles(text):
    """WikiText's articles; the text before the first heading belongs to the first."""
    before, first, *others = re.split(r"(?m)^(?= = [^=\n]+ = $)", text)
    return [before + first, *others]


def wikitext2():
    """WikiText-2 (Merity et al. 2016), the word-tokenised release, an article a document."""
    for side, file in (("train", "train.txt"), ("val", "valid.txt")):
        for article in articles(read_text(download("wikitext-2", file))):
            yield side, article


def wikitext103():
    """WikiText-103 (Merity et al. 2016), the raw release, an article a document."""
    for side, pattern in (("train", "train-*"), ("val", "validation-*")):
        lines = (row for path in download_hub("wikitext-103", pattern) for row in read_parquet(path, path, "text"))
        for article in articles("".join(lines)):
            yield side, article


SOURCES = {"python": standard_library, "packages": packages, "shakespeare": shakespeare, "wikitext-2": wikitext2,
           "wikitext-103": wikitext103}

FILES = {       # source: address, and git's own hash of each file there
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare", {
        "input.txt": "7dcb3a2d4cc3b48b6283dd46870bfeb78f88aac9"}),
    "wikitext-2": ("https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2", {
        "train.txt": "2d84b35af79e411d73ea7cae83c73964c6ac83b4",
        "valid.txt": "eec944eb2d9e46061cd34a6913528797db6842fc"}),
}

HUB = {         # source: repository on huggingface.co, revision, files; their sizes and sha256 the hub itself tells
    "wikitext-103": ("Salesforce/wikitext", "main", "wikitext-103-raw-v1/*.parquet"),
    "openwebtext": ("Skylion007/openwebtext", "refs/convert/parquet", "plain_text/train/*.parquet"),
    "fineweb-edu-10B": ("HuggingFaceFW/fineweb-edu", "main", "sample/10BT/*.parquet"),
    "pg19": ("emozilla/pg19", "main", "data/train-*.parquet"),
    "pile": ("monology/pile-uncopyrighted", "main", "train/*.jsonl.zst"),
}


def download(source, file):
    """Path of a corpus file under data/raw, downloaded and checked if it is not there yet."""
    path = DOWNLOADS / source / file
    if path.exists():
        return path
    address, blobs = FILES[source]
    data = fetch(f"{address}/{file}", path)
    if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != blobs[file]:
        raise DataError(f"{address}/{file} is not the file it was: its hash differs; if you trust it, "
                        f"put it at {path} yourself")
    write_whole(path, data)
    return path


def download_hub(source, pattern="*"):
    """Paths of a corpus of the hub under data/raw, sorted: those there, if any, else downloaded, going on
    where a download stopped, and checked. Raises DataError."""
    repository, revision, files = HUB[source]
    folder, done = DOWNLOADS / source, DOWNLOADS / source / "complete"
    if not folder.exists() or (folder / ".cache").exists() and not done.exists():
        try:
            from huggingface_hub import HfApi, hf_hub_download
        except ImportError:
            raise DataError(f"{source}: pip install huggingface_hub to download it, or put {files} of "
                            f"https://huggingface.co/datasets/{repository} into {folder}") from None
        place = dict(repo_id=repository, repo_type="dataset", revision=revision)
        try:
            entries = [entry for entry in HfApi().list_repo_tree(**place, path_in_repo=os.path.dirname(files))
                       if fnmatch(entry.path, files)]
            paths = [Path(hf_hub_download(**place, filename=entry.path, local_dir=folder)) for entry in entries]
        except Exception as e:          # of whichever network library it has this year
            raise DataError(f"cannot download {source} ({str(e).splitlines()[0]}); without a network, put {files} of "
                            f"https://huggingface.co/datasets/{repository} into {folder}") from None
        for path, entry in zip(tqdm(paths, desc="checking", unit="file"), entries):
            if entry.lfs and sha256_of(path) != entry.lfs.sha256:
                path.unlink()
                raise DataError(f"{path}: not the file that {repository} lists; run the same command again")
        done.touch()
    found = sorted(path for path in folder.rglob(pattern) if FORMATS.search(path.name))
    if not found:
        raise DataError(f"{folder}: none of the files {files} is here; delete the folder and run again")
    return found


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fetch(url, path):
    """The bytes at url, with a progress bar; path is where a person could put them. Raises DataError."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=size, unit="B", unit_scale=True, desc=url.rpartition("/")[2]) as bar:
                data = bytearray()
                while chunk := response.read(1 << 16):
                    data += chunk
                    bar.update(len(chunk))
    except OSError as e:        # urllib's errors are OSErrors
        raise DataError(f"cannot download {url} ({e}); without a network, put that file at {path}") from None
    return data


def write_whole(path, data):
    """Write a file (a text or bytes) so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def local_files(source):
    """The files that a path or a pattern stands for, sorted. Raises DataError."""
    path = Path(source)
    if glob.has_magic(source):
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True)) if FORMATS.search(name)]
    else:
        files = sorted(p for p in path.rglob("*") if FORMATS.search(p.name)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{source}: no .txt, .jsonl or .parquet file there")
    if not path.exists() and files == [path]:
        near = difflib.get_close_matches(source, [*SOURCES, *HUB], n=1)
        raise DataError(f"{source}: neither a file, a folder nor a corpus of --list"
                        + (f", did you mean {near[0]}?" if near else ""))
    if not FORMATS.search(files[0].name):
        raise DataError(f"{source}: expected a name that ends in .txt, .jsonl (or these with .gz, .xz, .bz2, .zst) "
                        "or .parquet")
    return files


class Counted(io.FileIO):
    """A file whose reading moves a progress bar."""

    def __init__(self, path, bar):
        super().__init__(path)
        self.bar = bar

    def readinto(self, buffer):
        n = super().readinto(buffer)
        self.bar.update(n)
        return n


@contextmanager
def open_file(path, bar=None):
    """with open_file(path) as f: the file's bytes, decompressed. Raises DataError."""
    suffix = Path(path).suffix
    opener = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}.get(suffix)
    damaged = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
    if suffix == ".bz2":
        damaged += (OSError,)           # bz2 has no error of its own
    if suffix == ".zst":
        try:
            from compression import zstd        # Python 3.14
        except ImportError:
            try:
                from backports import zstd
            except ImportError:
                raise DataError(f"{path}: pip install backports.zstd to read it") from None
        opener, damaged = zstd.open, (*damaged, zstd.ZstdError)
    # a buffer smaller than BATCH: larger reads go past it
    with io.BufferedReader(io.FileIO(path) if bar is None else Counted(path, bar), 2**18) as raw:
        try:
            yield opener(raw) if opener else raw
        except damaged as e:
            raise DataError(f"{path}: not a whole {suffix[1:]} file ({e})") from None


def decode(data, path, offset=0):
    """Strict UTF-8; `offset` is where in the file data begins. Raises DataError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 at byte {offset + e.start} (0x{data[e.start]:02x}); convert the file, "
                        "e.g. with iconv, or pass --errors=replace") from None


def read_text(path):
    with open_file(path) as f:
        return decode(f.read(), path)


SAFE = re.compile(rb"(?s:.*)[0-9A-Za-z](?=[ \n])")


def pieces(f):
    """The bytes of f, PIECE or so at a time, cut after a letter or digit before a space or line end, where
    GPT-2's tokens always end. (Where there is no such place, before a character.)"""
    data = f.read(PIECE)
    while more := f.read(PIECE):
        if safe := SAFE.match(data):
            cut = safe.end()
        else:
            cut = len(data) - 1
            while cut and data[cut] & 0xC0 == 0x80:     # in the middle of a character
                cut -= 1
        yield data[:cut]
        data = data[cut:] + more
    yield data


def read_parquet(f, path, field):
    """The rows of one column. Raises DataError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{path}: pip install pyarrow to read it") from None
    try:
        for batch in parquet.ParquetFile(f).iter_batches(1024, columns=[field]):
            yield from batch.column(field).to_pylist()
    except (pyarrow.ArrowException, KeyError, OSError) as e:
        raise DataError(f'{path}: cannot read "{field}" ({str(e).splitlines()[0]})') from None


def read_stream(f, path, lines, field="text"):
    """The records of an open .parquet, .jsonl (lines) or .txt."""
    suffix, number, offset = Path(path).suffix, 1, 0
    if suffix == ".parquet":
        for number, text in enumerate(read_parquet(f, path, field)):
            yield None, text, True, (str(path), f"row {number}", 0)
    elif suffix == ".jsonl":
        yield from whole_lines(f, str(path))
    elif lines:
        while data := f.read(BATCH):
            data += f.readline()
            yield None, data, True, (str(path), number, offset)
            number += data.count(b"\n")
            offset += len(data)
    else:
        for data in pieces(f):
            yield None, len(data) if suffix == ".txt" else data, offset == 0, (str(path), None, offset)
            offset += len(data)


def whole_lines(f, path):
    """The records of an open .jsonl: where its lines lie, some BATCH bytes together."""
    buffer, begin, line, at = bytearray(BATCH), 0, 1, 0
    while n := f.readinto(buffer):
        if end := buffer.rfind(b"\n", 0, n) + 1:
            yield None, at + end - begin, True, (path, line, begin)
            line += int(np.count_nonzero(np.frombuffer(buffer, np.uint8, end) == 10))   # 4 times as fast as count
            begin = at + end
        at += n
    if at > begin:
        yield None, at - begin, True, (path, line, begin)


def records(source, field="text", bar=None):
    """The records of one source. Raises DataError."""
    corpus = source.partition(":")[0]
    if source in SOURCES:
        for side, text in SOURCES[source]():
            yield side, text, True, (source, None, 0)
    elif source == "-":
        f = sys.stdin.buffer
        yield from read_stream(f, "standard input", f.peek(1)[:1] == b"{")
    else:
        for path in download_hub(corpus) if corpus in HUB else local_files(source):
            with open_file(path, bar) as f:
                yield from read_stream(f, path, FORMATS.search(path.name)[1] == "jsonl", field)


# ---------------------------------------------------------------------------------------------
# Test sets: what eval.py scores, and what a training corpus should not hold

TEST_SETS = {       # name: its files in a folder of test sets, each with address (# a member of the zip) and sha256
    "lambada": {"lambada/lambada_test.jsonl": (     # Paperno et al. 2016, as OpenAI gave it out
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226")},
    "piqa": {                                       # Bisk et al. 2020
        "piqa/valid.jsonl": ("https://yonatanbisk.com/piqa/data/valid.jsonl",
                             "93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d"),
        "piqa/valid-labels.lst": ("https://yonatanbisk.com/piqa/data/valid-labels.lst",
                                  "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb")},
    "hellaswag": {"hellaswag/hellaswag_val.jsonl": (        # Zellers et al. 2019
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588")},
    "wikitext2": {"wikitext-2/test.txt": (          # Merity et al. 2016, the raw release, without <unk>
        "https://wikitext.smerity.com/wikitext-2-raw-v1.zip#wikitext-2-raw/wiki.test.raw",
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08")},
}
ITEM_FIELDS = {
    "lambada": dict(text=str),
    "piqa": dict(goal=str, sol1=str, sol2=str),
    "hellaswag": dict(activity_label=str, ctx_a=str, ctx_b=str, endings=list, label=int),
}


def test_files(name, folder=None):
    """Paths of a test set's files: in folder, taken as they are, or, without one, under data/raw/eval,
    downloaded and checked if they are not there yet. Raises DataError."""
    paths = []
    for file, (address, sha256) in TEST_SETS[name].items():
        path = Path(folder or DOWNLOADS / "eval") / file
        if folder and not path.is_file():
            raise DataError(f"{path}: no such file for {name}; put {address} there")
        if not path.exists():
            url, _, member = address.partition("#")
            data = fetch(url, f"{path} ({member})" if member else path)
            try:
                data = zipfile.ZipFile(io.BytesIO(data)).read(member) if member else data
            except (zipfile.BadZipFile, KeyError, zlib.error) as e:
                raise DataError(f"{url}: not the archive it was ({e})") from None
            if hashlib.sha256(data).hexdigest() != sha256:
                raise DataError(f"{address} is not the file it was: its sha256 differs; if you trust it, put "
                                f"it at {path} yourself")
            write_whole(path, data)
        paths.append(path)
    return paths


def test_items(name, folder=None):
    """The items of a test set as they were published: dicts with the fields of ITEM_FIELDS, PIQA's with
    its "label" too, or for wikitext2 an article each as "page". Raises DataError."""
    path, *labels = test_files(name, folder)
    text = read_text(path)
    if name == "wikitext2":         # a page runs from one first-level heading to the line before the next
        pages = re.split(r"(?m)\n(?= *= (?!=).*(?<!=) = *$)", text)
        yield from ({"page": page} for page in pages if page.strip())
        return
    labels = read_text(labels[0]).split() if labels else None
    lines = [line for line in text.split("\n") if line.strip()]
    if labels is not None and len(labels) != len(lines):
        raise DataError(f"{path}: {len(lines)} items, but {len(labels)} labels beside it")
    for number, line in enumerate(lines):
        try:
            item = json.loads(line)
            if labels is not None:
                item["label"] = int(labels[number])
            wrong = [f"{field} ({type_.__name__})" for field, type_ in ITEM_FIELDS[name].items()
                     if not isinstance(item.get(field), type_)]
        except (ValueError, AttributeError, TypeError):
            wrong = ["a JSON object"]
        if wrong:
            raise DataError(f"{path}, item {number + 1}: expected {', '.join(wrong)}")
        yield item


def detokenise(page):
    """A page of WikiText as ordinary text: lm-evaluation-harness's rules, in its order, slips and all."""
    page = page.replace("s '", "s'").replace("/' [0-9]/", "/'[0-9]/")
    for mark in "-,.":
        page = page.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        page = page.replace(f" {mark} ", f"{mark} ")
    for left, right in ("()", "[]", "{}", '""', "''"):
        page = re.sub(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}",
                      lambda inside: left + inside[1] + right, page)
    for old, new in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"), (" \n", "\n"),
                     ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(old, new)
    return page


# ---------------------------------------------------------------------------------------------
# Test items in training data: shared 13-grams, as in GPT-3's paper (Brown et al. 2020,
# arXiv:2005.14165, appendix C)
#
# A word is lower case, without punctuation, between white space. The paper chose N between 8 and 13
# for each test set; here N is 13, an item of 8 to 12 words must occur whole, and a shorter one says
# nothing (it would be found by accident).

MIN_WORDS, MAX_WORDS = 8, 13


def item_texts(name, item):
    """The texts that give a test item away: its context with each of its endings."""
    if name == "lambada":
        return [item["text"]]
    if name == "piqa":
        return [f"{item['goal']} {solution}" for solution in (item["sol1"], item["sol2"])]
    if name == "hellaswag":         # without its markers such as [step]
        return [re.sub(r"\[.*?\]", "", f"{item['ctx_a']} {item['ctx_b']} {ending}") for ending in item["endings"]]
    return [item["page"], detokenise(item["page"])]


MARK = re.compile(r"[^\x00-\x7f\w]")                   # beyond ASCII, neither letter nor digit
ASCII_MARKS = bytes(i for i in range(128) if not chr(i).isalnum() and not chr(i).isspace())
SEPARATORS = bytes.maketrans(b"\x1c\x1d\x1e\x1f", b"    ")      # white space to str.split, not to bytes.split


@lru_cache(1)       # a document is looked through for test items, then for duplicates
def normalise(text):
    """The words of a text as they are compared: lower case, without punctuation, in UTF-8."""
    text = text.lower()
    if not text.isascii():
        text = MARK.sub(lambda mark: " " if mark[0].isspace() else "", text)
    return text.encode().translate(SEPARATORS, ASCII_MARKS).split()


class Grams:
    """Finds in documents the N-grams of test items: grams is {b"the words ...": (item, ...)}.

    texts: pairs (item, text), an item any hashable name. Holds the items alone in memory (0.5 GB for the
    four test sets), whatever the size of the corpus that passes by.
    """

    def __init__(self, texts):
        self.grams = {}
        self.lengths = set()
        self.seen = np.zeros(2**24, dtype=bool)     # a cheap first look: whether a gram's first 8 words fall here
        for item, text in texts:
            words = normalise(text)
            n = min(MAX_WORDS, len(words))
            if n < MIN_WORDS:
                continue
            self.lengths.add(n)
            starts = range(len(words) - n + 1)
            self.seen[self.slots(words)[:len(starts)]] = True
            alone = (item,)
            for i in starts:
                gram = b" ".join(words[i:i + n])
                items = self.grams.get(gram, ())
                self.grams[gram] = items if item in items else items + alone if items else alone

    @staticmethod
    def slots(words):
        """For each 8 words on end, where `seen` has their bit: (len(words) - 7,)."""
        hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
        n = max(0, len(words) - MIN_WORDS + 1)
        rolled = np.zeros(n, np.uint64)
        for i in range(MIN_WORDS):
            rolled = rolled * np.uint64(0x9E3779B97F4A7C15) + hashes[i:i + n]       # modulo 2**64
        return rolled >> np.uint64(40)

    def find(self, text):
        """Every occurrence in a document of one of the grams: a list of (start, end, gram), the offsets in
        characters of text, in order of start."""
        words = normalise(text)
        found = []
        for i in np.flatnonzero(self.seen[self.slots(words)]).tolist():
            for n in self.lengths:
                gram = b" ".join(words[i:i + n])
                if i + n <= len(words) and gram in self.grams:      # the words themselves, not their hashes
                    found.append((i, i + n, gram))
        if not found:
            return []
        spans = [m.span() for m in re.finditer(r"\S+", text) if normalise(m.group())]      # of each word
        return [(spans[i][0], spans[j - 1][1], gram) for i, j, gram in found]


def test_grams(names, folder=None):
    """The Grams of test sets, or of files whose documents are the items; each is named (test set, number from
    0). Raises DataError."""
    def items(name):
        if name not in TEST_SETS:
            return ((text,) for text in texts(name))
        return (item_texts(name, item) for item in test_items(name, folder))
    return Grams(((name, number), text) for name in names for number, item in enumerate(items(name)) for text in item)


# ---------------------------------------------------------------------------------------------
# What a record comes to: a row for each document (or piece of a long one), and its tokens. Workers do
# this, a batch of records at a time. The tokens stay in a file of each worker's own, for handing them to
# another process would cost more than all else; a row tells which file, and where in it.

BINS, BANDS = 128, 16       # of a document's signature; bands of BINS / BANDS of them
ROW = np.dtype([("source", "u4"), ("position", "f8"), ("first", "?"), ("bytes", "i8"), ("tokens", "i8"),
                ("file", "u4"), ("at", "i8"), ("exact", "u8", 2), ("bands", "u8", BANDS)])
MIX = np.uint64(0x9E3779B97F4A7C15)
OWN = {"train": 2.0, "val": -1.0}       # positions of documents whose source has its own split


def position(data):
    """A number in [0, 1) that depends on the document alone: below val_fraction it is for validation, so
    that the same document always falls on the same side, whatever else is in the corpus."""
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def shingles(words):
    """The 5-grams of words as hashes, sorted: (n,) uint64. Fewer than 5 words are one."""
    n = min(5, len(words))
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    rolled = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        rolled = (rolled ^ hashes[i:i + len(rolled)]) * MIX         # modulo 2**64
        rolled ^= rolled >> np.uint64(32)
    rolled.sort()
    return rolled


def signature(words):
    """MinHash (Broder 1997) of the 5-grams of words: (BINS,) uint64, zeros for no words.

    One hash, whose high bits choose a bin that keeps the least (one permutation hashing, Li et al. 2012); an
    empty bin takes the next one's (Shrivastava & Li 2014).
    """
    if not words:
        return np.zeros(BINS, np.uint64)
    hashes = shingles(words)
    begins = np.arange(BINS, dtype=np.uint64) << np.uint64(64 - 7)      # of each bin, among the hashes
    return hashes[np.searchsorted(hashes, begins) % len(hashes)]


def bands(signatures):
    """Signatures (n, BINS) banded for LSH: (n, BANDS) uint64. Two documents of Jaccard similarity s agree in some
    band of 8 bins with probability about 1 - (1 - s^8)^16: 0.95 at s = 0.8, 0.06 at 0.5."""
    hashes = np.zeros((len(signatures), BANDS), np.uint64)
    for k in range(BINS // BANDS):
        hashes = (hashes ^ signatures[:, k::BINS // BANDS]) * MIX
        hashes ^= hashes >> np.uint64(32)
    return hashes


def without_test_items(text, grams):
    """(passages, items): the text without what it shares with test items and 200 characters on both sides
    of it, and these items. As GPT-3's corpus was cleaned, of a document that is cut what is left in pieces of
    under 200 characters goes too, and all of it where it would fall into more than 10."""
    found = grams.find(text)
    passages, at = [], 0
    for start, end, _ in found:
        passages.append(text[at:max(at, start - 200)])
        at = max(at, end + 200)
    passages.append(text[at:])
    if found:
        passages = [passage for passage in passages if len(passage) >= 200]
    return (passages if len(passages) <= 10 else []), {item for *_, gram in found for item in grams.grams[gram]}


TOOLS = {}      # what a worker needs, made once in its process


def start_worker(options, work):
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the main process
    Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()      # if that one is killed
    make_tools(options)
    TOOLS["file"] = token_file(work)


def token_file(work):
    return open(work / f"tokens-{os.getpid()}", "ab", 2**20)


def make_tools(options):
    if not TOOLS:       # a forked worker has its parent's
        names = options["decontaminate"]
        TOOLS.update(options=options, tokenizer=get_tokenizer(options["tokenizer"]),
                     grams=test_grams(names, options["eval_data"]) if names else None)


def each(record):
    """The records of one document or piece each that a record stands for: of many lines, each line. data that is a
    number of bytes is read here. Raises DataError."""
    side, data, first, (path, line, offset) = record
    if isinstance(data, int):
        with open(path, "rb") as f:
            f.seek(offset)
            n, data = data, f.read(data)
        if len(data) < n:
            raise DataError(f"{path}: became shorter while it was read")
    if not isinstance(line, int):
        yield side, data, first, (path, line, offset)
        return
    for number, data in enumerate(io.BytesIO(data), line):
        yield side, data, first, (path, f"line {number}", offset)
        offset += len(data)


def text_of(data, where, options, component="", counts=None):
    """The text of a record, in UTF-8; None for an empty line, or where it is not of the Pile's component, or where
    --skip_bad leaves it out, which is counted. Raises DataError."""
    path, line, offset = where
    text = data
    if isinstance(data, bytes):
        try:
            text = decode(data, path, offset)
        except DataError:
            if options["errors"] == "strict":
                raise
            text = data.decode("utf-8", errors="replace")
            counts["not UTF-8"] += 1
        if line and text.isspace():
            return None
        if line:
            text = text.lstrip("\ufeff")
            try:
                try:
                    item = orjson.loads(text)
                except orjson.JSONDecodeError:
                    item = json.loads(text)     # takes NaN too, as Python writes it
                if component and item["meta"]["pile_set_name"] != component:
                    return None
                text = item[options["field"]]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
    try:
        return text.encode()            # JSON can spell half a surrogate pair, UTF-8 cannot
    except (AttributeError, UnicodeEncodeError):
        if not options["skip_bad"]:
            raise DataError(f'{path}, {line}: expected a JSON object with valid Unicode text in '
                            f'"{options["field"]}"; --skip_bad leaves such lines out') from None
        counts["bad lines"] += 1
        return None


def component_of(source):
    """ArXiv of pile:ArXiv."""
    corpus, _, component = source.partition(":")
    return component if corpus == "pile" else ""


def texts(source, field="text"):
    """The texts of any source, for other uses than bins. Raises DataError."""
    for _, data, _, where in chain.from_iterable(map(each, records(source, field))):
        data = text_of(data, where, dict(field=field, errors="strict", skip_bad=False), component_of(source))
        if data:
            yield data.decode()


def digest(batch):
    """What a batch of (source, record) comes to: rows (n,) of ROW, whose tokens are in this process's file, counts
    by source, and examples of documents that shared something with test items. One step for all of the batch, then
    the next, which is faster than a document after the other: each finds its code and tables in the cache."""
    options, tokenizer, grams, file = (TOOLS[key] for key in ("options", "tokenizer", "grams", "file"))
    documents, counts, examples, rows, texts, signatures = [], {}, [], [], [], []
    for source, record in batch:
        count, component = counts.setdefault(str(source), Counter()), component_of(options["sources"][source])
        for side, data, first, where in each(record):
            if data := text_of(data, where, options, component, count):
                documents.append((source, side, data, first, where))

    for source, side, data, first, where in documents:
        at = OWN[side] if side else position(data)
        passages, items = without_test_items(data.decode(), grams) if grams else ([], ())
        if items:
            counts[str(source)]["contaminated"] += 1
            counts[str(source)]["characters cut"] += len(data.decode()) - sum(map(len, passages))
            examples.append([f"{where[0]} {where[1] or ''}".strip(), sorted(map(list, items))[:3]])
        for passage in [passage.encode() for passage in passages] if items else [data]:
            for data in pieces(io.BytesIO(passage)):
                text, exact = data.decode(), bytes(16)
                if not options["keep_duplicates"]:
                    words = normalise(text)
                    exact = hashlib.blake2b(b" ".join(words) or data, digest_size=16).digest()
                    signatures.append(signature(words))
                rows.append((source, at, first, len(data), 0, os.getpid(), 0, np.frombuffer(exact, "<u8"), 0))
                texts.append(text)
                first = False
            first = True
    rows = np.array(rows, ROW)
    if signatures:
        rows["bands"] = bands(np.array(signatures))

    ids = [tokenizer.encode_to_numpy(text, allowed_special=set(), disallowed_special=())    # a literal <|endoftext|>
           for text in texts]                                                               # stays plain text
    rows["tokens"] = [len(one) for one in ids]
    rows["at"] = file.tell() + 2 * np.cumsum(np.append(0, rows["tokens"] + 1))[:-1]
    eot = np.array([tokenizer.eot_token], "<u2")
    for one in ids:
        file.write(one.astype("<u2"))
        file.write(eot)
    file.flush()
    return rows, counts, examples


def in_order(batches, workers, options, work):
    """digest of each batch, in order, by so many processes at once; only a few batches are held."""
    make_tools(options)
    begin = list(islice(batches, 2))
    if workers == 1 or len(begin) < 2:
        with token_file(work) as TOOLS["file"]:
            yield from map(digest, chain(begin, batches))
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(options, work)) as pool:
        pending = deque()
        try:
            for batch in chain(begin, batches):
                pending.append(pool.submit(digest, batch))
                if len(pending) > 3 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker was killed, for want of memory?; go on with --resume and fewer --workers") \
                from None


# ---------------------------------------------------------------------------------------------
# Duplicates

SIMILAR = 0.8       # Jaccard similarity of 5-grams from which a document repeats another


def repeats(rows, text_at):
    """Which earlier row each row repeats, exactly or nearly: (n,) int64, -1 for none.

    rows: (n,) ROW; text_at(i): the text of row i. Documents of a source with its own split come first and stay
    whatever they repeat. Rows that share a band with an earlier one are compared by all their 5-grams, so no
    document is taken for a duplicate by accident; only with the first that stays of each band, so time is
    linear. Needs about 130 bytes of memory for each row, and 0.8 KB for each that shares a band.
    """
    own = (rows["position"] < 0) | (rows["position"] > 1)
    order = np.argsort(~own, kind="stable")
    of = np.full(len(rows), -1)
    _, first, inverse = np.unique(rows["exact"][order].view("V16").ravel(), return_index=True, return_inverse=True)
    first = order[first[inverse.ravel()]]       # of the rows in order, the first that is the same
    of[order[first != order]] = first[first != order]
    of[own] = -1

    order = order[of[order] < 0]
    order = order[rows["bands"][order, 0] > 0]
    crowd, groups, n_groups = [], [], 0         # places in order that share a band with others, and which
    for band in range(BANDS):
        _, inverse, counts = np.unique(rows["bands"][order, band], return_inverse=True, return_counts=True)
        shared = np.flatnonzero(counts[inverse] > 1)
        inverse = np.unique(inverse[shared], return_inverse=True)[1]
        crowd.append(shared.astype(np.uint32))
        groups.append((inverse + n_groups).astype(np.uint32))
        n_groups += inverse.max(initial=-1) + 1
    crowd, groups = np.concatenate(crowd), np.concatenate(groups)
    leader = np.full(n_groups, -1)              # of each group the first row that stays
    sort = np.argsort(crowd, kind="stable")
    places, begins = np.unique(crowd[sort], return_index=True)
    grams = lru_cache(1024)(lambda i: np.unique(shingles(normalise(text_at(i)))))
    for place, mine in zip(tqdm(places, desc="comparing", unit="doc", delay=3, leave=False),
                           np.split(groups[sort], begins[1:])):
        i = int(order[place])
        for j in np.unique(leader[mine]).tolist() if not own[i] else ():
            if j >= 0 and jaccard(grams(i), grams(j)) >= SIMILAR:
                of[i] = j
                break
        else:
            leader[mine[leader[mine] < 0]] = i
    return of


def jaccard(a, b):
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


# ---------------------------------------------------------------------------------------------
# Bins


class BinWriter:
    """Writes one side: OUT/SIDE.bin, or OUT/SIDE-00000.bin and so on, each of shard_tokens tokens or a document
    more, all under .tmp names. splits: what meta.json says of each. files: the workers', by number."""

    def __init__(self, out, side, shard_tokens, files):
        self.out, self.side, self.shard_tokens, self.files = out, side, shard_tokens, files
        self.splits, self.bin, self.thread = {}, None, ThreadPoolExecutor(1)

    def add(self, rows, document):
        """Adds whole documents. rows: (n,) of ROW; document: (n,) of each row some number of its document."""
        last = np.append(document[1:] != document[:-1], True)[:len(rows)]       # of its document's rows
        n_tokens = rows["tokens"] + last        # <|endoftext|> follows each row's tokens in a worker's file
        ends = rows["at"] + 2 * n_tokens
        apart = np.flatnonzero((rows["file"][1:] != rows["file"][:-1]) | (rows["at"][1:] != ends[:-1])) + 1
        begin = 0
        while begin < len(rows):
            if self.bin is None:
                self.open()
            split, stop = self.splits[self.name], len(rows)
            if self.shard_tokens:
                size = split["tokens"] + np.cumsum(n_tokens[begin:])
                full = np.flatnonzero(last[begin:] & (size >= self.shard_tokens))
                stop = begin + full[0] + 1 if len(full) else stop
            for a, b in pairwise([begin, *apart[(begin < apart) & (apart < stop)], stop]):      # on end in a file
                self.copy(self.files[rows["file"][a]], rows["at"][a], ends[b - 1])
            split["documents"] += int(last[begin:stop].sum())
            split["bytes"] += int(rows["bytes"][begin:stop].sum())
            split["tokens"] += int(n_tokens[begin:stop].sum())
            if self.shard_tokens and split["tokens"] >= self.shard_tokens:
                self.close()
            begin = stop

    def open(self):
        self.name = self.side + f"-{len(self.splits):05}" * (self.shard_tokens is not None)
        self.bin, self.sha256 = open(self.out / f"{self.name}.bin.tmp", "wb"), hashlib.sha256()
        self.splits[self.name], self.hashing = dict(documents=0, bytes=0, tokens=0), deque()

    def copy(self, file, begin, end):
        """Writes these bytes of a file, while a thread hashes them and those before."""
        file.seek(begin)
        for at in range(begin, end, BATCH):
            data = file.read(min(BATCH, end - at))
            self.hashing.append(self.thread.submit(self.sha256.update, data))
            self.bin.write(data)
            if len(self.hashing) > 16:
                self.hashing.popleft().result()

    def close(self):
        if self.bin:
            self.bin.flush()
            os.fsync(self.bin.fileno())
            self.bin.close()
            self.bin = None
            for future in self.hashing:
                future.result()
            self.splits[self.name]["sha256"] = self.sha256.hexdigest()


def prepare(sources, out, tokenizer="gpt2", val_fraction=0.05, *, field="text", errors="strict", skip_bad=False,
            keep_duplicates=False, decontaminate=(), eval_data=None, shard_tokens=None, workers=1, resume=False):
    """Turn sources into out/train.bin, out/val.bin and out/meta.json; returns meta as a dict.

    First everything is tokenized into out/prepare.work, then duplicates are found there, then the bins are
    written under temporary names and renamed when all are whole, meta.json last: its sha256 tell a reader that
    they belong together. Raises DataError, with nothing under the final names touched.
    """
    out, sources = Path(out), list(sources)
    encoding = get_tokenizer(tokenizer)
    if encoding.n_vocab > 2**16:
        raise DataError(f"tokenizer {tokenizer}: {encoding.n_vocab} tokens do not fit in uint16")
    options = dict(sources=sources, tokenizer=tokenizer, val_fraction=val_fraction, field=field, errors=errors,
                   skip_bad=skip_bad, keep_duplicates=keep_duplicates, decontaminate=list(decontaminate),
                   eval_data=eval_data, shard_tokens=shard_tokens)
    TOOLS.clear()
    work = out / "prepare.work"
    layout = [2, BATCH, PIECE]          # of what lies in work; its version first
    done = dict(layout=layout, options=options, records=0, rows=0, counts={}, examples=[], complete=False)
    if resume and (work / "done.json").exists():
        done = json.loads((work / "done.json").read_text())
        if done.get("layout") != layout:
            raise DataError(f"{work}: written by another version; leave --resume out to start over")
        for key in options.keys() - {"errors", "skip_bad", "val_fraction", "shard_tokens"}:
            if done["options"][key] != options[key]:
                raise DataError(f"{work}: {key} was {done['options'][key]}, now it is {options[key]}; leave "
                                "--resume out to start over")
    elif work.exists():
        shutil.rmtree(work)
    try:
        if not done["complete"]:
            tokenize(sources, work, options, done, workers)
        meta = assemble(work, out, options, done, encoding)
    except BaseException:
        if not done["rows"]:        # nothing to go on from
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work)
    return meta


def tokenize(sources, work, options, done, workers):
    """All records into work/rows and the workers' work/tokens-*, going on after done["records"]; done is kept up to
    date in work/done.json, every COMMIT bytes. Raises DataError."""
    work.mkdir(parents=True, exist_ok=True)
    local = [source for source in sources if source != "-" and source.partition(":")[0] not in (*SOURCES, *HUB)]
    total = sum(path.stat().st_size for source in local for path in local_files(source))
    every_row = open(work / "rows", "ab")
    every_row.truncate(ROW.itemsize * done["rows"])
    taken = deque()         # records in each batch that is under way

    def batches(bar):
        every = ((k, record) for k, source in enumerate(sources) for record in records(source, options["field"], bar))
        batch, size = [], 0
        for source, record in islice(every, done["records"], None):
            batch.append((source, record))
            data = record[1]
            size += data if isinstance(data, int) else len(data or "")
            if size >= BATCH:
                taken.append(len(batch))
                yield batch
                batch, size = [], 0
        if batch:
            taken.append(len(batch))
            yield batch

    def commit():
        every_row.flush()
        for path in (work / "rows", *work.glob("tokens-*")):
            with open(path, "rb+") as f:
                os.fsync(f.fileno())
        write_whole(work / "done.json", json.dumps(done))

    since, measured = 0, local == sources       # else the bar counts what comes out
    try:
        with tqdm(total=total if measured else None, unit="B", unit_scale=True, desc=str(work.parent)) as bar:
            for rows, counts, examples in in_order(batches(bar if measured else None), workers, options, work):
                every_row.write(rows.tobytes())
                for source, count in counts.items():
                    done["counts"][source] = Counter(done["counts"].get(source, {})) + count
                done["records"] += taken.popleft()
                done["rows"] += len(rows)
                done["examples"] = (done["examples"] + examples)[:10]
                since += int(rows["bytes"].sum())
                if not measured:
                    bar.update(int(rows["bytes"].sum()))
                if since >= COMMIT:
                    commit()
                    since = 0
        done["complete"] = True
        commit()
    except (DataError, KeyboardInterrupt):
        if done["records"]:
            commit()
            print(f"what is done is in {work}; --resume goes on from there", file=sys.stderr)
        raise
    finally:
        every_row.close()


def assemble(work, out, options, done, encoding):
    """The final bins from what tokenize left in work; returns meta. Raises DataError."""
    rows = np.asarray(np.memmap(work / "rows", ROW, mode="r")) if done["rows"] else np.empty(0, ROW)
    files = {int(path.name[len("tokens-"):]): open(path, "rb") for path in work.glob("tokens-*")}

    def ids_at(i):
        file = files[rows["file"][i]]
        file.seek(rows["at"][i])
        return np.frombuffer(file.read(2 * rows["tokens"][i]), "<u2")

    def text_at(i):
        return encoding.decode(ids_at(i).tolist())

    of = np.full(len(rows), -1, np.int8) if options["keep_duplicates"] else repeats(rows, text_at)
    keep = of < 0
    examples = [[text_at(j)[:80] for j in (of[i], i)] for i in np.flatnonzero(~keep)[:10]]
    rows, keep, files[0] = both_sides(rows, keep, options["val_fraction"], ids_at, encoding)

    writers = {side: BinWriter(out, side, options["shard_tokens"], files) for side in ("train", "val")}
    totals = Counter()          # of each source
    meta_path = out / "meta.json"
    try:
        with tqdm(total=len(rows), desc="writing", unit="doc", delay=3, leave=False) as bar:
            for block, kept in blocks(rows, keep):
                firsts = np.flatnonzero(block["first"])
                document = np.cumsum(block["first"]) - 1
                validation = block["position"][firsts][document] < options["val_fraction"]
                for side, writer in writers.items():
                    mine = kept & (validation == (side == "val"))
                    writer.add(block[mine], document[mine])
                for key, values in dict(
                        documents=block["first"] & kept, bytes=block["bytes"] * kept, tokens=block["tokens"] * kept,
                        duplicates=block["first"] & ~kept, duplicate_bytes=block["bytes"] * ~kept).items():
                    for k, value in enumerate(np.bincount(block["source"], values, len(options["sources"]))):
                        totals[k, key] += int(value)
                bar.update(len(block))
        splits = {}
        for side, writer in writers.items():
            writer.close()
            splits |= writer.splits
            if not writer.splits:
                raise DataError(f"{', '.join(options['sources'])}: no text for {side}; add documents or change "
                                f"--val_fraction ({options['val_fraction']})")
        report = [dict(source=source, **{key: totals[k, key] for key in
                                         ("documents", "bytes", "tokens", "duplicates", "duplicate_bytes")},
                       **done["counts"].get(str(k), {})) for k, source in enumerate(options["sources"])]
        meta = dict(tokenizer=options["tokenizer"], vocab_size=encoding.n_vocab, splits=splits, sources=report,
                    options=options, examples=dict(duplicates=examples, contaminated=done["examples"]))
        with open(f"{meta_path}.tmp", "w") as f:
            json.dump(meta, f, indent=2)
            f.flush()
            os.fsync(f.fileno())
        paths = [out / f"{name}.bin" for name in splits]
        for path in (*paths, meta_path):
            os.replace(f"{path}.tmp", path)
        for path in out.glob("*.bin"):      # another number of shards than before
            if path not in paths and re.fullmatch(r"(train|val)(-\d{5})?", path.stem):
                path.unlink()
    finally:
        for file in files.values():
            file.close()
        for path in out.glob("*.tmp"):
            path.unlink()
    return meta


def blocks(rows, keep):
    """rows and keep, some 65,536 at a time, cut where a document begins."""
    begin = 0
    while begin < len(rows):
        end = min(begin + 2**16, len(rows))
        while end < len(rows) and not rows["first"][end]:
            end += 1
        yield rows[begin:end], keep[begin:end]
        begin = end


def both_sides(rows, keep, val_fraction, ids_at, encoding):
    """(rows, keep, file 0). A corpus so small that all of it would fall on one side still gets both: of a few documents
    that of the lowest position is for validation; a lone one becomes two, of which the second begins with a line. The
    last tokens of the first are then in file 0."""
    as_it_is = rows, keep, io.BytesIO()
    if np.count_nonzero(rows["first"]) > 1000:
        return as_it_is
    document = np.cumsum(rows["first"]) - 1                             # of each row
    kept = np.unique(document[keep])
    at = rows["position"][rows["first"]][kept]
    if not 0 < len(kept) < 20 or set(at) & set(OWN.values()) or len(set(at < val_fraction)) == 2:
        return as_it_is
    if len(kept) > 1:
        rows = rows.copy()
        rows["position"] = np.where(document == kept[at.argmin()], OWN["val"], OWN["train"])
        return rows, keep, io.BytesIO()
    mine = np.flatnonzero(keep)
    ends = np.cumsum(rows["tokens"][mine])
    cut = int((1 - val_fraction) * ends[-1])
    k = np.searchsorted(ends, cut, side="right")
    i = mine[k]
    cut -= ends[k] - rows["tokens"][i]                                  # in the row
    newlines = [token for token in range(encoding.n_vocab) if encoding.decode_single_token_bytes(token).endswith(b"\n")]
    after = np.flatnonzero(np.isin(ids_at(i)[:cut], newlines)) + 1
    head = ids_at(i)[:after[-1] if len(after) else cut]
    size = len(encoding.decode_bytes(head.tolist()))
    rows = np.concatenate([rows[:i + 1], rows[i:]])
    rows["position"] = np.where(np.arange(len(rows)) <= i, OWN["train"], OWN["val"])
    for key, value in dict(file=0, at=0, tokens=len(head), bytes=size).items():
        rows[key][i] = value
    for key, value in dict(first=True, at=2 * len(head), tokens=-len(head), bytes=-size).items():
        rows[key][i + 1] += value
    return rows, np.insert(keep, i, True), io.BytesIO(np.append(head, encoding.eot_token).astype("<u2"))


def open_bin(path, vocab_size=None):
    """(tokens, meta) of a bin: tokens a read-only memory map (n,) uint16, checked whole.

    meta is the meta.json beside it; a bin without one (nanoGPT writes none) is taken as GPT-2's
    tokens, and this is said. Raises DataError where the file is missing, cut short, not the one
    that meta.json describes, or holds a token at or above vocab_size (default: meta's own).
    """
    path = Path(path)
    if not path.is_file():
        raise NoBin(f"{path}: no such bin; make it with prepare.py --out {path.parent}")
    try:
        meta = json.loads((path.parent / "meta.json").read_text())
        counts = meta["splits"].get(path.stem, {})
        vocab_size = vocab_size or meta["vocab_size"]
    except FileNotFoundError:
        print(f"{path}: no meta.json beside it, so taken as a bin of GPT-2 tokens")
        meta = dict(tokenizer="gpt2", vocab_size=50257, splits={})
        counts, vocab_size = {}, vocab_size or 50257
    except (ValueError, KeyError, AttributeError):
        raise DataError(f"{path.parent / 'meta.json'}: not written by prepare.py") from None
    if meta["vocab_size"] > 2**16:
        raise DataError(f"{path.parent / 'meta.json'}: a vocabulary of {meta['vocab_size']} does not "
                        "fit in uint16 bins (at most 65536)")
    size = path.stat().st_size
    if size % 2 or size == 0 or size != 2 * counts.get("tokens", size // 2):
        raise DataError(f"{path}: {size} bytes, expected {2 * counts.get('tokens', size // 2 or 1)}; "
                        "it was cut short, make it again with prepare.py")

    tokens = np.memmap(path, dtype="<u2", mode="r")
    sha256 = hashlib.sha256()
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {path}", delay=3, leave=False) as bar:
        for start in range(0, len(tokens), 1 << 24):
            part = tokens[start:start + (1 << 24)]
            sha256.update(part)
            if part.max() >= vocab_size:
                where = start + int((part >= vocab_size).argmax())
                raise DataError(f"{path}: token {tokens[where]} at position {where} is outside the "
                                f"vocabulary of {vocab_size}")
            bar.update(part.nbytes)
    if counts.get("sha256", sha256.hexdigest()) != sha256.hexdigest():
        raise DataError(f"{path}: its sha256 is not the one in meta.json; make both again with prepare.py")
    meta["splits"][path.stem] = {**counts, "sha256": sha256.hexdigest()}
    return tokens, meta


def shards(folder, side):
    """Names, without .bin, of the bins of one side: those of meta.json, or, without one, the side's own."""
    try:
        splits = json.loads((Path(folder) / "meta.json").read_text())["splits"]
    except (OSError, ValueError, KeyError, TypeError):      # open_bin says what is wrong
        splits = ()
    return sorted(name for name in splits if re.fullmatch(rf"{side}(-\d{{5}})?", name)) or [side]


def open_data(data, side, vocab_size=None):
    """The bins of one side ("train" or "val") of a data set: ({source: its bins}, meta).

    data: a folder; several with commas between, which count as one source, "data/part1,data/part2";
    or a dict with such names as keys. meta: tokenizer, vocab_size, and a fingerprint of all bins.
    Raises DataError, also for a token at or above vocab_size.
    """
    sources, metas, hashes = {}, {}, []
    for name in data if isinstance(data, dict) else [data]:
        sources[name] = []
        for folder in name.split(","):
            for stem in shards(folder, side):
                tokens, metas[folder] = open_bin(os.path.join(folder, f"{stem}.bin"), vocab_size)
                sources[name].append(tokens)
                hashes.append(metas[folder]["splits"][stem]["sha256"])
    (first, meta), *others = metas.items()
    for folder, other in others:
        if other["tokenizer"] != meta["tokenizer"]:
            raise DataError(f"{folder}: {other['tokenizer']} tokens, but {first} holds {meta['tokenizer']} tokens")
    fingerprint = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return sources, dict(tokenizer=meta["tokenizer"], vocab_size=meta["vocab_size"], fingerprint=fingerprint)


class Parser(argparse.ArgumentParser):
    """argparse with a module's docstring as its help, whose errors are one line and status 1."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            word = message.split()[2].partition("=")[0]
            near = difflib.get_close_matches(word, self._option_string_actions, n=1)
            message = f"unknown argument {word}" + (f", did you mean {near[0]}?" if near else "; see --help")
        self.exit(1, f"{self.prog}: {message}\n")


def print_report(meta, out):
    print(f"{'':6}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}")
    for name, n in meta["splits"].items():
        print(f"{name:6}{n['documents']:12,}{n['bytes']:16,}{n['tokens']:16,}{n['bytes'] / n['tokens']:13.2f}")
    tokens = sum(source["tokens"] for source in meta["sources"])
    for source in meta["sources"][:20]:         # the others are in meta.json
        details = [f"{source['tokens'] / tokens:.1%} of the tokens"] if len(meta["sources"]) > 1 else []
        if source["duplicates"]:
            details.append(f"{source['duplicates']:,} duplicates left out ({source['duplicate_bytes']:,} bytes)")
        if "contaminated" in source:
            details.append(f"{source['contaminated']:,} documents shared passages with test items "
                           f"({source['characters cut']:,} characters cut)")
        details += [f"{source[kind]:,} {kind}" for kind in ("bad lines", "not UTF-8") if kind in source]
        if details:
            print(f"{source['source']}: {', '.join(details)}")
    print(f'in a config: data = "{out}"')


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help="a corpus, a file, a folder, a pattern, or -")
    parser.add_argument("--out", metavar="DIR", help="where the bins go, e.g. data/mine")
    parser.add_argument("--list", action="store_true", help="print the corpora that have a name")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 (default) or bytes")
    parser.add_argument("--val_fraction", type=float, default=0.05, metavar="F",
                        help="share of the documents for validation (default 0.05)")
    parser.add_argument("--field", default="text", help="of a .jsonl or .parquet (default text)")
    parser.add_argument("--keep_duplicates", action="store_true", help="leave repeated documents in")
    parser.add_argument("--decontaminate", metavar="LIST", default="",
                        help=f"cut what is also in {','.join(TEST_SETS)} or any file; names with commas between")
    parser.add_argument("--eval_data", metavar="DIR", help="folder of the test sets; default: downloaded once")
    parser.add_argument("--errors", choices=("strict", "replace"), default="strict", help="what to do about text that "
                        "is not UTF-8: stop (default), or replace and count")
    parser.add_argument("--skip_bad", action="store_true", help="leave out and count lines that are not JSON")
    parser.add_argument("--shard_tokens", type=lambda n: int(float(n)), metavar="N",
                        help="begin another bin after so many tokens")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--resume", action="store_true", help="go on with the same command where it was stopped")
    args = vars(parser.parse_args(argv))
    if args.pop("list"):
        for name, source in SOURCES.items():
            if name not in HUB:
                print(f"{name:16} {source.__doc__.splitlines()[0]}")
        for name, (repository, _, files) in HUB.items():
            print(f"{name:16} https://huggingface.co/datasets/{repository}, {files}")
        print("pile:ArXiv       one component of it, by its pile_set_name")
        return
    if not args["sources"] or not args["out"]:
        parser.error("expected a SOURCE and --out DIR; --list names corpora")
    if not 0 < args["val_fraction"] < 1:
        raise DataError(f"--val_fraction={args['val_fraction']}: expected a number between 0 and 1")
    for key in ("shard_tokens", "workers"):
        if args[key] is not None and args[key] < 1:
            raise DataError(f"--{key}={args[key]}: expected at least 1")
    args["decontaminate"] = [name for name in args["decontaminate"].split(",") if name]
    print_report(prepare(**args), args["out"])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (DataError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
