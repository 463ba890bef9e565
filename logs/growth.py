"""What growth saves, measured: makes growth.md, growth.jsonl and growth.png beside this file.

    python prepare.py python --out data/python --tokenizer bytes
    python logs/growth.py

Every run goes through train.py and grow.py. A run that is in growth.jsonl is not made again, so
after Ctrl-C the same command goes on; it prints what is left.
"""
import contextlib
import functools
import json
import os
import sys
from pathlib import Path

import matplotlib
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import grow      # noqa: E402
import train     # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt     # noqa: E402

OUT = "out/growth"
SEEDS = (1, 2, 3)
SOURCE_STEPS, GROWN_STEPS = 600, 400
SCRATCH_STEPS = (300, 500, 800, 1200)       # each with its whole schedule
CONFIG = """
data = "data/python"
block_size = 64
batch_size = 16
eval_interval = 10000           # before the first step and after the last
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
    "depth: identity": ("depth", 1, ["--depth=identity", FRESH], True),
    "width": ("width", 1, [FRESH], True),
    "both: adjacent": ("both", 1, ["--depth=adjacent", FRESH], True),
    "both: identity": ("both", 1, ["--depth=identity", FRESH], True),
    "depth: adjacent, optimizer grown": ("depth", 1, ["--depth=adjacent"], True),
    "width, optimizer grown": ("width", 1, [], True),
    "depth: adjacent, at half": ("depth", 0.5, ["--depth=adjacent", FRESH], True),
    "depth: adjacent, at a quarter": ("depth", 0.25, ["--depth=adjacent", FRESH], True),
    "depth: adjacent, no warmup": ("depth", 1, ["--depth=adjacent", FRESH], False),
    "width, at half": ("width", 0.5, [FRESH], True),
    "depth: adjacent, optimizer grown, no warmup": ("depth", 1, ["--depth=adjacent"], False),
    "width, no warmup": ("width", 1, [FRESH], False),
    "width, optimizer grown, no warmup": ("width", 1, [], False),
    "depth: middle": ("depth", 1, ["--depth=middle", FRESH], True),
    "width, no noise": ("width", 1, [FRESH, "--noise=0"], True),
    "width, at a quarter": ("width", 0.25, [FRESH], True),
    "both: stack": ("both", 1, ["--depth=stack", FRESH], True),
    "both: adjacent, at half": ("both", 0.5, ["--depth=adjacent", FRESH], True),
}


def run(name, shape, seed, steps, schedule_steps, *words):
    """Train through train.py, unless it is done; returns [(FLOPs so far, validation loss), ...]."""
    out = f"{OUT}/{name}".replace(" ", "_")
    if last_step(out) < steps:
        train.learning_rate = functools.partial(whole_schedule, schedule_steps)
        quietly(train.main, f"{OUT}/run.py", f"--seed={seed}", f"--max_steps={steps}", f"--out_dir={out}",
                *(f"--{key}={value}" for key, value in shape.items()), *words)
    if last_step(out) < steps:
        sys.exit("stopped; the same command goes on")
    model, _ = train.load(f"{out}/run.pt")
    return [(r["tokens"] * model.flops_per_token(model.config.block_size), r["val_loss"])
            for r in map(json.loads, open(f"{out}/run.jsonl")) if "val_loss" in r]


def last_step(out):
    """How far a run has come, with its evaluation."""
    if not os.path.exists(f"{out}/run.jsonl"):
        return -1
    return max((r["step"] for r in map(json.loads, open(f"{out}/run.jsonl")) if "val_loss" in r), default=-1)


def whole_schedule(schedule_steps, step, config, _max_steps, learning_rate=train.learning_rate):
    """A run that stops early keeps the rate that the whole schedule has there."""
    return learning_rate(step, config, schedule_steps)


def quietly(main, *argv):
    with open(f"{OUT}/output.txt", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        main(list(argv))


def scratch(steps, seed):
    return dict(points=run(f"scratch-{steps}-{seed}", TARGET, seed, steps, steps))


def arm(name, seed):
    kind, share, words, warm = ARMS[name]
    steps = int(share * SOURCE_STEPS)
    source = f"{kind}-{steps}-{seed}"
    cost = run(source, SMALLER[kind], seed, steps, SOURCE_STEPS)[-1][0]
    init = f"{OUT}/{name}-{seed}-init.pt".replace(" ", "_")
    quietly(grow.main, f"{OUT}/{source}/run.pt", init, "--force", *words,
            *(f"--{key}={value}" for key, value in TARGET.items()))
    points = run(f"{name}-{seed}", TARGET, 100 + seed, GROWN_STEPS, GROWN_STEPS,
                 f"--init_from={init}", *([] if warm else ["--warmup_steps=0"]))
    return dict(points=points, source_flops=cost)


def measure():
    """{(name, seed): record} of all runs, made or read from growth.jsonl."""
    path = HERE / "growth.jsonl"
    done = {}
    if path.exists():
        done = {(r["name"], r["seed"]): r for r in map(json.loads, path.read_text().splitlines())}
    jobs = [(f"scratch, {steps} steps", seed, functools.partial(scratch, steps)) for steps in SCRATCH_STEPS
            for seed in SEEDS]
    jobs += [(name, seed, functools.partial(arm, name)) for name in ARMS for seed in SEEDS]
    os.makedirs(OUT, exist_ok=True)
    Path(f"{OUT}/run.py").write_text(CONFIG)
    left = [job for job in jobs if job[:2] not in done]
    for i, (name, seed, job) in enumerate(left):
        print(f"{len(left) - i} runs left; now {name}, seed {seed}", flush=True)
        done[name, seed] = dict(name=name, seed=seed, **job(seed))
        with open(path, "a") as f:
            f.write(json.dumps(done[name, seed]) + "\n")
        report(done)
    return done


def end_losses(done, name):
    return np.array([done[name, seed]["points"][-1][1] for seed in SEEDS if (name, seed) in done])


def mean_sd(x, form):
    return f"{x.mean():{form}} ± {x.std(ddof=1):{form.lstrip('+')}}"


def report(done):
    """Write the table and the picture of what is measured so far."""
    scratch, arms = ([name for name in names if len(end_losses(done, name)) == len(SEEDS)]
                     for names in ([f"scratch, {n} steps" for n in SCRATCH_STEPS], ARMS))
    if len(scratch) < 2:
        return
    spent = np.array([done[name, SEEDS[0]]["points"][-1][0] for name in scratch])
    reached = np.array([end_losses(done, name).mean() for name in scratch])

    def flops_from_scratch(loss):
        """What training from scratch takes to end at this loss: log FLOPs interpolated; nan outside the range."""
        return np.exp(np.interp(loss, reached[::-1], np.log(spent[::-1]), left=np.nan, right=np.nan))

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
    path = HERE / "growth.md"
    head, _, tail = (path.read_text() if path.exists() else f"# Growth\n\n{START}\n{END}\n").partition(START)
    path.write_text(f"{head}{START}\n" + "\n".join(lines) + f"\n{END}{tail.partition(END)[2]}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    left.plot(spent, reached, "ko-", label="from scratch, each with its whole schedule")
    for kind, marker in (("depth", "^"), ("width", "s"), ("both", "D")):
        names = [name for name in arms if ARMS[name][0] == kind]
        for counted, fill, words in ((0, "full", "source not counted"), (1, "none", "source counted")):
            records = [done[name, SEEDS[0]] for name in names]      # the cost is that of any seed
            left.plot([r["points"][-1][0] + counted * r["source_flops"] for r in records],
                      [end_losses(done, name).mean() for name in names], marker, color=f"C{counted}",
                      fillstyle=fill, ms=6, label=f"{kind} grown, {words}")
    left.set(xscale="log", xlabel="training FLOPs", ylabel="validation loss at the end, nats per byte")
    left.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    y = np.arange(len(arms))[::-1]
    for counted, words in enumerate(("source not counted", "source counted")):
        values = [saved[name][counted] for name in arms]
        right.barh(y + 0.2 - 0.4 * counted, [v.mean() for v in values], 0.38, xerr=[v.std(ddof=1) for v in values],
                   color=("C0", "C1")[counted], label=words)
    right.axvline(40, color="k", lw=0.8, ls=":")
    right.set(yticks=y, yticklabels=arms, xlabel="% of compute saved at equal validation loss")
    figure.legend(*right.get_legend_handles_labels(), fontsize=8, loc="outside lower right", ncols=2)
    figure.savefig(HERE / "growth.png", dpi=120)
    plt.close(figure)


START, END = "<!-- written by growth.py -->", "<!-- to here -->"

if __name__ == "__main__":
    report(measure())
