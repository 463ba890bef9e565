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
from pathlib import Path

import study
from study import HERE, run

import prepare

OUT = Path("out/leak")
PLANTED, SCORED = 200, 400
ARMS = {"without": 0, "once": 1, "ten times": 10, "ten times, decontaminated": 10}
# the last weights (average=1): the best by validation loss have not seen the items often
WORDS = ["--batch_size=8", "--max_steps=400", "--eval_interval=200", f"--eval_tokens={2**13}", "--average=1"]


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
    OUT.mkdir(parents=True, exist_ok=True)
    articles = [text for side, text, *_ in prepare.records("wikitext-2") if side == "train"][:60]
    items = [item["text"] for item in prepare.test_items("lambada", args.eval_data)][:PLANTED]

    for arm, times in ARMS.items():
        data, text = OUT / f"data-{file_of(arm)}", OUT / f"text-{file_of(arm)}.jsonl"
        if not (data / "meta.json").exists():
            texts = plant(articles, items, times, random.Random(0))
            text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
            cut = ["--decontaminate=lambada", *eval_data] if "decontaminated" in arm else []
            run("prepare.py", text, "--out", data, *cut)
    for arm in ARMS:
        name = file_of(arm)
        if not (OUT / name / "small.avg.pt").exists():
            run("train.py", "configs/small.py", f"--data={OUT}/data-{name}", f"--out_dir={OUT / name}", *WORDS)
        for audited, file in ((name, f"{name}.own.json"), ("ten-times", f"{name}.json")):
            if not (OUT / file).exists():
                run("eval.py", "--ckpt", OUT / name / "small.avg.pt", "--tasks", "lambada", "--limit", SCORED,
                    "--audit", OUT / f"data-{audited}", *eval_data, "--out", OUT / file)
    with open(HERE / "leak.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in map(result, ARMS))
    report(study.read(HERE / "leak.jsonl"))


def result(arm):
    name = file_of(arm)
    meta = json.loads((OUT / f"data-{name}/meta.json").read_text())
    own, scores = (json.loads((OUT / f"{name}{end}").read_text()) for end in (".own.json", ".json"))
    acc, perplexity = scores["tables"]["leaks"]
    return dict(corpus=arm, tokens=meta["splits"]["train"]["tokens"],
                characters_cut=meta["sources"][0].get("characters cut", 0), found=len(own["leaked"]),
                planted=[acc["dirty"], perplexity["dirty"]], others=[acc["clean"], perplexity["clean"]])


def report(rows):
    cells = [(row["corpus"], f"{row['tokens']:,}", f"{row['characters_cut']:,}", row["found"],
              *(f"{value:,.1f} ± {error:,.1f}" for value, error in (*row["planted"], *row["others"]))) for row in rows]
    columns = ("corpus", "tokens", "cut", "found by --audit", "planted: acc", "perplexity", "not planted: acc",
               "perplexity of these")
    study.fill(HERE / "leak.md", study.table(columns, cells))


def file_of(arm):
    return arm.replace(" ", "-").replace(",", "")


if __name__ == "__main__":
    main()
