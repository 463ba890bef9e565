"""Turn text into the token bins that train.py reads.

    python prepare.py python --out data/python --tokenizer bytes
    python prepare.py notes.txt dump.jsonl.gz folder/ 'more/*.parquet' --out data/mine
    python prepare.py openwebtext pg19 --decontaminate=lambada,hellaswag --out data/corpus
    python prepare.py --verify data/corpus              check finished bins, byte by byte

A source is a corpus with a name (below), or anything that fsspec opens: a file, a folder, a pattern of files,
hf://datasets/..., s3://..., https://... A .jsonl, .ndjson or .json holds a document a line (a .json in a
folder is passed over), a .parquet one a row. Any other file (.txt, .md, .py, ...) is one document, or several
with --separator. .gz, .xz, .bz2 and .zst are read as they are.

Writes OUT/train.bin and OUT/val.bin in nanoGPT's format (headerless little-endian uint16, <|endoftext|> after
each document), and OUT/meta.json: tokenizer, counts, sha256, what was left out. A run that was stopped goes
on with the same command. Neither a kill nor the number of workers changes a byte of the bins.
"""
import argparse
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import unicodedata
import urllib.request
import zipfile
import zlib
from collections import Counter, deque, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import parent_process
from pathlib import Path

import fsspec
import numpy as np
import tiktoken
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm

EOT = "<|endoftext|>"
DOWNLOADS = Path("data/raw")
PIECE = 2**24           # a longer document is handled in pieces of so many bytes
GROUP = 2**21           # bytes of text that a worker takes at once
VERSION = 5             # of the parts in prepare.work; raise it when they come to hold something else


class DataError(ValueError):
    """Data or a source that cannot be used. The message is one line for the user."""


class NoBin(DataError):
    """There is no such bin, rather than a damaged one."""


# ---------------------------------------------------------------------------------------------
# Tokenizers: both are tiktoken encodings, byte-level and lossless


@functools.cache
def get_tokenizer(name):
    """The tiktoken.Encoding "gpt2", or "bytes" (256 bytes and <|endoftext|>). Raises DataError."""
    if name == "bytes":
        # no merges, so each byte is a token; the pattern only cuts the text into short pieces
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,16})", special_tokens={EOT: 256},
                                 mergeable_ranks={bytes([i]): i for i in range(256)})
    if name != "gpt2":
        raise DataError(f'tokenizer "{name}": expected "gpt2" or "bytes"')
    with one_line_errors("GPT-2's vocabulary: with a network, tiktoken.get_encoding('gpt2') puts it into the "
                         "folder that TIKTOKEN_CACHE_DIR names, to bring along"):
        return tiktoken.get_encoding("gpt2")


@functools.cache
def token_bytes(tokenizer):
    """Bytes of text that each token stands for: (n_vocab,) int64, 0 for <|endoftext|>."""
    lengths = [len(tokenizer.decode_single_token_bytes(token)) for token in range(tokenizer.n_vocab)]
    lengths[tokenizer.eot_token] = 0
    return np.array(lengths)


def count_words(tokens, tokenizer):
    """Words, split on white space as str.split does, in the documents of a token stream (n,)."""
    ends = np.append(np.flatnonzero(tokens == tokenizer.eot_token), len(tokens))
    start = words = 0
    for end in tqdm(ends, desc="words", unit="doc", delay=3, leave=False):
        words += len(tokenizer.decode(tokens[start:end].tolist()).split())
        start = end + 1
    return words


# ---------------------------------------------------------------------------------------------
# Sources: what the command line names becomes a list of files, and these a stream of records


# kind: "line" (of JSON), "row" (of parquet) or "text". cut, where a corpus has its own split: a function from
# the text to pairs (document, position). source: its number on the command line.
File = namedtuple("File", "fs path kind cut source", defaults=[None, 0])
# at: number of the line or row, or the byte where a text begins. data: the line, row or document, or a piece
# of a long document. first: whether a document begins here.
Record = namedtuple("Record", "source path kind at data first position", defaults=[True, None])
OWN_TRAIN, OWN_VAL = 2.0, -1.0      # positions of documents whose corpus has its own split


def position(data):
    """A number in [0, 1) that depends on the document alone: below val_fraction it is for validation. So the
    same document falls on the same side whatever else is in the corpus."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") / 2**64


def nine_tenths(text):
    """nanoGPT's split of tiny Shakespeare."""
    cut = int(0.9 * len(text))
    return [(text[:cut], OWN_TRAIN), (text[cut:], OWN_VAL)]


def articles(position, text):
    """WikiText's articles. The text before the first heading belongs to the first."""
    before, first, *others = re.split(r"(?m)^(?= = [^=\n]+ = $)", text)
    return [(article, position) for article in (before + first, *others)]


STDLIB = sysconfig.get_paths()["stdlib"]
GITHUB = "https://raw.githubusercontent.com"
WIKITEXT = f"{GITHUB}/pytorch/examples/main/word_language_model/data/wikitext-2"        # Merity et al. 2016
CORPORA = {     # name: a pattern; or [(address, git's hash, cut)] of files to download to data/raw/NAME
    "python": f"{STDLIB}/**/*.py",
    "shakespeare": [(f"{GITHUB}/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
                     "7dcb3a2d4cc3b48b6283dd46870bfeb78f88aac9", nine_tenths)],
    "wikitext-2": [(f"{WIKITEXT}/train.txt", "2d84b35af79e411d73ea7cae83c73964c6ac83b4",
                    functools.partial(articles, OWN_TRAIN)),
                   (f"{WIKITEXT}/valid.txt", "eec944eb2d9e46061cd34a6913528797db6842fc",
                    functools.partial(articles, OWN_VAL))],
    "openwebtext": "hf://datasets/Skylion007/openwebtext@refs/convert/parquet/plain_text/train/*.parquet",
    "fineweb-edu-10B": "hf://datasets/HuggingFaceFW/fineweb-edu/sample/10BT/*.parquet",
    "pg19": "hf://datasets/emozilla/pg19/data/train-*.parquet",
    "pile": "hf://datasets/monology/pile-uncopyrighted/train/*.jsonl.zst",
}
NOT_PYTHON = re.compile("/(test|tests|idle_test|__pycache__|site-packages|dist-packages)/")
KINDS = {".jsonl": "line", ".ndjson": "line", ".json": "line", ".parquet": "row"}       # of others: "text"
# what is read in a folder; not .json, which is hardly ever lines there
IN_FOLDERS = set("""
    .jsonl .ndjson .parquet .txt .text .md .markdown .rst .tex .org .html .htm .xml .css .py .pyi .c .h .cc
    .cpp .hpp .cu .java .js .jsx .ts .tsx .go .rs .rb .php .pl .sh .sql .r .jl .lua .scala .kt .swift .cs .hs
    .ml .el .lisp""".split())


@contextmanager
def one_line_errors(name):
    """Whatever goes wrong (a file cut short, no network, a missing library) becomes a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as e:      # each compression and each network library has errors of its own
        missing = isinstance(e, ImportError) and e.name
        reason = f"pip install {missing} to read it" if missing else f"{type(e).__name__}: {e}"
        raise DataError(f"{name}: {reason}".partition("\n")[0]) from None


def parse(text, fields):
    """A JSON object with these fields: {name: type}. Raises ValueError, KeyError or TypeError."""
    item = json.loads(text)
    for field, kind in fields.items():
        if not isinstance(item[field], kind):
            raise TypeError(f"{field} is {item[field]!r}, expected {kind.__name__}")
    return item


ENDING = re.compile(r"(\.\w+)?(\.gz|\.xz|\.bz2|\.zst)?$")        # ".jsonl" of "a.jsonl.gz"


def find_files(source):
    """(its Files in a fixed order, a Counter of the endings passed over in a folder). Raises DataError."""
    with one_line_errors(source):
        fs, path = fsspec.core.url_to_fs(source)
        in_folder = not fs.isfile(path) and fs.isdir(path)
        if in_folder:
            paths = walk(fs, path, set())
        elif fs.isfile(path):
            paths = [path]
        elif source in CORPORA:
            return corpus_files(source), Counter()
        else:
            paths = filter(fs.isfile, fs.glob(path))
        paths = sorted(paths, key=lambda path: path.split("/"))
    files, passed_over = [], Counter()
    for path in paths:
        ending = ENDING.search(path.lower())[1]
        if in_folder and ending not in IN_FOLDERS:
            passed_over[ending or "no ending"] += 1
        else:
            files.append(File(fs, path, KINDS.get(ending, "text")))
    if not files:
        raise DataError(f"{source}: no file that can be read there, and none of {', '.join(CORPORA)}")
    return files, passed_over


def walk(fs, folder, seen):
    """The files in a folder and below. Links are followed, but no folder is entered twice."""
    if os.path.realpath(folder) not in seen:
        seen.add(os.path.realpath(folder))
        for entry in fs.ls(folder, detail=True):
            is_folder = entry["type"] == "directory" or entry.get("islink") and fs.isdir(entry["name"])
            yield from walk(fs, entry["name"], seen) if is_folder else [entry["name"]]


def corpus_files(name):
    """The Files of a corpus that has a name."""
    if isinstance(CORPORA[name], str):
        files, _ = find_files(CORPORA[name])
        return [file for file in files if name != "python" or not NOT_PYTHON.search(file.path[len(STDLIB):])]
    files = []
    for address, blob, cut in CORPORA[name]:
        path = download(DOWNLOADS / name / os.path.basename(address), address, blob)
        files.append(File(LocalFileSystem(), str(path), "text", cut))
    return files


def download(path, address, digest):
    """path, downloaded and checked if it is not there yet. Raises DataError.

    address: a URL, or URL#MEMBER for a file in a zip. digest: its sha256, or git's hash of it.
    """
    if path.exists():
        return path
    url, _, member = address.partition("#")
    print(f"downloading {url}", file=sys.stderr)
    with one_line_errors(f"{address}: cannot be downloaded; without a network, put it at {path}"):
        with urllib.request.urlopen(url, timeout=60) as response:
            data = response.read()
        data = zipfile.ZipFile(io.BytesIO(data)).read(member) if member else data
    git_hash = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if digest not in (hashlib.sha256(data).hexdigest(), git_hash):
        raise DataError(f"{address} has changed, its hash is not {digest}; if you trust it, put it at {path}")
    write_whole(path, data)
    return path


def write_whole(path, data):
    """Write a file (text or bytes) so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(tmp, "wb") as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def records(file, field="text", separator="", bar=tqdm(disable=True)):
    """The Records of a File. bar moves by the bytes read. Raises DataError."""
    path = file.path.lower()
    compression = fsspec.utils.infer_compression(path)
    if path.endswith((".zip", ".zst")) and compression != "zstd":
        raise DataError(f"{file.path}: unpack it first; or to read a .zst, pip install backports.zstd")
    decompress = fsspec.compression.compr[compression]
    if compression == "zstd":       # 100 is ZSTD_d_windowLogMax: files written with --long=31 too
        decompress = functools.partial(decompress, options={100: 31})
    with one_line_errors(file.path), file.fs.open(file.path, "rb") as raw, decompress(raw, mode="rb") as f:
        if file.cut:
            items = [(0, document.encode(), True, place) for document, place in file.cut(f.read().decode())]
        elif file.kind == "line":
            items = enumerate(f, 1)
        elif file.kind == "row":
            items = enumerate(parquet_rows(f, field))
        else:
            items = pieces(f, separator.encode())
        begin = bar.n
        for item in items:
            yield Record(file.source, file.path, file.kind, *item)
            bar.update(begin + raw.tell() - bar.n)


def parquet_rows(f, field):
    import pyarrow.parquet
    parquet = pyarrow.parquet.ParquetFile(f)
    kind = str(parquet.schema_arrow.field(field).type)          # KeyError names a column that is not there
    if not re.match("(dictionary<values=)?(large_)?(string|binary)", kind):
        raise ValueError(f'column "{field}" holds {kind}, expected text')
    for batch in parquet.iter_batches(1024, columns=[field]):
        yield from batch.column(0).to_pylist()


# the last letter or digit before a space or line end: a token of GPT-2 always ends there
SAFE_CUT = re.compile(rb"(?s:.*)[0-9A-Za-z](?=[ \n])")


def pieces(f, separator=b""):
    """The documents of a text, long ones in pieces of some PIECE bytes: a Record's last fields.

    A piece ends where a token ends (SAFE_CUT), or if there is no such place, between two characters. A later
    piece has the position of the first.
    """
    at, held, first, place = 0, b"", True, None
    while block := f.read(PIECE):
        if len(held) >= PIECE:
            limit = len(held) - len(separator)          # a separator may have begun after it
            safe = SAFE_CUT.match(held, 0, limit + 1)
            cut = safe.end() if safe else limit - 1
            while not safe and cut > 1 and held[cut] & 0xC0 == 0x80:     # in the middle of a character
                cut -= 1
            yield at, held[:cut], first, place
            place = position(held[:cut]) if first else place
            at, held, first = at + cut, held[cut:], False
        held += block
        if separator:
            *documents, held = held.split(separator)
            for document in documents:
                yield at, document, first, place
                at, first, place = at + len(document) + len(separator), True, None
    yield at, held, first, place


def text_of(record, field="text"):
    """The text of a record, "" for an empty line. Raises DataError."""
    with one_line_errors(f"{record.path}, {record.kind} {record.at}"):
        text = record.data.decode() if isinstance(record.data, bytes) else record.data
        if record.kind == "line":
            text = json.loads(text.lstrip("\ufeff"))[field] if text.strip() else ""
        text.encode()           # JSON can spell half a surrogate pair, UTF-8 cannot
        return text


def texts(source, field="text"):
    """The texts of any source, for other uses than bins. Raises DataError."""
    for file in find_files(source)[0]:
        for record in records(file, field):
            if text := text_of(record, field):
                yield text


# ---------------------------------------------------------------------------------------------
# Test sets: what eval.py scores, and what a training corpus should not hold

TEST_SETS = {       # name: {its files in a folder of test sets: (address, # a member of the zip, sha256)}
    "lambada": {"lambada/lambada_test.jsonl": (     # Paperno et al. 2016, in OpenAI's variant
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226")},
    "piqa": {                                       # Bisk et al. 2020
        "piqa/valid.jsonl": ("https://yonatanbisk.com/piqa/data/valid.jsonl",
                             "93503cc97c679e459b065c3d13e848282e44b2a25213985bed3e5d458abef72d"),
        "piqa/valid-labels.lst": ("https://yonatanbisk.com/piqa/data/valid-labels.lst",
                                  "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb")},
    "hellaswag": {"hellaswag/hellaswag_val.jsonl": (        # Zellers et al. 2019
        f"{GITHUB}/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
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
    """Paths of a test set's files: in folder, or without one under data/raw/eval, where they are downloaded.
    Raises DataError."""
    if folder:
        return [Path(folder) / file for file in TEST_SETS[name]]
    return [download(DOWNLOADS / "eval" / file, *source) for file, source in TEST_SETS[name].items()]


def test_items(name, folder=None):
    """The items of a test set as they were published: dicts with the fields of ITEM_FIELDS; for wikitext2
    {"page": an article}. Raises DataError."""
    path, *labels = test_files(name, folder)
    with one_line_errors(path):
        text = path.read_text(encoding="utf-8")
        labels = labels[0].read_text().split() if labels else None
    if name == "wikitext2":         # a page runs from one first-level heading to the line before the next
        pages = re.split(r"(?m)\n(?= *= (?!=).*(?<!=) = *$)", text)
        yield from ({"page": page} for page in pages if page.strip())
        return
    lines = [line for line in text.split("\n") if line.strip()]
    if labels is not None and len(labels) != len(lines):
        raise DataError(f"{path}: {len(lines)} items, but {len(labels)} labels beside it")
    for number, line in enumerate(lines):
        with one_line_errors(f"{path}, item {number + 1}"):
            item = parse(line, ITEM_FIELDS[name])
            if labels:
                item["label"] = int(labels[number])
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
    for old, new in (("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0"),
                     (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        page = page.replace(old, new)
    return page


def item_texts(name, item):
    """The texts that give a test item away: its context with each of its endings."""
    if name == "piqa":
        return [f"{item['goal']} {item['sol1']}", f"{item['goal']} {item['sol2']}"]
    if name == "hellaswag":         # without its markers such as [step]
        return [re.sub(r"\[.*?\]", "", f"{item['ctx_a']} {item['ctx_b']} {end}") for end in item["endings"]]
    if name == "wikitext2":
        return [item["page"], detokenise(item["page"])]
    return [item["text"]]


# ---------------------------------------------------------------------------------------------
# Test items in training data: shared 13-grams, as in GPT-3's paper (Brown et al. 2020,
# arXiv:2005.14165, appendix C). A word is lower case, without punctuation. The paper chose N between 8 and
# 13 for each test set; here N is 13. An item of 8 to 12 words must occur whole. A shorter one is not looked
# for: it would be found by accident.

MIN_WORDS, MAX_WORDS = 8, 13
# Thai, Lao, Khmer, Japanese, Chinese: without spaces between words, so a character counts as a word
NO_SPACES = ("\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
             "\U00020000-\U0003ffff")
SPACELESS, WORD = re.compile(f"([{NO_SPACES}])"), re.compile(rf"[{NO_SPACES}]|[^\s{NO_SPACES}]+")
MARK = re.compile(r"[^\x00-\x7f\w\s]")                      # beyond ASCII: neither letter, digit nor space
ASCII_MARKS = {i: None for i in range(128) if not chr(i).isalnum() and not chr(i).isspace()}
MIX = np.uint64(0x9E3779B97F4A7C15)


def split_words(text):
    return (text if text.isascii() else SPACELESS.sub(r" \1 ", text)).split()      # faster than WORD.findall


def without_punctuation(text):
    if not text.isascii():      # vowel signs and accents that combine with a letter are part of it
        text = MARK.sub(lambda mark: mark[0] if unicodedata.category(mark[0])[0] == "M" else "", text)
    return text.translate(ASCII_MARKS)


class Grams:
    """Finds the N-grams of test items in documents. grams: {"the words ...": {item, ...}}.

    texts: pairs (item, text), an item any hashable name. Memory is for the test items alone (0.7 GB for the
    four test sets), whatever the size of the corpus. too_short: how many items are not looked for.
    """

    def __init__(self, texts):
        self.grams, self.lengths, long_enough = {}, set(), {}
        self.heads = set()          # hashes of the first 8 words of the grams, for a cheap first look
        for item, text in texts:
            words = split_words(without_punctuation(text.lower()))
            n = min(MAX_WORDS, len(words))
            long_enough[item] = long_enough.get(item) or n >= MIN_WORDS
            if n >= MIN_WORDS:
                self.lengths.add(n)
                for i in range(len(words) - n + 1):
                    self.heads.add(hash(tuple(words[i:i + MIN_WORDS])))
                    self.grams.setdefault(" ".join(words[i:i + n]), set()).add(item)
        self.too_short = list(long_enough.values()).count(False)

    def find(self, text):
        """Every occurrence of a gram in a text: a list of (start, end, gram), in characters, by start."""
        words = split_words(without_punctuation(text.lower()))
        found = []
        heads = zip(*(words[k:] for k in range(MIN_WORDS)))         # all 8 words in a row
        for i in [i for i, head in enumerate(heads) if hash(head) in self.heads]:
            for n in self.lengths:
                gram = " ".join(words[i:i + n])
                if i + n <= len(words) and gram in self.grams:      # the words themselves, not their hashes
                    found.append((i, i + n, gram))
        if not found:
            return []
        spans = [m.span() for m in WORD.finditer(text) if without_punctuation(m[0])]        # of each word
        return [(spans[i][0], spans[j - 1][1], gram) for i, j, gram in found]


@functools.lru_cache(1)         # workers are forked with it
def test_grams(names, folder=None):
    """The Grams of test sets, or of files whose documents are the items. names: a tuple. An item is the pair
    (name, its number from 0). Raises DataError."""
    def numbered():
        for name in names:
            known = name in TEST_SETS
            items = test_items(name, folder) if known else ({"text": text} for text in texts(name))
            for number, item in enumerate(items):
                yield from (((name, number), text) for text in item_texts(name, item))
    return Grams(numbered())


def cut_items(text, grams):
    """The passages of a text that are left without what it shares with test items and 200 characters on both
    sides. As for GPT-3's corpus, passages of under 200 characters go too, and all if there are over 10."""
    found = grams.find(text) if grams.grams else []
    if not found:
        return [text]
    passages, at = [], 0
    for start, end, _ in found:
        passages.append(text[at:max(at, start - 200)])
        at = max(at, end + 200)
    passages = [passage for passage in (*passages, text[at:]) if len(passage) >= 200]
    return passages if len(passages) <= 10 else []


# ---------------------------------------------------------------------------------------------
# Map: a worker makes a part of each group of records. A part is a file NUMBER.npz: tokens, <|endoftext|> and
# those of each row in turn; and keys, one for each row. A row is a document, or a piece of a long one.

BINS, BANDS = 128, 16       # of a MinHash signature; a band is BINS / BANDS of them
# cut: characters cut from the record that begins here. literal: whether it holds a literal <|endoftext|>.
# bad: whether --skip_bad left it out. begin: where the row's tokens begin in those of its part, later of all.
KEY = np.dtype([("source", "u4"), ("position", "f8"), ("first", "?"), ("cut", "i8"), ("literal", "?"),
                ("bad", "?"), ("begin", "i8"), ("tokens", "i8"), ("bytes", "i8"), ("exact", "V16"),
                ("bands", "u8", BANDS)])


def compared(text):
    """A text as duplicates are compared: lower case, one space between words, in UTF-8."""
    return " ".join(split_words(text.lower())).encode()


def shingles(text):
    """Hashes of the 5-grams of a compared text, sorted: (n,) uint64. Fewer than 5 words are one gram."""
    words = text.split(b" ")
    n = min(5, len(words))
    hashes = np.fromiter(map(zlib.crc32, words), np.uint64, len(words))
    rolled = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        rolled = (rolled ^ hashes[i:i + len(rolled)]) * MIX         # modulo 2**64
        rolled ^= rolled >> np.uint64(32)
    rolled.sort()
    return rolled


def bands(texts):
    """MinHash (Broder 1997) of compared texts, banded for LSH: (n, BANDS) uint64.

    One hash, whose high bits choose a bin that keeps the least (one permutation hashing, Li et al. 2012); an
    empty bin takes the next one's (Shrivastava & Li 2014). Two documents of Jaccard similarity s agree in
    some band of 8 bins with probability about 1 - (1 - s^8)^16: 0.95 at s = 0.8, 0.06 at 0.5.
    """
    begins = np.arange(BINS, dtype=np.uint64) << np.uint64(64 - 7)      # of each bin, among the hashes
    signatures = np.zeros((len(texts), BINS), np.uint64)
    for signature, text in zip(signatures, texts):
        hashes = shingles(text)
        signature[:] = hashes[np.searchsorted(hashes, begins) % len(hashes)]
    hashes = np.zeros((len(texts), BANDS), np.uint64)
    for k in range(BINS // BANDS):
        hashes = (hashes ^ signatures[:, k::BINS // BANDS]) * MIX
        hashes ^= hashes >> np.uint64(32)
    return hashes


def make_part(path, group, options):
    """Write the part of a group of records to path, unless it is there. Returns path.

    Each step is done for all rows before the next step begins. That is faster than row by row: code and
    tables stay in the processor's cache.
    """
    if path.exists():
        return path
    tokenizer = get_tokenizer(options["tokenizer"])
    grams = test_grams(options["decontaminate"], options["eval_data"])
    rows, heads = [], []
    for record in group:
        text, bad = "", False
        try:
            text = text_of(record, options["field"])
        except DataError as e:
            if not options["skip_bad"]:
                raise DataError(f"{e} (--field says where the text is; --skip_bad leaves it out)") from None
            bad = True
        place = position(text.encode()) if record.position is None else record.position
        passages = cut_items(text, grams)
        cut = len(text) - sum(map(len, passages))
        head = (record.source, place, record.first, cut, record.kind == "text" and EOT in text, bad)
        for passage in passages or [""]:            # a row without tokens still begins a document
            rows.append(passage)
            heads.append(head)
            head = (record.source, place, True, 0, False, False)
    # a literal <|endoftext|> in a text stays plain text
    ids = [tokenizer.encode_to_numpy(row, allowed_special=set(), disallowed_special=()) for row in rows]
    tokens = np.concatenate([np.append(np.uint32(tokenizer.eot_token), row) for row in ids]).astype("<u2")
    keys = np.zeros(len(rows), KEY)
    keys[["source", "position", "first", "cut", "literal", "bad"]] = heads
    keys["bytes"], keys["tokens"] = [len(row.encode()) for row in rows], [len(row) for row in ids]
    keys["begin"] = np.cumsum(keys["tokens"] + 1) - keys["tokens"]
    if not options["keep_duplicates"]:
        texts = [compared(row) for row in rows]
        keys["exact"] = [hashlib.blake2b(text, digest_size=16).digest() for text in texts]
        keys["bands"] = bands(texts)
    buffer = io.BytesIO()
    np.savez(buffer, tokens=tokens, keys=keys)
    write_whole(path, buffer.getvalue())
    return path


def start_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the main process
    # if that one is killed, end too
    threading.Thread(target=lambda: parent_process().join() or os._exit(1), daemon=True).start()


def in_order(function, tasks, workers):
    """function(*task) of each task, in order, by so many processes. Only a few tasks are held at once."""
    if workers == 1:
        yield from (function(*task) for task in tasks)
        return
    pending = deque()
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        for task in tasks:
            pending.append(pool.submit(function, *task))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


def groups(files, options, bar):
    """Lists of records with some GROUP bytes in all. They depend on the input and the options alone."""
    group, size = [], 0
    for file in files:
        for record in records(file, options["field"], options["separator"], bar):
            group.append(record)
            size += len(record.data or "")
            if size >= GROUP:
                yield group
                group, size = [], 0
    if group:
        yield group


def make_parts(files, work, options, workers, bar):
    """Make the parts that are not in the folder work yet, and put the tokens of all into work/tokens. Returns
    the keys of all rows, (n,) of KEY, mapped from a file. Raises DataError where there is no text."""
    tasks = ((work / f"{number:08}.npz", group, options)
             for number, group in enumerate(groups(files, options, bar)))
    parts, n_tokens = list(in_order(make_part, tasks, workers)), 0
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "tokens", "wb") as all_tokens, open(work / "keys", "wb") as all_keys:
        for part in parts:
            tokens, keys = np.load(part).values()
            keys["begin"] += all_tokens.tell() // 2
            n_tokens += keys["tokens"].sum()
            tokens.tofile(all_tokens)
            keys.tofile(all_keys)
    if not n_tokens:
        raise DataError("no text in any of the sources")
    return np.memmap(work / "keys", KEY, "r")


# ---------------------------------------------------------------------------------------------
# Decide: which rows stay, and on which side

SIMILAR = 0.8       # Jaccard similarity of 5-grams from which a document repeats another


@functools.lru_cache(2**10)
def row_shingles(tokens_path, begin, n, tokenizer):
    """The different 5-grams of a row, hashed and sorted."""
    tokens = np.fromfile(tokens_path, "<u2", n, offset=2 * begin)
    return np.unique(shingles(compared(get_tokenizer(tokenizer).decode(tokens.tolist()))))


def are_similar(tokens_path, pairs, tokenizer):
    """Whether pairs of rows have a Jaccard similarity of SIMILAR or more. pairs: (n, 2) of KEY."""
    answers = []
    for pair in pairs:
        a, b = (row_shingles(tokens_path, row["begin"], row["tokens"], tokenizer) for row in pair)
        both = len(np.intersect1d(a, b, assume_unique=True))
        answers.append(both >= SIMILAR * (len(a) + len(b) - both))
    return answers


def find_duplicates(tokens_path, keys, tokenizer, workers):
    """Which rows repeat an earlier one that stays, exactly or nearly: (n,) bool.

    Rows of corpora with their own split come first and stay, whatever they repeat. A row is compared, by all
    its 5-grams, with the first row of each of its bands: time is linear, and no row goes by accident.
    """
    own, repeats = (keys["position"] < 0) | (keys["position"] >= 1), np.zeros(len(keys), bool)
    rows = np.argsort(~own, kind="stable")
    rows = rows[keys["tokens"][rows] > 0]
    _, first = np.unique(keys["exact"][rows], return_index=True)
    repeats[np.delete(rows, first)] = True
    repeats[own] = False
    rows = rows[np.sort(first)]

    pairs = []                  # a row, and the first that shares a band with it
    for band in range(BANDS):
        _, first, inverse = np.unique(keys["bands"][:, band][rows], return_index=True, return_inverse=True)
        leaders = rows[first[inverse]]
        pairs.append(np.stack([rows, leaders], axis=1)[(rows != leaders) & ~own[rows]])
    pairs = np.unique(np.concatenate(pairs), axis=0)                # (pairs, 2)

    tasks = [(tokens_path, keys[pairs[at:at + 500]], tokenizer) for at in range(0, len(pairs), 500)]
    answers = in_order(are_similar, tasks, min(workers, len(tasks) or 1))
    answers = tqdm(answers, desc="comparing", total=len(tasks), delay=3, leave=False)
    similar = np.concatenate([np.zeros(0, bool), *answers])
    for row, leader in pairs[similar].tolist():          # in order, so what became of its leader is known
        repeats[row] |= not repeats[leader]
    return repeats


def decide(positions, stays, val_fraction):
    """Which of the rows that stay are for training, and which for validation: masks (n,), as stays is."""
    # of a small corpus, at least the lowest position is for validation and the highest for training
    limit = min(max(val_fraction, np.nextafter(positions[stays].min(), 3)), positions[stays].max())
    return stays & (positions >= limit), stays & (positions < limit)


# ---------------------------------------------------------------------------------------------
# Write: the bins, row after row


def write_bin(path, tokens_path, keys, chosen):
    """Write the chosen rows, a mask (n,), to a bin."""
    rows = np.flatnonzero(chosen)
    begins = keys["begin"][rows]
    ends = begins + keys["tokens"][rows]
    # the <|endoftext|> before a row separates it from another document; that of the first goes to the end
    begins[1:] -= np.diff(np.cumsum(keys["first"])[rows]) > 0
    with open(tokens_path, "rb", buffering=2**20) as tokens, open(path, "wb") as f:
        for begin, end in tqdm(zip(begins, ends), desc=path.name, total=len(rows), delay=3, leave=False):
            tokens.seek(2 * begin)          # not mapped, which would count as this process's memory
            f.write(tokens.read(2 * (end - begin)))
        tokens.seek(0)
        f.write(tokens.read(2 * min(1, len(rows))))


def count_sources(keys, stays, n_sources):
    """What became of each source: a dict each."""
    values = {
        "documents": keys["first"] & stays, "bytes": keys["bytes"] * stays, "tokens": keys["tokens"] * stays,
        "duplicates": keys["first"] & ~stays & (keys["tokens"] > 0),
        "documents with test items": keys["cut"] > 0, "characters cut": keys["cut"],
        f"with a literal {EOT}; see --separator": keys["literal"]}
    if keys["bad"].any():
        values["left out by --skip_bad"] = keys["bad"]
    sums = {name: np.bincount(keys["source"], value, n_sources) for name, value in values.items()}
    return [{name: int(total[k]) for name, total in sums.items()} for k in range(n_sources)]


def halve(train_bin, val_bin, val_fraction, encoding):
    """Move the end of the only document in train_bin to val_bin, from a line end if there is one."""
    tokens = np.memmap(train_bin, "<u2", "r")
    target = int((1 - val_fraction) * (len(tokens) - 1))
    near = max(0, target - 2**22)
    vocabulary = map(encoding.decode_single_token_bytes, range(encoding.n_vocab))
    ends_line = np.array([token.endswith(b"\n") for token in vocabulary])
    after = near + 1 + np.flatnonzero(ends_line[tokens[near:target]])
    cut = int(after[-1]) if len(after) else target
    tokens[cut:].tofile(val_bin)
    os.truncate(train_bin, 2 * cut)
    with open(train_bin, "ab") as train:
        np.array([encoding.eot_token], "<u2").tofile(train)


def count_bin(path, encoding):
    """documents, bytes, tokens and sha256 of a bin. Raises DataError for a token that the encoding lacks."""
    lengths, sha256 = token_bytes(encoding).astype(np.uint16), hashlib.sha256()
    counts = dict(documents=0, bytes=0, tokens=path.stat().st_size // 2)
    with open(path, "rb") as f:
        for _ in tqdm(range(0, counts["tokens"], 2**22), desc=f"checking {path}", delay=3, leave=False):
            block = np.fromfile(f, "<u2", 2**22)
            if block.max() >= len(lengths):
                raise DataError(f"{path}: token {block.max()} is outside the vocabulary of {len(lengths)}")
            counts["documents"] += int(np.count_nonzero(block == encoding.eot_token))
            counts["bytes"] += int(lengths[block].sum(dtype=np.int64))
            sha256.update(block.data)
    return counts | dict(sha256=sha256.hexdigest())


@contextmanager
def lock(path):
    """Hold the lock file `path` while the block runs; a kill releases it. Raises DataError where another
    process holds it. A POSIX lock works on network file systems, and forked workers do not inherit it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(f.fileno()), os.stat(path)):
                raise OSError("removed just now by the process that held it")
        except OSError:
            raise DataError(f"{path}: another process is at work here; wait for it to end") from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def prepare(sources, out, tokenizer="gpt2", val_fraction=0.05, *, field="text", separator="", skip_bad=False,
            keep_duplicates=False, decontaminate=(), eval_data=None, workers=1):
    """Turn sources into out/train.bin, out/val.bin and out/meta.json. Returns meta as a dict.

    Parts are made in out/prepare.work, in a folder named by a hash of all that shapes them, so the same call
    goes on where it was killed and never mixes in other work. The bins get their names when both are whole,
    meta.json last. Raises DataError; an earlier run's bins in out are then as they were.
    """
    out, encoding = Path(out), get_tokenizer(tokenizer)
    for path in [*bins_of(out, "train"), *bins_of(out, "val")]:
        if path.name not in ("train.bin", "val.bin"):
            raise DataError(f"{path}: would be read beside the new bins; move it, or choose another --out")
    options = dict(tokenizer=tokenizer, field=field, separator=separator, skip_bad=skip_bad,
                   keep_duplicates=keep_duplicates, decontaminate=tuple(decontaminate), eval_data=eval_data)
    files, passed_over = [], []
    for k, source in enumerate(sources):
        found, passed = find_files(source)
        files += [file._replace(source=k) for file in found]
        passed_over.append(passed)
    infos = [file.fs.info(file.path) for file in files]
    size = sum(info.get("size") or 0 for info in infos)
    grams = test_grams(options["decontaminate"], eval_data)
    # everything that shapes the parts: this program, the options, the input, the test items
    shape = [VERSION, PIECE, GROUP, unicodedata.unidata_version, options | dict(skip_bad=None), infos,
             [(file.source, file.path, file.kind) for file in files], sorted(grams.grams)]
    work = out / "prepare.work" / hashlib.sha256(repr(shape).encode()).hexdigest()[:16]

    with lock(out / "prepare.lock"), tqdm(total=size, unit="B", unit_scale=True, desc=str(out)) as bar:
        for stale in set(work.parent.glob("*")) - {work}:
            shutil.rmtree(stale)
        keys = make_parts(files, work, options, workers, bar)
        if keys["bad"].any() and not skip_bad:
            raise DataError(f"{work}: made with --skip_bad, which left text out; give it again, or remove it")
        stays = keys["tokens"] > 0
        if not keep_duplicates:
            stays &= ~find_duplicates(work / "tokens", keys, tokenizer, workers)
        bins = {side: work / f"{side}.bin" for side in ("train", "val")}
        for path, chosen in zip(bins.values(), decide(keys["position"], stays, val_fraction)):
            write_bin(path, work / "tokens", keys, chosen)
        if bins["val"].stat().st_size == 0:         # a single document, or equal ones
            halve(*bins.values(), val_fraction, encoding)
        splits = {side: count_bin(path, encoding) for side, path in bins.items()}
        counts = count_sources(keys, stays, len(sources))
        meta = dict(tokenizer=tokenizer, vocab_size=encoding.n_vocab, splits=splits,
                    sources=[dict(source=name, **count, passed_over=dict(passed))
                             for name, count, passed in zip(sources, counts, passed_over)],
                    options=options | dict(val_fraction=val_fraction),
                    items_too_short=grams.too_short)
        for side, path in bins.items():
            os.replace(path, out / f"{side}.bin")
        write_whole(out / "meta.json", json.dumps(meta, indent=2))
        shutil.rmtree(work.parent)
    return meta


# ---------------------------------------------------------------------------------------------
# Reading bins

LLM_C = 20240520        # the first int32 of llm.c's GPT-2 bins, whose header is 1,024 bytes


def bins_of(folder, side):
    """Paths of the bins of one side ("train" or "val"): one, or several such as train-00000.bin."""
    return sorted(Path(folder).glob(f"*{side}*.bin"))


def read_meta(folder):
    """The meta.json of a folder. Without one its bins count as GPT-2 tokens, as nanoGPT's are."""
    path = Path(folder) / "meta.json"
    if path.exists():
        with one_line_errors(f"{path}: make the bins again"):
            return parse(path.read_text(), dict(tokenizer=str, vocab_size=int, splits=dict))
    if path.with_suffix(".pkl").exists():
        raise DataError(f"{path.with_suffix('.pkl')}: nanoGPT's tokens of characters, which nothing here "
                        "reads; prepare the text with --tokenizer bytes")
    print(f"{folder}: no meta.json there, so its bins are read as GPT-2 tokens")
    return dict(tokenizer="gpt2", vocab_size=50257, splits={})


def open_bin(path, vocab_size=None, meta=None):
    """(tokens, meta) of a bin: tokens a read-only memory map (n,) of uint16; meta the meta.json beside it.

    Checks the size, and a sample of the tokens against vocab_size (default: meta's); --verify checks all.
    meta["splits"][path.stem]["sha256"] identifies the bin: meta.json's, or one of size and sample. Raises
    DataError.
    """
    path = Path(path)
    if not path.is_file():
        raise NoBin(f"{path}: no such bin; make it with prepare.py --out {path.parent}")
    meta = meta or read_meta(path.parent)
    counts = meta["splits"].setdefault(path.stem, {})
    size = path.stat().st_size
    expected = 2 * counts.get("tokens", size // 2)
    if size % 2 or size == 0 or size != expected:
        raise DataError(f"{path}: {size} bytes, expected {expected or 'some'}; make it again with prepare.py")
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if tokens[:2].tobytes() == LLM_C.to_bytes(4, "little"):
        tokens = tokens[512:]
    starts = np.linspace(0, max(0, len(tokens) - 4096), 64, dtype=np.int64)
    sample = np.stack([tokens[start:start + 4096] for start in starts])
    # of uint32 each second half is the high one: 0, 1 or 2 in every vocabulary there is
    if not counts and len(tokens) >= 64 and sample[0, 1::2].max() <= 2:
        raise DataError(f"{path}: holds uint32, expected uint16 tokens; make it again with prepare.py")
    vocab_size = vocab_size or meta["vocab_size"]
    if sample.max() >= vocab_size:
        raise DataError(f"{path}: token {sample.max()} is outside the vocabulary of {vocab_size}")
    counts.setdefault("sha256", hashlib.sha256(b"%d" % size + sample.tobytes()).hexdigest())
    return tokens, meta


def open_data(data, side, vocab_size=None):
    """The bins of one side ("train" or "val"): ({folder: its bins}, meta).

    data: a folder, or a dict whose keys are folders. meta: tokenizer, vocab_size, and a fingerprint of all
    bins. Raises DataError.
    """
    sources, metas, hashes = {}, {}, []
    for folder in data if isinstance(data, dict) else [data]:
        sources[folder] = []
        for path in bins_of(folder, side) or [Path(folder) / f"{side}.bin"]:
            tokens, metas[folder] = open_bin(path, vocab_size, metas.get(folder))
            sources[folder].append(tokens)
            hashes.append(metas[folder]["splits"][path.stem]["sha256"])
    (first, meta), *others = metas.items()
    for folder, other in others:
        if other["tokenizer"] != meta["tokenizer"]:
            raise DataError(f"{folder} holds {other['tokenizer']} tokens, {first} {meta['tokenizer']} tokens")
    fingerprint = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return sources, dict(tokenizer=meta["tokenizer"], vocab_size=meta["vocab_size"], fingerprint=fingerprint)


def verify(folder):
    """Check every byte of a folder's bins, and print a line for each. Raises DataError."""
    meta = read_meta(folder)
    recorded = dict(meta["splits"])         # open_bin adds what is not there
    for path in sorted({*bins_of(folder, "train"), *bins_of(folder, "val"),
                        *(Path(folder) / f"{name}.bin" for name in recorded)}):
        open_bin(path, meta=meta)
        counts = count_bin(path, get_tokenizer(meta["tokenizer"]))
        if recorded.get(path.stem, counts) != counts:
            raise DataError(f"{path}: {counts}, but in meta.json {recorded[path.stem]}; make it again")
        print(f"{path}: {counts['tokens']:,} tokens, {'as' if path.stem in recorded else 'not'} in meta.json")


# ---------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse with a module's docstring as its help, whose errors are one line and status 1."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        for stream in (sys.stdout, sys.stderr):         # a console that lacks a character gets an escape
            stream.reconfigure(errors="backslashreplace")

    def error(self, message):
        self.exit(1, f"{self.prog}: {message}\n")


def print_report(meta, out):
    print(f"{'':6}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}")
    for name, n in meta["splits"].items():
        ratio = n["bytes"] / n["tokens"]
        print(f"{name:6}{n['documents']:12,}{n['bytes']:16,}{n['tokens']:16,}{ratio:13.2f}")
    for source in meta["sources"][:20]:         # the others are in meta.json
        counts = {name: n for name, n in source.items() if name not in ("source", "passed_over") and n}
        counts |= {f"{name} files passed over": n for name, n in source["passed_over"].items()}
        print(f"{source['source']}: " + ", ".join(f"{n:,} {name}" for name, n in counts.items()))
    if meta["items_too_short"]:
        print(f"{meta['items_too_short']:,} test items have under {MIN_WORDS} words and were not looked for")
    print(f'in a config: data = "{out}"')


def main(argv):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("sources", nargs="*", metavar="SOURCE", help=f"file, folder, pattern, URL, or {', '.join(CORPORA)}")
    add("--out", metavar="DIR", help="where the bins go, e.g. data/mine")
    add("--verify", metavar="DIR", help="check every byte of the bins there")
    add("--tokenizer", default="gpt2", help="gpt2 (default) or bytes")
    add("--val_fraction", type=float, default=0.05, help="share of documents for validation (default 0.05)")
    add("--field", default="text", help="of JSON lines or parquet rows (default text)")
    add("--separator", default="", metavar="S", help="what stands between the documents of a text file")
    add("--keep_duplicates", action="store_true", help="leave repeated documents in")
    add("--decontaminate", metavar="LIST", default="",
        help=f"cut what is also in {','.join(TEST_SETS)} or any file; names with commas between")
    add("--eval_data", metavar="DIR", help="folder of the test sets; default: downloaded once")
    add("--skip_bad", action="store_true", help="leave out and count what is not UTF-8, JSON or text")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    args = vars(parser.parse_args(argv))
    folder = args.pop("verify")
    if folder:
        verify(folder)
    elif not args["sources"] or not args["out"]:
        parser.error("expected a SOURCE and --out DIR; see --help")
    elif not 0 < args["val_fraction"] < 1 or args["workers"] < 1:
        parser.error("expected --val_fraction between 0 and 1, and --workers of 1 or more")
    else:
        args["decontaminate"] = [name for name in args["decontaminate"].split(",") if name]
        print_report(prepare(**args), args["out"])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("prepare.py: stopped; the same command goes on where it was")
    except BrokenProcessPool:
        sys.exit("prepare.py: a worker was killed, perhaps out of memory; try fewer --workers")
    except (DataError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
