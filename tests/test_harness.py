"""lm-evaluation-harness 0.4.13 on the same files and the same exported models, compared item by item.

The harness reads its own task definitions and calls Hugging Face's models and tokenizer; only where
the data lies is told to it.
"""
import json
import math
import os
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api import metrics                                                 # noqa: E402
from lm_eval.api.instance import Instance                                       # noqa: E402
from lm_eval.models.huggingface import HFLM                                     # noqa: E402
from lm_eval.tasks import TaskManager                                           # noqa: E402

import eval as e                                                                # noqa: E402
import model as m                                                               # noqa: E402
import prepare                                                                  # noqa: E402
from model import GPT, GPTConfig                                                # noqa: E402

DATA = Path(__file__).resolve().parent.parent.parent / "shared/data"            # beside the checkout, where it is
THEIRS = {"lambada": "lambada/lambada_openai.yaml", "piqa": "piqa/piqa.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
          "wikitext2": "wikitext/wikitext.yaml"}
BLOCK_SIZE = 96

# what real items seldom hold: no context, white space at its end and in the answer, ties, no answer but a space,
# texts longer than the context, marks to be cleaned, pages shorter than a window, of one window, and one longer
EDGE = {
    "lambada": [{"text": text} for text in (
        "word", " word", "a text that ends in a space ", "two  spaces  before  it", "a new line\nand more", "x \n y",
        "quote “said he” — naïve café 🎉", "word word word word word word", "one " * 400 + "end",
        "three\n\n \tblanks")],
    "piqa": [dict(goal=goal, sol1=sol1, sol2=sol2, label=label) for goal, sol1, sol2, label in (
        ("boil an egg", "in water", "in water", 0), ("boil an egg", "in water", "in water", 1),
        ("boil an egg ", "in water  ", "in water", 1), ("", " ", "nothing", 0), ("g\n", "\ta", "b\n", 1),
        ("very long " * 60, "yes", "no, " * 25, 1), ("how", "x", "x" * 99, 0))],
    "hellaswag": [dict(activity_label=activity, ctx_a=a, ctx_b=b, endings=endings, label=label)
                  for activity, a, b, endings, label in (
        ("Making tea", "[header] How to make tea [title] Boil water [step] Take  a kettle.", "THE kettle",
         ["boils [substeps] loudly.", "is  blue   today", " sings ", "is. [title] Done"], 0),
        ("", "", "", ["one", "one", "one", "one"], 2), ("Long", "word " * 150, "", ["a", "b", "c", "d"], 3))],
    "wikitext2": [dict(page=page) for page in (
        "", " = A = \n",
        " = Page = \n \n The cat 's hat , 1 @,@ 000 @-@ fold ( so ) \" it \" is . \n = = Part = = \n",
        "word " * BLOCK_SIZE, "word " * (BLOCK_SIZE + 1), "word " * (2 * BLOCK_SIZE), "word " * (2 * BLOCK_SIZE + 5))],
}


def some_items(task, limit):
    """The edge cases, and real items whose answers fit into the small contexts of these tests."""
    real = prepare.test_items(task, DATA) if DATA.is_dir() else ()
    short = (item for item in real if task != "piqa" or max(len(item["sol1"]), len(item["sol2"])) < 200)
    return EDGE[task] + list(islice(short, limit))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(pos) -> (model, tokenizer, its Hugging Face folder)."""
    return cache(lambda pos: train(pos, tmp_path_factory.mktemp(pos)))


def train(pos, folder, steps=40):
    """A small GPT of GPT-2's vocabulary, trained for some steps and exported with its tokenizer."""
    try:
        tokenizer = prepare.get_tokenizer("gpt2")
    except prepare.DataError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    model = GPT(GPTConfig(BLOCK_SIZE, n_layer=2, n_head=4, n_embd=32, pos=pos, bias=pos == "learned"))
    text = " ".join(item.get("text") or item.get("page") or " ".join(map(str, item.values()))
                    for task in EDGE for item in some_items(task, 5))
    tokens = torch.tensor(tokenizer.encode_ordinary(text + " word" * len(text)))     # so that something is greedy
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.stack([tokens[i:i + 33] for i in torch.randint(len(tokens) - 33, (4,))])
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    m.export(model, str(folder / "hf"), tokenizer)
    return model.eval(), tokenizer, str(folder / "hf")


def harness(lm, items, tmp_path):
    """Per task, {task: (totals, samples)}, what lm_eval.simple_evaluate makes of items by its own definitions."""
    tasks = []
    for task, rows in items.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        split = "validation" if task in ("piqa", "hellaswag") else "test"
        tasks.append(tmp_path / f"{task}.yaml")         # their definition, but for where the data lies; JSON is YAML
        tasks[-1].write_text(json.dumps(dict(
            include=str(Path(lm_eval.__file__).parent / "tasks" / THEIRS[task]), dataset_path="json", dataset_name=None,
            dataset_kwargs=dict(data_files={split: str(tmp_path / f"{task}.jsonl")}, cache_dir=str(tmp_path / "cache")),
            **{f"{other}_split": split if other == split else None for other in ("training", "validation", "test")})))
    manager = TaskManager(include_defaults=False)       # reading its 14,000 definitions takes seconds
    found = lm_eval.simple_evaluate(model=lm, tasks=list(map(str, tasks)), bootstrap_iters=0, task_manager=manager)
    names = {task: Path(THEIRS[task]).stem for task in items}
    return {task: (found["results"][name], sorted(found["samples"][name], key=lambda s: s["doc_id"]))
            for task, name in names.items()}


def hflm(folder, block_size, logits_cache=False, batch_size=8):
    return HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=batch_size, max_length=block_size,
                logits_cache=logits_cache)


@pytest.mark.parametrize("pos, block_size", [("learned", BLOCK_SIZE), ("alibi", 64)])
def test_every_item_gets_what_the_harness_gives_it(pos, block_size, trained, tmp_path):
    model, tokenizer, folder = trained(pos)
    items = {task: some_items(task, 0 if task == "wikitext2" else 4) for task in THEIRS}
    lm = hflm(folder, block_size)
    theirs = harness(lm, items, tmp_path)
    for task in THEIRS:
        totals, samples = theirs[task]
        function, kind = e.TASKS[task]
        examples = [function(item) for item in items[task]]
        columns = e.run_task(kind, examples, model, tokenizer, block_size, 8)
        scores = e.scores(kind, columns)
        if kind == "text":
            np.testing.assert_allclose(-columns["nats"], [s["filtered_resps"][0] for s in samples], rtol=1e-6)
            for column, metric in (("words", "word_perplexity"), ("bytes", "byte_perplexity")):
                assert columns[column].tolist() == [s[metric][1] for s in samples]
                assert scores[metric][0] == pytest.approx(totals[f"{metric},none"], rel=1e-6)
            continue

        pairs = [(context, answer) for context, answers, _ in examples for answer in answers]
        assert pairs == [pair for s in samples for pair in s["arguments"]], task
        requests = [r for example in examples for r in e.make_requests(kind, example, tokenizer, block_size)]
        rows = [(tokens, continuation) for tokens, continuations in requests for continuation in continuations]
        for (context, answer), (tokens, continuation) in zip(pairs, rows, strict=True):
            begin, end = (lm._encode_pair(context, answer) if context else
                          ([lm.prefix_token_id], lm.tok_encode(answer)))
            assert (tokens + continuation, continuation) == ((begin + end)[-block_size - 1:], end), (context, answer)
        logp, greedy = e.log_likelihoods(model, requests, 8)
        expected = [answer for s in samples for answer in s["filtered_resps"]]
        np.testing.assert_allclose(logp, [x for x, _ in expected], rtol=0, atol=1e-3, err_msg=task)
        assert greedy.tolist() == [x for _, x in expected], task
        if kind == "cloze":
            assert greedy.any() and not greedy.all()
            assert scores["perplexity"][0] == pytest.approx(totals["perplexity,none"], rel=1e-4)
        for column, metric in [("correct", "acc")] + [("correct_norm", "acc_norm")] * (kind == "choice"):
            differ = [n for n, s in enumerate(samples) if s[metric] != columns[column][n]]
            gaps = [np.diff(np.sort([x for x, _ in samples[n]["filtered_resps"]])[-2:]) for n in differ]
            assert all(gap < 1e-3 for gap in gaps), (task, metric, differ)      # ties
            assert differ or scores[metric][0] == pytest.approx(100 * totals[f"{metric},none"])


def test_known_differences(trained):
    model, tokenizer, folder = trained("learned")
    with_cache, without = hflm(folder, BLOCK_SIZE, logits_cache=True), hflm(folder, BLOCK_SIZE)

    def theirs(lm, pairs):
        return [x for x, _ in lm.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs],
                                               disable_tqdm=True)]

    def encode(context, answer):
        return e.make_requests("choice", (context, [answer], 0), tokenizer, BLOCK_SIZE)[0]

    def ours(pairs):
        return e.log_likelihoods(model, [encode(*pair) for pair in pairs], 8)[0].tolist()

    # the second request's context is the first one's with the beginning of its continuation
    pairs = [("The cat", " sat on the mat"), ("The cat sat on", " the hat")]
    assert ours(pairs) == pytest.approx(theirs(without, pairs), abs=1e-3)
    wrong = theirs(with_cache, pairs)
    assert max(abs(a - b) for a, b in zip(ours(pairs), wrong)) > 0.01
    assert theirs(with_cache, pairs[1:]) == pytest.approx(ours(pairs[1:]), abs=1e-3)        # alone it is right

    # an end-of-text token that a text spells out is text here, and the token there
    pairs = [("one <|endoftext|> two", " three")]
    assert abs(ours(pairs)[0] - theirs(without, pairs)[0]) > 1e-3
    assert tokenizer.eot_token in without.tok_encode(pairs[0][0])
    assert tokenizer.eot_token not in encode(*pairs[0])[0]

    # an answer longer than the context is refused by both
    pairs = [("a", " b" * (BLOCK_SIZE + 1))]
    with pytest.raises(AssertionError):
        theirs(without, pairs)
    with pytest.raises(prepare.DataError, match=f"{BLOCK_SIZE + 1} tokens"):
        ours(pairs)
    pairs = [("a" + " a" * 99, " b" * BLOCK_SIZE)]         # and one that fills it is not
    assert ours(pairs) == pytest.approx(theirs(without, pairs), rel=1e-5)


def test_standard_errors():
    draw = np.random.default_rng(0)
    correct, nats, words = draw.random(200) < 0.3, draw.normal(3, 1, 200), draw.integers(50, 150, 200)
    columns = dict(items=np.ones(200), correct=correct, nats=nats * words, words=words, tokens=words, bytes=words)
    assert e.scores("choice", columns | dict(correct_norm=correct))["acc"][1] == pytest.approx(
        100 * metrics.mean_stderr(correct.astype(float).tolist()))
    # perplexities: what many draws of the same items vary by
    lambada = e.scores("cloze", columns | dict(nats=nats))["perplexity"]
    again = draw.integers(0, 200, (4000, 200))
    assert lambada == pytest.approx((math.exp(nats.mean()), np.exp(nats[again].mean(1)).std()), rel=0.1)
    wikitext = e.scores("text", columns)["word_perplexity"]
    drawn = np.exp((nats * words)[again].sum(1) / words[again].sum(1))
    assert wikitext == pytest.approx((math.exp((nats * words).sum() / words.sum()), drawn.std()), rel=0.1)
