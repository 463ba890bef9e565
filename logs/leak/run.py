"""What test items in the training data add to a score, and what takes them out again.

    python logs/leak/run.py [--eval_data DIR]

Four corpora: articles of WikiText-2; the same with the first 200 passages of LAMBADA's test set planted between
their paragraphs, once or ten times each; and the last of these through prepare.py --decontaminate. train.py trains
the same small model on each, for the same steps; eval.py scores it on the first 400 passages, half of them planted.
"""
import json
import random
import sys
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import study                # noqa: E402

import prepare              # noqa: E402

OUT = Path("out/leak")
PLANTED, SCORED = 200, 400
ARMS = {"without": 0, "once": 1, "ten times": 10, "ten times, decontaminated": 10}      # corpus: plantings
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


def folder(arm):
    return OUT / arm.replace(" ", "-").replace(",", "")


def make_data(arm, eval_data):
    """The corpus of an arm, in bins."""
    if (folder(arm) / "data/meta.json").exists():
        return
    folder(arm).mkdir(parents=True, exist_ok=True)
    articles = list(islice(prepare.texts("wikitext-2"), 60))            # all of them for training
    items = [item["text"] for item in prepare.test_items("lambada", eval_data)][:PLANTED]
    text = folder(arm) / "text.jsonl"
    planted = plant(articles, items, ARMS[arm], random.Random(0))
    text.write_text("".join(json.dumps({"text": article}) + "\n" for article in planted))
    cut = ["--decontaminate=lambada", *sets(eval_data)] if "decontaminated" in arm else []
    study.run("prepare.py", text, "--out", folder(arm) / "data", *cut)


def sets(eval_data):
    return ["--eval_data", eval_data] if eval_data else []


def measure(arm, eval_data):
    out = folder(arm)
    for each in (arm, "ten times"):
        make_data(each, eval_data)
    study.run("train.py", "configs/small.py", f"--data={out}/data", f"--out_dir={out}", *WORDS)
    # what --audit finds in its own data; and the scores, where "leaked" is what was planted ten times
    for audited, file in ((arm, "own.json"), ("ten times", "scores.json")):
        study.run("eval.py", "--ckpt", out / "small.avg.pt", "--tasks", "lambada", "--limit", SCORED, "--data", "none",
                  "--audit", folder(audited) / "data", *sets(eval_data), "--out", out / file)
    meta, own, scores = (json.loads((out / file).read_text()) for file in ("data/meta.json", "own.json", "scores.json"))
    clean, leaked = scores["tables"]["leaks"]
    return dict(tokens=meta["splits"]["train"]["tokens"], characters_cut=meta["sources"][0].get("characters cut", 0),
                found=len(own["leaked"]), planted=[leaked["acc"], leaked["perplexity"]],
                others=[clean["acc"], clean["perplexity"]])


def jobs(args, done):
    return {arm: partial(measure, arm, args.eval_data) for arm in ARMS}


def tables(done):
    rows = [(arm, f"{r['tokens']:,}", f"{r['characters_cut']:,}", r["found"],
             *(f"{value:,.1f} ± {error:,.1f}" for value, error in (*r["planted"], *r["others"])))
            for arm, r in done.items()]
    return study.table(("corpus", "tokens", "characters cut", "found by --audit", "planted: acc", "perplexity",
                        "not planted: acc", "perplexity of these"), rows)


if __name__ == "__main__":
    study.main(__file__, __doc__, jobs, tables)
