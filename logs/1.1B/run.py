"""The recipes of 580M, 760M and 1.1B at a tenth of their width: makes 580M.md, 760M.md, 1.1B.md, with .jsonl and .png.

    python prepare.py packages --out data/corpus --decontaminate=lambada,piqa,hellaswag,wikitext2
    python logs/recipe.py [--eval_data DIR]

The same config files, commands and depths as at full size, the 760M and 1.1B grown from the 580M. Goes on where it was
stopped.
"""
import argparse
import json
import math
from functools import partial
from pathlib import Path

import study
from study import HERE

OUT = Path("out/recipe")
STEPS = 150
TASKS, ITEMS = ("lambada", "piqa", "hellaswag"), 200
SMALL = ("--n_embd=156", "--n_head=2", "--batch_size=1", "--micro_batch_size=1", f"--max_steps={STEPS}",
         "--warmup_steps=15", f"--eval_interval={STEPS // 3}", f"--eval_tokens={2**15}", "--save_interval=1000")
GROWN = {"760M": 24, "1.1B": 36}        # layers
RATES = {"580M": 2.5e-3, "760M": 2e-3, "1.1B": 2e-3}    # ten times those of the full width


def train(name, eval_data):
    words = [*SMALL, f"--learning_rate={RATES[name]}", f"--min_lr={RATES[name] / 10}"]
    grown = []
    if name in GROWN:
        init = OUT / f"{name}-init.pt"
        grown = ["grow.py", OUT / "580M.pt", init, f"--n_layer={GROWN[name]}"]
        study.run(*grown, "--force")
        words.append(f"--init_from={init}")
    record = study.train(f"configs/{name}.py", OUT, *words)
    out = OUT / f"{name}.json"
    study.run("eval.py", "--ckpt", OUT / f"{name}.pt", "--tasks", *TASKS, "--limit", ITEMS, "--data", "none",
              "--audit", "data/corpus", "--out", out, *(["--eval_data", eval_data] if eval_data else []))
    scores = json.loads(out.read_text())
    return dict(grown=" ".join(map(str, grown)), **record, scores=scores["tables"]["tasks"][0],
                leaked=len(scores["leaked"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval_data", help="folder of the test sets; default: downloaded once")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    report({name: study.measure(HERE / f"{name}.jsonl", {name: partial(train, name, args.eval_data)})[name]
            for name in RATES})


def report(done):
    plt = study.pyplot()
    for name, record in done.items():
        last = record["last"]
        rows = [(f"{record['parameters'] / 1e6:.1f}M", f"{last['tokens']:,}", f"{record['val_loss'][0][1]:.3f}",
                 f"{last['loss']:.3f}", f"{last['val_loss']:.3f}", f"{math.exp(last['val_loss']):.1f}",
                 f"{last['tokens_per_second']:,}", f"{last['mfu']:.0%}", f"{last['bytes_held'] / 2**30:.1f} GiB")]
        columns = ("parameters", "tokens", "val loss at the start", "train loss", "val loss", "val ppl", "tokens/s",
                   "MFU", "peak memory")
        scores = {key: value for key, value in record["scores"].items() if isinstance(value, list)}
        cells = [f"{mean:.2f} ± {error:.2f}" for mean, error in scores.values()]
        evaluation = study.table(("items", *scores), [(ITEMS, *cells)])
        commands = [f"    python {words}" for words in (record["grown"], record["command"]) if words]
        study.fill(HERE / f"{name}.md", "\n\n".join((
            "\n".join(commands), study.table(columns, rows), evaluation,
            f"Test items found in the training data by `--audit`: {record['leaked']}. {study.provenance([record])}")))
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        study.curves(axes, record, name, "C0")
        axes.set(xlabel="tokens", ylabel="perplexity: training (line), validation (dots)", yscale="log",
                 title=f"{name} at a tenth of its width")
        axes.grid(alpha=0.3, which="both")
        figure.savefig(HERE / f"{name}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
