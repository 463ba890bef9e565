"""What test items in the training data add to a score, and what takes them out again: logs/leak.md.

    python logs/leak.py [--eval_data DIR]

Four corpora: articles of WikiText-2; the same with the first 200 passages of LAMBADA's test set planted between
their paragraphs, once or ten times each; and the last of these through prepare.py --decontaminate. The same small
model is trained on each by train.py, for the same steps, and scored by eval.py on the first 400 passages, of which
half were planted. Goes on where it was stopped; what is done is in out/leak.
"""
import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import prepare as p                         # noqa: E402

PLANTED, SCORED = 200, 400
ARMS = {"without": 0, "once": 1, "ten times": 10, "ten times, decontaminated": 10}
CONFIG = """
data = "{data}"
out_dir = "out/leak"
block_size = 256
batch_size = 8
max_steps = 400
eval_interval = 200
eval_tokens = 2**13
save_interval = 100
log_interval = 20
n_layer = 4
n_head = 4
n_embd = 128
bias = False
pos = "alibi"
learning_rate = 2e-3
min_lr = 2e-4
warmup_steps = 50
beta2 = 0.99
average = 1             # the last weights: the best by validation loss have not seen the items often
"""


def run(*words):
    print("$", *words, flush=True)
    subprocess.run([sys.executable, *map(str, words)], check=True)


def plant(articles, items, times, lots):
    """The articles with each item at so many places between their paragraphs."""
    articles = [article.split("\n") for article in articles]
    for item in items:
        for _ in range(times):
            lines = lots.choice(articles)
            lines.insert(lots.randrange(len(lines)), item)
    return ["\n".join(lines) for lines in articles]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval_data", help="folder of the test sets; default: downloaded once")
    args = parser.parse_args()
    eval_data = ["--eval_data", args.eval_data] if args.eval_data else []
    out = Path("out/leak")
    out.mkdir(parents=True, exist_ok=True)
    articles = [text for side, text, *_ in p.records("wikitext-2") if side == "train"][:60]
    items = [item["text"] for item in p.test_items("lambada", args.eval_data)][:PLANTED]

    for arm, times in ARMS.items():
        data, text = out / f"data-{file_of(arm)}", out / f"text-{file_of(arm)}.jsonl"
        if not (data / "meta.json").exists():
            texts = plant(articles, items, times, random.Random(0))
            text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
            cut = ["--decontaminate=lambada", *eval_data] if "decontaminated" in arm else []
            run("prepare.py", text, "--out", data, *cut)
    for arm in ARMS:
        name = file_of(arm)
        if not (out / f"{name}.avg.pt").exists():
            (out / f"{name}.py").write_text(CONFIG.format(data=out / f"data-{name}"))
            run("train.py", out / f"{name}.py")
        for audited, file in ((name, f"{name}.own.json"), ("ten-times", f"{name}.json")):
            if not (out / file).exists():
                run("eval.py", "--ckpt", out / f"{name}.avg.pt", "--tasks", "lambada", "--limit", SCORED, "--audit",
                    out / f"data-{audited}", *eval_data, "--out", out / file)

    print("| corpus | tokens | cut | found by --audit | planted: acc | perplexity | not planted: acc | perplexity |\n"
          "|---|---|---|---|---|---|---|---|")
    with open(ROOT / "logs/leak.jsonl", "w") as f:
        for arm in ARMS:
            meta = json.loads((out / f"data-{file_of(arm)}/meta.json").read_text())
            own, scores = (json.loads((out / f"{file_of(arm)}{end}").read_text()) for end in (".own.json", ".json"))
            acc, perplexity = scores["tables"]["leaks"]
            row = dict(corpus=arm, tokens=meta["splits"]["train"]["tokens"],
                       characters_cut=meta["sources"][0].get("characters cut", 0), found=len(own["leaked"]),
                       planted=[acc["dirty"], perplexity["dirty"]], others=[acc["clean"], perplexity["clean"]])
            f.write(json.dumps(row) + "\n")
            cells = [f"{value:,.1f} ± {error:,.1f}" for value, error in (*row["planted"], *row["others"])]
            print(f"| {arm} | {row['tokens']:,} | {row['characters_cut']:,} | {row['found']} | {' | '.join(cells)} |")


def file_of(arm):
    return arm.replace(" ", "-").replace(",", "")


if __name__ == "__main__":
    main()
