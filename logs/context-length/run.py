"""Fine-tuning on WikiText-2 at contexts of 256, 512 and 1024, with models that have learned English.

    python prepare.py BOOKS shakespeare --out data/english --tokenizer bytes
    python prepare.py python --out data/python --tokenizer bytes
    python prepare.py wikitext-2 --out data/wikitext-2-bytes --tokenizer bytes
    python logs/context-length/run.py

BOOKS: any English, in files of {"text": ...} a line; here 233 books of Project Gutenberg and the State of the
Union addresses. pg19 of prepare.py is of the same kind.
"""
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study        # noqa: E402

OUT = Path("out/context-length")
SIZES = {"small": (2, 96, 5e6), "medium": (2, 144, 1.1e7), "large": (3, 168, 2.2e7)}        # layers, width, bytes
CONTEXTS = (256, 512, 1024)
WIKITEXT_2 = 10_797_777         # its bytes, for the lengths of warmup and intervals
RATES = (1e-3, 3e-4, 3e-3)      # tried with the middle size for a tenth of an epoch at context 512
ARMS = ("8 sequences a step", "8192 bytes a step", "learned positions")
PRETRAIN = """
data = {"data/english": 0.8, "data/python": 0.2}
block_size = 1024
batch_size = 4
eval_interval = 250
eval_tokens = 2**17
save_interval = 50
n_head = 2
bias = False
optimizer = "muon"
learning_rate = 6e-3
min_lr = 6e-4
warmup_steps = 50
beta2 = 0.99
dtype = "float32"
"""


def pretrain(size, pos):
    n_layer, n_embd, n_bytes = SIZES[size]
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "pretrain.py").write_text(PRETRAIN)
    return study.train(OUT / "pretrain.py", OUT / f"{size}-{pos}", f"--n_layer={n_layer}",
                       f"--n_embd={n_embd}", f"--max_tokens={n_bytes:.0f}", f"--pos={pos}")


def fine_tune(size, pos, context, batch_size, rate, epochs=1.0):
    if rate is None:
        sys.exit("the rate comes first: --only rate")
    source, out = OUT / f"{size}-{pos}/pretrain.pt", f"{size}-{pos}-{context}-{batch_size}-{rate:g}-{epochs:g}"
    steps = math.ceil(epochs * WIKITEXT_2 / context / batch_size)
    return study.train("configs/wikitext2.py", OUT / out, "--data=data/wikitext-2-bytes",
                       f"--init_from={source}", f"--block_size={context}", f"--batch_size={batch_size}",
                       f"--max_epochs={epochs}", f"--learning_rate={rate:g}", f"--warmup_steps={steps // 10}",
                       f"--log_interval={steps // 20}", "--save_interval=100", "--dtype=float32",
                       f"--eval_interval={math.ceil(steps / 2)}", f"--eval_tokens={2**21}")


def best_rate(done):
    tried = {rate: done.get(f"rate {rate:g}") for rate in RATES}
    return min(tried, key=lambda rate: tried[rate]["last"]["val_loss"]) if all(tried.values()) else None


def jobs(_, done):
    """Cheapest first, so that the table fills from its top."""
    found = {f"pretrain {size}, alibi": partial(pretrain, size, "alibi") for size in ("small", "medium")}
    found |= {f"rate {rate:g}": partial(fine_tune, "medium", "alibi", 512, 8, rate, 0.1) for rate in RATES}
    for size in SIZES:
        for arm in ARMS:
            pos = "learned" if arm == ARMS[2] else "alibi"
            found[f"pretrain {size}, {pos}"] = partial(pretrain, size, pos)
            for context in CONTEXTS if arm != ARMS[1] else CONTEXTS[:2]:        # at 1024 both are the same
                batch_size = 8192 // context if arm == ARMS[1] else 8
                found[f"{size}, {context}, {arm}"] = partial(fine_tune, size, pos, context, batch_size,
                                                             best_rate(done))
    return found


def run_of(done, size, context, arm):
    return done.get(f"{size}, {context}, {ARMS[0] if arm == ARMS[1] and context == 1024 else arm}")


def tables(done):
    rows = []
    for name in (name for name in done if name.startswith("pretrain")):
        n, last, minutes = done[name]["parameters"], done[name]["last"], done[name]["seconds"] / 60
        rows.append((name.removeprefix("pretrain "), f"{n / 1e6:.2f}M", f"{last['tokens']:,}",
                     f"{last['tokens'] / n:.0f}", f"{last['loss']:.3f}", f"{last['val_loss']:.3f}",
                     f"{last['bits_per_byte']:.3f}", f"{minutes:.0f}"))
    text = [study.table(("pretrained", "parameters", "bytes", "bytes/parameter", "train loss", "val loss",
                         "bits per byte", "minutes"), rows)]
    if best_rate(done):
        text.append("Rate, by the middle size's loss after a tenth of an epoch at 512: " + ", ".join(
            f"{rate:g} {done[f'rate {rate:g}']['last']['val_loss']:.4f}" for rate in RATES) + ".")
    columns = ("context", "model", "val loss before", "train loss", "val loss", "bits per byte", "val ppl",
               "adj val ppl", "best epoch")
    for arm in ARMS:
        rows = []
        for size in SIZES:
            for context in CONTEXTS:
                if r := run_of(done, size, context, arm):
                    last, best = r["last"], min(r["val_loss"], key=lambda point: point[1])
                    rows.append((context, f"{size}, {r['parameters'] / 1e6:.2f}M",
                                 f"{r['val_loss'][0][1]:.4f}", f"{last['loss']:.3f}", f"{last['val_loss']:.4f}",
                                 f"{last['bits_per_byte']:.4f}", f"{math.exp(last['val_loss']):.3f}",
                                 f"{last['word_perplexity']:.1f}", f"{best[0] / last['tokens']:.2f}"))
        text += [f"{arm.capitalize()}:", study.table(columns, rows)] if rows else []
    return "\n\n".join((*text, study.missing(jobs(None, done), done), study.provenance(done)))


def draw(done):
    if not any(run_of(done, size, context, arm) for size in SIZES for context in CONTEXTS for arm in ARMS):
        return None
    figure, panels = study.pyplot().subplots(1, 3, figsize=(14, 4), sharey=True, layout="constrained")
    for arm, panel in zip(ARMS, panels):
        for i, size in enumerate(SIZES):
            runs = [(context, run_of(done, size, context, arm)) for context in CONTEXTS]
            points = [(context, r["val_loss"][0][1], r["last"]["val_loss"]) for context, r in runs if r]
            for column, style, when in ((1, "o:", "before"), (2, "o-", "after")):
                panel.plot([p[0] for p in points], [p[column] for p in points], style, color=f"C{i}",
                           label=f"{size}, {when}")
        panel.set(title=arm, xlabel="context", xscale="log", xticks=CONTEXTS, xticklabels=CONTEXTS)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    panels[0].set(ylabel="WikiText-2 validation loss, nats per byte")
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
