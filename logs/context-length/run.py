"""Fine-tuning on WikiText-2 at contexts of 256, 512 and 1024.

    python prepare.py wikitext-2 --out data/wikitext-2
    python prepare.py python --out data/python-gpt2
    python prepare.py state_union.jsonl shakespeare --out data/english
    python logs/context-length/run.py

state_union.jsonl: the State of the Union addresses of NLTK's corpus, {"text": ...} a line.
"""
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study                        # noqa: E402

from prepare import open_data       # noqa: E402

OUT = Path("out/context-length")
SIZES = {"small": (2, 2, 32), "medium": (4, 2, 64), "large": (4, 4, 128)}       # n_layer, n_head, n_embd
CONTEXTS = (256, 512, 1024)
ARMS = {        # rate, sizes, tokens of a step (None: 8 sequences)
    "5e-05": (5e-5, tuple(SIZES), None),                # the report's
    "0.001": (1e-3, ("medium",), None),                 # a rate at which these models learn
    "0.001, 8192 a step": (1e-3, ("medium",), 8192),
}
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


def fine_tune(arm, size, context, n_tokens):
    rate, _, step_tokens = ARMS[arm]
    batch_size = step_tokens // context if step_tokens else 8
    steps = math.ceil(EPOCHS * (n_tokens // context) / batch_size)
    return study.train("configs/wikitext2.py", OUT / run_name(arm, size, context),
                       f"--init_from={OUT / size / 'pretrain.pt'}", f"--block_size={context}",
                       f"--batch_size={batch_size}", f"--micro_batch_size={1024 // context}", f"--max_epochs={EPOCHS}",
                       f"--learning_rate={rate:g}", f"--warmup_steps={steps // 10}", f"--log_interval={steps // 10}",
                       "--eval_interval=1000", "--save_interval=1000", f"--eval_tokens={2**17}")


def run_name(arm, size, context):
    return f"{size}-{context}-{arm.replace(', ', '-').replace(' ', '-')}"


def jobs(*_):
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "pretrain.py").write_text(PRETRAIN)
    n_tokens = sum(map(len, open_data("data/wikitext-2", "train")[0]["data/wikitext-2"]))
    found = {size: partial(pretrain, size) for size in SIZES}
    for arm, (_, sizes, _) in ARMS.items():
        found |= {f"{size}, {context}, {arm}": partial(fine_tune, arm, size, context, n_tokens)
                  for size in sizes for context in CONTEXTS}
    return found


def title(arm):
    step_tokens = ARMS[arm][2]
    return f"rate {arm.split(',')[0]}, " + (f"{step_tokens:,} tokens a step" if step_tokens else "batches of 8")


def tables(done):
    columns = ("context", "model", "val loss before", "train loss", "val loss", "val ppl", "adj val ppl", "best epoch",
               "run")
    text = []
    for arm, (_, sizes, _) in ARMS.items():
        rows = []
        for size in sizes:
            for context in CONTEXTS:
                record = done[f"{size}, {context}, {arm}"]
                last, best = record["last"], min(record["val_loss"], key=lambda point: point[1])
                rows.append((context, f"{size}, {record['parameters'] / 1e6:.1f}M", f"{record['val_loss'][0][1]:.3f}",
                             f"{last['loss']:.3f}", f"{last['val_loss']:.3f}", f"{math.exp(last['val_loss']):.2f}",
                             f"{last['word_perplexity']:.2f}", f"{EPOCHS * best[0] / last['tokens']:.2f}",
                             run_name(arm, size, context)))
        text += [f"{title(arm).capitalize()}:", "", study.table(columns, rows), ""]
    return "\n".join(text) + "\n" + study.provenance(done)


def draw(done):
    plt = study.pyplot()
    figure, (left, *panels) = plt.subplots(1, 1 + len(ARMS), figsize=(17, 4.5), layout="constrained")
    for context, color in zip(CONTEXTS, ("C3", "C4", "C5")):
        study.curves(left, done[f"medium, {context}, 0.001"], f"medium, {context}", color)
    left.set(title="rate 0.001, batches of 8", xlabel="tokens of WikiText-2", yscale="log",
             ylabel="perplexity: training (lines), validation (dots)")
    for (arm, (_, sizes, _)), panel in zip(ARMS.items(), panels):
        for size in sizes:
            records = [done[f"{size}, {context}, {arm}"] for context in CONTEXTS]
            color = f"C{list(SIZES).index(size)}"
            panel.plot(CONTEXTS, [r["val_loss"][0][1] for r in records], "o:", color=color, label=f"{size}, before")
            panel.plot(CONTEXTS, [r["last"]["val_loss"] for r in records], "o-", color=color, label=f"{size}, after")
        panel.set(title=title(arm), xlabel="context", ylabel="validation loss, nats per token", xscale="log",
                  xticks=CONTEXTS, xticklabels=CONTEXTS)
    for panel in (left, *panels):
        panel.minorticks_off()
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables, draw)
