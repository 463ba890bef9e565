"""Fine-tuning on WikiText-2 at contexts of 256, 512 and 1024: makes context-length.md, .jsonl and .png.

    python prepare.py wikitext-2 --out data/wikitext-2
    python prepare.py python --out data/python-gpt2
    python prepare.py state_union.jsonl shakespeare --out data/english
    python logs/context-length.py

state_union.jsonl: the State of the Union addresses of NLTK's corpus, {"text": ...} a line. Goes on where it was
stopped.
"""
import math
from pathlib import Path

import study
from study import HERE

from prepare import open_data

OUT = Path("out/context-length")
SIZES = {"small": (2, 2, 32), "medium": (4, 2, 64), "large": (4, 4, 128)}       # n_layer, n_head, n_embd
CONTEXTS = (256, 512, 1024)
RATES = {5e-5: tuple(SIZES), 1e-3: ("medium",)}        # the report's, and one at which these models learn
EPOCHS = 0.1
PRETRAIN = """
data = {"data/english": 0.6, "data/python-gpt2": 0.4}
block_size = 1024
batch_size = 8
micro_batch_size = 1
max_steps = 150
eval_interval = 1000            # before the first step and after the last
eval_tokens = 2**15
save_interval = 1000
log_interval = 10
learning_rate = 3e-3
min_lr = 3e-4
warmup_steps = 20
"""


def pretrain(size):
    keys = (f"--{key}={value}" for key, value in zip(("n_layer", "n_head", "n_embd"), SIZES[size]))
    return study.train(OUT / "pretrain.py", OUT / size, *keys)


def fine_tune(size, context, rate, steps):
    return study.train("configs/wikitext2.py", OUT / f"{size}-{context}-{rate:g}",
                       f"--init_from={OUT / size / 'pretrain.pt'}", f"--block_size={context}",
                       f"--micro_batch_size={1024 // context}", f"--max_epochs={EPOCHS}", f"--learning_rate={rate:g}",
                       f"--warmup_steps={steps // 10}", f"--log_interval={steps // 10}", "--eval_interval=1000",
                       "--save_interval=1000", f"--eval_tokens={2**17}")


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "pretrain.py").write_text(PRETRAIN)
    tokens = sum(map(len, open_data("data/wikitext-2", "train")[0]["data/wikitext-2"]))
    jobs = {size: (lambda size=size: pretrain(size)) for size in SIZES}
    for rate, sizes in RATES.items():
        for size in sizes:
            for context in CONTEXTS:
                steps = math.ceil(EPOCHS * (tokens // context) / 8)
                jobs[f"{size}, {context}, {rate:g}"] = lambda job=(size, context, rate, steps): fine_tune(*job)
    report(study.measure(HERE / "context-length.jsonl", jobs))


def report(done):
    columns = ("context", "model", "val loss before", "train loss", "val loss", "val ppl", "adj val ppl", "best epoch",
               "run")
    text = []
    for rate, sizes in RATES.items():
        rows = []
        for size in sizes:
            for context in CONTEXTS:
                record = done[f"{size}, {context}, {rate:g}"]
                last, best = record["last"], min(record["val_loss"], key=lambda point: point[1])
                rows.append((context, f"{size}, {record['parameters'] / 1e6:.1f}M", f"{record['val_loss'][0][1]:.3f}",
                             f"{last['loss']:.3f}", f"{last['val_loss']:.3f}", f"{math.exp(last['val_loss']):.2f}",
                             f"{last['word_perplexity']:.2f}", f"{EPOCHS * best[0] / last['tokens']:.2f}",
                             f"{size}-{context}-{rate:g}"))
        text += [f"Learning rate {rate:g}:", "", study.table(columns, rows), ""]
    text.append(study.provenance(done.values()))
    study.fill(HERE / "context-length.md", "\n".join(text))

    plt = study.pyplot()
    figure, axes = plt.subplots(1, 1 + len(RATES), figsize=(15, 4.5), layout="constrained")
    for (rate, sizes), panel in zip(RATES.items(), axes[1:]):
        for size in sizes:
            records, i = [done[f"{size}, {context}, {rate:g}"] for context in CONTEXTS], list(SIZES).index(size)
            for values, style, words in (([r["val_loss"][0][1] for r in records], "o:", "before"),
                                         ([r["last"]["val_loss"] for r in records], "o-", "after")):
                panel.plot(CONTEXTS, values, style, color=f"C{i}", label=f"{size}, {words}")
            for j, record in enumerate(records if len(sizes) == 1 else ()):
                study.curves(axes[0], record, f"{size}, {CONTEXTS[j]}", f"C{j}")
        panel.set(title=f"rate {rate:g}", xlabel="context", ylabel="validation loss, nats per token", xscale="log",
                  xticks=CONTEXTS, xticklabels=CONTEXTS)
    axes[0].set(title=f"rate {rate:g}", xlabel="tokens of WikiText-2", yscale="log",
                ylabel="perplexity: training (lines), validation (dots)")
    for panel in axes:
        panel.minorticks_off()
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7)
    figure.savefig(HERE / "context-length.png", dpi=110)


if __name__ == "__main__":
    main()
