"""Muon beside AdamW on the quickstart's data, with the width it had then, 256.

    python prepare.py python --out data/python --tokenizer bytes
    python logs/muon/run.py
"""
import math
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study        # noqa: E402

OUT, STEPS = "out/muon", 180
RATES = {"muon": (6e-3, 3e-3, 1.2e-2), "adamw": (2e-3, 1e-3, 4e-3)}
SEED, MORE_SEEDS = 1337, (1, 2)             # the rates are chosen by the first, the best one then gets the others


def train(optimizer, rate, seed):
    out = Path(f"{OUT}/{optimizer}-{rate:g}-{seed}")
    record = study.train("configs/quickstart.py", out, f"--optimizer={optimizer}", f"--learning_rate={rate}",
                         "--n_embd=256", "--n_head=4", "--schedule=cosine", f"--min_lr={rate / 10:g}",
                         f"--max_steps={STEPS}", f"--seed={seed}", "--dtype=float32", "--eval_interval=30",
                         "--save_interval=30")
    log = study.read(out / "quickstart.jsonl")
    curve = [(r["step"], r["val_loss"], r["bits_per_byte"]) for r in log if "val_loss" in r]
    return dict(optimizer=optimizer, rate=rate, seed=seed, steps=STEPS, curve=curve, **record)


def seconds_per_step(rounds=8):
    """Median processor seconds of a step with each optimizer, in turns, on one thread: the same on a busy machine."""
    import torch

    from model import GPT, GPTConfig
    from train import Config, keep_memory, make_optimizer, train_step
    keep_memory()
    torch.set_num_threads(1)
    steps, seconds, scaler = {}, {}, torch.amp.GradScaler("cpu", enabled=False)
    for optimizer in RATES:
        model = GPT(GPTConfig(block_size=256, vocab_size=257, n_layer=4, n_head=4, n_embd=256, bias=False, pos="alibi"))
        steps[optimizer], seconds[optimizer] = (model, make_optimizer(model, Config(optimizer=optimizer))), []
    rows = torch.randint(0, 257, (16, 257))
    for _ in range(rounds + 2):
        for optimizer, (model, optimizers) in steps.items():
            began = time.process_time()
            train_step(model, optimizers, rows, 16, nullcontext(), 1.0, scaler)
            seconds[optimizer].append(time.process_time() - began)
    medians = {optimizer: statistics.median(times[2:]) for optimizer, times in seconds.items()}
    return dict(step_seconds=medians, versions=dict(torch=torch.__version__))


def name(optimizer, rate, seed):
    return f"{optimizer}, {rate:g}, seed {seed}, {STEPS} steps"


def best_rate(done, optimizer):
    """The rate whose run ended lowest, of those that have been run."""
    return min(RATES[optimizer], key=lambda rate: done[name(optimizer, rate, SEED)]["curve"][-1][1]
               if name(optimizer, rate, SEED) in done else math.inf)


def jobs(_, done):
    runs = [(optimizer, rate, SEED) for rates in zip(*RATES.values()) for optimizer, rate in zip(RATES, rates)]
    runs += [(optimizer, best_rate(done, optimizer), seed) for seed in MORE_SEEDS for optimizer in RATES]
    return {name(*run): partial(train, *run) for run in runs} | {"seconds of a step": seconds_per_step}


def best_runs(done, optimizer):
    """Those of all seeds at the best rate: (steps (n,), bits per byte (seeds, n))."""
    runs = [name(optimizer, best_rate(done, optimizer), seed) for seed in (SEED, *MORE_SEEDS)]
    curves = np.array([done[run]["curve"] for run in runs if run in done])          # (seeds, n, 3)
    return curves[0, :, 0], curves[:, :, 2]


def tables(done):
    text = []
    for steps in sorted({r["steps"] for r in done.values() if "curve" in r}):
        records = [r for r in done.values() if r.get("steps") == steps]
        columns = [f"{step} steps" for step, _, _ in records[0]["curve"][1:]]
        rows = [(r["optimizer"], f"{r['rate']:g}", r["seed"], *(f"{bits:.3f}" for _, _, bits in r["curve"][1:]))
                for r in sorted(records, key=lambda r: (r["optimizer"], r["rate"]))]
        text.append(study.table(("optimizer", "rate", "seed", *columns), rows))
    if timed := done.get("seconds of a step"):
        text.append(at_equal_seconds(done, timed["step_seconds"]))
    return "\n\n".join((*text, study.missing(jobs(None, done), done), study.provenance(done)))


def at_equal_seconds(done, seconds):
    """Muon's loss where it has taken as long as AdamW's whole run, its own rate not yet down; by interpolation."""
    (_, adamw), (steps, muon) = (best_runs(done, optimizer) for optimizer in ("adamw", "muon"))
    reached = STEPS * seconds["adamw"] / seconds["muon"]
    then = np.array([np.interp(reached, steps, bits) for bits in muon])
    passed = np.array([np.interp(-adamw[:, -1].mean(), -bits, steps) for bits in muon])     # falling, so - rises
    rows = [(f"{optimizer}, {best_rate(done, optimizer):g}", STEPS, f"{STEPS * seconds[optimizer]:.0f}",
             study.spread(bits[:, -1])) for optimizer, bits in (("adamw", adamw), ("muon", muon))]
    rows += [("muon, in adamw's time", f"{reached:.0f}", f"{STEPS * seconds['adamw']:.0f}", study.spread(then)),
            ("muon, at adamw's end", study.spread(passed, ".0f"), f"{passed.mean() * seconds['muon']:.0f}",
             f"{adamw[:, -1].mean():.3f}")]
    each = ", ".join(f"{s:.3f} processor seconds with {optimizer}" for optimizer, s in seconds.items())
    return (f"A step, both optimizers in turns in one process: {each}. At the best rates, mean ± standard "
            f"deviation:\n\n{study.table(('optimizer', 'steps', 'seconds', 'bits per byte'), rows)}")


def draw(done):
    figure, axes = study.pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for record in (r for r in done.values() if "curve" in r):
        steps, _, bits = zip(*record["curve"][1:])
        best = record["rate"] == best_rate(done, record["optimizer"])
        axes.plot(steps, bits, "-" if best else ":", lw=1, color="C0" if record["optimizer"] == "muon" else "C1",
                  label=record["name"])
    axes.set(xlabel="steps of 4,096 tokens", ylabel="validation bits per byte", title="dotted: not the best rate")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
