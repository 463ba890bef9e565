"""Make a trained model larger: wider, deeper or both, in any proportion, without changing its function.

    python grow.py out/580M.pt out/1.1B-init.pt --n_layer=36
    python grow.py out/a.pt out/b-init.pt --n_embd=1024 --n_head=16 --n_layer=18
    python grow.py gpt2 out/gpt2-24-init.pt --n_layer=24
    python train.py configs/1.1B.py                     where init_from = "out/1.1B-init.pt"

The source is a .pt, a Hugging Face folder or a name on the hub. The result is a plain checkpoint. Its logits
are compared with the source's, in float64, before it is written.

Width. C channels become N = n C + r: n copies of each, and r others that hold the mean μ of the C. (A layer
norm subtracts the mean, which stays only if all channels are copied equally often.) With s = sqrt(N / (n C)):

    stream h        h' = s [h ... h  μ ... μ]   mean(h') = s (n C μ + r μ) / N = s μ
                                                var(h') = s² n C var(h) / N = var(h), so eps can stay
    normalised z    z' = s [z ... z  0 ... 0]
    layer norm x    x' = [x ... x  0 ... 0]     x = weight z + bias

So each dimension of a tensor grows by one of these rules (the function `rules` says which):

    write           s W, copied; s mean(W) in the others
    norm            weight / s, copied; any weight in the others, where z' = 0
    shift           bias, copied; 0 in the others
    split           what reads n copies: W / n + E_c for copy c, where E_1 + ... + E_n = 0, so together W x
    read            split; random where it reads the others, which are 0
    ln_f            weight / (n s²) and bias / (n s): the tied head sums n copies, n (s w) (x / (n s)) = w x
    units           hidden units are copied, and what reads them is split
    heads           the same; with ALiBi a head goes where the new table of slopes has its slope. Heads of new
                    slopes are random, and what reads them is 0.
                    In heads m times as wide, k' = m^(-1/4) [k ... k] and q' = m^(-1/4) [q + e_1 ... q + e_m],
                    where e_1 + ... + e_m = 0: q'.k' / sqrt(m D) = m^(-1/2) m q.k / sqrt(m D) = q.k / sqrt(D)

E and e are random. They part the copies, which would otherwise get equal gradients and stay equal for ever.
Copies of a row share one E, or their rounding would differ and E would amplify it from layer to layer.
(After Net2Net, Chen et al. 2016, arXiv:1511.05641, which has no layer norms.)

Depth. --depth=identity adds copies of layers that write nothing to the stream at first: their c_proj are 0.
adjacent and stack add copies that write at once: the loss jumps first and comes back in training.
"""
import math
import os
import sys
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from model import GPT, ModelError, alibi_slopes, load, save
from prepare import Parser

NOISE = 8.0                 # size of E relative to the weights (logs/growth/)
QUERY_NOISE = 0.125         # size of e's weights relative to q's with E: e is then about 0.4 of q
EXACT = 1e-10               # largest change of a logit in float64, relative to the largest logit
SIZES = {"n_layer": "layers", "n_embd": "width", "n_head": "heads; by default as many as keep their size",
         "block_size": "context; the function is kept up to the source's"}


# ---------------------------------------------------------------------------------------------
# Depth


def layer_map(depth, L, N):
    """Which of L old layers each of N new ones is a copy of.

    adjacent, identity: layer j of j * L // N, as in Gopher (Rae et al. 2021, arXiv:2112.11446, G.3.3);
    stack: whole models on one another (G_stack, Du et al. 2024, arXiv:2405.15319), cut at the first
    and last seam where N is no multiple of L (Kim et al. 2023, arXiv:2312.15166).
    """
    if depth == "stack" and N > L:
        n = math.ceil(N / L)
        cut = n * L - N
        return [*range(L - cut // 2), *list(range(L)) * (n - 2), *range(cut - cut // 2, L)]
    return [j * L // N for j in range(N)]


def deepen(model, depth, n_layer):
    """Repeat layers of model, in place; copies share weights. Returns the layers that must not write yet."""
    layers = layer_map(depth, len(model.h), n_layer)
    model.h = nn.ModuleList(model.h[i] for i in layers)
    return [j for j, i in enumerate(layers) if depth == "identity" and i in layers[:j]]


# ---------------------------------------------------------------------------------------------
# Width


class Axis(NamedTuple):
    """How one dimension of a tensor grows from n entries to N."""
    source: Tensor                  # (N,) the old entry that each new one copies; -1: one of the others
    factor: Tensor | float = 1.0    # (N,) or one for all: what the copy is multiplied by
    others: str = "zero"            # they hold the "mean" of the old entries, "random" numbers or "zero"
    noise: float = 0.0              # size of the noise added to the copies, relative to the entries
    group: Tensor | None = None     # (N,) labels: the noise sums to 0 over the entries of one label


def split(source, noise, others="zero"):
    """Columns that read copies: W / n + E_c where there are n of them."""
    group = source + 1
    return Axis(source, 1 / torch.bincount(group)[group].double(), others, noise, group)


def rules(old, new, noise):
    """{tensor: an Axis for each dimension}, the table at the top. old, new: GPTConfig."""
    C, N, H = old.n_embd, new.n_embd, new.n_head
    D = C // old.n_head
    m = N // H // D
    n, r = divmod(N, C)
    s = math.sqrt(N / (n * C))

    # which old entry each new one copies
    channel = torch.cat((torch.arange(C).repeat(n), torch.full((r,), -1)))              # (N,)
    unit = torch.arange(4 * N) % (4 * C)                                                # (4N,)
    position = torch.arange(new.block_size)
    position[old.block_size:] = -1
    head = torch.arange(H) % old.n_head                                                 # (H,)
    if old.pos == "alibi":
        slopes = alibi_slopes(old.n_head).tolist()
        head = torch.tensor([slopes.index(x) if x in slopes else -1 for x in alibi_slopes(H).tolist()])
    qkv = torch.arange(3 * C).view(3, -1, 1, D)[:, head].repeat(1, 1, m, 1)             # (3, H, m, D)
    qkv[:, head < 0] = -1
    inner = qkv[0].flatten()                                                            # (N,)

    factor = torch.ones(3, N, dtype=torch.float64)
    factor[:2] = m ** -0.25
    group = torch.arange(3 * N).view(3, H, m, D)
    group[0] = group[0, :, :1].clone()      # e sums to 0 over the m copies in a head of q; k and v get none
    heads = Axis(qkv.flatten(), factor.flatten(), "random", QUERY_NOISE if m > 1 else 0.0, group.flatten())
    units = Axis(unit)
    write, read = Axis(channel, s, "mean"), split(channel, noise, "random")
    norm, shift = Axis(channel, 1 / s, "mean"), Axis(channel)
    return {
        "wte.weight": (Axis(torch.arange(old.padded_vocab_size)), write),
        "wpe.weight": (Axis(position, others="mean"), write),
        "ln_1.weight": (norm,), "ln_1.bias": (shift,),
        "attn.c_attn.weight": (heads, read), "attn.c_attn.bias": (heads,),
        "attn.c_proj.weight": (write, split(inner, noise)), "attn.c_proj.bias": (write,),
        "ln_2.weight": (norm,), "ln_2.bias": (shift,),
        "mlp.c_fc.weight": (units, read), "mlp.c_fc.bias": (units,),
        "mlp.c_proj.weight": (write, split(unit, noise)), "mlp.c_proj.bias": (write,),
        "ln_f.weight": (Axis(channel, 1 / (n * s * s), "mean"),), "ln_f.bias": (Axis(channel, 1 / (n * s)),),
    }


def random(shape, like, generator):
    """Normal numbers of this shape, as large as those of like on average."""
    return like.square().mean().sqrt() * torch.randn(shape, generator=generator, dtype=like.dtype)


def centred(z, group):
    """z (..., N) less its mean over each group of its columns. A column alone in its group becomes 0."""
    n = torch.bincount(group)
    mean = z.new_zeros(*z.shape[:-1], len(n)).index_add_(-1, group, z / n[group])
    return z - mean[..., group]


def widen(p, rule, generator):
    """p, a float64 vector or matrix, in its new shape. rule: an Axis for each dimension."""
    for dim in reversed(range(p.dim())):    # columns first: copies of a row then share their noise
        axis = rule[dim]
        if len(axis.source) == p.size(dim):
            continue                        # as it was
        p = p.movedim(dim, -1)                                  # (..., n)
        new = axis.source < 0
        q = p[..., axis.source.clamp(min=0)] * axis.factor      # (..., N)
        z = random(q.shape, q[..., ~new], generator)
        if axis.noise:
            q += centred(axis.noise * z, axis.group)
        if axis.others == "mean":
            q[..., new] = p.mean(-1, keepdim=True) * axis.factor
        else:
            q[..., new] = z[..., new] if axis.others == "random" else 0.0
        p = q.movedim(-1, dim)
    return p.contiguous()


def grow_weights(model, new, silent=(), noise=NOISE, seed=1337):
    """(name, weight in float64) of each tensor of model made as wide as new, in state_dict's order.

    new: a GPTConfig; silent: the layers that must not write yet.
    """
    rule, generator = rules(model.config, new, noise), torch.Generator().manual_seed(seed)
    for name, p in model.state_dict().items():
        _, j, kind = name.split(".", 2) if name.startswith("h.") else ("", -1, name)
        weight = widen(p.to(torch.float64, copy=True), rule[kind], generator)
        if int(j) in silent and "c_proj" in kind:
            weight.zero_()
        elif int(j) in silent and weight.shape != p.shape:
            # nothing reads it yet, so any noise will do to part the copies
            weight += min(noise, 0.5) * random(weight.shape, weight, generator)
        yield name, weight


@torch.no_grad()
def logits64(model, idx, weights=None):
    """Logits (B, T, V) in float64 of an fp32 model, which is first filled with weights, if given.

    weights: what grow_weights yields. Only the embeddings and one layer at a time are held in float64.
    """
    def enter(part, *_):
        if weights is not None:
            part.load_state_dict({name: next(weights)[1] for name in part.state_dict()}, assign=True)
        part.double()

    def leave(part, *_):
        part.float()

    for part in filter(None, (model.wte, model.wpe)):
        enter(part)
    hooks = [part.register_forward_pre_hook(enter) for part in (*model.h, model.ln_f)]
    hooks += [part.register_forward_hook(leave) for part in (*model.h, model.ln_f)]
    logits = model(idx)
    for hook in hooks:
        hook.remove()
    model.float()       # the embeddings
    return logits


# ---------------------------------------------------------------------------------------------
# The command


def target_config(old, args):
    """The GPTConfig of the larger model. Raises ModelError."""
    size = {key: getattr(old if getattr(args, key) is None else args, key) for key in SIZES}
    D = old.n_embd // old.n_head
    if args.n_head is None and size["n_embd"] % D == 0:
        size["n_head"] = size["n_embd"] // D
    for key, value in size.items():
        if value < getattr(old, key):
            raise ModelError(f"--{key}={value}: smaller than the source's {getattr(old, key)}")
    new = replace(old, **size)
    if new == old:
        raise ModelError(f"nothing to grow; set one of --{', --'.join(SIZES)}")
    if new.n_embd // new.n_head % D:
        raise ModelError(f"--n_embd={new.n_embd} --n_head={new.n_head}: expected heads of {D} channels, "
                         "as in the source, or of a multiple")
    return new


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("source", help="what to grow: a .pt, a Hugging Face folder or a name on the hub")
    parser.add_argument("target", help="checkpoint to write")
    for key, what in SIZES.items():
        parser.add_argument(f"--{key}", type=int, help=what)
    parser.add_argument("--depth", choices=("identity", "adjacent", "stack"), default="identity")
    parser.add_argument("--noise", type=float, default=NOISE, help=f"what parts copies (default {NOISE})")
    parser.add_argument("--seed", type=int, default=1337, help="of the noise")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    args = parser.parse_args(argv)
    if os.path.exists(args.target) and not args.force:
        raise ModelError(f"{args.target} exists; pass --force to overwrite it")
    if not 0 <= args.seed < 2**63:
        raise ModelError(f"--seed={args.seed}: expected 0 to 2^63 - 1")
    source, meta = load(args.source)
    old, new = source.config, target_config(source.config, args)
    changed = [key for key in SIZES if getattr(old, key) != getattr(new, key)]
    how = ", ".join(f"{key} {getattr(old, key)} to {getattr(new, key)}" for key in changed)
    how += f"; depth by {args.depth}" * ("n_layer" in changed)
    print(f"{args.source}: {how}")
    with torch.device("meta"):
        grown = GPT(new).eval()
    grown.slopes = alibi_slopes(new.n_head) if new.pos == "alibi" else None
    for name, model in ((args.source, source), (args.target, grown)):
        print(f"{name}: {model.num_params() / 1e6:.1f}M parameters, "
              f"{model.flops_per_token(model.config.block_size) / 1e6:,.1f} MFLOPs per token")

    # what the source computes in float64 is the truth; the larger model is filled as it is compared
    generator = torch.Generator().manual_seed(args.seed)
    idx = torch.randint(old.vocab_size, (2, min(old.block_size, 64)), generator=generator)
    truth = logits64(source, idx)
    silent = deepen(source, args.depth, new.n_layer)
    if new.n_layer > old.n_layer and not silent:
        before, truth = truth, logits64(source, idx)
        print(f"--depth={args.depth} changes logits by up to {(truth - before).abs().max():.1e}: "
              "the loss jumps first and comes back in training")
    weights = grow_weights(source, new, silent, args.noise, args.seed)
    weights = tqdm(weights, "growing", len(grown.state_dict()), unit="tensor", delay=3, leave=False)
    change = (logits64(grown, idx, iter(weights)) - truth).abs().max()
    rounded, largest = (logits64(grown, idx) - truth).abs().max(), truth.abs().max()
    print(f"largest change of a logit, on {idx.numel()} random tokens, logits up to {largest:.1f}: "
          f"float64 {change:.1e}, weights rounded to fp32 {rounded:.1e}")
    if not change <= EXACT * largest:
        raise ModelError(f"the function changed by {change:.1e}; nothing was written")
    if new.pos == "learned" and new.block_size > old.block_size:
        print(f"positions from {old.block_size} on are new: the function is kept up to there")

    known = {key: meta[key] for key in ("step", "tokens", "flops", "val_loss") if key in meta}
    data = {key: meta[key] for key in ("data", "fingerprint") if key in meta}
    save(args.target, grown, tokenizer=meta["tokenizer"], **data, step=0, tokens=0, flops=0,
         lineage=[*meta.get("lineage", []), {"from": args.source, "how": how, **known}])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ModelError, OSError) as e:
        sys.exit(f"grow.py: {e}")
