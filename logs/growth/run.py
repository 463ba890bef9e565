"""What growth saves: a small model is trained, grown, and trained on, beside the large one from scratch.

    python prepare.py BOOKS shakespeare --out data/english --tokenizer bytes
    python prepare.py python --out data/python --tokenizer bytes
    python logs/growth/run.py

BOOKS: see logs/context-length/run.py. The runs of the 0.3M model are of an earlier version of this script.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study        # noqa: E402

OUT = Path("out/growth")
CONFIG = """
data = {"data/english": 0.8, "data/python": 0.2}
block_size = 256
batch_size = 16
eval_interval = 200
eval_tokens = 2**16
save_interval = 100
warmup_steps = 100
beta2 = 0.99
dtype = "float32"
bias = False
pos = "alibi"
"""
TARGET = dict(n_layer=4, n_head=2, n_embd=112)
N = 630_000                     # its parameters; lengths are given in bytes for each of them
SMALLER = {"depth": dict(TARGET, n_layer=2), "width": dict(TARGET, n_head=1, n_embd=56),
           "both": dict(n_layer=2, n_head=1, n_embd=56)}
RATES = {"adamw": (4e-3, 2e-3, 8e-3), "muon": (6e-3,)}          # AdamW's by runs of TUNING; Muon's: logs/muon
TUNING, SOURCE, GROWN = 2.5, 10, 10
SCRATCH = (10, 20, 30)
ARMS = {"depth: identity": ("depth", "identity"), "depth: adjacent": ("depth", "adjacent"),
        "depth: stack": ("depth", "stack"), "width": ("width", "identity"), "both: identity": ("both", "identity")}
MORE = ("depth: identity", "width")             # with a second seed

OLD_SCRATCH = [f"scratch, {steps} steps" for steps in (300, 500, 800, 1200)]
# title: (names of the scratch runs, shortest first; names of the grown runs, or None: all that there are)
GROUPS = {"0.6M, AdamW": ([f"adamw, scratch, {n}" for n in SCRATCH], [f"adamw, {arm}" for arm in ARMS]),
          "0.6M, Muon": ([f"muon, scratch, {n}" for n in SCRATCH], [f"muon, {arm}" for arm in ARMS]),
          "0.3M, AdamW": (OLD_SCRATCH, None)}


def train(optimizer, rate, shape, n_bytes, seed, out, *words):
    """A record with points: (FLOPs, validation loss) of each evaluation."""
    from model import load      # here: torch is slow to import
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "run.py").write_text(CONFIG)
    record = study.train(OUT / "run.py", OUT / out, f"--optimizer={optimizer}", f"--learning_rate={rate:g}",
                         f"--min_lr={rate / 10:g}", f"--max_tokens={n_bytes * N:.0f}", f"--seed={seed}",
                         *(f"--{key}={value}" for key, value in shape.items()), *words)
    model = load(OUT / out / "run.pt")[0]
    flops = model.flops_per_token(model.config.block_size)
    return dict(record, points=[(tokens * flops, loss) for tokens, loss in record["val_loss"]])


def grow(optimizer, rate, arm, seed):
    kind, depth = ARMS[arm]
    source = study.records(Path(__file__).parent)[f"{optimizer}, source {kind}, seed {seed}"]
    out = f"{optimizer}-{arm}-{seed}".replace(": ", "-")
    init = OUT / f"{out}-init.pt"
    study.run("grow.py", OUT / f"{optimizer}-source-{kind}-{seed}/run.pt", init, "--force", f"--depth={depth}",
              *(f"--{key}={value}" for key, value in TARGET.items()))
    record = train(optimizer, rate, TARGET, GROWN, 100 + seed, out, f"--init_from={init}")
    return dict(record, source_points=source["points"], source_flops=source["points"][-1][0])


def best_rate(done, optimizer):
    ends = {rate: done[name]["points"][-1][1] for rate in RATES[optimizer]
            if (name := f"{optimizer}, rate {rate:g}") in done}
    return min(ends, key=ends.get, default=RATES[optimizer][0])


def jobs(_, done):
    """In the order of what they tell; sources come before what is grown from them."""
    found = {f"adamw, rate {rate:g}": partial(train, "adamw", rate, TARGET, TUNING, 1, f"rate-{rate:g}")
             for rate in RATES["adamw"]}

    def scratch(optimizer, n, seed):
        found[f"{optimizer}, scratch, {n}, seed {seed}"] = partial(
            train, optimizer, best_rate(done, optimizer), TARGET, n, seed, f"{optimizer}-scratch-{n}-{seed}")

    def arm(optimizer, name, seed):
        rate, kind = best_rate(done, optimizer), ARMS[name][0]
        found[f"{optimizer}, source {kind}, seed {seed}"] = partial(
            train, optimizer, rate, SMALLER[kind], SOURCE, seed, f"{optimizer}-source-{kind}-{seed}")
        found[f"{optimizer}, {name}, seed {seed}"] = partial(grow, optimizer, rate, name, seed)

    scratch("adamw", 10, 1)
    for name in ARMS:
        arm("adamw", name, 1)
    scratch("adamw", 20, 1)
    scratch("muon", 10, 1)
    arm("muon", "depth: identity", 1)
    scratch("muon", 20, 1)
    scratch("adamw", 30, 1)
    for n in SCRATCH[:2]:
        scratch("adamw", n, 2)
    for name in MORE:
        arm("adamw", name, 2)
    return found


def seeds(done, name):
    return [record for key, record in done.items() if key.partition(", seed ")[0] == name]


def mean_points(done, name, key="points"):
    """(FLOPs (n,), validation loss (n,)), the mean over the seeds."""
    return np.mean([record[key] for record in seeds(done, name)], axis=0).T


def scratch_curves(done, scratch):
    """[(FLOPs, validation loss)]: at the ends of the runs from scratch, and on the way of the longest."""
    there = [name for name in scratch if seeds(done, name)]
    ends = [np.mean([r["points"][-1] for r in seeds(done, name)], axis=0) for name in there]
    return [np.array(ends).reshape(-1, 2).T] + [mean_points(done, name)[:, 1:] for name in there[-1:]]


def flops_from_scratch(done, scratch, loss):
    """The least FLOPs, log-interpolated, in which a run from scratch has each loss (n,); nan outside the range."""
    found = [np.interp(loss, losses[::-1], np.log(flops[::-1]), left=np.nan, right=np.nan)
             for flops, losses in scratch_curves(done, scratch) if len(losses)]
    return np.exp(np.fmin.reduce(found)) if found else np.full(len(loss), np.nan)


def saved(done, scratch, name):
    """% of compute saved, for each seed: (source not counted, source counted)."""
    ends = np.array([record["points"][-1] for record in seeds(done, name)])
    source = np.array([record["source_flops"] for record in seeds(done, name)])
    needed = flops_from_scratch(done, scratch, ends[:, 1])
    return 100 * (1 - ends[:, 0] / needed), 100 * (1 - (ends[:, 0] + source) / needed)


def grown(done, group):
    """The names of a group's grown runs that are there."""
    names = dict.fromkeys(key.partition(", seed ")[0] for key, record in done.items() if "source_flops" in record)
    chosen = GROUPS[group][1]
    return sorted(name for name in names if (name in chosen if chosen else not name.startswith(tuple(RATES))))


def percent(x):
    return "beyond the runs from scratch" if np.isnan(x).any() else study.spread(x, "+.0f") + "%"


def tables(done):
    text = []
    for group, (scratch, _) in GROUPS.items():
        rows = []
        for name in (name for name in (*scratch, *grown(done, group)) if seeds(done, name)):
            starts, ends = (np.array([r["points"][i][1] for r in seeds(done, name)]) for i in (0, -1))
            gains = ("", "") if name in scratch else map(percent, saved(done, scratch, name))
            start = "" if name in scratch else f"{starts.mean():.3f}"
            rows.append((name, len(ends), start, study.spread(ends), *gains))
        columns = ("run", "seeds", "val loss just after growing", "at the end", "saved, source not counted",
                   "saved, source counted")
        text += [f"{group}:", study.table(columns, rows)] if rows else []
    rates = ", ".join(f"{rate:g} {done[key]['points'][-1][1]:.3f}" for rate in RATES["adamw"]
                      if (key := f"adamw, rate {rate:g}") in done)
    text += [f"AdamW's rates, at the end of {TUNING} bytes per parameter: {rates}."] if rates else []
    return "\n\n".join((*text, study.missing(jobs(None, done), done), study.provenance(done)))


def draw(done):
    groups = [group for group in GROUPS if grown(done, group)]
    figure, panels = study.pyplot().subplots(1, len(groups), figsize=(7 * len(groups), 5), layout="constrained")
    for group, panel in zip(groups, np.atleast_1d(panels)):
        ends, *longest = scratch_curves(done, GROUPS[group][0])
        panel.plot(*ends, "ko", label="from scratch, at the end of each schedule")
        for curve in longest:
            panel.plot(*curve, "k-", lw=1, label="from scratch, the longest")
        for i, name in enumerate(name for name in grown(done, group) if len(seeds(done, name)[0]["points"]) > 2):
            flops, losses = mean_points(done, name)
            panel.plot(flops + seeds(done, name)[0]["source_flops"], losses, color=f"C{i % 10}", lw=1, label=name)
        panel.set(title=group, xlabel="training FLOPs, the source's counted", ylabel="validation loss, nats per byte",
                  xscale="log", ylim=(ends[1].min() - 0.1, ends[1].max() + 0.6))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
