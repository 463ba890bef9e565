"""What the studies here share. NAME/run.py names its jobs; each is done once and kept as a line of NAME/runs.jsonl.

From these lines come the tables in NAME/README.md, between the two marks, and NAME/curve.png.
"""
import argparse
import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
START, END = "<!-- measured -->", "<!-- to here -->"


def main(file, doc, jobs, tables, draw=None):
    """The command line of a study, run from the repository's folder.

    jobs: (args, {name: record} so far) -> {name: function that returns a record}, asked anew after each job, so that
    one job may follow from another's result; tables: {name: record} -> the README's tables; draw: the same -> the figure,
    or None where there is nothing to draw yet.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing, only make the tables and the picture")
    parser.add_argument("--eval_data", metavar="DIR", help="folder of the test sets; default: downloaded once")
    parser.add_argument("--only", default="", metavar="WORDS", help="only jobs whose name contains this")
    args = parser.parse_args()
    folder = Path(file).resolve().parent
    if not args.report:
        measure(folder, functools.partial(jobs, args), args.only)
    done = records(folder)
    fill(folder / "README.md", tables(done))
    figure = draw(done) if draw else None
    if figure:
        figure.savefig(folder / "curve.png", dpi=110)


def measure(folder, jobs, only):
    """Do what runs.jsonl does not have yet; after Ctrl-C or a kill the same command goes on."""
    while True:
        done = records(folder)
        todo = {name: job for name, job in jobs(done).items() if only in name and name not in done}
        if not todo:
            return
        name, job = next(iter(todo.items()))
        print(f"{len(todo)} left; now {name}", flush=True)
        record = dict(name=name, **job())
        with open(folder / "runs.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


def records(folder):
    return {record["name"]: record for record in read(folder / "runs.jsonl")}


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()] if Path(path).exists() else []


def fill(readme, text):
    """Put text between the marks."""
    head, _, rest = readme.read_text().partition(START)
    readme.write_text(f"{head}{START}\n{text}\n{END}{rest.partition(END)[2]}")


def run(*words):
    """python WORDS"""
    words = [str(word) for word in words]
    print("$ python", *words, flush=True)
    status = subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]]).returncode
    if status:
        sys.exit(f"{words[0]} ended with status {status}; the same command goes on")


def train(config, out_dir, *words, script="train.py"):
    """The record of a run of train.py: the first line of its log, its curves, and its last evaluation."""
    run(*script.split(), config, f"--out_dir={out_dir}", *words)
    header, *log = read(Path(out_dir) / f"{Path(config).stem}.jsonl")
    steps = [r for r in log if "loss" in r]
    evaluations = [r for r in log if "val_loss" in r]
    if evaluations[-1]["step"] < steps[-1]["step"]:     # train.py was stopped and has saved
        sys.exit("stopped; the same command goes on")
    starts = [0, *(r["tokens"] for r in steps)]
    seconds = sum((r["tokens"] - start) / r["tokens_per_second"] for start, r in zip(starts, steps))
    return dict(command=" ".join(map(str, (script, config, *words))), seconds=round(seconds),
                **{key: header[key] for key in ("parameters", "dtype", "device", "versions", "commit")},
                loss=[(r["tokens"], r["loss"]) for r in steps],
                val_loss=[(r["tokens"], r["val_loss"]) for r in evaluations],
                last={**steps[-1], **evaluations[-1]})


def table(columns, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (columns, ["---"] * len(columns), *rows))


def spread(x, form=".3f"):
    """mean ± standard deviation of (n,); a single value as it is"""
    return f"{x.mean():{form}}" + (f" ± {x.std(ddof=1):{form.lstrip('+')}}" if len(x) > 1 else "")


def missing(jobs, done):
    """A line for a study that has not been run to its end."""
    left = [name for name in jobs if name not in done]
    names = "; ".join(left[:8]) + " and others" * (len(left) > 8)
    return f"Not run yet, {len(left)} of {len(jobs)}: {names}." if left else "All runs are here."


def provenance(done):
    """One line: what it ran on, and for how long. The commits are in runs.jsonl."""
    made = [record for record in done.values() if "seconds" in record]
    if not made:
        return "Nothing has been run yet."
    versions = ", ".join(f"{name} {version}" for name, version in made[0]["versions"].items())
    return f"{made[0]['device']}, {versions}; {sum(record['seconds'] for record in made) / 60:.0f} minutes of training."


def pyplot():
    import matplotlib       # here, for it is slow to import
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def curves(axes, record, label, color):
    """Training (thin) and validation (dots) perplexity over tokens."""
    for key, style in (("loss", "-"), ("val_loss", "o--")):
        tokens, losses = np.array(record[key]).T
        axes.plot(tokens, np.exp(losses), style, color=color, lw=1, ms=4, label=label if key == "val_loss" else None)
