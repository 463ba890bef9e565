"""The 580M, 760M and 1.1B recipes at a tenth of their width: makes 580M.md, 760M.md and 1.1B.md, each with .jsonl, .png.

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
STEPS = 200
SMALL = ["--n_embd=156", "--batch_size=2", "--micro_batch_size=1", f"--max_steps={STEPS}", "--warmup_steps=20",
         "--learning_rate={}", "--min_lr={}", f"--eval_interval={STEPS // 4}", f"--eval_tokens={2**15}", "--save_interval=1000"]
GROWN = {"760M": 24, "1.1B": 36}        # layers
RATES = {"580M": 2.5e-3, "760M": 2e-3, "1.1B": 2e-3}    # ten times those of the full width


def train(name):
    words = [word.format(RATES[name] if "learning" in word else RATES[name] / 10) for word in SMALL]
    grown = []
    if name in GROWN:
        init = OUT / f"{name}-init.pt"
        grown = ["grow.py", OUT / "580M.pt", init, f"--n_layer={GROWN[name]}"]
        print(study.run(*grown, "--force"))
        words.append(f"--init_from={init}")
    record = study.train(f"configs/{name}.py", OUT, *words)
    return dict(grown=" ".join(map(str, grown)), **record)


def evaluate(names, eval_data):
    out = OUT / "eval.json"
    words = ["--eval_data", eval_data] if eval_data else []
    study.run("eval.py", "--ckpt", *(OUT / f"{name}.pt" for name in names), "--limit", 200, "--audit", "data/corpus",
              "--tasks", "lambada", "piqa", "hellaswag", "wikitext2", "--out", out, *words)
    return json.loads(out.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval_data", help="folder of the test sets; default: downloaded once")
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    done = {name: study.measure(HERE / f"{name}.jsonl", {name: partial(train, name)})[name] for name in RATES}
    scores = OUT / "eval.json"
    if not scores.exists():
        evaluate(RATES, args.eval_data)
    report(done, json.loads(scores.read_text()))


def report(done, scores):
    plt = study.pyplot()
    for name, record in done.items():
        last = record["last"]
        rows = [(f"{record['parameters'] / 1e6:.1f}M", f"{last['tokens']:,}", f"{record['val_loss'][0][1]:.3f}",
                 f"{last['loss']:.3f}", f"{last['val_loss']:.3f}", f"{math.exp(last['val_loss']):.1f}",
                 f"{last['tokens_per_second']:,}", f"{last['mfu']:.0%}", f"{last['bytes_held'] / 2**30:.1f} GiB")]
        text = [study.table(("parameters", "tokens", "val loss at the start", "train loss", "val loss", "val ppl", "tokens/s",
                             "MFU", "peak memory"), rows), "", f"`python {record['command']}`", ""]
        text += [study.provenance([record])]
        study.fill(HERE / f"{name}.md", "\n".join(text))
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        study.curves(axes, record, name, "C0")
        axes.set(xlabel="tokens", ylabel="perplexity: training (line), validation (dots)", yscale="log",
                 title=f"{name} at a tenth of its width")
        axes.grid(alpha=0.3, which="both")
        figure.savefig(HERE / f"{name}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    main()
