"""Text to token bins that train.py reads.

    python prepare.py python --out data/python --tokenizer bytes
    python prepare.py wikitext-2 --out data/wikitext-2
    python prepare.py notes.txt dump.jsonl.gz folder/ --out data/mine

A source is a name from SOURCES below, a file (.txt: one document; .jsonl: one document a line, in
its field "text"; either also .gz), or a folder, searched for such files.

Writes OUT/train.bin and OUT/val.bin: the documents' tokens, each document followed by
<|endoftext|>, as headerless little-endian uint16 (nanoGPT's format, readable by either project),
and OUT/meta.json: tokenizer, counts, sha256 of each bin, sources and options.
"""
import argparse
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import sys
import sysconfig
import tempfile
import urllib.request
import zipfile
import zlib
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

EOT = "<|endoftext|>"
DOWNLOADS = Path("data/raw")
SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")


class DataError(ValueError):
    """Data or a source that cannot be used; the message is one line for the user."""


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
# Sources: each yields (split, text), split "train" or "val" where the source has its own, else None


def standard_library():
    """The running interpreter's standard library, a module a document, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    for path in sorted(root.rglob("*.py")):
        if not skip & set(path.relative_to(root).parts):
            yield None, read_text(path)


def shakespeare():
    """Tiny Shakespeare, split as in nanoGPT: the first 90% of its characters are for training."""
    text = read_text(download("shakespeare", "input.txt"))
    cut = int(0.9 * len(text))
    yield "train", text[:cut]
    yield "val", text[cut:]


def wikitext2():
    """WikiText-2 (Merity et al. 2016), the word-tokenised release, an article a document."""
    for split, file in (("train", "train.txt"), ("val", "valid.txt")):
        text = read_text(download("wikitext-2", file))
        before, first, *others = re.split(r"(?m)^(?= = [^=\n]+ = $)", text)
        for article in (before + first, *others):       # the file begins with an empty line
            yield split, article


SOURCES = {"python": standard_library, "shakespeare": shakespeare, "wikitext-2": wikitext2}

FILES = {       # source: address, and git's own hash of each file there
    "shakespeare": ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare", {
        "input.txt": "7dcb3a2d4cc3b48b6283dd46870bfeb78f88aac9"}),
    "wikitext-2": ("https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2", {
        "train.txt": "2d84b35af79e411d73ea7cae83c73964c6ac83b4",
        "valid.txt": "eec944eb2d9e46061cd34a6913528797db6842fc"}),
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
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_bytes(data)
    os.replace(tmp, path)


def local_files(source):
    """The .txt and .jsonl files (also .gz) that a path stands for, sorted. Raises DataError."""
    path = Path(source)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES))
        if not files:
            raise DataError(f"{source}: no {', '.join(SUFFIXES)} file in this folder")
        return files
    if not path.exists():
        raise DataError(f"{source}: neither a file, a folder nor one of {', '.join(SOURCES)}")
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{source}: expected a name that ends in {', '.join(SUFFIXES)}")
    return [path]


def decode(data, path, offset=0):
    """Strict UTF-8; `offset` is where in the file data begins. Raises DataError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 at byte {offset + e.start} "
                        f"(0x{data[e.start]:02x}); convert the file, e.g. with iconv") from None


def read_text(path):
    with open_maybe_gz(path) as f:
        return decode(f.read(), path)


def read_file(path):
    """The documents of one local file."""
    if ".jsonl" not in path.suffixes:
        yield None, read_text(path)
        return
    offset = 0
    with open_maybe_gz(path) as f:
        for number, line in enumerate(f, 1):
            text = decode(line, path, offset)
            offset += len(line)
            if not text.strip():
                continue
            try:
                document = json.loads(text)["text"]
                document.encode("utf-8")        # JSON can spell half a surrogate pair, UTF-8 cannot
            except (ValueError, KeyError, TypeError, AttributeError):
                raise DataError(f'{path}, line {number}: expected a JSON object with valid Unicode '
                                'text in "text"') from None
            yield None, document


@contextmanager
def open_maybe_gz(path):
    """with open_maybe_gz(path) as f: the file's bytes, decompressed (.gz, .zst). Raises DataError."""
    kind, opener, broken = "", open, ()
    if str(path).endswith(".gz"):
        kind, opener, broken = "gzip", gzip.open, (EOFError, gzip.BadGzipFile, zlib.error)
    elif str(path).endswith(".zst"):
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: to read .zst install zstandard: pip install zstandard") from None
        kind, opener, broken = "zstd", zstandard.open, zstandard.ZstdError
    with opener(path, "rb") as f:
        try:
            yield f
        except broken as e:
            raise DataError(f"{path}: not a whole {kind} file ({e})") from None


def documents(sources):
    for source in sources:
        if source in SOURCES:
            yield from SOURCES[source]()
        else:
            for path in local_files(source):
                yield from read_file(path)


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


def normalise(text):
    """The words of a text as the matcher compares them."""
    return PUNCTUATION.sub("", text.lower()).split()


PUNCTUATION = re.compile(r"[^\w\s]+|_+")


class Grams:
    """Finds in documents the N-grams of test items: grams is {"the words ...": (item, ...)}.

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
                gram = " ".join(words[i:i + n])
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
                gram = " ".join(words[i:i + n])
                if i + n <= len(words) and gram in self.grams:      # the words themselves, not their hashes
                    found.append((i, i + n, gram))
        if not found:
            return []
        spans = [m.span() for m in re.finditer(r"\S+", text) if normalise(m.group())]      # of each word
        return [(spans[i][0], spans[j - 1][1], gram) for i, j, gram in found]


def test_grams(names, folder=None):
    """The Grams of whole test sets, each item named (test set, number from 0). Raises DataError."""
    return Grams(((name, number), text) for name in names for number, item in enumerate(test_items(name, folder))
                 for text in item_texts(name, item))


# ---------------------------------------------------------------------------------------------
# The split


def position(text):
    """A number in [0, 1) that depends on the document alone."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(documents, val_fraction):
    """Give each (split, text) that has no split one: by its hash, so that the same document always
    falls on the same side, whatever else is in the corpus.

    A corpus so small that all its documents would fall on one side still gets both: the document
    with the lowest hash goes to validation, a lone document is cut at a line end.
    """
    few = list(islice(documents, 20))
    if len(few) < 20 and all(side is None for side, _ in few):
        sides = {position(text) < val_fraction for _, text in few}
        if len(few) == 1:
            text = few[0][1]
            cut = text.rfind("\n", 0, int((1 - val_fraction) * len(text))) + 1
            few = [("train", text[:cut]), ("val", text[cut:])]
        elif len(sides) == 1:
            few.sort(key=lambda document: position(document[1]))
            few = [("val", few[0][1])] + [("train", text) for _, text in few[1:]]
    for side, text in chain(few, documents):
        yield side or ("val" if position(text) < val_fraction else "train"), text


# ---------------------------------------------------------------------------------------------
# Bins


class BinWriter:
    """Appends documents to PATH.tmp and counts; commit() gives it the name PATH."""

    def __init__(self, path, tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.file = open(f"{path}.tmp", "wb")
        self.sha256 = hashlib.sha256()
        self.counts = dict(documents=0, bytes=0, tokens=0)

    def add(self, text):
        """Returns the bytes of text added."""
        tokens = self.tokenizer.encode_ordinary(text)   # a literal <|endoftext|> stays plain text
        size = len(text.encode("utf-8"))
        data = np.array(tokens + [self.tokenizer.eot_token], dtype="<u2").tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.counts["documents"] += 1
        self.counts["bytes"] += size
        self.counts["tokens"] += len(tokens) + 1
        return size

    def close(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {**self.counts, "sha256": self.sha256.hexdigest()}


def prepare(sources, out, tokenizer, val_fraction):
    """Tokenize sources into out/train.bin, out/val.bin and out/meta.json; returns meta as a dict.

    The final names appear only when all is written: first the bins, then meta.json, whose sha256
    tells a reader that they belong together. Raises DataError, with nothing under them touched.
    """
    encoding = get_tokenizer(tokenizer)
    if encoding.n_vocab > 2**16:
        raise DataError(f"tokenizer {tokenizer}: {encoding.n_vocab} tokens do not fit in uint16")
    os.makedirs(out, exist_ok=True)
    paths = {side: os.path.join(out, f"{side}.bin") for side in ("train", "val")}
    meta_path = os.path.join(out, "meta.json")
    try:
        writers = {side: BinWriter(path, encoding) for side, path in paths.items()}
        with tqdm(unit="B", unit_scale=True, desc=out) as bar:
            for side, text in split(documents(sources), val_fraction):
                if text:
                    bar.update(writers[side].add(text))
        splits = {side: writer.close() for side, writer in writers.items()}
        for side, counts in splits.items():
            if not counts["documents"]:
                raise DataError(f"{', '.join(sources)}: no text for {side}; add documents or change "
                                f"--val_fraction ({val_fraction})")
        meta = dict(tokenizer=tokenizer, vocab_size=encoding.n_vocab, splits=splits,
                    sources=list(sources), options=dict(val_fraction=val_fraction))
        with open(f"{meta_path}.tmp", "w") as f:
            json.dump(meta, f, indent=2)
            f.flush()
            os.fsync(f.fileno())
        for path in (*paths.values(), meta_path):
            os.replace(f"{path}.tmp", path)
    finally:
        for path in (*paths.values(), meta_path):
            if os.path.exists(f"{path}.tmp"):
                os.remove(f"{path}.tmp")
    return meta


def open_bin(path, vocab_size=None):
    """(tokens, meta) of a bin: tokens a read-only memory map (n,) uint16, checked whole.

    meta is the meta.json beside it; a bin without one (nanoGPT writes none) is taken as GPT-2's
    tokens, and this is said. Raises DataError where the file is missing, cut short, not the one
    that meta.json describes, or holds a token at or above vocab_size (default: meta's own).
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such bin; make it with prepare.py --out {path.parent}")
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


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=f"{', '.join(SOURCES)}, a file or a folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the bins go, e.g. data/mine")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2 (default) or bytes")
    parser.add_argument("--val_fraction", type=float, default=0.05, metavar="F",
                        help="share of the documents for validation (default 0.05)")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise DataError(f"--val_fraction={args.val_fraction}: expected a number between 0 and 1")
    meta = prepare(args.sources, args.out, args.tokenizer, args.val_fraction)
    print(f"{'':6}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}")
    for side, n in meta["splits"].items():
        print(f"{side:6}{n['documents']:12,}{n['bytes']:16,}{n['tokens']:16,}{n['bytes'] / n['tokens']:13.2f}")
    print(f'in a config: data = "{args.out}"')


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (DataError, OSError) as e:
        sys.exit(f"prepare.py: {e}")
