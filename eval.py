"""Score checkpoints as lm-evaluation-harness does, or continue a text with them.

    python eval.py --ckpt out/quickstart.pt                     four tasks, and its own validation bin
    python eval.py --ckpt out/a.pt gpt2 --tasks lambada,piqa --limit 200 --out scores.json
    python eval.py --ckpt out/a.pt --tasks none --data data/mine/val.bin --block_size 512
    python eval.py --ckpt out/a.pt --bpb "ArXiv=arxiv.jsonl.zst" "Pile CC=data/cc/val.bin"
    python eval.py --ckpt out/a.pt --audit data/mine            which test items its training data held
    torchrun --nproc_per_node=8 eval.py --ckpt out/1.1B.pt      the items shared out over 8 GPUs
    python eval.py --ckpt out/quickstart.pt --prompt "def main():"

A checkpoint is a .pt of train.py or grow.py, a Hugging Face folder, or a name on its hub. Test sets are
read from --eval_data DIR, or downloaded once into data/raw/eval. Each log-likelihood is that of
lm-evaluation-harness 0.4.13, zero-shot; tests/test_harness.py compares them, and shows two differences.

A new task is one function and one row of TASKS; its items are read from DIR/arc.jsonl, an object a line:

    def arc(item):
        return item["question"], [f" {answer}" for answer in item["answers"]], item["label"]

    "arc": (arc, "choice"),
"""
import json
import math
import os
import re
import sys
from contextlib import nullcontext
from datetime import timedelta
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import ModelError, load
from prepare import (TEST_SETS, DataError, NoBin, Parser, count_words, detokenise, get_tokenizer, open_bin,
                     open_data, sha256_of, test_files, test_grams, test_items, texts, token_bytes,
                     write_whole)


class EvalError(ValueError):
    """Something that cannot be evaluated; the message is one line for the user."""


# ---------------------------------------------------------------------------------------------
# Tasks. A function turns an item into an example: (context, answers, number of the right answer),
# or for the kind "text" (text to score, text as published).


def lambada(item):
    """The last word, with the space before it, after all the others."""
    *words, last = item["text"].split(" ")
    return " ".join(words), [f" {last}"], 0


def piqa(item):
    return f"Question: {item['goal']}\nAnswer:", [f" {item['sol1']}", f" {item['sol2']}"], item["label"]


def hellaswag(item):
    def clean(text):        # removes WikiHow's marks
        text = text.strip().replace(" [title]", ". ")
        return re.sub(r"\[.*?\]", "", text).replace("  ", " ")
    context = clean(f"{item['activity_label']}: {item['ctx_a']} {item['ctx_b'].capitalize()}")
    return context, [f" {clean(ending)}" for ending in item["endings"]], item["label"]


def wikitext2(item):
    return detokenise(item["page"]), item["page"]


TASKS = {       # name: (function, kind)
    "lambada": (lambada, "cloze"),
    "piqa": (piqa, "choice"),
    "hellaswag": (hellaswag, "choice"),
    "wikitext2": (wikitext2, "text"),
}
METRICS = {     # kind: {metric: (a, b)}, the sum of column a over that of b; for nats its exponential
    "cloze": dict(acc=("correct", "items"), perplexity=("nats", "items")),
    "choice": dict(acc=("correct", "items"), acc_norm=("correct_norm", "items")),
    "text": dict(token_perplexity=("nats", "tokens"), word_perplexity=("nats", "words"),
                 byte_perplexity=("nats", "bytes")),
    "documents": {"": ("bits", "bytes")},       # of --bpb
}


def make_requests(kind, example, tokenizer, block_size):
    """The requests of an example: pairs (context, continuation) of token lists.

    A text becomes windows that predict each token once, the first from <|endoftext|>; the last one is
    filled up with context. Other examples have a request for each answer. White space at the context's
    end goes to the answer, as part of its first token; an empty context becomes <|endoftext|>.
    """
    if kind in ("text", "documents"):
        tokens = tokenizer.encode_ordinary(example[0])
        stream, n = [tokenizer.eot_token, *tokens], len(tokens)
        spans = [(i, min(i + block_size, n)) for i in range(0, n, block_size)]
        return [(stream[max(0, end - block_size):i + 1], stream[i + 1:end + 1]) for i, end in spans]
    context, answers, _ = example
    tokens = tokenizer.encode_ordinary(context.rstrip())
    both = [tokenizer.encode_ordinary(context + answer) for answer in answers]
    return [(tokens or [tokenizer.eot_token], whole[len(tokens):]) for whole in both]


# ---------------------------------------------------------------------------------------------
# Log-likelihoods


def make_batches(requests, block_size, batch_size):
    """Batches (prefix, groups) of at most batch_size rows, where groups allow.

    A group is the numbers of neighbouring requests with the same context: all of it but the last token is
    their prefix, computed once. The prefixes of a batch are equally long, so that only what follows them
    is padded. A request that stands alone or is too long for the context has a prefix of 0 tokens.
    """
    lengths = [len(context) + len(continuation) for context, continuation in requests]
    groups = []         # (tokens of prefix, tokens of the longest row, numbers of the requests)
    for _, same in groupby(range(len(requests)), key=lambda i: requests[i][0]):
        same = list(same)
        longest = max(lengths[i] for i in same)
        if len(same) > 1 and longest <= block_size + 1:
            groups.append((len(requests[same[0]][0]) - 1, longest, same))
        else:
            groups += [(0, lengths[i], [i]) for i in same]
    batches, rows = [], 0
    for prefix, _, same in sorted(groups, reverse=True):        # rows of similar length come together
        if not batches or batches[-1][0] != prefix or rows + len(same) > batch_size:
            batches.append((prefix, []))
            rows = 0
        batches[-1][1].append(same)
        rows += len(same)
    return batches


@torch.no_grad()
def log_likelihoods(model, requests, block_size, batch_size, autocast=nullcontext(), what="scoring"):
    """(log-probability (n,) of each continuation in nats, fp64; whether its tokens are the likeliest (n,)).

    The last block_size + 1 tokens of a request count. Softmax in fp32, over the vocabulary without padding.
    The device is waited for once, at the end; under torchrun the batches are shared out. Raises EvalError.
    """
    for number, (_, continuation) in enumerate(requests, 1):
        if not 0 < len(continuation) <= block_size:
            raise EvalError(f"{what} {number}: {len(continuation)} tokens, expected 1 to {block_size}")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    weight = model.wte.weight[:model.config.vocab_size]
    chunk = max(1, 2**23 // len(weight))        # positions whose logits exist at a time: 32 MiB

    def on_device(values):
        x = torch.as_tensor(values)
        return x.pin_memory().to(weight.device, non_blocking=True) if weight.is_cuda else x.to(weight.device)

    order, losses, hits = [], [], []            # numbers of the requests; values (M,) of their tokens
    batches = make_batches(requests, block_size, batch_size)[rank::world]
    for prefix, groups in tqdm(batches, desc=what, unit="batch", leave=False, disable=rank > 0):
        numbers = [i for same in groups for i in same]
        rows = [np.concatenate(requests[i])[-(block_size + 1):][prefix:] for i in numbers]
        tokens = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)             # (B, T + 1)
        scored = np.zeros((len(rows), tokens.shape[1] - 1), dtype=bool)                 # (B, T)
        for b, (i, row) in enumerate(zip(numbers, rows)):
            tokens[b, :len(row)] = row
            scored[b, len(row) - 1 - len(requests[i][1]):len(row) - 1] = True
        idx, targets, at = map(on_device, (tokens[:, :-1], tokens[:, 1:][scored], np.flatnonzero(scored)))
        cache = [[] for _ in model.h] if prefix else None
        with autocast:
            if prefix:
                model.hidden(on_device([requests[same[0]][0][:prefix] for same in groups]), cache)
                owner = on_device([g for g, same in enumerate(groups) for _ in same])
                cache = [[t[owner] for t in past] for past in cache]    # (groups, H, S, D) to (B, H, S, D)
            x = model.hidden(idx, cache).flatten(0, 1)[at]              # (B, T, C) to (M, C)
            for h, target in zip(x.split(chunk), targets.split(chunk)):
                logits = F.linear(h, weight).float()
                losses.append(F.cross_entropy(logits, target, reduction="none"))
                hits.append(logits.argmax(-1) == target)
        order += numbers

    result = np.zeros((2, len(requests)))
    if order:
        starts = np.cumsum([0] + [len(requests[i][1]) for i in order[:-1]])
        result[0, order] = -np.add.reduceat(torch.cat(losses).cpu().double().numpy(), starts)
        result[1, order] = np.logical_and.reduceat(torch.cat(hits).cpu().numpy(), starts)
    if dist.is_initialized():
        total = torch.from_numpy(result).to(weight.device)
        dist.all_reduce(total)
        result = total.cpu().numpy()
    return result[0], result[1] > 0


# ---------------------------------------------------------------------------------------------
# Scores


def run_task(kind, examples, model, tokenizer, block_size, batch_size, autocast=nullcontext(), what="task"):
    """What each example got: columns (n,) by the names in METRICS. Raises EvalError."""
    requests = [make_requests(kind, example, tokenizer, block_size) for example in examples]
    logp, greedy = log_likelihoods(model, list(chain(*requests)), block_size, batch_size, autocast, what)
    logp = np.split(logp, np.cumsum([len(own) for own in requests])[:-1])       # an array for each example
    nats = -np.array([x.sum() for x in logp])
    columns = dict(items=np.ones(len(examples)), nats=nats, bits=nats / math.log(2), correct=greedy)
    if kind in ("text", "documents"):           # words and bytes are those of the text as published
        columns["tokens"] = np.array([sum(len(continuation) for _, continuation in own) for own in requests])
        columns["words"] = np.array([len(re.split(r"\s+", published)) for _, published in examples])
        columns["bytes"] = np.array([len(published.encode()) for _, published in examples])
    elif kind == "choice":      # argmax takes the first of equals; the space before an answer is no character
        right = np.array([label for _, _, label in examples])
        characters = [np.array([len(answer) - 1 for answer in answers]) for _, answers, _ in examples]
        columns["correct"] = np.array([x.argmax() for x in logp]) == right
        columns["correct_norm"] = np.array([(x / n).argmax() for x, n in zip(logp, characters)]) == right
    return columns


def ratio(x, w):
    """(sum x / sum w, its standard error) over n independent items.

    With w = 1 the mean and its usual standard error; otherwise that of a ratio estimate, to first
    order (Cochran 1977, 6.4).
    """
    n = len(x)
    r = float(x.sum() / w.sum()) if n else math.nan
    return r, float(math.sqrt(n / (n - 1) * ((x - r * w)**2).sum()) / w.sum()) if n > 1 else math.nan


def scores(kind, columns, chosen=slice(None)):
    """{metric: (value, standard error)} of the chosen items, accuracies in percent.

    A perplexity's error is the perplexity times that of its logarithm, to first order; the harness draws
    bootstrap samples for LAMBADA's, and states none for WikiText's.
    """
    result = {}
    for metric, (a, b) in METRICS[kind].items():
        value, error = ratio(columns[a][chosen], columns[b][chosen])
        if a == "nats":
            value = math.exp(min(value, 700))           # a perplexity beyond 1e304 stays there
            error *= value
        scale = 100 if a.startswith("correct") else 1
        result[metric] = scale * value, scale * error
    return result


def leak_rows(name, task, kind, columns, leaks):
    """A row for each metric: on all items of a task, on the clean ones, and on the leaked ("dirty") ones."""
    dirty = np.array([(task, number) in leaks for number in range(len(columns["items"]))])
    rows = {metric: {"checkpoint": name, "score": f"{task} {metric}"} for metric in METRICS[kind]}
    for part, chosen in (("all", dirty | True), ("clean", ~dirty), ("dirty", dirty)):
        for metric, value in scores(kind, columns, chosen).items():
            rows[metric] |= {f"{part} items": int(chosen.sum()), part: value}
    return rows.values()


def score(tokens, model, tokenizer, block_size, batch_size, autocast=nullcontext()):
    """Loss in nats per token, perplexity per token and word, bits per byte of a token stream (n,).

    Windows of block_size do not overlap. Each token is predicted once, the first from <|endoftext|>; an
    <|endoftext|> between documents is a token without bytes and words.
    """
    stream = np.append(np.uint16(tokenizer.eot_token), tokens)
    starts = range(0, len(tokens), block_size)
    windows = [([int(stream[i])], stream[i + 1:i + block_size + 1]) for i in starts]
    nats = -float(log_likelihoods(model, windows, block_size, batch_size, autocast)[0].sum())
    words, size = max(1, count_words(tokens, tokenizer)), max(1, int(token_bytes(tokenizer)[tokens].sum()))
    return {"tokens": len(tokens), "loss": nats / len(tokens), "perplexity": math.exp(nats / len(tokens)),
            "word perplexity": math.exp(min(nats / words, 700)), "bits per byte": nats / math.log(2) / size}


def bin_texts(tokens, meta, size=2**22, overlap=256):
    """The documents of a bin (n,) as texts. One of more than `size` tokens comes in pieces, each of which
    begins `overlap` tokens before the last one's end."""
    tokens, tokenizer, start = np.asarray(tokens), get_tokenizer(meta["tokenizer"]), 0
    eot = tokenizer.eot_token
    ends = [i + np.flatnonzero(tokens[i:i + size] == eot) for i in range(0, len(tokens), size)]
    for end in tqdm(np.concatenate([*ends, [len(tokens)]]), desc="reading", unit="doc", delay=3, leave=False):
        for i in range(start, end, size - overlap):
            yield tokenizer.decode(tokens[i:min(i + size, end)].tolist())
        start = end + 1


def audit(data, tasks, folder):
    """{(task, number of the item): an excerpt} of the test items that share a 13-gram with a document of the
    training bins of data. Raises DataError."""
    sources, meta = open_data(data, "train")
    grams, found = test_grams(tasks, folder), {}
    for text in chain(*(bin_texts(tokens, meta) for tokens in chain(*sources.values()))):
        for start, end, gram in grams.find(text):
            for item in grams.grams[gram]:
                found.setdefault(item, text[max(0, start - 40):end + 40])
    return found


# ---------------------------------------------------------------------------------------------
# The command line

WHO = "checkpoint", "parameters", "context", "trained on", "FLOPs"          # the first columns of a row
QUOTED = [dict(zip(("checkpoint", "lambada acc", "lambada perplexity", "piqa acc", "hellaswag acc", "Pile CC",
                    "OpenWebText2", "Wikipedia", "ArXiv", "BookCorpus2"), row)) for row in (
    # published results of OpenAI's models; none of it is measured here
    ("GPT-2 large (quoted)", 47.6, 12.97, 70.3, 36.40, 0.9582, 0.9539, 0.9795, 1.1778, 1.0061),
    ("GPT-2 XL (quoted)", 51.21, 10.63, 70.78, 40.03, 0.9355, 0.9171, 0.9655, 1.1381, 0.9783))]


def cell(value):
    """A pair is a value and its standard error."""
    if isinstance(value, tuple):
        return "" if math.isnan(value[0]) else f"{cell(value[0])} ± {value[1]:.2g}"
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else value or ""


def markdown(rows):
    """Rows (dicts) as a table, and under them the quoted rows that have one of its scores."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = rows + [row for row in QUOTED if row.keys() & set(columns) > {"checkpoint"}]
    lines = [columns, ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse(argv):
    """The arguments, checked as far as they can be without opening anything. Raises EvalError."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", nargs="+", required=True, help="one row of the tables each")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"of {', '.join(TASKS)}; or none")
    parser.add_argument("--eval_data", metavar="DIR", help="folder of the test sets; default: downloaded")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    parser.add_argument("--data", help="a bin or data set to score, or none; default: the run's own")
    parser.add_argument("--bpb", nargs="+", default=[], metavar="NAME=SOURCE", help="bits per byte of texts")
    parser.add_argument("--max_docs", type=int, default=3000, help="of each of these sources (default 3000)")
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
    bounds = dict(temperature=(0, 1e6), top_p=(1e-6, 1), seed=(0, 2**63 - 1))
    for key in ("limit", "max_docs", "block_size", "batch_size", "max_new_tokens", "top_k"):
        bounds[key] = 1, 2**31 - 1
    for key, (low, high) in bounds.items():
        value = getattr(args, key)
        if value is not None and not low <= value <= high:
            raise EvalError(f"--{key}={value}: expected {low} to {high}")
    if args.prompt == "":
        raise EvalError("--prompt: expected some text to continue")
    args.tasks = [] if args.tasks == ["none"] else ",".join(args.tasks).split(",")
    for task in args.tasks:
        if task not in TASKS:
            raise EvalError(f"--tasks {task}: expected some of {', '.join(TASKS)}, or none")
    names = {*WHO, *TASKS}                  # that are taken
    for word in args.bpb:
        name, _, source = word.partition("=")
        if not source or name in ("", *names):
            raise EvalError(f"--bpb {word}: expected NAME=SOURCE, with a name of its own")
        names.add(name)
    if args.out:
        open(args.out, "a").close()         # what cannot be written fails here
    return args


def continue_text(args, device, autocast):
    """Prints what each checkpoint makes of the prompt. Raises ModelError, EvalError."""
    for name in args.ckpt:
        model, meta = load(name, device)
        tokenizer = get_tokenizer(meta["tokenizer"])
        idx = torch.tensor([tokenizer.encode_ordinary(args.prompt)], device=device)         # (1, T)
        if idx.size(1) > model.config.block_size:
            raise EvalError(f"--prompt: {idx.size(1)} tokens, {name} reads at most {model.config.block_size}")
        rng = torch.Generator(device).manual_seed(args.seed)
        with autocast:
            idx = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, rng, args.top_p)
        print(tokenizer.decode(idx[0].tolist()))


def make_plan(args):
    """(subjects, leaks, sha256 of the files). What can be refused is refused here, before the first batch.

    A subject is (first columns of its rows, tokenizer, block_size, {path: tokens} of its own data, jobs); a
    job is (table, name, kind, examples). Raises ModelError, DataError, EvalError.
    """
    subjects, jobs, files = [], [], []
    for name in args.ckpt:
        model, meta = load(name)
        tokenizer, config = get_tokenizer(meta["tokenizer"]), model.config
        block_size = args.block_size or config.block_size
        if config.pos == "learned" and block_size > config.block_size:
            raise EvalError(f"--block_size={block_size}: {name}'s positions end at {config.block_size}")
        data, bins, of_bins = args.data or meta.get("data", "none"), {}, meta
        try:
            if str(data).endswith(".bin"):
                bins[data], of_bins = open_bin(data, config.vocab_size)
            elif data != "none":
                sources, of_bins = open_data(data, "val", config.vocab_size)
                bins = {f"{folder}/val.bin": np.concatenate(parts) for folder, parts in sources.items()}
        except NoBin:
            if args.data:
                raise
            print(f"eval.py: {name}: its own data, {data}, is not here; --data names other", file=sys.stderr)
        if of_bins["tokenizer"] != meta["tokenizer"]:
            raise EvalError(f"{data}: {of_bins['tokenizer']} tokens, but {name} reads {meta['tokenizer']}")
        runs = [meta, *meta.get("lineage", [])]         # its own and its ancestors'
        tokens, flops = (sum(run.get(key, 0) for run in runs) for key in ("tokens", "flops"))
        who = dict(zip(WHO, (name, model.num_params(), block_size, tokens, float(flops) or None)))
        subjects.append((who, tokenizer, block_size, bins, []))

    for task in args.tasks:
        function, kind = TASKS[task]
        try:
            if task in TEST_SETS:
                paths, items = test_files(task, args.eval_data), test_items(task, args.eval_data)
            else:
                paths = [Path(args.eval_data or "data/raw/eval") / f"{task}.jsonl"]
                items = map(json.loads, paths[0].read_text().splitlines())
            jobs.append(("tasks", task, kind, [function(item) for item in islice(items, args.limit)]))
            files += map(str, paths)
        except (OSError, ValueError) as e:              # a DataError is a ValueError
            print(f"eval.py: {task} is left out: {e}", file=sys.stderr)
    audited = tuple(task for _, task, _, _ in jobs if task in TEST_SETS)
    if args.audit and not audited:
        raise EvalError(f"--audit {args.audit}: there are no test items to look for")
    for name, source in (word.split("=", 1) for word in args.bpb):
        found = bin_texts(*open_bin(source)) if source.endswith(".bin") else texts(source)
        examples = [(text, text) for text in islice(found, args.max_docs)]
        jobs.append(("bits per byte", name, "documents", examples))
        files.append(source)

    for who, tokenizer, block_size, bins, own in subjects:
        for table, name, kind, examples in jobs:
            requests = chain(*(make_requests(kind, example, tokenizer, block_size) for example in examples))
            longest = max((len(continuation) for _, continuation in requests), default=0)
            if 0 < longest <= block_size:
                own.append((table, name, kind, examples))
            else:
                print(f"eval.py: {who['checkpoint']}: {name} is left out: an answer of {longest} tokens, "
                      f"expected 1 to block_size={block_size}", file=sys.stderr)
        if not own and not bins:
            raise EvalError(f"{who['checkpoint']}: nothing to score; name a bin or data set with --data")
    leaks = audit(args.audit, audited, args.eval_data) if args.audit else {}
    return subjects, leaks, {file: sha256_of(file) for file in files if os.path.isfile(file)}


def main(argv):
    args = parse(argv)
    # one process, or one of torchrun's
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    batch_size = args.batch_size or (64 if device == "cuda" else 8)
    if args.prompt:
        return continue_text(args, device, autocast) if rank == 0 else None
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(local_rank)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=7))
    plan = [make_plan(args) if rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(plan)
    subjects, leaks, sha256 = plan[0]

    tables = {name: [] for name in ("tasks", "leaks", "bits per byte", "own data")}
    items = {name: len(examples) for *_, jobs in subjects for _, name, _, examples in jobs if name in TASKS}
    report = dict(tables=tables, items=items, dtype=args.dtype, quoted=QUOTED, sha256=sha256,
                  leaked=[[*item, excerpt] for item, excerpt in sorted(leaks.items())])

    def save():         # after each measurement, so that none is lost
        if args.out and rank == 0:
            values = json.loads(json.dumps(report), parse_constant=lambda _: None)      # JSON has no NaN
            write_whole(Path(args.out), json.dumps(values, indent=1))

    try:
        for who, tokenizer, block_size, bins, jobs in subjects:
            model, _ = load(who["checkpoint"], device)
            how, rows = (model, tokenizer, block_size, batch_size, autocast), {}
            for table, name, kind, examples in jobs:
                if table not in rows:
                    rows[table] = dict(who)
                    tables[table].append(rows[table])
                columns = run_task(kind, examples, *how, name)
                for metric, value in scores(kind, columns).items():
                    rows[table][f"{name} {metric}".strip()] = value
                if args.audit and name in TEST_SETS:
                    tables["leaks"] += leak_rows(who["checkpoint"], name, kind, columns, leaks)
                save()
            for path, tokens in bins.items():
                tables["own data"].append(who | dict(data=path) | score(tokens, *how))
                save()
    finally:            # an error at one checkpoint does not lose the others
        if rank == 0:
            for rows in filter(None, tables.values()):
                print(markdown(rows))
            if items:
                counts = ", ".join(f"{task} {n:,}" for task, n in items.items())
                print(f"zero-shot, ± standard error; items: {counts}")
            for task, number, excerpt in report["leaked"][:10]:
                print(f"leaked, {task} {number}: ... {' '.join(excerpt.split())} ...")
            sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        os._exit(0)         # as in train.py: gloo's threads can abort Python's own end


if __name__ == "__main__":
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")        # an ASCII console has no ±
    try:
        main(sys.argv[1:])
    except BrokenPipeError:     # the reader has gone
        os._exit(1)
    except (EvalError, DataError, ModelError, OSError) as e:
        sys.exit(f"eval.py: {e}" if os.environ.get("RANK", "0") == "0" else 1)
