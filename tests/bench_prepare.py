"""How fast prepare.py tokenizes, beside tiktoken alone and nanoGPT's way, on the same text and cores.

    python tests/bench_prepare.py [--text FILE.jsonl] [--workers 2] [--rounds 3]

Without --text: the installed Python packages. Each row is a fresh process, in turns; the least time of the rounds
counts. nanoGPT's way: datasets.map with encode_ordinary in as many processes, then a memmap filled from 1024 shards
(its loading of the text into Arrow is not counted; ours reads and parses the .jsonl).
Needs pip install datasets; EVAL_DATA names a folder of the test sets.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tiktoken

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare as p                         # noqa: E402


def alone(path, folder, workers):
    """tiktoken in one process, called the way that is fastest, nothing kept."""
    texts = list(p.texts(path))
    encoding = p.get_tokenizer("gpt2")
    began = time.perf_counter()
    n = sum(len(encoding.encode_to_numpy(t, allowed_special=set(), disallowed_special=())) + 1 for t in texts)
    return n, time.perf_counter() - began


def ours(path, folder, workers, **options):
    p.get_tokenizer("gpt2")
    began = time.perf_counter()
    meta = p.prepare([path], folder, workers=workers, **options)
    seconds = time.perf_counter() - began
    return sum(split["tokens"] for split in meta["splits"].values()), seconds


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
                f.writelines(json.dumps({"text": text}) + "\n" for _, text in p.packages())
        size = sum(len(text.encode()) for text in p.texts(path))
        best = {}
        for _ in range(args.rounds):
            for row in ROWS:
                command = [sys.executable, __file__, "--row", row, "--text", path, "--workers", str(args.workers)]
                result = subprocess.run(command, capture_output=True, text=True)
                assert result.returncode == 0, result.stderr
                n, seconds = result.stdout.split()[-2:]
                best[row] = min(best.get(row, (int(n), float("inf"))), (int(n), float(seconds)), key=lambda x: x[1])
    print(f"{size / 1e6:,.0f} MB of text, {args.workers} workers, Python {platform.python_version()}, tiktoken "
          f"{tiktoken.__version__}\n\n| | tokens | seconds | million tokens/s | of tiktoken x workers | of nanoGPT's way "
          "|\n|---|---|---|---|---|---|")
    speed = {row: n / seconds for row, (n, seconds) in best.items()}
    unit = speed["tiktoken alone, one process"] * args.workers
    for row, (n, seconds) in best.items():
        print(f"| {row} | {n:,} | {seconds:.1f} | {speed[row] / 1e6:.2f} | {speed[row] / unit:.0%} | "
              f"{speed[row] / speed['nanoGPT' + chr(39) + 's way']:.1f} |")


if __name__ == "__main__":
    main()
