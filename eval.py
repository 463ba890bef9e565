"""Evaluate checkpoints as lm-evaluation-harness does, and continue texts with them.

    python eval.py --ckpt out/quickstart.pt                     four tasks, and its own validation bin
    python eval.py --ckpt out/a.pt out/b.pt gpt2 --tasks lambada piqa --limit 200 --out scores.json
    python eval.py --ckpt out/a.pt --tasks none --data data/mine/val.bin --block_size 512
    python eval.py --ckpt out/a.pt --bpb "ArXiv=arxiv.jsonl.zst" "Pile CC=data/cc/val.bin"
    python eval.py --ckpt out/a.pt --audit data/mine            which test items its training data held
    torchrun --nproc_per_node=8 eval.py --ckpt out/1.1B.pt      the items shared out over 8 GPUs
    python eval.py --ckpt out/quickstart.pt --prompt "def main():"

A checkpoint is a .pt of train.py or grow.py, a Hugging Face folder, or gpt2 ... gpt2-xl. Test sets are
read from --eval_data DIR, or downloaded once into data/raw/eval.

Each log-likelihood is that of lm-evaluation-harness 0.4.13, zero-shot, tests/test_harness.py compares
them one by one. Two known differences: with its logits cache on (the default) the harness scores a
request wrongly where another one's context is this one's with some of its continuation; and it reads a
literal <|endoftext|> in a text as the token, here it is text.
"""
import json
import math
import os
import re
import sys
from contextlib import nullcontext
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import OPENAI, GPT, ModelError, load
from prepare import (TEST_SETS, DataError, NoBin, Parser, count_words, detokenise, get_tokenizer, open_bin, open_data,
                     sha256_of, test_files, test_grams, test_items, texts, token_bytes, write_whole)


class EvalError(ValueError):
    """A combination that cannot be evaluated; the message is one line for the user."""


def open_checkpoint(name, device):
    """(model, meta) of a .pt, a Hugging Face folder or one of OpenAI's names. Raises ModelError."""
    if name in OPENAI or os.path.isdir(name):
        return GPT.from_pretrained(name).to(device).eval(), {"tokenizer": "gpt2"}
    return load(name, device)


# ---------------------------------------------------------------------------------------------
# The tasks: what is scored


def lambada(item):
    """The last word, and the single space before it, after all the others."""
    *words, last = item["text"].split(" ")
    return " ".join(words), [f" {last}"]


def piqa(item):
    return f"Question: {item['goal']}\nAnswer:", [f" {item['sol1']}", f" {item['sol2']}"]


def hellaswag(item):
    def clean(text):        # of the marks that WikiHow's articles came with
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
    context = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    return context, [f" {clean(ending)}" for ending in item["endings"]]


REQUESTS = {"lambada": lambada, "piqa": piqa, "hellaswag": hellaswag}


def encode_pair(tokenizer, context, continuation):
    """(context, continuation) as two lists of tokens, divided where the context's own tokens end.

    White space at the context's end goes to the continuation, as it is part of its first token; an
    empty context becomes <|endoftext|>.
    """
    text = context.rstrip()
    if not text:
        return [tokenizer.eot_token], tokenizer.encode_ordinary(context + continuation)
    tokens = tokenizer.encode_ordinary(text)
    return tokens, tokenizer.encode_ordinary(context + continuation)[len(tokens):]


def rolling(tokens, eot, block_size):
    """Pairs (context, continuation) whose continuations are, joined, the tokens: each token is predicted
    once, the first from <|endoftext|>; the last window is filled up with context."""
    stream = [eot, *tokens]
    ends = [min(i + block_size, len(tokens)) for i in range(0, len(tokens), block_size)]
    return [(stream[max(0, end - block_size):i + 1], stream[i + 1:end + 1])
            for i, end in zip(range(0, len(tokens), block_size), ends)]


# ---------------------------------------------------------------------------------------------
# Log-likelihoods


def make_batches(requests, block_size, batch_size):
    """The requests' numbers as batches (prefix, groups), of at most batch_size rows where groups allow.

    A group is the requests, one after the other, that have a context in common: all of it but the
    last token is their prefix, computed once. The prefixes of a batch are equally long, so that only what
    follows them is padded, and rows of similar length come together. Requests that stand alone, or
    are too long to keep all of their context, have a prefix of 0 tokens.
    """
    def length(i):
        return sum(map(len, requests[i]))

    groups = []         # (tokens of prefix, longest row, numbers of requests)
    for _, same in groupby(range(len(requests)), key=lambda i: requests[i][0]):
        same = list(same)
        if len(same) > 1 and max(map(length, same)) <= block_size + 1:
            groups.append((len(requests[same[0]][0]) - 1, max(map(length, same)), same))
        else:
            groups += [(0, length(i), [i]) for i in same]
    batches = []
    for prefix, alike in groupby(sorted(groups, reverse=True), key=lambda group: group[0]):
        rows = batch_size
        for _, _, group in alike:
            if rows + len(group) > batch_size:
                batches.append((prefix, []))
                rows = 0
            batches[-1][1].append(group)
            rows += len(group)
    return batches


@torch.no_grad()
def log_likelihoods(model, requests, block_size, batch_size, autocast=nullcontext(), what="scoring"):
    """The log-probability (n,) of each continuation in nats, fp64, and whether each of its tokens is the
    likeliest one, (n,) bool.

    requests: pairs (context, continuation) of token lists, of which the last block_size + 1 tokens
    count. Softmax in fp32, over the vocabulary without its padding. The device is waited for once, at the end;
    under torchrun the batches are shared out. Raises EvalError.
    """
    for number, (_, continuation) in enumerate(requests, 1):
        if not 0 < len(continuation) <= block_size:
            raise EvalError(f"{what}, request {number}: a continuation of {len(continuation)} tokens, expected 1 to "
                            f"block_size={block_size}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    weight = model.wte.weight[:model.config.vocab_size]
    chunk = max(1, 2**23 // len(weight))        # rows whose logits exist at a time: 32 MiB

    def on_device(values):
        x = torch.as_tensor(values)
        return x.pin_memory().to(weight.device, non_blocking=True) if weight.is_cuda else x.to(weight.device)

    order, losses, hits = [], [], []            # the requests' numbers; (M,) values of their tokens
    batches = make_batches(requests, block_size, batch_size)[rank::world]
    for prefix, groups in tqdm(batches, desc=what, unit="batch", leave=False, disable=rank > 0):
        numbers = [i for group in groups for i in group]
        rows = [[*requests[i][0], *requests[i][1]][-(block_size + 1):][prefix:] for i in numbers]
        T = max(map(len, rows)) - 1
        idx = np.zeros((len(rows), T), dtype=np.int64)
        at = []                                 # where in idx, flattened, the next token is scored
        for b, (i, row) in enumerate(zip(numbers, rows)):
            idx[b, :len(row) - 1] = row[:-1]
            at += range(b * T + len(row) - 1 - len(requests[i][1]), b * T + len(row) - 1)
        targets = on_device([token for i in numbers for token in requests[i][1]])       # (M,)
        cache = [[] for _ in model.h] if prefix else None
        with autocast:
            if prefix:
                model.hidden(on_device([requests[group[0]][0][:prefix] for group in groups]), cache)
                owner = on_device([g for g, group in enumerate(groups) for _ in group])
                cache = [[t[owner] for t in past] for past in cache]        # (groups, H, S, D) to (B, H, S, D)
            x = model.hidden(on_device(idx), cache).flatten(0, 1)[on_device(at)]        # (M, C)
            for h, target in zip(x.split(chunk), targets.split(chunk)):
                logits = F.linear(h, weight).float()
                losses.append(F.cross_entropy(logits, target, reduction="none"))
                hits.append(logits.argmax(-1) == target)
        order += numbers

    result = np.zeros((2, len(requests)))
    if order:
        starts = np.cumsum([0] + [len(requests[i][1]) for i in order[:-1]])
        result[0, order] = -np.add.reduceat(torch.cat(losses).double().cpu().numpy(), starts)
        result[1, order] = np.logical_and.reduceat(torch.cat(hits).cpu().numpy(), starts)
    logp, greedy = sum_over_processes(result)
    return logp, greedy > 0


def sum_over_processes(values):
    """Of an array or a number; the same on every process."""
    total = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        total = total.cuda() if dist.get_backend() == "nccl" else total
        dist.all_reduce(total)
    return total.cpu().numpy()


def text_nats(model, tokenizer, texts, block_size, batch_size, autocast=nullcontext(), what="scoring"):
    """(nats, tokens) of whole texts, each (n,): rolling log-likelihoods, negated, and how many tokens they cover."""
    tokens = [tokenizer.encode_ordinary(text) for text in texts]
    windows = [rolling(t, tokenizer.eot_token, block_size) for t in tokens]
    requests = [window for text in windows for window in text]
    logp, _ = log_likelihoods(model, requests, block_size, batch_size, autocast, what)
    owner = [n for n, text in enumerate(windows) for _ in text]
    return np.bincount(owner, -logp, len(texts)), np.array([len(t) for t in tokens])


def score(model, tokens, tokenizer, block_size, batch_size, autocast=nullcontext()):
    """Total loss of a token stream (n,), and what to divide it by: a dict of nats, tokens, words, bytes.

    Windows of block_size do not overlap; every token is predicted once, the first of the stream
    from <|endoftext|>, and each <|endoftext|> between documents counts as a token that has no
    bytes and no words. Raises ModelError where block_size is more than learned positions allow.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    stream = np.append(np.uint16(tokenizer.eot_token), tokens)
    starts = np.arange(0, len(tokens), block_size)[rank::world]
    nats = 0.0
    for i in tqdm(range(0, len(starts), batch_size), desc="scoring", unit="batch", leave=False, disable=rank > 0):
        nats += model.total_loss(stream, starts[i:i + batch_size], block_size, batch_size, autocast)
    return dict(nats=float(sum_over_processes(nats)), tokens=len(tokens), words=count_words(tokens, tokenizer),
                bytes=int(token_bytes(tokenizer)[tokens].sum()))


def summary(counts):
    """Loss in nats per token, perplexity, word-adjusted perplexity (total loss over words,
    exponentiated) and bits per byte of what score returns."""
    nats = counts["nats"]
    return {"loss": nats / counts["tokens"], "perplexity": exp(nats / counts["tokens"]),
            "word perplexity": exp(nats / max(1, counts["words"])),
            "bits per byte": nats / math.log(2) / max(1, counts["bytes"])}


def exp(x):
    return math.inf if x > 700 else math.exp(x)


# ---------------------------------------------------------------------------------------------
# Scores

METRICS = {     # task: metric: the sum of one column over that of another; of nats its exponential
    "lambada": dict(acc=("correct", "items"), perplexity=("nats", "items")),
    "piqa": dict(acc=("correct", "items"), acc_norm=("correct_norm", "items")),
    "hellaswag": dict(acc=("correct", "items"), acc_norm=("correct_norm", "items")),
    "wikitext2": dict(token_perplexity=("nats", "tokens"), word_perplexity=("nats", "words"),
                      byte_perplexity=("nats", "bytes")),
}


def run_task(task, items, model, tokenizer, block_size, batch_size, autocast=nullcontext()):
    """What each item got: columns (n,) by the names in METRICS. Raises EvalError."""
    how = block_size, batch_size, autocast, task
    columns = dict(items=np.ones(len(items)))
    if task == "wikitext2":         # scored as ordinary text, divided by what the page as published holds
        pages = [item["page"] for item in items]
        nats, tokens = text_nats(model, tokenizer, [detokenise(page) for page in pages], *how)
        words = np.array([len(re.split(r"\s+", page)) for page in pages])
        return columns | dict(nats=nats, tokens=tokens, words=words, bytes=count_bytes(pages))
    asked = [REQUESTS[task](item) for item in items]
    requests = [encode_pair(tokenizer, context, choice) for context, choices in asked for choice in choices]
    logp, greedy = log_likelihoods(model, requests, *how)
    if task == "lambada":
        return columns | dict(correct=greedy, nats=-logp)
    logp = np.split(logp, np.cumsum([len(choices) for _, choices in asked])[:-1])       # by items
    characters = [np.array([len(choice) - 1 for choice in choices]) for _, choices in asked]    # but the first space
    gold = np.array([item["label"] for item in items])
    # of equals argmax takes the first
    return columns | dict(correct=np.array([x.argmax() for x in logp]) == gold,
                          correct_norm=np.array([(x / n).argmax() for x, n in zip(logp, characters)]) == gold)


def count_bytes(texts):
    return np.array([len(text.encode("utf-8")) for text in texts])


def ratio(x, w):
    """(sum x / sum w, its standard error) over n independent items.

    With w = 1 the mean and its usual standard error; otherwise that of a ratio estimate, to first
    order (Cochran 1977, 6.4).
    """
    n = len(x)
    r = float(x.sum() / w.sum()) if n else math.nan
    return r, float(math.sqrt(n / (n - 1) * ((x - r * w)**2).sum()) / w.sum()) if n > 1 else math.nan


def scores(task, columns, chosen=slice(None)):
    """{metric: (value, standard error)} of the chosen items, accuracies in percent.

    A perplexity's error is the perplexity times that of its logarithm, to first order; the harness draws
    bootstrap samples for LAMBADA's, and states none for WikiText's.
    """
    result = {}
    for metric, (over, under) in METRICS[task].items():
        value, error = ratio(columns[over][chosen], columns[under][chosen])
        result[metric] = (exp(value), exp(value) * error) if over == "nats" else (100 * value, 100 * error)
    return result


def validation_bins(data, vocab_size):
    """({name: tokens}, meta) of a .bin, or of the validation of a data set as train.py takes them. Raises DataError."""
    if str(data).endswith(".bin"):
        tokens, meta = open_bin(data, vocab_size)
        return {data: tokens}, meta
    sources, meta = open_data(data, "val", vocab_size)
    return {f"{name}/val.bin": np.concatenate(bins) for name, bins in sources.items()}, meta


def text_documents(path):
    """The documents of a bin, or of any file that prepare.py reads, as texts. Raises DataError."""
    if not path.endswith(".bin"):
        return texts(path)
    tokens, meta = open_bin(path)
    tokenizer = get_tokenizer(meta["tokenizer"])
    return (tokenizer.decode(document.tolist()) for document in bin_documents(tokens, tokenizer.eot_token))


def bin_documents(tokens, eot, size=2**22, overlap=256):
    """The documents of a token stream (n,), read `size` tokens at a time; a longer one comes in pieces,
    each of which begins `overlap` tokens before the last one's end."""
    start = 0
    while start < len(tokens):
        part = np.asarray(tokens[start:start + size])
        last = start + len(part) == len(tokens)
        ends = np.flatnonzero(part == eot)
        if last or not len(ends):
            ends = np.append(ends, len(part))
        for a, b in zip([0, *(ends[:-1] + 1)], ends):
            if a < b:
                yield part[a:b]
        start = len(tokens) if last else start + (ends[-1] + 1 if ends[-1] < len(part) else size - overlap)


def audit(data, tasks, folder):
    """{(task, number of the item): an excerpt} of the test items that share a 13-gram with the training bins of data.

    Holds the test items in memory, and the documents one at a time. Raises DataError.
    """
    sources, meta = open_data(data, "train")
    tokenizer = get_tokenizer(meta["tokenizer"])
    grams, found = test_grams(tasks, folder), {}
    for tokens in sum(sources.values(), []):
        with tqdm(total=len(tokens), desc=f"auditing {data}", unit="tok", unit_scale=True, leave=False) as bar:
            for document in bin_documents(tokens, tokenizer.eot_token):
                text = tokenizer.decode(document.tolist())
                for start, end, gram in grams.find(text):
                    for item in grams.grams[gram]:
                        found.setdefault(item, text[max(0, start - 40):end + 40])
                bar.update(len(document))
    return found


# ---------------------------------------------------------------------------------------------
# The tables

QUOTED = [      # what has been published of OpenAI's models; none of it is measured here
    {"checkpoint": "GPT-2 large (quoted)", "lambada acc": 47.6, "lambada perplexity": 12.97, "piqa acc": 70.3,
     "hellaswag acc": 36.40, "Pile CC": 0.9582, "OpenWebText2": 0.9539, "Wikipedia": 0.9795, "ArXiv": 1.1778,
     "BookCorpus2": 1.0061},
    {"checkpoint": "GPT-2 XL (quoted)", "lambada acc": 51.21, "lambada perplexity": 10.63, "piqa acc": 70.78,
     "hellaswag acc": 40.03, "Pile CC": 0.9355, "OpenWebText2": 0.9171, "Wikipedia": 0.9655, "ArXiv": 1.1381,
     "BookCorpus2": 0.9783},
]


def markdown(rows):
    """Rows (dicts; the first one's keys are the columns) as a table in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(row.get(key)) for key in rows[0]] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value):
    """A pair is a value and its standard error."""
    if value is None or isinstance(value, tuple) and math.isnan(value[0]):
        return ""                       # nothing was measured
    if isinstance(value, tuple):
        return f"{cell(value[0])} ± {value[1]:.{4 if value[0] < 10 else 2}f}"
    if isinstance(value, float):
        return f"{value:.4f}" if value < 10 else f"{value:.2f}" if value < 1e9 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) else value


def report(tables, items, leaks):
    """What was measured, and beside it what has been published, as Markdown."""
    text = []
    for rows in filter(None, tables.values()):
        text.append(markdown(rows + [row for row in QUOTED if row.keys() & rows[0].keys() > {"checkpoint"}]))
    if items:
        text.append("zero-shot, ± standard error; items: " + ", ".join(f"{task} {n:,}" for task, n in items.items()))
    for task in items:
        found = [(number, excerpt) for (of, number), excerpt in sorted(leaks.items()) if of == task]
        text += [f"leaked, {task} {number}: ... {' '.join(excerpt.split())} ..." for number, excerpt in found[:3]]
    return "\n".join(text)


def write_json(path, values):
    """Replaces path only when all is written; what is no number in JSON becomes null."""
    values = json.loads(json.dumps(values), parse_constant=lambda _: None)
    write_whole(Path(path), json.dumps(values, indent=1))


def leak_rows(name, task, columns, leaks):
    """A row for each metric of a task: on all items, on those that are clean and on those that are not."""
    dirty = np.array([(task, number) in leaks for number in range(len(columns["items"]))])
    parts = {"all": dirty | True, "clean": ~dirty, "dirty": dirty}
    values = {part: scores(task, columns, chosen) for part, chosen in parts.items()}
    counts = {f"{part} items": int(chosen.sum()) for part, chosen in parts.items()}
    return [{"checkpoint": name, "score": f"{task} {metric}", **counts,
             **{part: values[part][metric] for part in parts}} for metric in METRICS[task]]


def bits_per_byte(texts, model, tokenizer, *how):
    """(bits per byte of the texts, standard error)."""
    nats, _ = text_nats(model, tokenizer, texts, *how)
    return ratio(nats / math.log(2), count_bytes(texts))


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", nargs="+", required=True, help="one row of the tables each")
    parser.add_argument("--tasks", nargs="+", default=list(TEST_SETS), metavar="TASK",
                        help=f"of {', '.join(TEST_SETS)} (default: all), or none")
    parser.add_argument("--eval_data", metavar="DIR", help="where the test sets lie; default: downloaded")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    parser.add_argument("--data", metavar="DATA", help="a bin or data set to score, or none; default: the run's own")
    parser.add_argument("--bpb", nargs="+", default=[], metavar="NAME=FILE", help="bits per byte of these documents")
    parser.add_argument("--max_docs", type=int, default=3000, help="of each of these files (default 3000)")
    parser.add_argument("--audit", metavar="DATA", help="a data set whose training bins may hold test items")
    parser.add_argument("--out", metavar="FILE.json", help="all that was measured, with each file's sha256")
    parser.add_argument("--block_size", type=int, metavar="T", help="context; default: the model's")
    parser.add_argument("--batch_size", type=int, help="sequences at once (default: 64 on a GPU, else 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt", metavar="TEXT", help="continue this text instead")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens only")
    parser.add_argument("--top_p", type=float, help="sample among the fewest tokens of this probability")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    for key in ("limit", "max_docs", "block_size", "batch_size", "max_new_tokens", "top_k"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise EvalError(f"--{key}={getattr(args, key)}: expected at least 1")
    if args.temperature < 0:
        raise EvalError(f"--temperature={args.temperature}: expected at least 0")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise EvalError(f"--top_p={args.top_p}: expected more than 0 and at most 1")
    args.tasks = [] if args.tasks == ["none"] or args.prompt is not None else args.tasks
    for task in args.tasks:
        if task not in TEST_SETS:
            raise EvalError(f"--tasks {task}: expected some of {', '.join(TEST_SETS)}, or none")
    if args.audit and not args.tasks:
        raise EvalError(f"--audit {args.audit}: there are no test items to look for with --tasks none")
    for word in args.bpb:
        if not all(word.partition("=")):
            raise EvalError(f"--bpb {word}: expected NAME=FILE")
    return args


def main(argv):
    args = parse(argv)
    # one process, or one of torchrun's
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    batch_size = args.batch_size or (64 if device == "cuda" else 8)
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    # what to score
    try:
        if rank:
            dist.barrier()      # the first process downloads
        files = [str(path) for task in args.tasks for path in test_files(task, args.eval_data)]
        if dist.is_initialized() and not rank:
            dist.barrier()
    except DataError as e:
        raise EvalError(f"{e}; --tasks none does without test sets") from None
    items = {task: list(islice(test_items(task, args.eval_data), args.limit)) for task in args.tasks}
    components = dict(word.split("=", 1) for word in args.bpb)
    samples = {name: list(islice(text_documents(file), args.max_docs)) for name, file in components.items()}
    leaks = audit(args.audit, args.tasks, args.eval_data) if args.audit else {}

    tables = {"tasks": [], "leaks": [], "bits per byte": [], "own data": []}
    try:
        for name in args.ckpt:
            model, meta = open_checkpoint(name, device)
            tokenizer = get_tokenizer(meta["tokenizer"])
            block_size = args.block_size or model.config.block_size
            if tokenizer.n_vocab > model.config.vocab_size:
                raise EvalError(f"{name}: a vocabulary of {model.config.vocab_size}, too small for "
                                f"{meta['tokenizer']} tokens")
            if model.config.pos == "learned" and block_size > model.config.block_size:
                raise EvalError(f"--block_size={block_size}: {name}'s learned positions end at "
                                f"block_size={model.config.block_size}")
            if args.prompt is not None:
                idx = tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]
                generator = torch.Generator(device).manual_seed(args.seed)
                with autocast:
                    idx = model.generate(torch.tensor([idx], device=device), args.max_new_tokens, args.temperature,
                                         args.top_k, generator, args.top_p)
                print(tokenizer.decode(idx[0].tolist()))
                continue

            runs = [meta, *meta.get("lineage", [])]     # its own and its ancestors'
            who = {"checkpoint": name, "parameters": model.num_params(), "context": block_size,
                   "trained on": sum(run.get("tokens", 0) for run in runs),
                   "FLOPs": float(sum(run.get("flops", 0) for run in runs)) or None}
            how = model, tokenizer, block_size, batch_size, autocast
            results = {task: run_task(task, items[task], *how) for task in args.tasks}
            if results:
                tables["tasks"].append(who | {f"{task} {metric}": value for task, columns in results.items()
                                              for metric, value in scores(task, columns).items()})
            if args.audit:
                tables["leaks"] += [row for task in results for row in leak_rows(name, task, results[task], leaks)]
            if samples:
                tables["bits per byte"].append(who | {part: bits_per_byte(documents, *how, part)
                                                      for part, documents in samples.items()})
            data = None if args.data == "none" else args.data or meta.get("data")
            if not data and not (results or samples):
                raise EvalError(f"{name}: says nothing of its own data; name some with --data")
            try:
                bins, bin_meta = validation_bins(data, model.config.vocab_size) if data else ({}, meta)
            except NoBin:
                if args.data or not (results or samples):
                    raise
                bins, bin_meta = {}, meta
            if not bins and args.data != "none" and rank == 0:
                print(f"{name}: its own data ({data or 'none named'}) is not here; --data names other")
            if bin_meta["tokenizer"] != meta["tokenizer"]:
                raise EvalError(f"{data}: holds {bin_meta['tokenizer']} tokens, but {name} reads {meta['tokenizer']} "
                                "tokens")
            for path, tokens in bins.items():
                counts = score(model, tokens, tokenizer, block_size, batch_size, autocast)
                tables["own data"].append(who | dict(data=path, tokens=counts["tokens"]) | summary(counts))
    finally:            # an error at one checkpoint does not lose the others
        if rank == 0 and any(tables.values()):
            n_items = {task: len(items[task]) for task in items}
            print(report(tables, n_items, leaks))
            if args.out:
                write_json(args.out, dict(
                    tables=tables, items=n_items, dtype=args.dtype, quoted=QUOTED,
                    sha256={file: sha256_of(file) for file in (*files, *components.values())},
                    leaked=[[*item, excerpt] for item, excerpt in sorted(leaks.items())]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)         # as in train.py: gloo's threads can abort Python's own end


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (EvalError, DataError, ModelError, OSError) as e:
        sys.exit(f"eval.py: {e}" if os.environ.get("RANK", "0") == "0" else 1)
