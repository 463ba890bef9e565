"""Evaluate checkpoints, and continue texts with them.

    python eval.py --ckpt out/quickstart.pt                     on its own validation bin
    python eval.py --ckpt out/a.pt out/b.pt gpt2 --data data/mine/val.bin --block_size 512
    python eval.py --ckpt out/quickstart.pt --prompt "def main():"

A checkpoint is a .pt of train.py or grow.py, a Hugging Face folder, or gpt2 ... gpt2-xl.
"""
import math
import os
import sys
from contextlib import nullcontext

import numpy as np
import torch
from tqdm import tqdm

from model import OPENAI, GPT, ModelError, load
from prepare import DataError, Parser, count_words, get_tokenizer, open_bin, token_bytes


class EvalError(ValueError):
    """A combination that cannot be evaluated; the message is one line for the user."""


def open_checkpoint(name, device):
    """(model, meta) of a .pt, a Hugging Face folder or one of OpenAI's names. Raises ModelError."""
    if name in OPENAI or os.path.isdir(name):
        return GPT.from_pretrained(name).to(device).eval(), {"tokenizer": "gpt2"}
    return load(name, device)


def score(model, tokens, tokenizer, block_size, batch_size, autocast=nullcontext()):
    """Total loss of a token stream (n,), and what to divide it by: a dict of nats, tokens, words, bytes.

    Windows of block_size do not overlap; every token is predicted once, the first of the stream
    from <|endoftext|>, and each <|endoftext|> between documents counts as a token that has no
    bytes and no words. Raises ModelError where block_size is more than learned positions allow.
    """
    stream = np.append(np.uint16(tokenizer.eot_token), tokens)
    starts = np.arange(0, len(tokens), block_size)
    nats = 0.0
    with tqdm(total=len(tokens), desc="scoring", unit="tok", unit_scale=True, leave=False) as bar:
        for i in range(0, len(starts), batch_size):
            part = starts[i:i + batch_size]
            nats += model.total_loss(stream, part, block_size, batch_size, autocast)
            bar.update(min(part[-1] + block_size, len(tokens)) - part[0])
    return dict(nats=nats, tokens=len(tokens), words=count_words(tokens, tokenizer),
                bytes=int(token_bytes(tokenizer)[tokens].sum()))


def summary(counts):
    """Loss in nats per token, perplexity, word-adjusted perplexity (total loss over words,
    exponentiated) and bits per byte of what score returns."""
    nats = counts["nats"]
    return dict(loss=nats / counts["tokens"], perplexity=exp(nats / counts["tokens"]),
                word_perplexity=exp(nats / max(1, counts["words"])),
                bits_per_byte=nats / math.log(2) / max(1, counts["bytes"]))


def exp(x):
    return math.exp(x) if x < 700 else math.inf


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", nargs="+", required=True, help="one row of the table each")
    parser.add_argument("--data", metavar="BIN", help="tokens to score; default: the run's own val.bin")
    parser.add_argument("--block_size", type=int, metavar="T", help="context; default: the model's")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences at once (default 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt", metavar="TEXT", help="continue this text instead")
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens only")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args(argv)
    for key in ("block_size", "batch_size", "max_new_tokens", "top_k"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise EvalError(f"--{key}={getattr(args, key)}: expected at least 1")
    if args.temperature < 0:
        raise EvalError(f"--temperature={args.temperature}: expected at least 0")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16")

    header = ("| checkpoint | parameters | trained on | data | context | tokens | loss | perplexity "
              "| word perplexity | bits per byte |\n|---|---|---|---|---|---|---|---|---|---|\n")
    for name in args.ckpt:
        model, meta = open_checkpoint(name, device)
        tokenizer = get_tokenizer(meta["tokenizer"])
        if tokenizer.n_vocab > model.config.vocab_size:
            raise EvalError(f"{name}: a vocabulary of {model.config.vocab_size}, too small for "
                            f"{meta['tokenizer']} tokens")
        if args.prompt is not None:
            idx = tokenizer.encode_ordinary(args.prompt) or [tokenizer.eot_token]
            generator = torch.Generator(device).manual_seed(args.seed)
            with autocast:
                idx = model.generate(torch.tensor([idx], device=device), args.max_new_tokens, args.temperature,
                                     args.top_k, generator)
            print(tokenizer.decode(idx[0].tolist()))
            continue
        if not args.data and "data" not in meta:
            raise EvalError(f"{name}: says nothing of its own data; name a bin with --data")
        path = args.data or os.path.join(meta["data"], "val.bin")
        tokens, data = open_bin(path, model.config.vocab_size)
        if data["tokenizer"] != meta["tokenizer"]:
            raise EvalError(f"{path}: holds {data['tokenizer']} tokens, but {name} reads {meta['tokenizer']} tokens")
        block_size = args.block_size or model.config.block_size
        counts = score(model, tokens, tokenizer, block_size, args.batch_size, autocast)
        row = summary(counts)
        seen = sum(m.get("tokens", 0) for m in [meta, *meta.get("lineage", [])])    # its ancestors' too
        print(f"{header}| {name} | {model.num_params() / 1e6:.1f}M | {seen / 1e6:.1f}M tokens | {path} "
              f"| {block_size} | {counts['tokens']:,} | {row['loss']:.4f} | {row['perplexity']:.2f} "
              f"| {row['word_perplexity']:.2f} | {row['bits_per_byte']:.4f} |", flush=True)
        header = ""


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (EvalError, DataError, ModelError, OSError) as e:
        sys.exit(f"eval.py: {e}")
