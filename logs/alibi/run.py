"""ALiBi beside learned positions beyond the training context, and attention in bf16.

    python prepare.py python --out data/python --tokenizer bytes
    python logs/alibi/run.py

train.py trains models at context 256; they are measured at 256 to 2048 on the same tokens. One of them trains with
scores, ALiBi's bias and softmax in bf16, the bias as the report's 580M has it: "python logs/alibi/run.py train
CONFIG ..." is train.py with that attention. On a CPU, where model.py calls attention_ref.
"""
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study                        # noqa: E402

import grow                         # noqa: E402
import model as m                   # noqa: E402
import train                        # noqa: E402
from prepare import open_data       # noqa: E402

OUT = Path("out/alibi")
CONTEXTS = (256, 512, 1024, 2048)
N_TOKENS = 2**16                # of the validation, measured
CONFIG = """
data = "data/python"
block_size = 256
batch_size = 16
max_steps = 800
eval_interval = 200
eval_tokens = 2**15
save_interval = 1000
log_interval = 20
n_layer = 4
n_head = 12             # the slopes of the 580M
n_embd = 144
bias = False
learning_rate = 2e-3
min_lr = 2e-4
warmup_steps = 50
beta2 = 0.99
dtype = "bfloat16"
"""


def attention_bf16(q, k, v, slopes=None, dropout_p=0.0, bias="from the end"):
    """attention_ref with scores, bias and softmax in bf16. q: (B, H, T, D); k, v: (B, H, S, D).

    bias: slope * (j - i), "distance"; or what differs from it by a constant per row: slope * j, "from the start", or
    slope * (j - (S - 1)), "from the end", one row for all queries as in the report's code. dropout_p is 0 here.
    """
    j = torch.arange(k.size(2), dtype=torch.float32)
    distance = j[None, :] - j[-q.size(2):, None]                                        # (T, S)
    offset = {"distance": distance, "from the start": j[None, :], "from the end": j[None, :] - j[-1]}[bias]
    scores = (q @ k.transpose(-2, -1)).bfloat16() / math.sqrt(q.size(3))                # (B, H, T, S)
    if slopes is not None:
        scores = scores + (slopes[:, None, None] * offset).bfloat16()
    scores = scores.masked_fill(distance > 0, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v


ATTENTION = {"fp32": m.attention_ref}
for form in ("from the end", "from the start", "distance"):
    ATTENTION[f"bf16, {form}"] = partial(attention_bf16, bias=form)


@torch.no_grad()
def losses(model, tokens, T, softmax):
    """The loss of each of tokens, T at a time: (len(tokens) // T, T)."""
    rows = torch.from_numpy(tokens[:len(tokens) // T * T + 1].astype(np.int64))
    m.attention_ref = ATTENTION[softmax]
    with torch.autocast("cpu", torch.bfloat16, enabled=softmax != "fp32"):
        parts = [model(rows[i:i + T][None], rows[i + 1:i + T + 1][None], reduction="none")[0].float()
                 for i in range(0, len(rows) - 1, T)]
    m.attention_ref = ATTENTION["fp32"]
    return torch.stack(parts)


def arm(pos, softmax):
    name = f"{pos}-{softmax}"
    script = "train.py" if softmax == "fp32" else "logs/alibi/run.py train"
    record = study.train(OUT / "run.py", OUT / name, f"--pos={pos}", script=script)
    checkpoint = f"{OUT / name}/run.pt"
    if pos == "learned":
        checkpoint, source = f"{OUT / name}/longer.pt", checkpoint
        grow.main([source, checkpoint, f"--block_size={CONTEXTS[-1]}", "--force"])
    model, _ = m.load(checkpoint)
    tokens = open_data("data/python", "val")[0]["data/python"][0][:N_TOKENS + 1]
    measured = {eval_softmax: {T: losses(model, tokens, T, eval_softmax).mean().item() for T in CONTEXTS}
                for eval_softmax in ("fp32", "bf16, from the end")}
    if name == "alibi-fp32":
        T = CONTEXTS[2]
        record["by_position"] = {softmax: losses(model, tokens, T, softmax).view(-1, T // 32, 32).mean((0, 2)).tolist()
                                 for softmax in ATTENTION}
    return dict(**record, measured=measured)


def jobs(*_):
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "run.py").write_text(CONFIG)
    train.keep_memory()
    arms = ("alibi", "fp32"), ("alibi", "bf16"), ("learned", "fp32")
    return {f"{pos}, {softmax}": partial(arm, pos, softmax) for pos, softmax in arms}


def tables(done):
    rows = []
    for name, record in done.items():
        for softmax, values in record["measured"].items():
            cells = [f"{loss:.4f}" for loss in values.values()]
            rows.append((name.replace(",", ", trained in"), softmax.partition(",")[0], *cells))
    text = study.table(("positions", "measured in", *(f"context {T}" for T in CONTEXTS)), rows)
    return f"{text}\n\n{study.provenance(done)}"


def draw(done):
    plt = study.pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for i, (name, record) in enumerate(done.items()):
        study.curves(left, record, name, f"C{i}")
        middle.plot(CONTEXTS, list(record["measured"]["fp32"].values()), "o-", color=f"C{i}", label=name)
    for softmax, values in done["alibi, fp32"]["by_position"].items():
        right.plot(np.arange(len(values)) * 32 + 16, values, label=f"softmax in {softmax}")
    left.set(xlabel="tokens", ylabel="perplexity per byte", yscale="log",
             title="training (lines) and validation (dots)")
    middle.set(xlabel="context", ylabel="validation loss, nats per byte", xscale="log", xticks=CONTEXTS,
               xticklabels=CONTEXTS, title="beyond the training context, measured in fp32")
    right.set(xlabel="position in a context of 1024", ylabel="validation loss, nats per byte",
              title="ALiBi trained in fp32, measured in bf16")
    for panel in (left, middle, right):
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        m.attention_ref = ATTENTION["bf16, from the end"]
        train.start(sys.argv[2:])
    else:
        study.main(__file__, __doc__, jobs, tables, draw)
