"""The recipes of 580M, 760M and 1.1B at a tenth of their width: the same configs, depths and commands.

    python prepare.py "$(python -c 'import site; print(site.getsitepackages()[0])')/**/*.py" \\
        --out data/corpus --decontaminate=lambada,piqa,hellaswag,wikitext2
    python logs/1.1B/run.py [--eval_data DIR]
"""
import json
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study        # noqa: E402

OUT = Path("out/recipe")
STEPS, ITEMS = 150, 200
SMALL = ("--n_embd=156", "--n_head=2", "--batch_size=1", "--micro_batch_size=1", f"--max_steps={STEPS}",
         "--warmup_steps=15", f"--eval_interval={STEPS // 3}", f"--eval_tokens={2**15}", "--save_interval=1000")
GROWN = {"760M": 24, "1.1B": 36}        # layers
RATES = {"580M": 2.5e-3, "760M": 2e-3, "1.1B": 2e-3}    # ten times those of the full width


def train(name, eval_data):
    words, grown = [*SMALL, f"--learning_rate={RATES[name]}", f"--min_lr={RATES[name] / 10}"], []
    if name in GROWN:
        init = OUT / f"{name}-init.pt"
        grown = ["grow.py", OUT / "580M.pt", init, f"--n_layer={GROWN[name]}"]
        study.run(*grown, "--force")
        words.append(f"--init_from={init}")
    record = study.train(f"configs/{name}.py", OUT, *words)
    out = OUT / f"{name}.json"
    study.run("eval.py", "--ckpt", OUT / f"{name}.pt", "--tasks", "lambada,piqa,hellaswag", "--limit", ITEMS,
              "--data", "none", "--audit", "data/corpus", "--out", out,
              *(["--eval_data", eval_data] if eval_data else []))
    scores = json.loads(out.read_text())
    return dict(grown=" ".join(map(str, grown)), **record, scores=scores["tables"]["tasks"][0],
                leaked=len(scores["leaked"]))


def jobs(args, done):
    OUT.mkdir(parents=True, exist_ok=True)
    return {name: partial(train, name, args.eval_data) for name in RATES}


def tables(done):
    commands = [f"    python {words}" for record in done.values() for words in (record["grown"], record["command"])
                if words]
    rows, scores = [], []
    for name, record in done.items():
        last = record["last"]
        rows.append((name, f"{record['parameters'] / 1e6:.1f}M", f"{last['tokens']:,}",
                     f"{record['val_loss'][0][1]:.3f}", f"{last['loss']:.3f}", f"{last['val_loss']:.3f}",
                     f"{math.exp(last['val_loss']):.1f}", f"{last['tokens_per_second']:,}", f"{last['mfu']:.0%}",
                     f"{last['bytes_held'] / 2**30:.1f} GiB"))
        metrics = {key: value for key, value in record["scores"].items() if isinstance(value, list)}
        scores.append((name, *(f"{mean:.2f} ± {error:.2f}" for mean, error in metrics.values()), record["leaked"]))
    columns = ("run", "parameters", "tokens", "val loss at the start", "train loss", "val loss", "val ppl",
               "tokens/s", "MFU", "peak memory")
    return "\n\n".join(("\n".join(commands), study.table(columns, rows),
                        study.table((f"{ITEMS} items", *metrics, "leaked items found"), scores),
                        study.provenance(done)))


def draw(done):
    figure, axes = study.pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for i, (name, record) in enumerate(done.items()):
        study.curves(axes, record, name, f"C{i}")
    axes.set(xlabel="tokens", ylabel="perplexity: training (lines), validation (dots)", yscale="log",
             title="a tenth of the width")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
