"""How fast prepare.py tokenizes, beside tiktoken alone and nanoGPT's way, on the same text and cores.

    python tests/tools/bench_prepare.py [--text FILE.jsonl] [--workers 2] [--rounds 3]

Without --text: the installed Python packages. Each row is a fresh process, in turns; what is printed are medians over
the rounds, of times and of ratios within a round. tiktoken in as many processes at once, with nothing to read, pass
on or write, is what the machine can give. Last, of our own rows, what share of cores x time is spent inside of
tiktoken: where a machine's speed wavers, that share does little. nanoGPT's way: datasets.map with encode_ordinary in as
many processes, then a memmap filled from 1024 shards (its loading of the text into Arrow is not counted; ours reads
and parses the .jsonl).
Needs pip install datasets; EVAL_DATA names a folder of the test sets.
"""
import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import tiktoken

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import prepare as p                         # noqa: E402


def count(texts):
    """Tokens of texts by tiktoken, called the way that is fastest, nothing kept."""
    encoding = p.get_tokenizer("gpt2")
    return sum(len(encoding.encode_to_numpy(t, allowed_special=set(), disallowed_special=())) + 1 for t in texts)


def alone(path, folder, workers):
    texts = list(p.texts(path))
    p.get_tokenizer("gpt2")
    began = time.perf_counter()
    n = count(texts)
    return n, time.perf_counter() - began


def count_some(start):
    return count(TEXTS[start:start + 50])


def at_once(path, folder, workers):
    global TEXTS            # which the processes have from their parent
    TEXTS = list(p.texts(path))
    p.get_tokenizer("gpt2")
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        began = time.perf_counter()
        n = sum(pool.imap_unordered(count_some, range(0, len(TEXTS), 50)))
        return n, time.perf_counter() - began


class Timed:
    """A tiktoken.Encoding that adds up, over all processes, the time spent in its call."""

    def __init__(self, encoding):
        self.encoding, self.spent = encoding, multiprocessing.Value("d")

    def __getattr__(self, name):
        return getattr(self.encoding, name)

    def encode_to_numpy(self, *args, **options):
        began = time.perf_counter()
        tokens = self.encoding.encode_to_numpy(*args, **options)
        with self.spent:
            self.spent.value += time.perf_counter() - began
        return tokens


def ours(path, folder, workers, **options):
    encoding = Timed(p.get_tokenizer("gpt2"))
    p.get_tokenizer = lambda name: encoding
    began = time.perf_counter()
    meta = p.prepare([path], folder, workers=workers, **options)
    seconds = time.perf_counter() - began
    tokens = sum(split["tokens"] for split in meta["splits"].values())
    return tokens, seconds, encoding.spent.value / seconds / workers


def nanogpt(path, folder, workers):
    import datasets
    datasets.disable_progress_bars()
    encoding = tiktoken.get_encoding("gpt2")

    def process(example):
        ids = encoding.encode_ordinary(example["text"])
        ids.append(encoding.eot_token)
        return {"ids": ids, "len": len(ids)}
    data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=folder)
    began = time.perf_counter()
    total = 0
    for side, part in data.train_test_split(test_size=0.05, seed=1, shuffle=True).items():
        part = part.map(process, remove_columns=["text"], num_proc=workers)
        length = np.sum(part["len"], dtype=np.uint64)
        bins = np.memmap(f"{folder}/{side}.bin", dtype=np.uint16, mode="w+", shape=(int(length),))
        at, shards = 0, min(1024, len(part))
        for i in range(shards):
            batch = np.concatenate(part.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")["ids"])
            bins[at:at + len(batch)] = batch
            at += len(batch)
        bins.flush()
        total += at
    return total, time.perf_counter() - began


ROWS = {
    "tiktoken alone, one process": alone,
    "tiktoken alone, a process a core": at_once,
    "nanoGPT's way": nanogpt,
    "ours, --keep_duplicates": lambda *a: ours(*a, keep_duplicates=True),
    "ours": ours,
    "ours, --decontaminate=lambada": lambda *a: ours(*a, decontaminate=["lambada"],
                                                     eval_data=os.environ.get("EVAL_DATA")),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--row", help="run this one alone, here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.row:
            print(*ROWS[args.row](args.text, folder, args.workers))
            return
        path = args.text or f"{folder}/packages.jsonl"
        if not args.text:
            with open(path, "w") as f:
                for file in p.find_files(f"{sysconfig.get_paths()['purelib']}/**/*.py")[0]:
                    for record in p.records(file):
                        with suppress(p.DataError):         # a few are not UTF-8
                            f.write(json.dumps({"text": p.text_of(record)}) + "\n")
        size = sum(len(text.encode()) for text in p.texts(path))
        tokens, seconds, shares = {}, {row: [] for row in ROWS}, {row: [] for row in ROWS}
        for _ in range(args.rounds):
            for row in ROWS:
                command = [sys.executable, __file__, "--row", row, "--text", path, "--workers", str(args.workers)]
                result = subprocess.run(command, capture_output=True, text=True)
                assert result.returncode == 0, result.stderr
                tokens[row], took, *share = result.stdout.splitlines()[-1].split()
                seconds[row].append(float(took))
                shares[row] += map(float, share)
    print(f"{size / 1e6:,.0f} MB of text, {args.workers} workers, {args.rounds} rounds, Python "
          f"{platform.python_version()}, tiktoken {tiktoken.__version__}\n\n| | tokens | seconds | million tokens/s "
          "| of tiktoken x workers | of tiktoken at once | of nanoGPT's way | in tiktoken |\n" + "|---" * 8 + "|")

    def against(row, other):
        """How many times the text a second of the other row."""
        return statistics.median(b / a for a, b in zip(seconds[row], seconds[other]))
    one, many, nano, *_ = ROWS
    for row in ROWS:
        took = statistics.median(seconds[row])
        print(f"| {row} | {int(tokens[row]):,} | {took:.1f} | {int(tokens[row]) / took / 1e6:.2f} | "
              f"{against(row, one) / args.workers:.0%} | {against(row, many):.0%} | {against(row, nano):.1f} | "
              + (f"{statistics.median(shares[row]):.0%} |" if shares[row] else "|"))


if __name__ == "__main__":
    main()
