"""Train a GPT.

    python train.py configs/quickstart.py --max_steps=20 --seed 1
    torchrun --nproc_per_node=8 train.py configs/1.1B.py                one node of 8 GPUs
    python train.py configs/1.1B.py --plan=8                            memory and hours on 8 GPUs

A config file assigns values to keys of Config, below; --key=value or --key value overrides it. For
configs/NAME.py a run writes into out_dir:

    NAME.pt         the model with the best validation loss so far (what eval.py and grow.py read)
    NAME.state.pt   everything needed to go on: the same command continues from it
    NAME.jsonl      the log; its first line holds config, versions, device, commit and data
    NAME.png        training and validation perplexity over tokens seen
    NAME.avg.pt     with average=K: the mean of the weights at K points of the last fifth
"""
import sys

if __name__ == "__main__" and "--help" in sys.argv:     # before the imports, which take seconds
    sys.exit(print(__doc__))

import ctypes
import difflib
import functools
import json
import math
import os
import resource
import runpy
import signal
import subprocess
import time
import timeit
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from typing import Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from numpy.lib.stride_tricks import sliding_window_view
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import ConcatDataset

from model import GPT, GPTConfig, ModelError, atomic_save, load, load_pickle, save
from prepare import DataError, NoBin, count_words, get_tokenizer, lock, open_data, token_bytes

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))     # by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))
MAX_SKIPS = 10                          # steps in a row whose loss or gradient is not finite


class TrainError(ValueError):
    """A config that cannot be trained, or a run that cannot go on; the message is one line."""


def expect(condition, message):
    if not condition:
        raise TrainError(message)


def print0(*text):
    if RANK == 0:
        print(*text, flush=True)


# ---- Configuration
@dataclass
class Config:
    data: str | dict = ""               # folder made by prepare.py, or a mixture {folder: share, ...}
    out_dir: str = "out"
    init_from: str = ""                 # a .pt, a Hugging Face folder or hub name; "": from scratch
    resume: bool = True                 # go on from NAME.state.pt if it exists
    wandb: str = ""                     # also log to this Weights & Biases project
    seed: int = 1337
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"      # auto: the first of these that is here
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # by autocast; auto: by its units
    compile: bool | None = None         # torch.compile; None: on CUDA only
    checkpoint: bool = False            # recompute layers in the backward: far less memory, a third more work
    zero: bool = False                  # share the optimizer's state over the processes (ZeRO stage 1)
    plan: int = 0                       # print what the run would take on this many GPUs, and stop
    # batches, and the length: training ends at the first of the three that is set
    block_size: int = 1024              # tokens of context
    batch_size: int = 512               # sequences per step, over all processes
    micro_batch_size: int | None = None     # sequences at once per process; None: its whole share
    max_steps: int | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    # intervals, in steps
    eval_interval: int = 500
    eval_tokens: int = 2**18            # validation tokens per source, the same ones each time
    save_interval: int = 500
    log_interval: int = 10
    # optimizer
    optimizer: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 6e-4
    min_lr: float = 6e-5                # where the schedule ends
    adamw_lr: float | None = None       # with muon: the rate of embeddings and vectors; None: learning_rate
    warmup_steps: int = 2000
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = 0.1           # on matrices; biases and layer norms have none
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0              # largest norm of the gradient; 0: no clipping
    average: int = 0                    # points of the last fifth whose mean weights become NAME.avg.pt
    # model; with init_from the checkpoint gives the shape, and keys set here must agree with it
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    pos: Literal["learned", "alibi"] = "learned"

    def gpt_config(self, vocab_size=50257):
        """The GPTConfig of a model from scratch. Raises ModelError."""
        shape = {key: getattr(self, key) for key in ("block_size", "dropout", *SHAPE)}
        return GPTConfig(vocab_size=vocab_size, **shape)


SHAPE = ("n_layer", "n_head", "n_embd", "bias", "pos")
IDENTITY = ("data", "init_from", "seed", "batch_size", "block_size", "optimizer", *SHAPE)   # fixed for a run
MAY_BE_ZERO = ("seed", "plan", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip",
               "average", "dropout")
BELOW = dict(beta1=1, beta2=1, dropout=1, seed=2**32)


def configure(argv, world=1):
    """(Config, names of the keys that were set, run name) from a config file and --key=value words.
    world: processes that share a batch. Raises TrainError, ModelError; loads nothing."""
    path, *words = argv or ["configs/NAME.py"]
    try:
        assigned = runpy.run_path(path)
    except Exception as e:      # no such file, or whatever a wrong line in it raises
        raise TrainError(f"{path}: {type(e).__name__}: {e}") from None
    types = {f.name: get_args(f.type) or (f.type,) for f in fields(Config)}
    settings = [(path, key, value) for key, value in assigned.items() if not key.startswith("_")
                and (key in types or isinstance(value, (str, int, float, dict)))]       # not what it imports
    words = iter(words)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        settings.append((word, key, value if equals else next(words, "")))
    config = Config()
    for source, key, value in settings:
        near = difflib.get_close_matches(key, types, n=1) or ["another key of Config in train.py"]
        expect(key in types, f"{source}: unknown key {key}, did you mean {near[0]}?")
        try:
            setattr(config, key, convert(value, types[key]))
        except (ValueError, OverflowError):
            expected = " or ".join(getattr(t, "__name__", t) for t in types[key])
            raise TrainError(f"{source}: {key} = {value!r}, expected {expected}") from None
    check(config, path, config.plan or world)
    return config, {key for _, key, _ in settings}, os.path.basename(path).removesuffix(".py")


def convert(value, types):
    """value as one of types, or one of the words among them; text is parsed. Raises ValueError."""
    if isinstance(value, str) and str not in types and value not in types:
        words = {"true": True, "false": False, "none": None}
        value = words[value.lower()] if value.lower() in words else float(value)
    if type(value) in (int, float):
        number = float if float in types else int
        value = number(value) if number(value) == value else value      # 1 stands for 1.0, 1e3 for 1000
    if type(value) not in types and value not in types:
        raise ValueError
    if isinstance(value, dict):
        return {os.path.expanduser(str(folder)): share for folder, share in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value


def check(config, path, world):
    """Set micro_batch_size, and refuse what cannot be trained. Raises TrainError, ModelError."""
    def need(holds, key, expected):
        expect(holds, f"{path}: {key} = {getattr(config, key)!r}, expected {expected}")

    if config.micro_batch_size is None:
        config.micro_batch_size = max(1, config.batch_size // world)
    for key, value in vars(config).items():
        if type(value) in (int, float):
            least, end = "at least" if key in MAY_BE_ZERO else "more than", BELOW.get(key, math.inf)
            need(0 < value < end or value == 0 and key in MAY_BE_ZERO, key, f"{least} 0, less than {end}")
    shares = config.data.values() if isinstance(config.data, dict) else [1]
    need(config.data and all(type(share) in (int, float) and 0 < share < math.inf for share in shares)
         and apportion(shares).all(), "data", f"a folder, or a mixture with a sample of each in {DECK}")
    need(config.max_steps or config.max_tokens or config.max_epochs,
         "max_steps", "a length: max_steps, max_tokens or max_epochs")
    need(config.batch_size % (world * config.micro_batch_size) == 0, "batch_size",
         f"a multiple of {world} processes x micro_batch_size {config.micro_batch_size}")
    need(not config.adamw_lr or config.optimizer == "muon", "adamw_lr", "optimizer = muon along with it")
    if not config.init_from:
        config.gpt_config()


# ---- Data: which tokens a step sees is a pure function of (seed, step)
DECK = 1000         # samples of a mixture in which every source has exactly its share


def cut(bins, T, name):
    """The blocks of T tokens in several bins as one list, each with the token after it: (T + 1,) uint16."""
    views = [sliding_window_view(tokens, T + 1)[::T] for tokens in bins if len(tokens) > T]
    expect(views, f"{name}: {sum(map(len, bins)):,} tokens, expected more than block_size={T}")
    return ConcatDataset(views)


def spread(blocks, n):
    """At most n blocks, evenly spread over all: (n, T + 1) uint16."""
    n = min(n, len(blocks))
    return np.stack([blocks[i * len(blocks) // n] for i in range(n)])


def apportion(shares):
    """Samples of each source in a deck: whole numbers that add up to DECK, by largest remainder."""
    exact = np.array(list(shares)) / sum(shares) * DECK
    counts = exact.astype(int)
    counts[np.argsort(counts - exact, kind="stable")[:DECK - counts.sum()]] += 1
    return counts


class Loader:
    """Batches of blocks, the same for any number of processes; it has no state. Each source comes in a new
    random order each epoch; several are dealt by their shares from one shuffled deck."""

    def __init__(self, sources, shares, batch_size, seed):
        self.sources, self.counts, self.batch_size = sources, apportion(shares), batch_size

        @functools.lru_cache(len(sources))      # the present order of each source
        def permutation(n, *key):       # numpy guarantees that RandomState's streams never change
            return np.random.RandomState([seed, *key]).permutation(n)
        self.permutation = permutation
        self.deck = np.repeat(np.arange(len(sources)), self.counts)[permutation(DECK, 0, 0, 0)]

    def block(self, sample):
        """The sample-th sample since the start of training: (T + 1,) uint16."""
        decks, place = divmod(sample, DECK)
        k = self.deck[place]
        i = decks * self.counts[k] + (self.deck[:place] == k).sum()     # it is source k's i-th
        epoch, i = divmod(int(i), len(self.sources[k]))
        key = (epoch, k) if k else (epoch,)
        return self.sources[k][self.permutation(len(self.sources[k]), *key)[i]]

    def batch(self, step, rank=0, world=1):
        """This rank's share of a step: (batch_size / world, T + 1) int64 on the CPU."""
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        return torch.from_numpy(np.stack([self.block(first + i) for i in range(share)]).astype(np.int64))


def open_sources(config):
    """(Loader, {source: its validation rows (n, T + 1)}, meta of the data, what identifies it)."""
    T = config.block_size
    bins, meta = open_data(config.data, "train")
    val_bins, val_meta = open_data(config.data, "val")
    shares = config.data.values() if isinstance(config.data, dict) else [1]
    loader = Loader([cut(bins[key], T, key) for key in bins], shares, config.batch_size, config.seed)
    n_rows = math.ceil(config.eval_tokens / T)
    val_rows = {key: spread(cut(val_bins[key], T, f"{key}/val"), n_rows) for key in bins}
    data = [meta["fingerprint"][:16], val_meta["fingerprint"][:16], loader.counts.tolist()]
    return loader, val_rows, meta, data


# ---- The step
def learning_rate(step, config, max_steps):
    """Linear warmup over warmup_steps, then the schedule down to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + share * (config.learning_rate - config.min_lr)


def make_optimizer(model, config):
    """[AdamW], [Adafactor] (Shazeer & Stern 2018) or [Muon, AdamW] (Jordan et al. 2024): Muon for the blocks'
    matrices, AdamW at adamw_lr for the rest. A group's rate is the schedule's times lr_scale."""
    def make(optimizer, *groups, **options):
        if config.zero and dist.is_initialized():       # Rajbhandari et al. 2020, arXiv:1910.02054
            from torch.distributed.optim import ZeroRedundancyOptimizer     # here, for it is slow to import
            return ZeroRedundancyOptimizer(groups, optimizer, lr=config.learning_rate, **options)
        return optimizer(groups, lr=config.learning_rate, **options)

    scale = (config.adamw_lr or config.learning_rate) / config.learning_rate
    blocks = dict(params=[], weight_decay=config.weight_decay, lr_scale=1.0)
    matrices = dict(params=[], weight_decay=config.weight_decay, lr_scale=scale)
    vectors = dict(params=[], weight_decay=0.0, lr_scale=scale)
    for name, p in model.named_parameters():
        muon = config.optimizer == "muon" and name.startswith("h.")
        (vectors if p.dim() < 2 else blocks if muon else matrices)["params"].append(p)
    if config.optimizer == "adafactor":
        # a step's root mean square is the rate itself, as in fine-tuning recipes; torch would multiply it by
        # that of the weights, which is left only where theirs is above 1
        return [make(torch.optim.Adafactor, matrices, vectors, eps=(None, 1.0))]
    adamw = make(torch.optim.AdamW, matrices, vectors, betas=(config.beta1, config.beta2), fused=True)
    if config.optimizer == "adamw":
        return [adamw]
    # updates as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so AdamW's rates are where to start
    return [make(torch.optim.Muon, blocks, adjust_lr_fn="match_rms_adamw"), adamw]


def train_step(model, optimizers, rows, micro_batch_size, autocast, grad_clip, scaler, stop=()):
    """One step over rows (share, T + 1), micro_batch_size at a time. Returns the mean loss of all ranks, the
    gradient's norm before clipping, and whether `stop` holds anything on any rank.

    Where loss or norm is not finite, no rank changes its weights. Waits for the device once, before the
    optimizer, which runs while the next batch is fetched.
    """
    loss, micro_batches = 0, rows.split(micro_batch_size)
    for i, micro_batch in enumerate(micro_batches, 1):
        idx, targets = micro_batch[:, :-1], micro_batch[:, 1:]      # each (B, T)
        model.require_backward_grad_sync = i == len(micro_batches)  # DDP averages gradients once a step
        with autocast:
            part = model(idx, targets) / len(micro_batches)
        scaler.scale(part).backward()
        loss += part.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    report = torch.stack([loss.float(), norm.float(), torch.full_like(loss, bool(stop)).float()])
    if dist.is_initialized():
        dist.all_reduce(report)                     # what is not finite on one rank is so on all
        report /= dist.get_world_size()
    loss, norm, stopping = report.tolist()          # the wait
    # torch's Muon works in bf16, 28 times slower than fp32 on a CPU without bf16 units
    in_fp32 = patch.object(torch.Tensor, "bfloat16", torch.Tensor.float)
    for optimizer in optimizers:
        if math.isfinite(loss) and math.isfinite(norm):
            with in_fp32 if rows.device.type == "cpu" else nullcontext():
                scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss, norm, stopping > 0


@torch.no_grad()
def evaluate(model, sources, batch_size, autocast):
    """Mean loss in nats per token on each of sources, (n, T + 1) uint16, whose rows the ranks share."""
    device, totals = model.wte.weight.device, [0.0] * len(sources)
    model.eval()        # no dropout, so no random number is drawn
    for k, rows in enumerate(sources):
        mine = torch.from_numpy(rows[RANK::WORLD].astype(np.int64)).to(device)          # (n / WORLD, T + 1)
        for i in range(0, len(mine), batch_size):
            batch = mine[i:i + batch_size]
            with autocast:
                losses = model(batch[:, :-1], batch[:, 1:], reduction="none")           # (B, T)
            totals[k] += losses.cpu().double().sum().item()
    model.train()
    if dist.is_initialized():
        totals = torch.tensor(totals, dtype=torch.float64, device=device)
        dist.all_reduce(totals)
    return [float(total) / rows[:, 1:].size for total, rows in zip(totals, sources)]


# ---- The machine
def choose_device(config):
    """Set device and dtype where they are "auto", and make this process ready for the device."""
    here = [kind for kind in ("cuda", "mps", "cpu") if torch.get_device_module(kind).is_available()]
    config.device = here[0] if config.device == "auto" else config.device
    expect(config.device in here, f"device = {config.device}: torch sees only {', '.join(here)} here")
    best = "float32"
    if config.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        best = "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"
    elif config.device == "cpu":
        keep_memory()
        best = "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"
    config.dtype = best if config.dtype == "auto" else config.dtype


def keep_memory():
    """Let glibc keep freed memory: a step on a CPU allocates the same activations again, and fetching them
    from the kernel can cost more than the arithmetic. The process keeps its peak (logs/speed/)."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):   # never trim, grow by 64 MiB, map no block, one heap
        for key, value in ((M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
            libc.mallopt(key, value)


def matmul_flops(device, dtype):
    """FLOP/s of this device in a large product of square matrices: what MFU is measured against."""
    n, times = (8192, 60) if device.type == "cuda" else (512, 4)
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=times)   # .item() waits
    return 2 * n**3 / min(seconds)


def memory(device):
    """The most memory, in bytes, that this process has held at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def writing(path):
    """A full disk ends the run in one line that names the file, as in atomic_save."""
    try:
        yield
    except OSError as e:
        raise OSError(f"{path}: not written ({e}); the same command goes on") from None


def environment(device):
    """What a run ran on. The commit has a + where files differ from it."""
    git = "git describe --always --dirty=+ --exclude='*' --abbrev=12"
    here = os.path.dirname(os.path.abspath(__file__))
    commit = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True).stdout.strip()
    versions = dict(python=sys.version.split()[0], torch=torch.__version__, numpy=np.__version__)
    name = torch.cuda.get_device_name() if device.type == "cuda" else os.uname().machine
    return dict(device=name, world=WORLD, versions=versions, commit=commit)


# ---- The log
def perplexity(loss):
    return math.exp(min(loss, 50))      # a loss gone wild must not end the run


class Log:
    """NAME.jsonl, one JSON object a line, also printed; by rank 0. The state holds the records too, and a run
    that goes on writes the file anew: damage to it does no harm."""

    def __init__(self, path, records, config):
        self.records, self.wandb = records, None
        if config.wandb and RANK == 0:
            try:        # the id in the header finds the same run again
                import wandb
                self.wandb = wandb.init(project=config.wandb, config=asdict(config), resume="allow",
                                        name=os.path.basename(path)[:-6], id=records[0].get("wandb"))
            except Exception as e:      # not installed, no account, no network
                raise TrainError(f"wandb = {config.wandb}: {e}; pip install wandb, or leave it out") from None
            self.wandb.define_metric("*", step_metric="tokens")
            records[0]["wandb"] = self.wandb.id
        self.file = open(os.devnull if RANK else path, "w", buffering=1)        # each line at once
        with writing(path):
            self.file.writelines(json.dumps(record) + "\n" for record in records)

    def write(self, **record):
        print0("   ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
        self.records.append(record)
        with writing(self.file.name):
            self.file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record)

    def plot(self, path):
        """Perplexity over tokens, without step 0: an untrained model would take most of the axis."""
        from matplotlib.figure import Figure        # here, for it is slow to import and only rank 0 draws
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(r["tokens"], perplexity(r[key])) for r in self.records if r.get("step") and key in r]
            axes.plot(*np.array(points).reshape(-1, 2).T, style, label=label, lw=1, ms=3)
        axes.set(xlabel="tokens seen", ylabel="perplexity per token", yscale="log", title=path)
        axes.legend()
        with writing(path):
            figure.savefig(path, dpi=120)


# ---- The plan
def memory_by_part(model, config, micro, gpus):
    """Bytes on each GPU at the peak, by part: bf16 autocast, compiled, with the kernels of model.py."""
    N, (V, C), L = model.num_params(), model.wte.weight.shape, config.n_layer
    tokens = micro * config.block_size
    state = dict(adamw=8 * N, muon=8 * N - 48 * L * C * C, adafactor=8 * N // C)[config.optimizer]
    # kept for the backward: in bf16 both norms' outputs, q, k, v, y, the MLP before and after GELU; in fp32
    # the stream twice; dropout masks. Checkpointing keeps the stream alone
    layer = tokens * ((36 + 2 * (config.dropout > 0)) * C + 4 * config.n_head)
    again = config.checkpoint
    return {"weights and gradients, fp32": 8 * N,
            f"{config.optimizer} state": state // (gpus if config.zero else 1),
            "weights, bf16 copies": 2 * (12 * C * C if again else N),
            "activations": layer + (L - 1) * tokens * 4 * C if again else L * layer,
            "one layer's backward": tokens * 28 * C + layer * again,
            "loss": max(6 * V * C + 2 * min(tokens * V, 2**27), 8 * V * C)}


def plan(config, name):
    """Print what a run would take on config.plan GPUs; nothing is trained and no data is needed."""
    try:
        vocab_size = open_data(config.data, "val")[1]["vocab_size"]
    except NoBin:
        vocab_size = 50257
    gpus, micro, tokens = config.plan, config.micro_batch_size, config.batch_size * config.block_size
    with torch.device("meta"):
        model = GPT(config.gpt_config(vocab_size))
    steps = config.max_steps or math.ceil((config.max_tokens or tokens) / tokens)
    flops = steps * tokens * model.flops_per_token(config.block_size)
    print(f"{name} on {gpus} GPUs: {model.num_params() / 1e6:,.1f}M parameters, {steps:,} steps of "
          f"{tokens:,} tokens, {steps * tokens / 1e9:.1f}B in all, {flops:.2e} FLOPs\n\n"
          f"| memory per GPU, micro batches of {micro} | GB |\n|---|---|")
    parts = memory_by_part(model, config, micro, gpus)
    for part, size in {**parts, "together": sum(parts.values())}.items():
        print(f"| {part} | {size / 1e9:.1f} |")
    print("\n| TFLOP/s per GPU | hours |\n|---|---|")
    for speed in (100, 200, 300, 400):
        print(f"| {speed} | {flops / (speed * 1e12 * gpus) / 3600:,.0f} |")


# ---- A run
@dataclass
class Progress:
    """How far a run has come; saved and restored as a whole."""
    step: int = 0
    best: float = math.inf          # lowest validation loss
    best_step: int = 0
    skips: int = 0                  # steps in a row, up to this one, that were not finite
    mean: dict = field(default_factory=dict)        # average: mean of the weights, on the CPU ...
    mean_of: list = field(default_factory=list)     # ... at these steps

    def add_to_mean(self, model, points):
        if not set(self.mean_of) <= points:         # those of an earlier, shorter run
            self.mean_of = []
        self.mean_of = [*self.mean_of, self.step]
        for key, p in model.state_dict().items():
            p = p.float().cpu()
            self.mean[key] = self.mean.get(key, p).lerp(p, 1 / len(self.mean_of))


def load_state(out, config, given, data):
    """(state, {key: [old, new]} of the keys that changed), or (None, {}) where there is none. data: what
    identifies it. Raises TrainError where the state is another run's, or a model has lost its state."""
    path, again = f"{out}.state.pt", "--resume=false starts over"
    if not os.path.exists(path):
        expect(not os.path.exists(f"{out}.pt"), f"{out}.pt is here without its .state.pt; {again}")
        return None, {}
    state = load_pickle(path, mmap=True)        # one copy for all processes of a machine
    expect(isinstance(state, dict) and "log" in state, f"{path}: not a state of this train.py; {again}")
    was = {**state["config"], **{key: state["model_config"][key] for key in SHAPE}, "data": state["data"]}
    now = {**vars(config), "data": data, "resume": was["resume"]}
    if config.init_from:                        # it gives the shape
        now.update({key: was[key] for key in SHAPE if key not in given})
    changed = {key: [was.get(key), value] for key, value in now.items() if was.get(key) != value}
    for key in IDENTITY:
        expect(key not in changed, f"{path}: {key} was {was[key]}, now it is {now[key]}; {again}")
    return state, changed


def make_model(config, given, meta, path, out, state):
    """(model, lineage); of a state without its weights yet. Raises ModelError, TrainError."""
    source = config.init_from
    if state:
        return GPT(GPTConfig(**state["model_config"])), state["lineage"]
    if not source:
        return GPT(config.gpt_config(meta["vocab_size"])), []
    own = [os.path.realpath(f"{out}{end}.pt") for end in ("", ".avg")]
    expect(os.path.realpath(source) not in own,
           f"init_from = {source}: this run would overwrite it; choose an out_dir")
    with open(path) as f:       # the configs of grown models say how they are made
        how = next((s.strip("# \n") for s in f if "grow.py" in s and source in s), "make it first")
    expect(os.path.exists(source) or not source.endswith(".pt"), f"init_from = {source}: no such file; {how}")
    model, parent = load(source)
    for key in SHAPE:
        have, asked = getattr(model.config, key), getattr(config, key)
        expect(key not in given or have == asked, f"{source}: {key} is {have}, the config asks for {asked}")
    expect(parent["tokenizer"] == meta["tokenizer"] and model.config.vocab_size >= meta["vocab_size"],
           f"{source}: {model.config.vocab_size} {parent['tokenizer']} tokens, but {config.data} holds "
           f"{meta['vocab_size']} {meta['tokenizer']} tokens")
    model.crop_block_size(config.block_size)
    known = {key: parent[key] for key in ("step", "tokens", "flops", "val_loss") if key in parent}
    return model, parent.get("lineage", []) + [{"from": source, **known}]


def sample(model, tokenizer, prompt, autocast):
    """Print 400 tokens after prompt (T,). A failure is only a warning: all is saved when this comes."""
    try:
        model.config.vocab_size = tokenizer.n_vocab     # only what it can decode
        idx = torch.from_numpy(prompt.astype(np.int64))[None].to(model.wte.weight.device)       # (1, T)
        with autocast:
            tokens = model.eval().generate(idx, 400, temperature=0.8)[0].tolist()
        print(f"\na sample, 400 tokens after the first {len(prompt)}:\n\n{tokenizer.decode(tokens)}")
    except Exception as e:
        print(f"warning: no sample: {type(e).__name__}: {e}")


def main(config, given, name, path):
    out, T, micro = os.path.join(config.out_dir, name), config.block_size, config.micro_batch_size
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)

    # ---- data
    loader, val_rows, meta, data = open_sources(config)
    shares, epochs_per_step = loader.counts / DECK, config.batch_size / sum(map(len, loader.sources))
    tokens_per_step = config.batch_size * T
    max_steps = math.ceil(min(config.max_steps or math.inf, (config.max_tokens or math.inf) / tokens_per_step,
                              (config.max_epochs or math.inf) / epochs_per_step))
    if LOCAL_RANK == 0:         # DDP waits for all: by then a machine has the tokenizer, downloaded once
        get_tokenizer(meta["tokenizer"])

    # ---- model and optimizer, new or where the run stopped
    state, changed = load_state(out, config, given, data) if config.resume else (None, {})
    torch.manual_seed(config.seed)
    model, lineage = make_model(config, given, meta, path, out, state)
    model.to(device).train()
    model.config.dropout, model.checkpointing = config.dropout, config.checkpoint
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizers, run = make_optimizer(model, config), Progress()
    if state:
        run = Progress(**state["progress"])
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            groups = zip(optimizer.param_groups, saved["param_groups"])     # its moments, the config's rates
            saved["param_groups"] = [dict(group, params=old["params"]) for group, old in groups]
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    if "eval_tokens" in changed:
        run.best = math.inf     # losses on other tokens cannot be compared
    if config.compile or config.compile is None and device.type == "cuda":
        model.compile()
    runner = DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.is_initialized() else model

    # ---- the log and its units
    tokenizer, texts = get_tokenizer(meta["tokenizer"]), [rows[:, 1:] for rows in val_rows.values()]
    bytes_per_token = shares @ [token_bytes(tokenizer)[text].mean() for text in texts]
    words_per_token = shares @ [max(1, count_words(text.ravel(), tokenizer)) / text.size for text in texts]
    flops_per_step = model.flops_per_token(T) * tokens_per_step
    peak = WORLD * matmul_flops(device, dtype)
    header = dict(config=asdict(config), parameters=model.num_params(), dtype=config.dtype,
                  data=meta["fingerprint"], lineage=lineage, **environment(device))
    log = Log(f"{out}.jsonl", json.loads(state["log"]) if state else [header], config)
    print0(f"{name}: {model.num_params() / 1e6:.1f}M parameters, {max_steps} steps of {tokens_per_step:,} "
           f"{meta['tokenizer']} tokens, {max_steps * epochs_per_step:.2f} epochs of {config.data}, "
           f"on {WORLD} x {device.type} in {config.dtype}", *(f"\nfrom {each['from']}" for each in lineage))
    if state:
        print0(f"going on from {out}.state.pt at step {run.step}; --resume=false starts over")
    if changed:
        log.write(step=run.step, changed=changed)

    def save_model(file, loss):
        if RANK == 0:
            save(file, model, tokenizer=meta["tokenizer"], data=config.data, step=run.step,
                 tokens=run.step * tokens_per_step, flops=run.step * flops_per_step, val_loss=loss,
                 fingerprint=meta["fingerprint"], lineage=lineage)

    stop, stopping = [], False      # SIGINT and SIGTERM: finish the step, save, leave
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    mean_at = {round(max_steps * (1 - 0.2 * i / config.average)) for i in range(config.average)}
    seconds = []                    # of each step since the last record
    while True:
        # ---- save, before the evaluation: then no step is done twice
        ending = run.step >= max_steps
        evaluating = ending or run.step % config.eval_interval == 0
        if stopping or evaluating or run.step % config.save_interval == 0:
            for optimizer in optimizers if config.zero and dist.is_initialized() else ():
                optimizer.consolidate_state_dict(to=0)
            if RANK == 0:
                atomic_save(dict(model=model.state_dict(), model_config=asdict(model.config),
                                 optimizers=[optimizer.state_dict() for optimizer in optimizers],
                                 scaler=scaler.state_dict(), progress=vars(run), config=asdict(config),
                                 data=data, lineage=lineage, log=json.dumps(log.records)), f"{out}.state.pt")
        if stopping:
            return print0(f"stopped at step {run.step}; the same command goes on from {out}.state.pt")

        # ---- evaluate
        if evaluating:
            losses = evaluate(model, list(val_rows.values()), micro, autocast)
            val_loss = float(shares @ losses)
            if val_loss < run.best:
                run.best, run.best_step = val_loss, run.step
                save_model(f"{out}.pt", val_loss)
            scores = dict(val_loss=val_loss, bits_per_byte=val_loss / math.log(2) / bytes_per_token,
                          word_perplexity=perplexity(val_loss / words_per_token))
            if len(losses) > 1:     # a mixture
                scores["val_losses"] = dict(zip(val_rows, losses))
            log.write(step=run.step, tokens=run.step * tokens_per_step, **scores)
            if RANK == 0 and run.step:
                log.plot(f"{out}.png")
        if ending:
            break

        # ---- step
        began = time.perf_counter()
        lr = learning_rate(run.step, config, max_steps)
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = lr * group["lr_scale"]
        # dropout, the only draw in a step, depends on (seed, step, rank) alone
        torch.manual_seed(int(np.random.SeedSequence([config.seed, run.step, RANK]).generate_state(1)[0]))
        rows = loader.batch(run.step, RANK, WORLD)
        rows = (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)
        loss, norm, stopping = train_step(runner, optimizers, rows, micro, autocast, config.grad_clip, scaler,
                                          stop)
        run.step += 1
        run.skips = 0 if math.isfinite(loss) and math.isfinite(norm) else run.skips + 1
        seconds.append(time.perf_counter() - began)
        record = dict(step=run.step, tokens=run.step * tokens_per_step)
        if run.skips:
            log.write(**record, skipped=f"loss {loss}, norm {norm}")
        elif run.step % config.log_interval == 0 or run.step == max_steps:
            speed = len(seconds) / max(sum(seconds), 1e-9)      # steps per second
            seconds.clear()
            log.write(**record, loss=loss, norm=norm, lr=lr, tokens_per_second=round(speed * tokens_per_step),
                      mfu=round(speed * flops_per_step / peak, 4), bytes_held=memory(device),
                      left=str(timedelta(seconds=int((max_steps - run.step) / speed))))
        expect(run.skips < MAX_SKIPS, f"{MAX_SKIPS} steps in a row were not finite; lower the learning_rate")
        if run.step in mean_at:
            run.add_to_mean(model, mean_at)

    # ---- the end: the mean of the weights, a row for a table, a sample
    if run.mean_of:
        model.load_state_dict(run.mean)
        mean_loss = float(shares @ evaluate(model, list(val_rows.values()), micro, autocast))
        save_model(f"{out}.avg.pt", mean_loss)
        print0(f"mean of the weights at steps {run.mean_of}: val loss {mean_loss:.4f}, {out}.avg.pt")
    train_loss = next((r["loss"] for r in reversed(log.records) if "loss" in r), math.nan)
    best, last = run.best_step * epochs_per_step, run.step * epochs_per_step
    print0("\n| context | model | train loss | val loss | val ppl | adj val ppl | best epoch | run |\n"
           f"|{'---|' * 8}\n| {T} | {config.init_from or name} | {train_loss:.4f} | {val_loss:.4f} | "
           f"{perplexity(val_loss):.2f} | {scores['word_perplexity']:.2f} | "
           f"{best:.2f} of {last:.2f} | {out} |")
    if log.wandb:
        log.wandb.finish()
    if RANK == 0:
        sample(model, tokenizer, next(iter(val_rows.values()))[0, :32], autocast)


def start(argv):
    """Read the config, take the run's lock, join the other processes of torchrun and train."""
    config, given, name = configure(argv, WORLD)
    if config.plan:
        return plan(config, name)
    choose_device(config)
    torchrun = "RANK" in os.environ
    config.resume |= os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"       # torchrun, after a crash
    with lock(os.path.join(config.out_dir, f"{name}.lock")) if RANK == 0 else nullcontext():
        if torchrun:
            dist.init_process_group("nccl" if config.device == "cuda" else "gloo")
        main(config, given, name, argv[0])
        if torchrun:
            dist.barrier()      # a rank that leaves early takes its connections away from the others
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)         # at Python's own end gloo's threads abort one process in some fifty


if __name__ == "__main__":
    try:
        start(sys.argv[1:])
    except KeyboardInterrupt:       # before the first step; later the run saves first
        sys.exit(130)
    except (TrainError, DataError, ModelError, OSError) as e:
        sys.exit(f"train.py: {e}" if RANK == 0 else 1)
