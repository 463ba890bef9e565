"""Warm starting: make a trained model deeper, to go on training as a larger one.

    python grow.py out/580M.pt out/1.1B-init.pt --n_layer=36

Layer j of the deeper model is a copy of layer j * L // L' of the source (L layers to L'), as in
Gopher (Rae et al. 2021, arXiv:2112.11446, G.3.3): a doubling makes layers 2i and 2i + 1 of layer
i, and 18 to 24 layers doubles 0, 3, 6, 9, 12 and 15. The function changes: the loss jumps first
and comes back in training, so grow.py prints the validation loss before and after.
"""
import os
import sys
from dataclasses import replace

import numpy as np

from model import ModelError, build, load, save
from prepare import DataError, Parser, open_bin


class GrowError(ValueError):
    """A growth that cannot be done; the message is one line for the user."""


def sources(n_layer, new_n_layer):
    """Which old layer each new layer is a copy of."""
    return [j * n_layer // new_n_layer for j in range(new_n_layer)]


def deepen(model, n_layer):
    """A new GPT of n_layer layers, each a copy of one of model's. Raises GrowError."""
    if n_layer < model.config.n_layer:
        raise GrowError(f"--n_layer={n_layer}: smaller than the source's {model.config.n_layer}")
    weights = {name: p for name, p in model.state_dict().items() if not name.startswith("h.")}
    for j, i in enumerate(sources(model.config.n_layer, n_layer)):
        for name, p in model.h[i].state_dict().items():
            weights[f"h.{j}.{name}"] = p
    weights = {name: p.clone() for name, p in weights.items()}      # copies, so that they can part
    return build(replace(model.config, n_layer=n_layer), weights, "grown").eval()


def val_loss(model, path, max_tokens=2**16):
    """Mean loss in nats per token on at most max_tokens of a bin, in windows spread evenly over it."""
    tokens, _ = open_bin(path, model.config.vocab_size)
    T = min(model.config.block_size, len(tokens) - 1)
    n = max(1, min(len(tokens) - 1, max_tokens) // T)
    starts = np.arange(n) * ((len(tokens) - 1) // T) // n * T
    return model.total_loss(tokens, starts, T, batch_size=4) / (n * T)


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("source", help="checkpoint to grow")
    parser.add_argument("target", help="checkpoint to write")
    parser.add_argument("--n_layer", type=int, required=True, help="layers of the target")
    parser.add_argument("--data", metavar="DIR", help="folder whose val.bin measures the loss; default: the source's")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    args = parser.parse_args(argv)
    if os.path.exists(args.target) and not args.force:
        raise GrowError(f"{args.target} exists; pass --force to overwrite it")
    model, meta = load(args.source)
    data = args.data or meta.get("data")
    if not data:
        raise GrowError(f"{args.source}: says nothing of its own data; name a folder with --data")
    val = os.path.join(data, "val.bin")

    grown = deepen(model, args.n_layer)
    how = f"depth {model.config.n_layer} to {args.n_layer} layers"
    print(f"{args.source}: {model.config.n_layer} layers, {model.num_params() / 1e6:.1f}M parameters, "
          f"val loss {val_loss(model, val):.4f}", flush=True)
    loss = val_loss(grown, val)
    print(f"{args.target}: {args.n_layer} layers, {grown.num_params() / 1e6:.1f}M parameters, val loss {loss:.4f}")
    parent = {"from": args.source, "how": how, **{k: meta[k] for k in ("step", "tokens", "val_loss") if k in meta}}
    save(args.target, grown, tokenizer=meta["tokenizer"], data=meta.get("data", data), step=0, tokens=0,
         val_loss=loss, lineage=meta.get("lineage", []) + [parent])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (GrowError, DataError, ModelError, OSError) as e:
        sys.exit(f"grow.py: {e}")
