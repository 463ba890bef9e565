"""Muon beside AdamW at the quickstart's shape.

    python prepare.py python --out data/python --tokenizer bytes
    python logs/muon/run.py
"""
import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study        # noqa: E402

OUT, STEPS = "out/muon", 360
RATES = {"muon": (6e-3, 3e-3, 1.2e-2), "adamw": (2e-3, 1e-3, 4e-3)}         # the likeliest first
SEEDS = (1337, 1, 2)


def train(optimizer, rate, seed):
    out = Path(f"{OUT}/{optimizer}-{rate:g}-{seed}")
    words = [f"--optimizer={optimizer}", f"--learning_rate={rate}", f"--min_lr={rate / 10}", f"--max_steps={STEPS}",
             f"--seed={seed}", f"--out_dir={out}", "--dtype=float32", "--eval_interval=60", "--save_interval=30"]
    study.run("train.py", "configs/quickstart.py", *words)
    header, *log = study.read(out / "quickstart.jsonl")
    if log[-1]["step"] < STEPS or "val_loss" not in log[-1]:
        sys.exit("stopped; the same command goes on")
    curve = [(r["step"], r["val_loss"], r["bits_per_byte"]) for r in log if "val_loss" in r]
    speed = statistics.median(r["tokens_per_second"] for r in log if "loss" in r)
    return dict(optimizer=optimizer, rate=rate, seed=seed, steps=STEPS, curve=curve, tokens_per_second=speed,
                **{key: header[key] for key in ("device", "versions", "commit")})


def seconds_per_step(rounds=10):
    """Median seconds of a step with each optimizer, in turns, in this process."""
    import torch

    from model import GPT, GPTConfig
    from train import Config, keep_memory, make_optimizer, train_step
    keep_memory()
    steps, seconds, scaler = {}, {}, torch.amp.GradScaler("cpu", enabled=False)
    for optimizer in RATES:
        model = GPT(GPTConfig(block_size=256, vocab_size=257, n_layer=4, n_head=4, n_embd=256, bias=False, pos="alibi"))
        steps[optimizer], seconds[optimizer] = (model, make_optimizer(model, Config(optimizer=optimizer))), []
    rows = torch.randint(0, 257, (16, 257))
    for _ in range(rounds + 2):
        for optimizer, (model, optimizers) in steps.items():
            began = time.perf_counter()
            train_step(model, optimizers, rows, 16, nullcontext(), 1.0, scaler)
            seconds[optimizer].append(time.perf_counter() - began)
    medians = {optimizer: statistics.median(times[2:]) for optimizer, times in seconds.items()}
    return dict(seconds=medians, threads=torch.get_num_threads(), versions=dict(torch=torch.__version__))


def jobs(_):
    runs = {f"{optimizer}, {rate:g}, seed {seed}": partial(train, optimizer, rate, seed)
            for seed in SEEDS for rates in zip(*RATES.values()) for optimizer, rate in zip(RATES, rates)}
    return runs | {"seconds of a step": seconds_per_step}


def tables(done):
    rows = [(r["optimizer"], f"{r['rate']:g}", r["seed"], *(f"{bits:.3f}" for _, _, bits in r["curve"][1:]),
             f"{r['tokens_per_second']:,.0f}") for r in done.values() if "curve" in r]
    after = [f"{step} steps" for step in range(60, STEPS + 1, 60)]
    text = study.table(("optimizer", "rate", "seed", *after, "median tokens/s"), rows)
    if timed := done.get("seconds of a step"):
        text += "\n\nA step, both optimizers in turns in one process: " + ", ".join(
            f"{seconds:.3f} s with {optimizer}" for optimizer, seconds in timed["seconds"].items()) + "."
    return text


def draw(done):
    figure, axes = study.pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for record in done.values():
        if "curve" in record:
            steps, _, bits = zip(*record["curve"][1:])
            axes.plot(steps, bits, "o-", ms=3, color="C0" if record["optimizer"] == "muon" else "C1",
                      label=record["name"])
    axes.set(xlabel="steps of 4,096 tokens", ylabel="validation bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
