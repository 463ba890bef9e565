"""What the studies in this folder share: commands run once and kept in a .jsonl, tables written into a .md."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
START, END = "<!-- measured -->", "<!-- to here -->"


def run(*words):
    """python WORDS, from the folder where the study was started."""
    words = [str(word) for word in words]
    print("$ python", *words, flush=True)
    status = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]]).returncode
    if status:
        sys.exit(f"{words[0]} ended with status {status}; the same command goes on")


def train(config, out_dir, *words, script="train.py"):
    """A run of train.py and what came of it: the first line of its log, its curves, and its last evaluation."""
    run(*script.split(), config, f"--out_dir={out_dir}", *words)
    log = read(Path(out_dir) / f"{Path(config).stem}.jsonl")
    losses = {key: [(r["tokens"], r[key]) for r in log if key in r] for key in ("loss", "val_loss")}
    steps = [r for r in log if "loss" in r]
    seconds = sum((r["tokens"] - before) / r["tokens_per_second"]
                  for before, r in zip([0, *(r["tokens"] for r in steps)], steps))
    return dict(command=" ".join(map(str, (script, config, *words))), seconds=round(seconds),
                **{key: log[0][key] for key in ("parameters", "dtype", "device", "versions", "commit")}, **losses,
                last={**steps[-1], **[r for r in log if "val_loss" in r][-1]})


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def measure(path, jobs):
    """{name: record} of the jobs, {name: function}, each made once and then read from path, a .jsonl."""
    done = {record["name"]: record for record in read(path)}
    left = [name for name in jobs if name not in done]
    for i, name in enumerate(left):
        print(f"{len(left) - i} of {len(jobs)} left; now {name}", flush=True)
        done[name] = dict(name=name, **jobs[name]())
        with open(path, "a") as f:
            f.write(json.dumps(done[name]) + "\n")
    return {name: done[name] for name in jobs}


def fill(path, text):
    """Put text between the markers of a .md."""
    head, _, tail = path.read_text().partition(START)
    path.write_text(f"{head}{START}\n{text}\n{END}{tail.partition(END)[2]}")


def table(columns, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows))


def provenance(records):
    """One line: what it ran on, from which commit, for how long."""
    records = list(records)
    versions = ", ".join(f"{name} {version}" for name, version in records[0]["versions"].items())
    commits = ", ".join(sorted({record["commit"] or "none" for record in records}))
    return (f"Device {records[0]['device']}, {versions}, commit {commits}; "
            f"{sum(record['seconds'] for record in records) / 60:.0f} minutes of training.")


def pyplot():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def curves(axes, record, label, color):
    """Training (thin) and validation (dots) perplexity over tokens."""
    for key, style in (("loss", "-"), ("val_loss", "o--")):
        tokens, losses = np.array(record[key]).T
        axes.plot(tokens, np.exp(losses), style, color=color, lw=1, ms=4, label=label if key == "val_loss" else None)
