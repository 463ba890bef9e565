"""The recipes of 580M, 760M and 1.1B in small: the same configs and depths, with a width of 48 and bytes as tokens.

    python prepare.py BOOKS python --out data/recipe --tokenizer bytes --decontaminate=lambada,piqa,hellaswag,wikitext2
    python prepare.py python --out data/python --tokenizer bytes
    python prepare.py shakespeare --out data/shakespeare --tokenizer bytes
    python prepare.py wikitext-2 --out data/wikitext-2-bytes --tokenizer bytes
    python logs/1.1B/run.py [--eval_data DIR]

BOOKS: see logs/context-length/run.py. The validation files of Python are the same in data/recipe: held back.
"""
import json
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study        # noqa: E402

OUT, T = Path("out/recipe"), 256
LAYERS = {"580M": 18, "760M": 24, "1.1B": 36}
BYTES = {"580M": 5.2e6, "760M": 6.9e6, "1.1B": 1.02e7}          # 10 for each parameter
RATES = {"580M": 3e-3, "760M": 2.4e-3, "1.1B": 2.4e-3}          # in the recipes' ratio
TEXTS = {"WikiText-2": "data/wikitext-2-bytes/val.bin", "Shakespeare": "data/shakespeare/val.bin",
         "Python": "data/python/val.bin"}
ITEMS, DOCUMENTS = 200, 20


def train(name):
    words = ["--data=data/recipe", "--n_embd=48", "--n_head=1", f"--block_size={T}", "--batch_size=16",
             "--micro_batch_size=4", f"--max_tokens={BYTES[name]:.0f}", "--warmup_steps=100", "--dtype=float32",
             f"--learning_rate={RATES[name]}", f"--min_lr={RATES[name] / 10:g}", "--average=4", "--eval_interval=125",
             f"--eval_tokens={2**16}", "--save_interval=50"]
    grown = []
    if name != "580M":
        init = OUT / f"{name}-init.pt"
        grown = ["grow.py", OUT / "580M.avg.pt", init, f"--n_layer={LAYERS[name]}"]
        if not (OUT / f"{name}.state.pt").exists():
            study.run(*grown, "--force")
        words.append(f"--init_from={init}")
    return dict(grown=" ".join(map(str, grown)), **study.train(f"configs/{name}.py", OUT, *words))


def score(name, args):
    """Test sets, audit, and held-back texts at the training context and at twice that."""
    def evaluate(block_size, *words):
        out = OUT / f"{name}-{block_size}.json"
        study.run("eval.py", "--ckpt", OUT / f"{name}.avg.pt", "--data", "none", f"--block_size={block_size}",
                  "--max_docs", DOCUMENTS, "--bpb", *(f"{text}={source}" for text, source in TEXTS.items()),
                  "--out", out, *words, *(["--eval_data", args.eval_data] if args.eval_data else []))
        return json.loads(out.read_text())
    short = evaluate(T, "--tasks", "none")
    audit = ["--audit", "data/recipe"] if name == "580M" else []        # the others have the same data
    long = evaluate(2 * T, "--tasks", "lambada,piqa,hellaswag", "--limit", ITEMS, *audit)
    return dict(tasks=long["tables"]["tasks"][0], leaked=len(long["leaked"]) if audit else "",
                bits={T: short["tables"]["bits per byte"][0], 2 * T: long["tables"]["bits per byte"][0]})


def jobs(args, _):
    found = {}
    for name in LAYERS:
        found |= {name: partial(train, name), f"{name}, scores": partial(score, name, args)}
    return found


def tables(done):
    trained = {name: done[name] for name in LAYERS if name in done}
    scored = {name: done[f"{name}, scores"] for name in LAYERS if f"{name}, scores" in done}
    rows = []
    for name, record in trained.items():
        last = record["last"]
        rows.append((name, LAYERS[name], f"{record['parameters'] / 1e6:.2f}M", f"{last['tokens']:,}",
                     f"{record['val_loss'][0][1]:.3f}", f"{last['loss']:.3f}", f"{last['val_loss']:.3f}",
                     f"{math.exp(last['val_loss']):.2f}", f"{last['bits_per_byte']:.3f}",
                     f"{record['seconds'] / 60:.0f}"))
    columns = ("run", "layers", "parameters", "bytes", "val loss at the start", "train loss", "val loss",
               "val ppl", "bits per byte", "minutes")
    text = [study.table(columns, rows)] if rows else []
    if scored:
        bits = [(name, context, *(f"{values[text][0]:.3f}" for text in TEXTS))
                for name, record in scored.items() for context, values in record["bits"].items()]
        text.append(study.table(("bits per byte", "context", *TEXTS), bits))
        tasks = [[name, *(f"{value[0]:.2f} ± {value[1]:.2f}" for value in record["tasks"].values()
                          if isinstance(value, list)), record["leaked"]] for name, record in scored.items()]
        metrics = [key for key, value in next(iter(scored.values()))["tasks"].items() if isinstance(value, list)]
        text.append(study.table((f"{ITEMS} items", *metrics, "leaked items found"), tasks))
    commands = [words for record in trained.values() for words in (record["grown"], record["command"])]
    text += ["\n".join(f"    python {words}" for words in commands if words)] if commands else []
    return "\n\n".join((*text, study.missing(jobs(None, done), done), study.provenance(done)))


def draw(done):
    if not done:
        return None
    figure, axes = study.pyplot().subplots(figsize=(7, 4.5), layout="constrained")
    for i, name in enumerate(name for name in LAYERS if name in done):
        study.curves(axes, done[name], name, f"C{i}")
    axes.set(xlabel="bytes", ylabel="perplexity per byte: training (lines), validation (dots)", yscale="log",
             title="in small: width 48", ylim=(2.5, 30))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
