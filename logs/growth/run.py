"""What growth saves.

    python prepare.py python --out data/python --tokenizer bytes
    python logs/growth/run.py

Every run goes through train.py and grow.py.
"""
import contextlib
import functools
import os
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study                # noqa: E402

import grow                 # noqa: E402
import train                # noqa: E402
from model import load      # noqa: E402

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

ARMS = {        # name: (what grows, share of the source's schedule done, words for grow.py, warm up again?)
    "depth: identity": ("depth", 1, ["--depth=identity"], True),
    "depth: adjacent": ("depth", 1, ["--depth=adjacent"], True),
    "depth: stack": ("depth", 1, ["--depth=stack"], True),
    "depth: adjacent, no warmup": ("depth", 1, ["--depth=adjacent"], False),
    "depth: adjacent, at half": ("depth", 0.5, ["--depth=adjacent"], True),
    "depth: adjacent, at a quarter": ("depth", 0.25, ["--depth=adjacent"], True),
    "width": ("width", 1, [], True),
    "width, no noise": ("width", 1, ["--noise=0"], True),
    "width, noise 0.5": ("width", 1, ["--noise=0.5"], True),
    "width, noise 4": ("width", 1, ["--noise=4"], True),
    "width, noise 16": ("width", 1, ["--noise=16"], True),
    "width, at half": ("width", 0.5, [], True),
    "both: identity": ("both", 1, ["--depth=identity"], True),
    "both: adjacent": ("both", 1, ["--depth=adjacent"], True),
}
GONE = ("depth: middle", "depth: adjacent, optimizer grown", "depth: adjacent, optimizer grown, no warmup",
        "width, optimizer grown")           # measured before grow.py lost these two options
CURVES = ("depth: identity", "width", "both: identity")     # those drawn whole


def run(name, shape, seed, steps, schedule_steps, *words):
    """Train through train.py, unless it is done; returns [(FLOPs so far, validation loss), ...], and what it ran on."""
    out = f"{OUT}/{name}".replace(" ", "_")
    if last_step(out) < steps:
        train.learning_rate = functools.partial(whole_schedule, schedule_steps)
        quietly(train.start, f"{OUT}/run.py", f"--seed={seed}", f"--max_steps={steps}", f"--out_dir={out}",
                *(f"--{key}={value}" for key, value in shape.items()), *words)
    if last_step(out) < steps:
        sys.exit("stopped; the same command goes on")
    model, _ = load(f"{out}/run.pt")
    header, *records = study.read(f"{out}/run.jsonl")
    flops_per_token = model.flops_per_token(model.config.block_size)
    points = [(r["tokens"] * flops_per_token, r["val_loss"]) for r in records if "val_loss" in r]
    return points, {key: header[key] for key in ("device", "versions", "commit")}


def last_step(out):
    """The step of a run's last evaluation; -1: none."""
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


def jobs(*_):
    os.makedirs(OUT, exist_ok=True)
    Path(f"{OUT}/run.py").write_text(CONFIG)
    makers = {f"scratch, {steps} steps": functools.partial(scratch, steps) for steps in SCRATCH_STEPS}
    makers |= {name: functools.partial(arm, name) for name in ARMS}
    return {f"{name}, seed {seed}": functools.partial(makers[name], seed) for name in makers for seed in SEEDS}


SCRATCH = [f"scratch, {n} steps" for n in SCRATCH_STEPS]


def seeds(done, name):
    return [done[f"{name}, seed {seed}"] for seed in SEEDS]


def mean_points(done, name, key="points"):
    """(FLOPs, validation loss), the mean over the seeds."""
    return np.mean([record[key] for record in seeds(done, name)], axis=0).T


def scratch_ends(done):
    """(FLOPs, validation loss) at the ends of the scratch runs, the mean over the seeds."""
    return np.mean([[record["points"][-1] for record in seeds(done, name)] for name in SCRATCH], axis=1).T


def end_losses(done, name):
    return np.array([record["points"][-1][1] for record in seeds(done, name)])


def flops_from_scratch(done, loss):
    """The least that training from scratch takes to this loss: at the end of a run, or on the way of the longest.

    log FLOPs are interpolated; nan outside the range.
    """
    found = [np.interp(loss, losses[::-1], np.log(flops[::-1]), left=np.nan, right=np.nan)
             for flops, losses in (scratch_ends(done), mean_points(done, SCRATCH[-1])[:, 1:])]
    return np.exp(np.nanmin(found, axis=0))


def saved(done, name):
    """% of compute saved, for each seed: (source not counted, source counted)."""
    cost = np.array([record["points"][-1][0] for record in seeds(done, name)])
    source = np.array([record["source_flops"] for record in seeds(done, name)])
    needed = flops_from_scratch(done, end_losses(done, name))
    return 100 * (1 - cost / needed), 100 * (1 - (cost + source) / needed)


def mean_sd(x, form):
    return f"{x.mean():{form}} ± {x.std(ddof=1):{form.lstrip('+')}}"


def tables(done):
    rows = [(name, "", mean_sd(end_losses(done, name), ".3f"), "", "") for name in SCRATCH]
    for name in (*ARMS, *GONE):
        start = np.mean([record["points"][0][1] for record in seeds(done, name)])
        rows.append((name + " (gone)" * (name in GONE), f"{start:.3f}", mean_sd(end_losses(done, name), ".3f"),
                     *(f"{mean_sd(x, '+.0f')}%" for x in saved(done, name))))
    columns = ("run", "val loss just after growing", "at the end", "saved, source not counted",
               "saved, source counted")
    return f"{study.table(columns, rows)}\n\nThe runs in width, and those with a curve: {study.provenance(done)}"


def draw(done):
    figure, (left, right) = study.pyplot().subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    left.plot(*mean_points(done, SCRATCH[-1]), "k-", label=f"from scratch, {SCRATCH_STEPS[-1]} steps")
    left.plot(*scratch_ends(done), "ko", label="from scratch, at the ends of shorter schedules")
    for i, name in enumerate(CURVES):
        source, grown = mean_points(done, name, "source_points"), mean_points(done, name)
        left.plot(*source, "--", color=f"C{i}", lw=1)
        left.plot(grown[0] + source[0][-1], grown[1], color=f"C{i}", label=f"{name}: the source (dashed), then grown")
    left.set(xlabel="training FLOPs, the source's counted", ylabel="validation loss, nats per byte", ylim=(1.65, 3.2))
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    y = np.arange(len(ARMS))[::-1]
    for counted, words in enumerate(("source not counted", "source counted")):
        values = [saved(done, name)[counted] for name in ARMS]
        right.barh(y + 0.2 - 0.4 * counted, [v.mean() for v in values], 0.38, xerr=[v.std(ddof=1) for v in values],
                   color=f"C{counted}", label=words)
    right.axvline(40, color="k", lw=0.8, ls=":")
    right.set(yticks=y, yticklabels=ARMS, xlabel="% of compute saved at equal validation loss")
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside lower right", ncols=2)
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
