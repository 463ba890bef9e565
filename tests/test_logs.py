"""The tables in logs/*.md against the .jsonl beside them: each figure worked out again from what was logged."""
import json
import math
import re
import statistics

import pytest
from conftest import ROOT

LOGS = ROOT / "logs"


def jsonl(name):
    return [json.loads(line) for line in (LOGS / f"{name}.jsonl").read_text().splitlines()]


def tables(name):
    """The tables of a log: each a list of rows, dicts by column."""
    found, columns = [], None
    for line in (LOGS / f"{name}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            columns = None
        elif columns is None:
            columns = cells
            found.append([])
        elif set(line) - set("|- "):
            found[-1].append(dict(zip(columns, cells, strict=True)))
    return found


def same(cell, value):
    """The cell is the value, rounded to as many places as it shows."""
    number = re.match(r"[-+]?[\d,]*\.?\d+(e[-+]?\d+)?", cell)[0].replace(",", "")
    places = len(number.partition(".")[2].partition("e")[0])
    return float(number) == pytest.approx(value, abs=0.5001 * 10**-places, rel=1e-9)


def test_every_log_shows_its_curve_and_command_and_hides_no_machine():
    for path in LOGS.glob("*.md"):
        text = path.read_text()
        assert re.search(r"^    (python|torchrun|pip) ", text, re.M), path
        assert not re.search(r"/work|/tmp|/root|/home", text), path
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (LOGS / picture).exists(), (path, picture)
    for name in ("context-length", "growth", "alibi", "580M", "760M", "1.1B", "quickstart"):
        assert f"({name}.png)" in (LOGS / f"{name}.md").read_text() and (LOGS / f"{name}.jsonl").exists()


def test_quickstart():
    logged = {r["step"]: r for r in jsonl("quickstart") if "val_loss" in r}
    (rows,) = tables("quickstart")
    assert len(rows) == len(logged)
    for row in rows:
        r = logged[int(row["step"])]
        assert same(row["val loss"], r["val_loss"]) and same(row["bits per byte"], r["bits_per_byte"])
        assert same(row["perplexity per byte"], math.exp(r["val_loss"])) and same(row["tokens"], r["tokens"] / 1e6)


def test_context_length():
    logged = {r["name"]: r for r in jsonl("context-length")}
    ours = [row for rows in tables("context-length") for row in rows if "val loss before" in row]
    assert len(ours) == 15
    for row in ours:
        size, context, rate = re.fullmatch(r"(\w+)-(\d+)-(5e-05|0\.001)(?:-8192-a-step)?", row["run"]).groups()
        r = logged[f"{size}, {context}, {rate}" + ", 8192 a step" * row["run"].endswith("step")]
        assert row["context"] == context and row["model"].startswith(size)
        assert same(row["model"].split()[1], r["parameters"] / 1e6)
        assert f"--block_size={context}" in r["command"] and f"--learning_rate={rate}" in r["command"]
        loss = r["val_loss"][-1][1]
        assert same(row["val loss before"], r["val_loss"][0][1]) and same(row["train loss"], r["loss"][-1][1])
        assert same(row["val loss"], loss) and same(row["val ppl"], math.exp(loss))
        # WikiText-2's official counts: 213,886 words of validation; 258,719 tokens with GPT-2's vocabulary. Half of
        # these tokens were scored, so the ratio is theirs but for the sample
        tokens_per_word = math.log(r["last"]["word_perplexity"]) / loss
        assert tokens_per_word == pytest.approx(258_719 / 213_886, rel=4e-3)
        assert same(row["adj val ppl"], r["last"]["word_perplexity"])


def test_growth():
    runs = {}
    for r in jsonl("growth"):
        name, _, seed = r["name"].rpartition(", seed ")
        runs.setdefault(name, {})[seed] = r
    table = next(rows for rows in tables("growth") if "run" in rows[0])
    assert {row["run"] for row in table} == set(runs) and all(len(seeds) == 3 for seeds in runs.values())
    ends = {name: [r["points"][-1] for r in seeds.values()] for name, seeds in runs.items()}
    by_end = sorted((flops, statistics.mean(loss for _, loss in ends[name]))
                    for name in ends if name.startswith("scratch") for flops in {flops for flops, _ in ends[name]})
    longest = zip(*(r["points"] for r in runs["scratch, 1200 steps"].values()))
    on_the_way = [(point[0][0], statistics.mean(loss for _, loss in point)) for point in longest][1:]

    def needed(loss):       # between the two scratch losses around it, in log FLOPs, whichever is less
        found = []
        for scratch in (by_end, on_the_way):
            for (f1, l1), (f2, l2) in zip(scratch, scratch[1:]):
                if l1 >= loss >= l2:
                    found.append(math.exp(math.log(f1) + (l1 - loss) / (l1 - l2) * (math.log(f2) - math.log(f1))))
        return min(found)

    for row in table:
        name = row["run"]
        assert same(row["at the end"], statistics.mean(loss for _, loss in ends[name]))
        assert same(row["at the end"].split("±")[1].strip(), statistics.stdev(loss for _, loss in ends[name]))
        if name.startswith("scratch"):
            continue
        for column, counted in (("saved, source not counted", 0), ("saved, source counted", 1)):
            saved = [100 * (1 - (r["points"][-1][0] + counted * r["source_flops"]) / needed(r["points"][-1][1]))
                     for r in runs[name].values()]
            assert same(row[column], statistics.mean(saved)), (name, column)
            assert same(row[column].split("±")[1].strip(), statistics.stdev(saved)), (name, column)


def test_readme_shows_the_figures_of_the_growth_log():
    readme = (ROOT / "README.md").read_text()
    logged = {row["run"]: [row[f"saved, source {counted}"].lstrip("+") for counted in ("not counted", "counted")]
              for rows in tables("growth") if "run" in rows[0] for row in rows}
    names = {"depth, identity (the default)": "depth: identity", "width and depth, identity": "both: identity",
             "depth, stack": "depth: stack", "depth, adjacent": "depth: adjacent", "width": "width",
             "depth, adjacent, at half of the source's schedule": "depth: adjacent, at half",
             "width and depth, adjacent": "both: adjacent", "width, optimizer grown": "width, optimizer grown",
             "width, at half of the source's schedule": "width, at half"}
    for name, run in names.items():
        assert f"| {name} | {' | '.join(logged[run])} |" in readme, name
    for run, words in (("depth: identity", "twice the depth saves {} ({} with the source's training counted)"),
                       ("width", "twice the width {} ({})"), ("both: identity", "both {} ({})")):
        assert words.format(*logged[run]) in readme, run


def test_alibi():
    logged = {r["name"]: r for r in jsonl("alibi")}
    (rows,) = tables("alibi")
    assert len(rows) == 6
    for row in rows:
        r = logged[row["positions"].replace(", trained in", ",")]
        (softmax,) = [key for key in r["measured"] if key.startswith(row["measured in"])]
        for T in (256, 512, 1024, 2048):
            assert same(row[f"context {T}"], r["measured"][softmax][str(T)])


@pytest.mark.parametrize("name", ["580M", "760M", "1.1B"])
def test_recipe(name):
    (r,) = jsonl(name)
    (row,) = [row for rows in tables(name) for row in rows if "tokens/s" in row]
    last = r["last"]
    assert same(row["parameters"], r["parameters"] / 1e6) and same(row["tokens"], last["tokens"])
    assert same(row["val loss at the start"], r["val_loss"][0][1]) and same(row["val loss"], r["val_loss"][-1][1])
    assert same(row["train loss"], r["loss"][-1][1]) and same(row["val ppl"], math.exp(r["val_loss"][-1][1]))
    assert same(row["tokens/s"], last["tokens_per_second"]) and same(row["MFU"], 100 * last["mfu"])
    assert same(row["peak memory"], last["bytes_held"] / 2**30)
    (scores,) = [row for rows in tables(name) for row in rows if "lambada acc" in row and "items" in row]
    for metric, (mean, error) in ((key, value) for key, value in r["scores"].items() if isinstance(value, list)):
        assert same(scores[metric], mean) and same(scores[metric].split("±")[1].strip(), error), metric


def test_leak():
    logged = {r["corpus"]: r for r in jsonl("leak")}
    (rows,) = tables("leak")
    for row in rows:
        r = logged.pop(row["corpus"])
        assert same(row["tokens"], r["tokens"]) and same(row["cut"], r["characters_cut"])
        assert same(row["found by --audit"], r["found"])
        (acc, ppl), (other_acc, other_ppl) = r["planted"], r["others"]
        assert same(row["planted: acc"], acc[0]) and same(row["not planted: acc"], other_acc[0])
        assert same(row["perplexity"], ppl[0]) and same(row["perplexity of these"], other_ppl[0])
    assert not logged
