"""Score checkpoints as lm-evaluation-harness does, or continue a text with them.

    python eval.py --ckpt out/quickstart.pt                     four tasks, and its own validation bin
    python eval.py --ckpt out/a.pt gpt2 --tasks lambada,piqa --limit 200 --out scores.json
    python eval.py --ckpt out/a.pt --tasks none --data data/mine --block_size 512
    python eval.py --ckpt out/a.pt --bpb "ArXiv=arxiv.jsonl.zst" "Pile CC=data/cc/val.bin"
    python eval.py --ckpt out/a.pt --audit data/mine            which test items its training data held
    torchrun --nproc_per_node=8 eval.py --ckpt out/1.1B.pt      the items shared out over 8 GPUs
    python eval.py --ckpt out/quickstart.pt --prompt "def main():"

A checkpoint is a .pt of train.py or grow.py, a Hugging Face folder, or a name on its hub. Test sets are
read from --eval_data DIR, or downloaded once into data/raw/eval. Each log-likelihood is that of
lm-evaluation-harness 0.4.13, zero-shot; tests/test_harness.py compares them, and shows two differences.

A new task is a function and a row of TASKS, here "arc": (arc, "choice"). It reads the lines of DIR/arc.jsonl:

    def arc(item):
        return item["question"], [f" {answer}" for answer in item["answers"]], item["label"]
"""
import json
import math
import os
import re
import sys
from contextlib import nullcontext
from datetime import timedelta
from functools import lru_cache
from itertools import chain, groupby, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import ModelError, load
from prepare import (TEST_SETS, DataError, NoBin, Parser, count_words, detokenise, get_tokenizer, open_bin,
                     open_data, sha256_of, test_files, test_grams, test_items, texts, token_bytes,
                     write_whole)

# ---------------------------------------------------------------------------------------------
# Tasks. A function turns an item into an example: (context, answers, number of the right answer),
# or for the kind "text": (text, its words and its bytes as published).


def lambada(item):
    *words, last = item["text"].split(" ")      # the last word is scored, with the space before it
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
    return detokenise(item["page"]), len(re.split(r"\s+", item["page"])), len(item["page"].encode())


TASKS = {       # name: (function, kind)
    "lambada": (lambada, "cloze"),
    "piqa": (piqa, "choice"),
    "hellaswag": (hellaswag, "choice"),
    "wikitext2": (wikitext2, "text"),
}
METRICS = {     # kind: {metric: (a, b)}, the sum of column a over that of b
    "cloze": dict(acc=("correct", "items"), perplexity=("nats", "items")),
    "choice": dict(acc=("correct", "items"), acc_norm=("correct_norm", "items")),
    "text": dict(token_perplexity=("nats", "tokens"), word_perplexity=("nats", "words"),
                 byte_perplexity=("nats", "bytes")),
    "documents": {"": ("bits", "bytes")},       # of --bpb; as "text"
    "bin": {"loss": ("nats", "tokens"), "perplexity": ("nats", "tokens"),       # as "text", but (tokens, ...)
            "word perplexity": ("nats", "words"), "bits per byte": ("bits", "bytes")},
}


def make_requests(kind, example, tokenizer, block_size):
    """The requests of an example: pairs (context, continuations that follow it) of tokens. Raises DataError.

    A text or a bin becomes windows that predict each token once, the first from <|endoftext|>; a text's last
    window is filled up with context. Of other examples the last block_size + 1 tokens count; white space at
    the context's end goes to the answers, and an empty context becomes <|endoftext|>.
    """
    if kind in ("cloze", "choice"):
        context, answers, _ = example
        tokens = tokenizer.encode_ordinary(context.rstrip())
        answers = [tokenizer.encode_ordinary(context + answer)[len(tokens):] for answer in answers]
        tokens = tokens or [tokenizer.eot_token]
        longest = max(map(len, answers))
        if longest > block_size or not all(answers):
            raise DataError(f"an answer of {longest} tokens or none, expected 1 to block_size={block_size}")
        if len(tokens) + longest <= block_size + 1:
            return [(tokens, answers)]
        return [(tokens[len(answer) - block_size - 1:], [answer]) for answer in answers]
    tokens = example[0] if kind == "bin" else tokenizer.encode_ordinary(example[0])
    stream, requests = np.append(np.uint16(tokenizer.eot_token), np.asarray(tokens, np.uint16)), []
    for start in range(0, len(tokens), block_size):
        end = min(start + block_size, len(tokens))
        first = start if kind == "bin" else max(0, end - block_size)
        requests.append((stream[first:start + 1], [stream[start + 1:end + 1]]))
    return requests


# ---------------------------------------------------------------------------------------------
# Scoring: log-likelihoods, then scores


def make_batches(requests, batch_size):
    """Batches (n, prefix, numbers of requests) of at most batch_size rows, or one request.

    A row is a continuation; each request has n. Where n > 1, its context but for the last token is computed
    once: these `prefix` tokens are as many in each request, so that only what follows them is padded.
    """
    shapes, batches = [], []
    for i, (context, continuations) in enumerate(requests):
        n, longest = len(continuations), max(map(len, continuations))
        shapes.append((n, len(context) - 1 if n > 1 else 0, len(context) + longest, i))
    for n, prefix, _, i in sorted(shapes, reverse=True):        # rows of similar length come together
        if not batches or batches[-1][:2] != (n, prefix) or len(batches[-1][2]) >= batch_size // n:
            batches.append((n, prefix, []))
        batches[-1][2].append(i)
    return batches


@torch.no_grad()
def log_likelihoods(model, requests, batch_size, autocast=nullcontext(), what="scoring"):
    """(log-probability of each continuation in nats (n,), whether all its tokens are the likeliest (n,)).

    Softmax in fp32, over the vocabulary without padding. Under torchrun the batches are shared out.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    weight = model.wte.weight[:model.config.vocab_size]
    def to_device(x):       # without waiting for a GPU
        return x.pin_memory().to(weight.device, non_blocking=True) if weight.is_cuda else x.to(weight.device)
    chunk = max(1, 2**23 // len(weight))        # positions whose logits exist at a time: 32 MiB
    starts = np.cumsum([0] + [len(continuations) for _, continuations in requests])
    batches, done = make_batches(requests, batch_size)[rank::world], []
    for n, prefix, batch in tqdm(batches, desc=what, unit="batch", leave=False, disable=rank > 0):
        rows = [(requests[i][0][prefix:], continuation) for i in batch for continuation in requests[i][1]]
        tokens = [torch.from_numpy(np.concatenate(row).astype(np.int64)) for row in rows]
        scored = [torch.arange(1 - len(context), len(continuation)) >= 0 for context, continuation in rows]
        tokens = pad_sequence(tokens, batch_first=True)                                     # (B, T + 1)
        b, t = pad_sequence(scored, batch_first=True).nonzero(as_tuple=True)                # (M,) each
        owners = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in batch])[b]      # (M,)
        idx, targets, b, t = map(to_device, (tokens[:, :-1], tokens[b, t + 1], b, t))
        cache = [[] for _ in model.h] if prefix else None
        with autocast:
            if prefix:
                model.hidden(to_device(torch.tensor([requests[i][0][:prefix] for i in batch])), cache)
                # from (requests, H, S, D) to (B, H, S, D)
                cache = [[past.repeat_interleave(n, dim=0) for past in layer] for layer in cache]
            x = model.hidden(idx, cache)[b, t]      # (B, T, C) to (M, C)
            for h, target, owner in zip(x.split(chunk), targets.split(chunk), owners.split(chunk)):
                logits = F.linear(h, weight).float()
                loss = F.cross_entropy(logits, target, reduction="none")
                done.append((owner, torch.stack((loss, logits.argmax(-1) != target))))

    sums = torch.zeros(2, starts[-1], dtype=torch.float64)
    for owner, values in done:
        sums.index_add_(1, owner, values.cpu().double())
    if dist.is_initialized():
        dist.all_reduce(sums)
    return -sums[0].numpy(), sums[1].numpy() == 0


def run_task(kind, examples, model, tokenizer, block_size, batch_size, autocast=nullcontext(), what="task"):
    """What each example got: columns (n,) by the names in METRICS. Raises DataError."""
    requests = [make_requests(kind, example, tokenizer, block_size) for example in examples]
    logp, greedy = log_likelihoods(model, list(chain(*requests)), batch_size, autocast, what)
    counts = [sum(len(continuations) for _, continuations in own) for own in requests]
    logp = np.split(logp, np.cumsum(counts)[:-1])           # an array for each example
    nats = -np.array([x.sum() for x in logp])
    columns = dict(items=np.ones(len(examples)), nats=nats, bits=nats / math.log(2), correct=greedy)
    if kind == "choice":        # argmax takes the first of equals; the space before an answer is no character
        right = np.array([label for _, _, label in examples])
        characters = [np.array([len(answer) - 1 for answer in answers]) for _, answers, _ in examples]
        columns["correct"] = np.array([x.argmax() for x in logp]) == right
        columns["correct_norm"] = np.array([(x / n).argmax() for x, n in zip(logp, characters)]) == right
    elif kind != "cloze":
        columns["tokens"] = np.array([sum(len(window) for _, (window,) in own) for own in requests])
        columns["words"], columns["bytes"] = np.array([size for _, *size in examples]).T
    return columns


def scores(kind, columns, chosen=slice(None)):
    """{metric: (value, standard error)} of the chosen items, accuracies in percent.

    The error of a ratio is that of Cochran 1977, 6.4; of a perplexity, its size times its logarithm's error.
    """
    result = {}
    for metric, (a, b) in METRICS[kind].items():
        x, w = columns[a][chosen], columns[b][chosen]
        n = len(x)
        value = float(x.sum() / w.sum()) if n else math.nan
        error = math.sqrt(n / (n - 1) * ((x - value * w)**2).sum()) / float(w.sum()) if n > 1 else math.nan
        if "perplexity" in metric:
            value = math.exp(min(value, 700))           # one beyond 1e304 stays there
            error *= value
        scale = 100 if "acc" in metric else 1
        result[metric] = scale * value, scale * error
    return result


def audit(data, tasks, folder, size=2**20, overlap=256):
    """{(task, number of the item): an excerpt} of test items that share a 13-gram with the training bins."""
    sources, meta = open_data(data, "train")
    tokenizer, grams, found = get_tokenizer(meta["tokenizer"]), test_grams(tasks, folder), {}
    for tokens in chain(*sources.values()):
        for i in tqdm(range(0, len(tokens), size), desc="audit", delay=3, leave=False):
            text = tokenizer.decode(tokens[i:i + size + overlap].tolist())
            for start, end, gram in grams.find(text):
                for item in grams.grams[gram]:
                    found.setdefault(item, text[max(0, start - 40):end + 40])
    return found


# ---------------------------------------------------------------------------------------------
# The command line

QUOTED = [dict(zip(("checkpoint", "lambada acc", "lambada perplexity", "piqa acc", "hellaswag acc", "Pile CC",
                    "OpenWebText2", "Wikipedia", "ArXiv", "BookCorpus2"), row)) for row in (
    ("GPT-2 large (quoted)", 47.6, 12.97, 70.3, 36.40, 0.9582, 0.9539, 0.9795, 1.1778, 1.0061),
    ("GPT-2 XL (quoted)", 51.21, 10.63, 70.78, 40.03, 0.9355, 0.9171, 0.9655, 1.1381, 0.9783))]   # published


def markdown(rows):
    """Rows (dicts) as a table, and under them the quoted rows that have one of its scores."""
    def cell(value):
        if isinstance(value, tuple):    # a value and its standard error, NaN where there is none
            return f"{value[0]:.5g} ± {value[1]:.2g}".replace(" ± nan", "").replace("nan", "")
        if isinstance(value, float):
            return f"{value:.5g}"
        return f"{value:,}" if isinstance(value, int) else value or ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = rows + [row for row in QUOTED if row.keys() & set(columns) > {"checkpoint"}]
    lines = [columns, ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse(argv):
    """The arguments, checked as far as they can be without opening anything. Raises DataError."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, help="one row of the tables each")
    add("--tasks", nargs="+", default=list(TASKS), help=f"of {', '.join(TASKS)}; or none")
    add("--eval_data", metavar="DIR", help="folder of the test sets; default: downloaded")
    add("--limit", type=int, metavar="N", help="the first N items of each task")
    add("--data", help="a bin or data set to score, or none; default: the run's own")
    add("--bpb", nargs="+", default=[], metavar="NAME=SOURCE", help="bits per byte of texts")
    add("--max_docs", type=int, default=3000, help="of each of these sources (default 3000)")
    add("--audit", metavar="DATA", help="a data set whose training bins may hold test items")
    add("--out", metavar="FILE.json", help="all that was measured, with each file's sha256")
    add("--block_size", type=int, metavar="T", help="context; default: the model's")
    add("--batch_size", type=int, default=64 if torch.cuda.is_available() else 8, help="default %(default)s")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--prompt", metavar="TEXT", help="continue this text instead")
    add("--max_new_tokens", type=int, default=200)
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    add("--top_k", type=int, help="sample among the k likeliest tokens only")
    add("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    bounds = dict(temperature=(0, 1e6), seed=(0, 2**63 - 1))
    for key, value in vars(args).items():
        low, high = bounds.get(key, (1, 2**31 - 1))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise DataError(f"--{key}={value}: expected {low} to {high}")
    args.tasks = [] if args.tasks == ["none"] else " ".join(args.tasks).replace(",", " ").split()
    if unknown := set(args.tasks) - TASKS.keys():
        raise DataError(f"--tasks {', '.join(unknown)}: expected some of {', '.join(TASKS)}, or none")
    if args.out:
        open(args.out, "a").close()             # what cannot be written fails here
    return args


def continue_text(args, device, autocast):
    """Prints what each checkpoint makes of the prompt. Raises ModelError, DataError."""
    for name in args.ckpt:
        model, meta = load(name, device)
        tokenizer, block_size = get_tokenizer(meta["tokenizer"]), model.config.block_size
        tokens = tokenizer.encode_ordinary(args.prompt)
        if not 0 < len(tokens) <= block_size:
            raise DataError(f"--prompt: {len(tokens)} tokens, expected 1 to {block_size}, {name}'s context")
        idx, rng = torch.tensor([tokens], device=device), torch.Generator(device).manual_seed(args.seed)
        with autocast:
            idx = model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, rng)
        print(tokenizer.decode(idx[0].tolist()))


def make_plan(args):
    """(jobs, leaks, sha256 of the files read). What can be refused is refused here, before the first batch.

    A job is (table, row, name, kind, examples); its scores go into the row. Raises ModelError, DataError.
    """
    subjects, measurements, files = [], [], []
    for name in args.ckpt:
        model, meta = load(name)
        tokenizer, config = get_tokenizer(meta["tokenizer"]), model.config
        model.crop_block_size(args.block_size or config.block_size)     # raises where it cannot be
        runs = [meta, *meta.get("lineage", [])]                         # its own and its ancestors'
        tokens, flops = (sum(run.get(key, 0) for run in runs) for key in ("tokens", "flops"))
        who = {"checkpoint": name, "parameters": model.num_params(), "context": config.block_size,
               "trained on": tokens, "FLOPs": float(flops) or None}     # the first columns of its rows
        data, own, of_bins = args.data or meta.get("data", "none"), {}, meta
        try:
            if str(data).endswith(".bin"):
                own[data], of_bins = open_bin(data, config.vocab_size)
            elif data != "none":
                sources, of_bins = open_data(data, "val", config.vocab_size)
                own = {folder: np.concatenate(bins) for folder, bins in sources.items()}
        except NoBin as e:
            if args.data:
                raise
            print(f"eval.py: {name}: its own data is left out: {e}; --data names other", file=sys.stderr)
        if of_bins["tokenizer"] != meta["tokenizer"]:
            raise DataError(f"{data}: {of_bins['tokenizer']} tokens, but {name} reads {meta['tokenizer']}")
        subjects.append((tokenizer, who, own))

    for task in args.tasks:
        function, kind = TASKS[task]
        known, path = task in TEST_SETS, Path(args.eval_data or "data/raw/eval") / f"{task}.jsonl"
        try:
            items = test_items(task, args.eval_data) if known else map(json.loads, path.open("rb"))
            measurements.append(("tasks", task, kind, [function(item) for item in islice(items, args.limit)]))
            files += test_files(task, args.eval_data) if known else [path]
        except (OSError, ValueError, KeyError) as e:              # a DataError is a ValueError
            print(f"eval.py: {task} is left out: {e}", file=sys.stderr)
    audited = tuple(task for _, task, _, _ in measurements if task in TEST_SETS)
    if args.audit and not audited:
        raise DataError(f"--audit {args.audit}: there are no test items to look for")
    names = {"", *who}                      # that are taken
    for word in args.bpb:
        name, _, source = word.partition("=")
        if not source or name in names:
            raise DataError(f"--bpb {word}: expected NAME=SOURCE, with a name of its own")
        names.add(name)
        found = texts(source)
        if source.endswith(".bin"):         # its documents, what lies between two ends of text
            tokens, meta = open_bin(source)
            bpe = get_tokenizer(meta["tokenizer"])
            runs = groupby(np.asarray(tokens), lambda token: token == bpe.eot_token)
            found = (bpe.decode(list(run)) for is_end, run in runs if not is_end)
        examples = [(text, 1, len(text.encode())) for text in islice(found, args.max_docs)]
        measurements.append(("bits per byte", name, "documents", examples))
        files.append(source)

    jobs = []
    for tokenizer, who, own in subjects:
        rows = {"tasks": dict(who), "bits per byte": dict(who)}
        for table, name, kind, examples in measurements:
            try:
                if not [make_requests(kind, example, tokenizer, who["context"]) for example in examples]:
                    raise DataError("there is nothing in it")
                jobs.append((table, rows[table], name, kind, examples))
            except DataError as e:
                print(f"eval.py: {who['checkpoint']}: {name} is left out: {e}", file=sys.stderr)
        for name, tokens in own.items():
            example = tokens, count_words(tokens, tokenizer), token_bytes(tokenizer)[tokens].sum()
            jobs.append(("own data", who | {"data": name, "tokens": len(tokens)}, "", "bin", [example]))
    if not jobs:
        raise DataError("nothing to score; name a data set with --data")
    leaks = audit(args.audit, audited, args.eval_data) if args.audit else {}
    return jobs, leaks, {str(file): sha256_of(file) for file in files if os.path.isfile(file)}


def main(argv):
    args = parse(argv)
    rank = int(os.environ.get("RANK", 0))           # of torchrun's processes
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")
    if args.prompt is not None:
        return continue_text(args, device, autocast) if rank == 0 else None
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:        # gloo, as all that is sent is on the CPU
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    plan = [make_plan(args) if rank == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(plan)
    jobs, leaks, sha256 = plan[0]

    tables = {table: [] for table in ("tasks", "leaks", "bits per byte", "own data")}
    report = dict(tables=tables, dtype=args.dtype, quoted=QUOTED, sha256=sha256,
                  items={name: len(examples) for table, _, name, _, examples in jobs if table == "tasks"},
                  leaked=[[*item, excerpt] for item, excerpt in sorted(leaks.items())])
    load_once = lru_cache(1)(load)          # the jobs of a checkpoint follow one another
    try:
        for table, row, name, kind, examples in jobs:
            model, meta = load_once(row["checkpoint"], device)
            columns = run_task(kind, examples, model, get_tokenizer(meta["tokenizer"]), row["context"],
                               args.batch_size, autocast, name or table)
            if row not in tables[table]:
                tables[table].append(row)
            row |= {f"{name} {metric}".strip(): value for metric, value in scores(kind, columns).items()}
            if args.audit and table == "tasks" and name in TEST_SETS:
                dirty = np.array([(name, number) in leaks for number in range(len(examples))])
                for part, chosen in (("clean", ~dirty), ("leaked", dirty)):
                    tables["leaks"].append({"checkpoint": row["checkpoint"], "task": name, "part": part,
                                            "items": int(chosen.sum()), **scores(kind, columns, chosen)})
            if args.out and rank == 0:      # after each measurement, so that none is lost
                values = json.loads(json.dumps(report), parse_constant=lambda _: None)      # JSON has no NaN
                write_whole(Path(args.out), json.dumps(values, indent=1))
    finally:            # an error at one checkpoint does not lose the others
        if rank == 0:
            print("\n".join(markdown(rows) for rows in tables.values() if rows))
            print("zero-shot, ± standard error; items:", report["items"] or "none")
            for task, number, excerpt in report["leaked"][:10]:
                print(f"leaked, {task} {number}: ... {' '.join(excerpt.split())} ...")
            sys.stdout.flush()
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)         # as in train.py: gloo's threads can abort Python's own end


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BrokenPipeError:     # the reader has gone
        os._exit(1)
    except (DataError, ModelError, OSError) as e:
        sys.exit(f"eval.py: {e}" if os.environ.get("RANK", "0") == "0" else 1)
