"""What growth saves, measured: makes growth.md, growth.jsonl and growth.png beside this file.

    python prepare.py python --out data/python --tokenizer bytes
    python logs/growth.py

Every run goes through train.py and grow.py. A run that is in growth.jsonl is not made again, so
after Ctrl-C the same command goes on; it prints what is left.
"""
import contextlib
import functools
import os
import sys
import time
from pathlib import Path

import numpy as np
import study
from study import HERE

import grow
import train

OUT = "out/growth"
SEEDS = (1, 2, 3)
SOURCE_STEPS, GROWN_STEPS = 600, 400
SCRATCH_STEPS = (300, 500, 800, 1200)       # each with its whole schedule
CONFIG = """
data = "data/python"
block_size = 64
batch_size = 16
eval_interval = 50              # for the curves; of other runs the first and the last loss count
eval_tokens = 2**15
save_interval = 10000
log_interval = 100
learning_rate = 4e-3
min_lr = 4e-4
warmup_steps = 40
dtype = "float32"
bias = False
pos = "alibi"
"""
TARGET = dict(n_layer=6, n_head=4, n_embd=64)
SMALLER = {"depth": dict(TARGET, n_layer=3), "width": dict(TARGET, n_head=2, n_embd=32),
           "both": dict(n_layer=3, n_head=2, n_embd=32)}

# arm: (what grows, share of the source's schedule done, words for grow.py, warm up again?)
FRESH = "--fresh_optimizer"
ARMS = {
    "depth: adjacent": ("depth", 1, ["--depth=adjacent", FRESH], True),
    "depth: stack": ("depth", 1, ["--depth=stack", FRESH], True),
    "depth: middle": ("depth", 1, ["--depth=middle", FRESH], True),
    "depth: identity": ("depth", 1, ["--depth=identity", FRESH], True),
    "depth: adjacent, optimizer grown": ("depth", 1, ["--depth=adjacent"], True),
    "depth: adjacent, no warmup": ("depth", 1, ["--depth=adjacent", FRESH], False),
    "depth: adjacent, optimizer grown, no warmup": ("depth", 1, ["--depth=adjacent"], False),
    "depth: adjacent, at half": ("depth", 0.5, ["--depth=adjacent", FRESH], True),
    "depth: adjacent, at a quarter": ("depth", 0.25, ["--depth=adjacent", FRESH], True),
    "width": ("width", 1, [FRESH], True),
    "width, noise 4": ("width", 1, [FRESH, "--noise=4"], True),
    "width, noise 0.5": ("width", 1, [FRESH, "--noise=0.5"], True),
    "both: identity": ("both", 1, ["--depth=identity", FRESH], True),
    "width, optimizer grown": ("width", 1, [], True),
    "width, at half": ("width", 0.5, [FRESH], True),
    "both: adjacent": ("both", 1, ["--depth=adjacent", FRESH], True),
    "width, noise 16": ("width", 1, [FRESH, "--noise=16"], True),
    "width, no noise": ("width", 1, [FRESH, "--noise=0"], True),
}
CURVES = ("depth: identity", "width", "both: identity")     # those drawn whole


def run(name, shape, seed, steps, schedule_steps, *words):
    """Train through train.py, unless it is done; returns [(FLOPs so far, validation loss), ...], and what it ran on."""
    out = f"{OUT}/{name}".replace(" ", "_")
    if last_step(out) < steps:
        train.learning_rate = functools.partial(whole_schedule, schedule_steps)
        quietly(train.main, f"{OUT}/run.py", f"--seed={seed}", f"--max_steps={steps}", f"--out_dir={out}",
                *(f"--{key}={value}" for key, value in shape.items()), *words)
    if last_step(out) < steps:
        sys.exit("stopped; the same command goes on")
    model, _ = train.load(f"{out}/run.pt")
    header, *records = study.read(f"{out}/run.jsonl")
    points = [(r["tokens"] * model.flops_per_token(model.config.block_size), r["val_loss"]) for r in records
              if "val_loss" in r]
    return points, {key: header[key] for key in ("device", "versions", "commit")}


def last_step(out):
    """How far a run has come, with its evaluation."""
    return max((r["step"] for r in study.read(f"{out}/run.jsonl") if "val_loss" in r), default=-1)


def whole_schedule(schedule_steps, step, config, _max_steps, learning_rate=train.learning_rate):
    """A run that stops early keeps the rate that the whole schedule has there."""
    return learning_rate(step, config, schedule_steps)


def quietly(main, *argv):
    with open(f"{OUT}/output.txt", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        main(list(argv))


def scratch(steps, seed):
    began = time.time()
    points, machine = run(f"scratch-{steps}-{seed}", TARGET, seed, steps, steps)
    return dict(points=points, seconds=round(time.time() - began), **machine)


def arm(name, seed):
    began = time.time()
    kind, share, words, warm = ARMS[name]
    steps = int(share * SOURCE_STEPS)
    source = f"{kind}-{steps}-{seed}"
    source_points, _ = run(source, SMALLER[kind], seed, steps, SOURCE_STEPS)
    init = f"{OUT}/{name}-{seed}-init.pt".replace(" ", "_")
    quietly(grow.main, f"{OUT}/{source}/run.pt", init, "--force", *words,
            *(f"--{key}={value}" for key, value in TARGET.items()))
    points, machine = run(f"{name}-{seed}", TARGET, 100 + seed, GROWN_STEPS, GROWN_STEPS,
                          f"--init_from={init}", *([] if warm else ["--warmup_steps=0"]),
                          *([] if name in CURVES else ["--eval_interval=10000"]))
    return dict(points=points, source_points=source_points, source_flops=source_points[-1][0],
                seconds=round(time.time() - began), **machine)


def measure():
    """{(name, seed): record} of all runs, made or read from growth.jsonl."""
    os.makedirs(OUT, exist_ok=True)
    Path(f"{OUT}/run.py").write_text(CONFIG)
    makers = {f"scratch, {steps} steps": functools.partial(scratch, steps) for steps in SCRATCH_STEPS}
    makers |= {name: functools.partial(arm, name) for name in ARMS}
    keys = {f"{name}, seed {seed}": (name, seed) for name in makers for seed in SEEDS}
    jobs = {key: functools.partial(makers[name], seed) for key, (name, seed) in keys.items()}
    return {keys[key]: record for key, record in study.measure(HERE / "growth.jsonl", jobs).items()}


def end_losses(done, name):
    return np.array([done[name, seed]["points"][-1][1] for seed in SEEDS])


def mean_sd(x, form):
    return f"{x.mean():{form}} ± {x.std(ddof=1):{form.lstrip('+')}}"


def report(done):
    """Write the table and the picture."""
    scratch, arms = [f"scratch, {n} steps" for n in SCRATCH_STEPS], list(ARMS)
    spent = np.array([done[name, SEEDS[0]]["points"][-1][0] for name in scratch])
    reached = np.array([end_losses(done, name).mean() for name in scratch])
    curve = mean_points(done, scratch[-1], "points")[:, 1:]     # of the longest run, on its way

    def flops_from_scratch(loss):
        """The least that training from scratch takes to this loss, by the end of a run or on the way of the longest:
        log FLOPs interpolated; nan outside the range."""
        return np.exp(np.nanmin([np.interp(loss, losses[::-1], np.log(flops[::-1]), left=np.nan, right=np.nan)
                                 for flops, losses in ((spent, reached), curve)], axis=0))

    lines = ["| run | val loss just after growing | at the end | saved, source not counted | saved, source counted |",
             "|---|---|---|---|---|"]
    lines += [f"| {name} | | {mean_sd(end_losses(done, name), '.3f')} | | |" for name in scratch]
    saved = {}
    for name in arms:
        records = [done[name, seed] for seed in SEEDS]
        start = np.mean([r["points"][0][1] for r in records])
        cost = np.array([r["points"][-1][0] for r in records])
        source = np.array([r["source_flops"] for r in records])
        needed = flops_from_scratch(end_losses(done, name))
        saved[name] = [100 * (1 - flops / needed) for flops in (cost, cost + source)]
        lines.append(f"| {name} | {start:.3f} | {mean_sd(end_losses(done, name), '.3f')} | "
                     f"{mean_sd(saved[name][0], '+.0f')}% | {mean_sd(saved[name][1], '+.0f')}% |")
    study.fill(HERE / "growth.md", "\n".join(lines) + "\n\nThe runs with width, and those with a curve: "
               + study.provenance(record for record in done.values() if "commit" in record))

    figure, (left, right) = study.pyplot().subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    left.plot(*mean_points(done, scratch[-1], "points"), "k-", label=f"from scratch, {SCRATCH_STEPS[-1]} steps")
    left.plot(spent, reached, "ko", label="from scratch, at the ends of shorter schedules")
    for i, name in enumerate(CURVES):
        source, grown = (mean_points(done, name, key) for key in ("source_points", "points"))
        left.plot(*source, "--", color=f"C{i}", lw=1)
        left.plot(grown[0] + source[0][-1], grown[1], color=f"C{i}", label=f"{name}: the source (dashed), then grown")
    left.set(xlabel="training FLOPs, the source's counted", ylabel="validation loss, nats per byte", ylim=(1.65, 3.2))
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    y = np.arange(len(arms))[::-1]
    for counted, words in enumerate(("source not counted", "source counted")):
        values = [saved[name][counted] for name in arms]
        right.barh(y + 0.2 - 0.4 * counted, [v.mean() for v in values], 0.38, xerr=[v.std(ddof=1) for v in values],
                   color=("C0", "C1")[counted], label=words)
    right.axvline(40, color="k", lw=0.8, ls=":")
    right.set(yticks=y, yticklabels=arms, xlabel="% of compute saved at equal validation loss")
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside lower right", ncols=2)
    figure.savefig(HERE / "growth.png", dpi=110)


def mean_points(done, name, key):
    """(FLOPs, validation loss), the mean over the seeds."""
    return np.mean([done[name, seed][key] for seed in SEEDS], axis=0).T


if __name__ == "__main__":
    report(measure())
