"""The quickstart's log as a table and a curve.

    python prepare.py python --out data/python --tokenizer bytes
    python logs/quickstart/run.py
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study        # noqa: E402


def quickstart():
    study.run("train.py", "configs/quickstart.py", "--out_dir=out/logs-quickstart")
    return dict(log=study.read("out/logs-quickstart/quickstart.jsonl"))


def jobs(*_):
    return {"Muon, 380 steps": quickstart}


def tables(done):
    text = []
    for name, record in done.items():
        rows = [(r["step"], f"{r['tokens'] / 1e6:.2f}M", f"{r['val_loss']:.4f}", f"{math.exp(r['val_loss']):.2f}",
                 f"{r['bits_per_byte']:.4f}") for r in record["log"] if "val_loss" in r]
        columns = ("step", "tokens", "val loss", "perplexity per byte", "bits per byte")
        text.append(f"{name}:\n\n{study.table(columns, rows)}")
    return "\n\n".join(text)


def draw(done):
    figure, axes = study.pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, record) in enumerate(done.items()):
        log = record["log"][1:]
        points = {key: [(r["tokens"], r[key]) for r in log if key in r and r["step"]] for key in ("loss", "val_loss")}
        study.curves(axes, points, name, f"C{i}")
    axes.set(xlabel="tokens seen", ylabel="perplexity per byte: training (line), validation (dots)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
