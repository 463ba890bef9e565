"""Muon beside AdamW at the quickstart's shape: makes runs.jsonl and curve.png here, and prints the tables of README.md.

    python prepare.py python --out data/python --tokenizer bytes
    python logs/muon/run.py                 every run that is not yet in runs.jsonl
    python logs/muon/run.py --time          the seconds of a step, both optimizers in turns
    python logs/muon/run.py --report        only the tables and the curve

Every run goes through train.py; after Ctrl-C or a kill the same command goes on.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT))
RUNS = HERE / "runs.jsonl"
DATA, OUT = "data/python", "out/muon"
STEPS = 300
RATES = {"adamw": (2e-3, 1e-3, 4e-3), "muon": (4e-3, 8e-3, 2e-3)}     # the likeliest first
SEEDS = (1, 2, 3)


def jobs():
    for seed in SEEDS:
        for i in range(3):
            for optimizer, rates in RATES.items():
                yield optimizer, rates[i], seed


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(record):
    with open(RUNS, "a") as f:
        f.write(json.dumps(record) + "\n")


def train(optimizer, rate, seed):
    out = f"{OUT}/{optimizer}-{rate}-{seed}"
    words = [f"--optimizer={optimizer}", f"--learning_rate={rate}", f"--min_lr={rate / 10}", f"--max_steps={STEPS}",
             f"--seed={seed}", f"--out_dir={out}", f"--data={DATA}", "--dtype=float32", "--adamw_lr=none",
             "--eval_interval=50", "--save_interval=25"]
    if subprocess.run([sys.executable, ROOT / "train.py", ROOT / "configs/quickstart.py", *words]).returncode:
        sys.exit("a run failed; the same command goes on")
    header, *log = read(Path(out) / "quickstart.jsonl")
    if log[-1]["step"] < STEPS:
        sys.exit("stopped; the same command goes on")
    curve = [(r["step"], r["val_loss"], r["bits_per_byte"]) for r in log if "val_loss" in r]
    add(dict(optimizer=optimizer, rate=rate, seed=seed, steps=STEPS, curve=curve, versions=header["versions"],
             commit=header["commit"]))


def seconds_per_step(rounds=10):
    """Median seconds of a step with each optimizer, in turns, in this process."""
    import torch

    from model import GPT, GPTConfig
    from train import Config, keep_memory, make_optimizer, train_step
    keep_memory()
    steps = {}
    for optimizer in RATES:
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=256, vocab_size=257, n_layer=4, n_head=4, n_embd=256, bias=False, pos="alibi"))
        steps[optimizer] = model, make_optimizer(model, Config(optimizer=optimizer, learning_rate=1e-3))
    scaler, seconds = torch.amp.GradScaler("cpu", enabled=False), {optimizer: [] for optimizer in RATES}
    rows = torch.randint(0, 257, (16, 257))
    for _ in range(rounds + 2):
        for optimizer, (model, optimizers) in steps.items():
            began = time.perf_counter()
            train_step(model, optimizers, rows, 16, nullcontext(), 1.0, scaler)
            seconds[optimizer].append(time.perf_counter() - began)
    medians = {optimizer: statistics.median(times[2:]) for optimizer, times in seconds.items()}
    add(dict(seconds=medians, threads=torch.get_num_threads(), versions=dict(torch=torch.__version__)))


def report():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    records = read(RUNS)
    runs, times = [r for r in records if "curve" in r], [r for r in records if "seconds" in r]
    ratio = times[-1]["seconds"]["muon"] / times[-1]["seconds"]["adamw"] if times else None
    if times:
        print(f"a step: {times[-1]['seconds']['adamw']:.3f} s with AdamW, {times[-1]['seconds']['muon']:.3f} s with Muon "
              f"({ratio:.2f} times), {times[-1]['threads']} threads\n")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    print(f"| optimizer | rate | seeds | val loss after {STEPS} steps | bits per byte |\n|---|---|---|---|---|")
    for optimizer, color in (("adamw", "C0"), ("muon", "C1")):
        for rate, style in zip(sorted(RATES[optimizer]), (":", "-", "--")):
            group = [r for r in runs if (r["optimizer"], r["rate"]) == (optimizer, rate)]
            if group:
                losses, bits = ([r["curve"][-1][k] for r in group] for k in (1, 2))
                spread = f" ± {statistics.stdev(losses):.3f}" if len(group) > 1 else ""
                print(f"| {optimizer} | {rate:g} | {', '.join(str(r['seed']) for r in group)} | "
                      f"{statistics.mean(losses):.4f}{spread} | {statistics.mean(bits):.4f} |")
            for i, r in enumerate(group):
                steps, _, bits = zip(*r["curve"][1:])
                label = f"{optimizer}, {rate:g}" if i == 0 else None
                axes[0].plot(steps, bits, style, color=color, label=label, lw=1)
                if ratio:
                    cost = ratio if optimizer == "muon" else 1
                    axes[1].plot([step * cost for step in steps], bits, style, color=color, lw=1)
    axes[0].set(xlabel="steps", ylabel="validation bits per byte")
    axes[1].set(xlabel="time, in steps of AdamW")
    axes[0].legend()
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(HERE / "curve.png", dpi=120)


if __name__ == "__main__":
    if "--time" in sys.argv:
        seconds_per_step()
    elif "--report" not in sys.argv:
        done = {(r["optimizer"], r["rate"], r["seed"]) for r in read(RUNS) if "curve" in r}
        for job in jobs():
            if job not in done:
                print("now", *job, flush=True)
                train(*job)
    report()
