"""Make a trained model larger: wider and deeper, in any proportion, without changing its function.

    python grow.py out/580M.pt out/1.1B-init.pt --n_layer=36
    python grow.py out/a.pt out/b-init.pt --n_embd=1024 --n_head=16 --n_layer=18
    python train.py configs/1.1B.py                     where init_from = "out/1.1B-init.pt"

What comes out is a plain checkpoint, compared with its source in float64 before it is written.
Where the source has its .state.pt, AdamW's state is grown too, into NAME.optimizer.pt beside it.

Width C becomes C': k = C' // C whole copies, and r = C' - k C channels left over. LayerNorm's mean
stays only if every channel is copied equally often, so those r hold the mean μ of the stream; with
s = sqrt(C' / (k C)) its variance stays too, and eps needs no care. x is what a norm computes:

    the stream      h' = s [h; ...; h; μ ... μ], so the rows of what writes to it become that
    layer norms     weight / s, bias as it was: [x; ...; x; 0 ... 0], whatever the weight of the 0s
    readers         columns W / k + E_c, random E_c whose sum over the copies c is 0: the copies get
                    different gradients, and part. Copies of a row share one E_c, else their rounding
                    would differ and be amplified by layer upon layer; columns that meet 0s are random
    the tied head   sums k copies, each s times as large: the last norm's weight / (k s²), bias / (k s)
    MLP             hidden units are copied, and the columns that read a unit share its weight
    heads           the same with learned positions; with ALiBi a head is its slope, so old heads go
                    where the larger table has their slope, the others are random and not yet read
    wider heads     m copies of each channel, q and k by m^(-1/4), since q k^T is divided by sqrt(m D)

(After Net2Net, Chen et al. 2016, arXiv:1511.05641, whose copies a layer norm would see.) Depth:
--depth=identity adds copies of layers that write nothing at first; the others change the function.

AdamW: a weight that becomes n copies, f times as large, gets gradients 1 / (n f) times as large. So
m takes that factor, v its square, eps that factor, and the learning rate f: with equal copies (no
noise, C' = k C, heads copied) training goes on exactly as the source's would have, weight decay
included. With wider heads q and k, in one tensor with v, learn up to m^(1/4) faster than that. New
entries have m = 0 and the mean v of the others, lest Adam's first steps be too long.
"""
import math
import os
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model import GPT, ModelError, alibi_slopes, atomic_save, load, load_pickle, save
from prepare import DataError, NoBin, Parser, open_data

NOISE = 8.0         # of E_c, relative to the tensor's own entries (logs/growth.md)
EXACT = 1e-10       # |difference of logits| in float64 above which a growth that should be exact is not
SIZES = ("n_layer", "n_embd", "n_head", "block_size")
DEPTH = ("identity", "adjacent", "stack", "middle")        # the first is the default: logs/growth.md


class GrowError(ValueError):
    """A growth that cannot be done; the message is one line for the user."""


# ---------------------------------------------------------------------------------------------
# Depth


def sources(depth, L, N):
    """Which of L old layers each of N new ones is a copy of.

    adjacent, identity: layer j of j * L // N, as in Gopher (Rae et al. 2021, arXiv:2112.11446, G.3.3);
    stack: whole models on one another (G_stack, Du et al. 2024, arXiv:2405.15319), cut at the first
    and last seam where N is no multiple (Kim et al. 2023, arXiv:2312.15166); middle: the middle half
    over and over (after MIDAS, Saunshi et al. 2024, arXiv:2409.19044).
    """
    if depth == "stack" and N > L:
        n = math.ceil(N / L)
        cut = n * L - N
        return [*range(L - cut // 2), *list(range(L)) * (n - 2), *range(cut - cut // 2, L)]
    if depth == "middle":
        half = math.ceil(L / 2)
        first = (L - half) // 2
        return [*range(first + half), *(first + i % half for i in range(N - L)), *range(first + half, L)]
    return [j * L // N for j in range(N)]


# ---------------------------------------------------------------------------------------------
# Width


class Axis(NamedTuple):
    """How one dimension of a tensor grows, from n entries to N."""
    source: Tensor          # (N,) which old entry a new one copies; -1: none
    factor: Tensor          # (N,) what the copy is multiplied by
    new: str = "zero"       # what the entries without a source hold: the "mean" of all, "random" or "zero"
    reads: bool = False     # its copies read the same value, so only their sum counts: noise may part them

    def share(self):
        """(N,) the gradient of a copy over that of its source: 1 / (the factors of all copies together)."""
        old = self.source >= 0
        total = torch.zeros(int(self.source.max()) + 1, dtype=torch.float64)
        total.index_add_(0, self.source[old], self.factor[old])
        return torch.where(old, 1 / total[self.source], 0.0)


def holds(source, factor=1.0, new="zero"):
    return Axis(source, factor * torch.ones(len(source), dtype=torch.float64), new)


def reads(source, new="zero"):
    """An axis whose copies share the weight of their source evenly."""
    old = source >= 0
    return Axis(source, torch.where(old, 1 / torch.bincount(source[old])[source].double(), 0.0), new, reads=True)


def rules(old, new):
    """{tensor: an Axis for each of its dimensions}; old, new: GPTConfig. Raises GrowError."""
    C, N, H = old.n_embd, new.n_embd, new.n_head
    D, m = C // old.n_head, N // H // (C // old.n_head)
    if m * D * H != N:
        fits = [h for h in range(old.n_head, N + 1) if N % (h * D) == 0]
        raise GrowError(f"--n_head={H}: heads of {N // H} channels at n_embd={N}, expected a multiple of the "
                        f"source's {D}; " + (f"n_head can be {', '.join(map(str, fits))}" if fits else "change n_embd"))
    k, r = divmod(N, C)
    s = math.sqrt(N / (k * C))
    stream = torch.cat((torch.arange(C).repeat(k), torch.full((r,), -1)))               # (N,)
    hidden = torch.arange(4 * N) % (4 * C)                                              # (4N,)
    heads = torch.arange(H) % old.n_head                                                # (H,)
    if old.pos == "alibi":
        table = alibi_slopes(old.n_head).tolist()
        heads = torch.tensor([table.index(x) if x in table else -1 for x in alibi_slopes(H).tolist()])
    inner = heads[:, None] * D + torch.arange(m * D) % D                                # (H, m D): heads side by side
    inner = inner.where(heads[:, None] >= 0, -1).flatten()                              # (N,)
    qkv = torch.cat([(inner + part * C).where(inner >= 0, -1) for part in range(3)])    # (3N,)

    write = holds(stream, s, "mean")
    read = reads(stream, "random")
    norm, shift = holds(stream, 1 / s, "mean"), holds(stream)
    qk = m ** -0.25
    project = holds(qkv, torch.tensor([qk, qk, 1.0], dtype=torch.float64).repeat_interleave(N), "random")
    positions = torch.arange(new.block_size)
    return {
        "wte.weight": (holds(torch.arange(old.padded_vocab_size)), write),
        "wpe.weight": (holds(positions.where(positions < old.block_size, -1), new="mean"), write),
        "ln_1.weight": (norm,), "ln_1.bias": (shift,),
        "attn.c_attn.weight": (project, read), "attn.c_attn.bias": (project,),
        "attn.c_proj.weight": (write, reads(inner)), "attn.c_proj.bias": (write,),
        "ln_2.weight": (norm,), "ln_2.bias": (shift,),
        "mlp.c_fc.weight": (holds(hidden), read), "mlp.c_fc.bias": (holds(hidden),),
        "mlp.c_proj.weight": (write, reads(hidden)), "mlp.c_proj.bias": (write,),
        "ln_f.weight": (holds(stream, 1 / (k * s * s), "mean"),), "ln_f.bias": (holds(stream, 1 / (k * s)),),
    }


def random(like, generator):
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def rms(p):
    return p.square().mean().sqrt()


def widen(p, rule, noise, generator):
    """A weight in its new shape. p: float64, 1 or 2 dimensions; rule: an Axis for each."""
    # what reads first: copies of a row then get one and the same noise, and stay equal to the last bit
    for dim, axis in sorted(enumerate(rule), key=lambda pair: not pair[1].reads):
        if len(axis.source) == p.size(dim):
            continue                    # as it was
        p = p.movedim(dim, -1)
        new = axis.source < 0
        old = axis.source.where(~new, 0)
        q = p[..., old] * axis.factor
        noises = random(q, generator) * rms(q[..., ~new])
        if axis.new == "mean":
            q[..., new] = p.mean(-1, keepdim=True) * axis.factor[new]
        else:
            q[..., new] = noises[..., new] * (axis.new == "random")
        if axis.reads:                  # E_c less its mean over the copies; one copy alone gets 0
            E = noise * noises
            mean = torch.zeros_like(p).index_add_(-1, old, E * axis.factor.masked_fill(new, 0))
            q += (E - mean[..., old]).masked_fill(new, 0)
        p = q.movedim(-1, dim)
    return p.contiguous()


def widen_moment(p, rule, power):
    """AdamW's m (power 1) or v (power 2) of a weight that widen grew."""
    for dim, axis in enumerate(rule):
        if len(axis.source) == p.size(dim):
            continue
        new = axis.source < 0
        q = p.movedim(dim, -1)[..., axis.source] * axis.share() ** power
        q[..., new] = q[..., ~new].mean(-1, keepdim=True) * (power == 2)
        p = q.movedim(-1, dim)
    return p.contiguous()


# ---------------------------------------------------------------------------------------------
# The whole model, a tensor at a time


def tensors(old, new, depth):
    """(name, old name, rule, added) of each tensor of the new model, in state_dict's order. Raises GrowError.

    added: in a layer that --depth=identity puts in, which must not write yet.
    """
    rule, layers = rules(old, new), sources(depth, old.n_layer, new.n_layer)
    with torch.device("meta"):
        names = list(GPT(new).state_dict())
    for name in names:
        if name.startswith("h."):
            _, j, kind = name.split(".", 2)
            i, before = layers[int(j)], layers[:int(j)]
            yield name, f"h.{i}.{kind}", rule[kind], depth == "identity" and i in before
        else:
            yield name, name, rule[name], False


def grow_weights(model, new, depth, noise=NOISE, seed=1337):
    """(name, weight in float64) of each tensor of the grown model, in state_dict's order. Raises GrowError."""
    weights, generator = model.state_dict(), torch.Generator().manual_seed(seed)
    for name, source, rule, added in tensors(model.config, new, depth):
        weight = widen(weights[source].to(torch.float64, copy=True), rule, noise, generator)
        if added and "c_proj" in name:
            weight.zero_()
        elif added and weight.shape != weights[source].shape:
            weight += min(noise, 0.5) * rms(weight) * random(weight, generator)     # not read yet: any noise parts them
        yield name, weight


def grow_optimizer(state, old, new, depth):
    """What train.py goes on from: dict(settings={name: lr_scale, eps}, moments={name: step, exp_avg, exp_avg_sq}).

    state: that of the source's AdamW; old, new: GPTConfig. Raises GrowError.
    """
    had = {name: (group, state["state"][i]) for group in state["param_groups"]
           for name, i in zip(group["names"], group["params"])}
    moments, settings = {}, {}
    for name, source, rule, added in tensors(old, new, depth):
        group, own = had[source]
        m, v = (widen_moment(own[key].to(torch.float64, copy=True), rule, power).to(own[key].dtype)
                for key, power in (("exp_avg", 1), ("exp_avg_sq", 2)))
        moments[name] = dict(step=own["step"].clone(), exp_avg=torch.zeros_like(m) if added else m, exp_avg_sq=v)
        factor = math.prod(axis.factor[axis.source >= 0].mean().item() for axis in rule)
        share = math.prod(axis.share()[axis.source >= 0].mean().item() for axis in rule)
        settings[name] = {key: float(f"{group[key] * scale:.12g}")      # equal ones are equal to the last digit
                          for key, scale in (("lr_scale", factor), ("eps", share))}
    return dict(settings=settings, moments=moments)


# ---------------------------------------------------------------------------------------------
# Verification


@torch.no_grad()
def logits64(model, idx, weights=None):
    """Logits (B, T, V) in float64 of an fp32 model, with one layer at a time in that form.

    weights: what grow_weights yields; then the model is filled from it on the way, rounded to fp32
    behind each layer. So neither model is ever held whole in float64.
    """
    fp32 = {}

    def enter(part, _=None):
        if weights is not None:
            part.load_state_dict({name: next(weights)[1] for name in part.state_dict()}, assign=True)
        for p in part.parameters():
            fp32[p] = p.data.float()       # itself where it is fp32
            p.data = p.data.double()

    def leave(part, *_):
        for p in part.parameters():
            p.data = fp32.pop(p)

    hooks = [hook for layer in model.h for hook in
             (layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave))]
    ends = [part for part in (model.wte, model.wpe) if part is not None]
    for part in ends:
        enter(part)
    hooks.append(model.ln_f.register_forward_pre_hook(enter))
    logits = model(idx)
    for part in (*ends, model.ln_f):
        leave(part)
    for hook in hooks:
        hook.remove()
    return logits


@torch.no_grad()
def logits_bf16(model, idx):
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):       # no copy of all weights
        return model(idx).double()


def closest_copies(model, rule, layers, idx, steps=2):
    """{what: how far apart the gradients of the two closest copies are, relative to their size} in the last step.

    0 is identical, and so is 1e-6 in fp32. Each step is AdamW's first, the gradient's sign, taken as the
    gradients arrive: no optimizer state, no second model. Changes the model.
    """
    heads = rule["attn.c_attn.weight"][0].source
    heads = heads.where(heads >= 0, -1 - torch.arange(len(heads)))          # ALiBi's new heads copy nothing
    watched = {model.wte.weight: ("channels", 1, rule["wte.weight"][1].source)}
    for block in model.h:
        watched[block.attn.c_attn.weight] = ("heads", 0, heads)
        watched[block.mlp.c_fc.weight] = ("hidden units", 0, rule["mlp.c_fc.weight"][0].source)
    prints = {}     # of the gradients: 8 random projections tell two apart as well as all their entries do

    def step(p):
        if p in watched:
            g = p.grad.movedim(watched[p][1], 0)                                                      # (n, M)
            prints[p] = g @ torch.randn(g.size(1), 8, generator=torch.Generator().manual_seed(0))     # (n, 8)
        p.data.sub_(p.grad.sign_(), alpha=1e-3)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(steps):
        model(idx[:, :-1], idx[:, 1:]).backward()

    apart = {}
    for p, (what, _, source) in watched.items():
        copies = (source[:, None] == source).triu(1).nonzero().t()                                    # (2, pairs)
        x, y = prints[p][copies]                                                                      # (pairs, 8) each
        apart[what] = apart.get(what, []) + ((x - y).norm(dim=1) / x.norm(dim=1).clamp(min=1e-30)).tolist()
    for i, j in combinations(range(len(layers)), 2):
        if layers[i] == layers[j]:
            x, y = (prints[model.h[n].mlp.c_fc.weight] for n in (i, j))
            apart["layers"] = apart.get("layers", []) + [((x - y).norm() / x.norm()).item()]
    return {what: min(distances) for what, distances in apart.items() if distances}


def val_loss(model, tokens, max_tokens):
    """Mean loss in nats per token on at most max_tokens of a bin, in windows spread evenly over it."""
    T = min(model.config.block_size, max_tokens, len(tokens) - 1)
    n = min(len(tokens) - 1, max_tokens) // T
    starts = np.arange(n) * ((len(tokens) - 1) // T) // n * T
    return model.total_loss(tokens, starts, T, batch_size=4) / (n * T)


# ---------------------------------------------------------------------------------------------


def target_config(old, args):
    """The grown model's GPTConfig. Raises GrowError, ModelError."""
    size = {key: getattr(old if getattr(args, key) is None else args, key) for key in SIZES}
    if args.n_head is None and size["n_embd"] % (old.n_embd // old.n_head) == 0:
        size["n_head"] = size["n_embd"] // (old.n_embd // old.n_head)       # more heads of the old size
    for key, value in size.items():
        if value < getattr(old, key):
            raise GrowError(f"--{key}={value}: smaller than the source's {getattr(old, key)}")
    new = replace(old, **size)
    if new == old:
        raise GrowError(f"nothing to grow; set one of --{', --'.join(SIZES)}")
    return new


def source_optimizer(args, source):
    """(the state of the source's AdamW or None, a word about it). Raises GrowError, ModelError."""
    path = args.source.removesuffix(".pt") + ".state.pt"
    if args.fresh_optimizer or not os.path.exists(path):
        return None, "fresh" if args.fresh_optimizer else f"fresh (no {path})"
    state = load_pickle(path, mmap=True)
    if state["config"]["optimizer"] != "adamw":
        return None, f"fresh ({path} is of {state['config']['optimizer']})"
    shapes = {name: state["model"][name].shape for group in state["optimizer"].get("param_groups", ())
              for name in group.get("names", ())}
    if shapes != {name: p.shape for name, p in source.named_parameters()}:
        raise GrowError(f"{path}: of another model than {args.source}; pass --fresh_optimizer to leave it out")
    return state["optimizer"], f"grown, as at step {state['step']}"


def open_tokens(args, meta, vocab_size):
    """(data set, its tokens for validation) to measure on, or (None, None) where the source's own is not here.
    Raises GrowError, DataError."""
    data = args.data or meta.get("data")
    try:
        bins, bin_meta = open_data(data, "val", vocab_size) if data else ({}, {})
    except NoBin:
        if args.data:
            raise
        bins = {}
    if not bins:
        return None, None
    if bin_meta["tokenizer"] != meta.get("tokenizer", bin_meta["tokenizer"]):
        raise GrowError(f"{data}: holds {bin_meta['tokenizer']} tokens, but {args.source} reads {meta['tokenizer']}")
    return ", ".join(bins), np.concatenate([tokens for source in bins.values() for tokens in source])


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("source", help="checkpoint to grow")
    parser.add_argument("target", help="checkpoint to write")
    parser.add_argument("--n_layer", type=int, help="layers of the target; all sizes default to the source's")
    parser.add_argument("--n_embd", type=int, help="width of the target")
    parser.add_argument("--n_head", type=int, help="heads of the target; default: as many as keep their size")
    parser.add_argument("--block_size", type=int, help="context of the target; exact up to the source's")
    parser.add_argument("--depth", choices=DEPTH, default=DEPTH[0], help=f"what layers copy (default {DEPTH[0]})")
    parser.add_argument("--noise", type=float, default=NOISE, help=f"what parts the copies (default {NOISE})")
    parser.add_argument("--seed", type=int, default=1337, help="of the noise")
    parser.add_argument("--data", metavar="DIR", help="data to measure on; default: the source's")
    parser.add_argument("--fresh_optimizer", action="store_true", help="leave the optimizer's state behind")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    args = parser.parse_args(argv)
    if os.path.exists(args.target) and not args.force:
        raise GrowError(f"{args.target} exists; pass --force to overwrite it")
    source, meta = load(args.source)
    old, new = source.config, target_config(source.config, args)
    rule, layers = rules(old, new), sources(args.depth, old.n_layer, new.n_layer)
    optimizer, word = source_optimizer(args, source)
    how = ", ".join(f"{key} {getattr(old, key)} to {getattr(new, key)}" + f" ({args.depth})" * (key == "n_layer")
                    for key in SIZES if getattr(new, key) != getattr(old, key)) + f"; optimizer {word}"
    print(f"{args.source}: {how}")

    path, tokens = open_tokens(args, meta, old.vocab_size)
    with torch.device("meta"):
        grown = GPT(new).eval()
    grown.slopes = alibi_slopes(new.n_head) if new.pos == "alibi" else None
    max_tokens = int(min(2**16, max(64, 2e11 / grown.num_params())))        # the larger, the fewer: some seconds
    T = min(old.block_size, 64, max_tokens // 8)
    idx = torch.randint(old.vocab_size, (2, T), generator=torch.Generator().manual_seed(args.seed))
    if tokens is not None and len(tokens) >= 2 * T:
        idx = torch.from_numpy(tokens[:2 * T].astype(np.int64)).view(2, T)

    # the source in float64 is the truth; the grown model comes into being as it is compared
    truth = logits64(source, idx)
    with tqdm(grow_weights(source, new, args.depth, args.noise, args.seed), desc="growing", unit="tensor",
              total=len(grown.state_dict()), delay=3, leave=False) as weights:
        exact_logits = logits64(grown, idx, iter(weights))
    errors = [(logits - truth).abs().max().item() for logits in (
        exact_logits, logits64(grown, idx), logits_bf16(grown, idx), logits_bf16(source, idx))]
    print(f"largest change of a logit, on {2 * T} {f'tokens of {path}' if path else 'random tokens'}, logits up to "
          f"{truth.abs().max():.1f}:\n    float64 {errors[0]:.1e}, weights rounded to fp32 {errors[1]:.1e}, "
          f"bf16 {errors[2]:.1e} (the source's own in bf16 {errors[3]:.1e})")
    exact = args.depth == "identity" or new.n_layer == old.n_layer
    if exact and not errors[0] <= EXACT:
        raise GrowError(f"the function changed by {errors[0]:.1e}, expected at most {EXACT}; nothing was written")
    if not exact:
        print(f"    --depth={args.depth} does not keep the function: the loss jumps first and comes back in training")
    if new.pos == "learned" and new.block_size > old.block_size:
        print(f"    positions from {old.block_size} on are new: the function is kept up to there")

    losses = []
    for name, model in ((args.source, source), (args.target, grown)):
        line = (f"{name}: {model.num_params() / 1e6:.1f}M parameters, "
                f"{model.flops_per_token(model.config.block_size) / 1e6:,.1f} MFLOPs per token")
        if path:
            losses.append(val_loss(model, tokens, max_tokens))
            line += f", val loss {losses[-1]:.4f}"
        print(line, flush=True)

    beside = args.target.removesuffix(".pt") + ".optimizer.pt"
    with suppress(FileNotFoundError):
        os.remove(beside)               # an earlier growth's
    parent = {"from": args.source, "how": how,
              **{key: meta[key] for key in ("step", "tokens", "flops", "val_loss") if key in meta}}
    save(args.target, grown, **{key: meta[key] for key in ("tokenizer", "data", "fingerprint") if key in meta}, step=0,
         tokens=0, flops=0, **dict(zip(("val_loss",), losses[1:])), lineage=meta.get("lineage", []) + [parent])
    del source, model, weights          # room for the gradients
    closest = closest_copies(grown, rule, layers, idx)
    print("gradients of the closest two copies after a step, relative difference: " +
          (", ".join(f"{what} {distance:.0e}" for what, distance in closest.items()) or "no copies") +
          "; SOME ARE STILL IDENTICAL" * (min(closest.values(), default=1) < 1e-5))
    if optimizer:
        del grown
        atomic_save(grow_optimizer(optimizer, old, new, args.depth), beside)
        print(f"{beside}: its optimizer, which train.py takes along with init_from={args.target}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (GrowError, DataError, ModelError, OSError) as e:
        sys.exit(f"grow.py: {e}")
