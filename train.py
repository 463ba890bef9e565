"""Train a GPT.

    python train.py configs/quickstart.py                               one process
    python train.py configs/quickstart.py --max_steps=20 --dtype float32
    torchrun --nproc_per_node=8 train.py configs/1.1B.py                one node of 8 GPUs
    python train.py configs/1.1B.py --plan=8                            memory and hours on 8 GPUs

A config file assigns values to keys of Config, below; --key=value or --key value overrides it. For
configs/NAME.py a run writes into out_dir:

    NAME.pt         the model with the best validation loss so far (what eval.py and grow.py read)
    NAME.state.pt   everything needed to go on: the same command continues from it
    NAME.jsonl      the log; its first line holds config, versions, device, commit and data
    NAME.png        training and validation perplexity over tokens seen
    NAME.avg.pt     with average=K: the mean of the weights at K points of the last fifth
    NAME.lock       held by the running process, so that the same run cannot be started twice
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
import platform
import resource
import runpy
import signal
import subprocess
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")     # for torch: less fragmentation

import numpy as np                                                          # noqa: E402
import torch                                                                # noqa: E402
import torch.distributed as dist                                            # noqa: E402
from numpy.lib.stride_tricks import sliding_window_view                     # noqa: E402
from torch.nn.parallel import DistributedDataParallel                       # noqa: E402
from torch.overrides import TorchFunctionMode                               # noqa: E402

from model import GPT, GPTConfig, ModelError, atomic_save, load, load_pickle, save              # noqa: E402
from prepare import DataError, NoBin, count_words, get_tokenizer, lock, open_data, token_bytes  # noqa: E402

RANK, LOCAL_RANK, WORLD = (int(os.environ.get(key, n)) for key, n in        # as torchrun sets them
                           (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
MAX_SKIPS = 10                          # steps in a row whose loss or gradient is not finite
PATIENCE = timedelta(minutes=10)        # how long a rank waits for another before all of them end


class TrainError(ValueError):
    """A config that cannot be trained, or a run that cannot go on; the message is one line."""


# ---- Configuration
@dataclass
class Config:
    # where
    data: str | dict = ""               # folder made by prepare.py, or a mixture {folder: share, ...}
    out_dir: str = "out"
    init_from: str = ""                 # a .pt, a Hugging Face folder or hub name; "": from scratch
    resume: bool = True                 # go on from NAME.state.pt if it exists
    wandb: str = ""                     # also log to this Weights & Biases project
    seed: int = 1337
    # how
    device: str = "auto"                # auto: cuda, else mps, else cpu
    dtype: str = "auto"                 # float32, or bfloat16 or float16 by autocast; auto: the fastest here
    compile: bool | None = None         # torch.compile; None: on CUDA only
    checkpoint: bool = False            # recompute layers in the backward: far less memory, a third more work
    zero: bool = False                  # share the optimizer's state over the processes (ZeRO stage 1)
    plan: int = 0                       # print what the run would take on this many GPUs, and stop
    # batches; batch_size does not depend on the number of processes
    block_size: int = 1024              # tokens of context
    batch_size: int = 512               # sequences per step, over all processes
    micro_batch_size: int | None = None     # sequences at once per process; None: its whole share
    # length: training ends at the first of these that is set
    max_steps: int | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    # intervals, in steps
    eval_interval: int = 500
    eval_tokens: int = 2**18            # validation tokens per source, the same ones each time
    save_interval: int = 500
    log_interval: int = 10
    # optimizer
    optimizer: str = "adamw"            # adamw, adafactor or muon
    learning_rate: float = 6e-4
    min_lr: float = 6e-5                # where the schedule ends
    adamw_lr: float | None = None       # with muon: the rate of embeddings and vectors; None: learning_rate
    warmup_steps: int = 2000
    schedule: str = "cosine"            # cosine, linear or constant
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
    pos: str = "learned"                # learned or alibi


SHAPE = ("n_layer", "n_head", "n_embd", "bias", "pos")
IDENTITY = ("data", "init_from", "seed", "batch_size", "block_size", "optimizer", *SHAPE)   # fixed for a run
CHOICES = dict(device=("auto", "cuda", "mps", "cpu"), dtype=("auto", "float32", "bfloat16", "float16"),
               optimizer=("adamw", "adafactor", "muon"), schedule=("cosine", "linear", "constant"),
               pos=("learned", "alibi"))
MAY_BE_ZERO = ("seed", "plan", "min_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip",
               "average", "dropout")
BELOW = dict(beta1=1, beta2=1, dropout=1, seed=2**32)


def configure(argv, world=1):
    """(Config, names of the keys that were set, run name) from a config file and --key=value words.

    world: the number of processes that share a batch. Raises TrainError or ModelError; loads nothing.
    """
    path, *words = argv or [""]
    types = {f.name: f.type for f in fields(Config)}
    if not os.path.isfile(path):
        raise TrainError(f"{path}: no such file; expected a config first: python train.py configs/NAME.py")
    try:
        values = runpy.run_path(path)
    except Exception as e:      # whatever a wrong line in it raises
        raise TrainError(f"{path}: {type(e).__name__}: {e}") from None
    settings = [(path, key, value) for key, value in values.items() if not key.startswith("_")
                and (key in types or isinstance(value, (str, int, float, dict)))]       # not what it imports
    while words:
        word, equals, value = words.pop(0).partition("=")
        settings.append((word, word.removeprefix("--"), value if equals else words.pop(0) if words else ""))
    config = Config()
    for source, key, value in settings:
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1) or ["another key of Config in train.py"]
            raise TrainError(f"{source}: unknown key {key}, did you mean {near[0]}?")
        try:
            setattr(config, key, convert(value, getattr(types[key], "__args__", (types[key],))))
        except ValueError:
            expected = getattr(types[key], "__name__", types[key])
            raise TrainError(f"{source}: {key} = {value!r}, expected {expected}") from None
    check(config, path, config.plan or world)
    return config, {key for _, key, _ in settings}, os.path.basename(path).removesuffix(".py")


def convert(value, types):
    """value as one of types; text from the command line is parsed first. Raises ValueError."""
    words = {"true": True, "false": False, "none": None}
    if isinstance(value, str) and str not in types:
        value = words[value.lower()] if value.lower() in words else float(value)
    if type(value) in (int, float) and math.isfinite(value):
        for number in (int, float):     # 1e3 is a whole number, and 1 may stand for 1.0
            if number in types and number(value) == value:
                return number(value)
    if type(value) not in types or isinstance(value, float):
        raise ValueError
    return os.path.expanduser(value) if isinstance(value, str) else value


def check(config, path, world):
    """Refuse what cannot be trained. Raises TrainError, ModelError."""
    def expect(condition, key, expected):
        if not condition:
            raise TrainError(f"{path}: {key} = {getattr(config, key)!r}, expected {expected}")

    for key, value in vars(config).items():
        expect(value in CHOICES.get(key, [value]), key, f"one of {', '.join(CHOICES.get(key, []))}")
        if type(value) in (int, float):
            expect(value > 0 or value == 0 and key in MAY_BE_ZERO, key, "more than 0")
            expect(value < BELOW.get(key, math.inf), key, f"less than {BELOW.get(key)}")
    if isinstance(config.data, dict):
        expect(all(type(n) in (int, float) and 0 < n < math.inf for n in config.data.values()) and
               apportion(config.data.values()).all(), "data", f"shares of at least one sample in {DECK}")
        config.data = {os.path.expanduser(folder): share for folder, share in config.data.items()}
    expect(config.data, "data", "a folder made by prepare.py")
    expect(config.max_steps or config.max_tokens or config.max_epochs, "max_steps",
           "a length: max_steps, max_tokens or max_epochs")
    micro = config.micro_batch_size or max(1, config.batch_size // world)
    expect(config.batch_size % (world * micro) == 0, "batch_size",
           f"a multiple of {world} processes x micro_batch_size {micro}")
    expect(not config.zero or config.optimizer != "adafactor", "zero", "False: adafactor's state is small")
    expect(not config.adamw_lr or config.optimizer == "muon", "adamw_lr", "optimizer = muon along with it")
    if not config.init_from:
        GPTConfig(**{key: getattr(config, key) for key in ("block_size", "dropout", *SHAPE)})


# ---- Data: which tokens a step sees is a pure function of (seed, step)

DECK = 1000         # samples of a mixture in which every source has exactly its share


class Blocks:
    """The blocks of T tokens in several bins as one list, each with the token after it, its last target."""

    def __init__(self, bins, T, name):
        self.views = [sliding_window_view(tokens, T + 1)[::T] for tokens in bins if len(tokens) > T]
        if not self.views:
            raise DataError(f"{name}: {sum(map(len, bins)):,} tokens, expected more than block_size={T}")

    def __len__(self):
        return sum(map(len, self.views))

    def __getitem__(self, i):
        """Block i: (T + 1,) uint16."""
        for view in self.views:
            if i < len(view):
                return view[i]
            i -= len(view)

    def spread(self, n_tokens):
        """Enough blocks to hold n_tokens, spread evenly over all: (n, T + 1) uint16."""
        n = min(len(self), math.ceil(n_tokens / (self.views[0].shape[1] - 1)))
        return np.stack([self[i * len(self) // n] for i in range(n)])


def apportion(shares):
    """Samples of each source in a deck: whole numbers that add up to DECK, by largest remainder."""
    exact = np.array(list(shares)) / sum(shares) * DECK
    counts = exact.astype(int)
    counts[np.argsort(counts - exact, kind="stable")[:DECK - counts.sum()]] += 1
    return counts


class Loader:
    """Batches of blocks. Each source comes in a new random order each epoch, every block once.

    sources: Blocks; shares: of each source, dealt from one shuffled deck, over and over. Sample i of a step
    is the same for any number of processes, so a run needs no loader state to resume.
    """

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
        k = int(self.deck[place])
        i = decks * int(self.counts[k]) + int((self.deck[:place] == k).sum())   # it is source k's i-th
        n = len(self.sources[k])
        epoch, i = divmod(i, n)
        order = self.permutation(n, epoch, k) if k else self.permutation(n, epoch)
        return self.sources[k][order[i]]

    def batch(self, step, rank=0, world=1):
        """This rank's share of a step: (batch_size / world, T + 1) int64 on the CPU."""
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        return torch.from_numpy(np.stack([self.block(first + i) for i in range(share)]).astype(np.int64))

    def epochs(self, step):
        """How often each source has been seen, to within a deck."""
        samples = step * self.batch_size * self.counts / DECK
        return [float(n / len(blocks)) for n, blocks in zip(samples, self.sources)]


def open_sources(config):
    """(Loader, {source: validation rows}, meta of the data, what identifies it)."""
    T = config.block_size
    bins, meta = open_data(config.data, "train")
    val_bins, val_meta = open_data(config.data, "val")
    shares = config.data.values() if isinstance(config.data, dict) else [1]
    loader = Loader([Blocks(bins[name], T, name) for name in bins], shares, config.batch_size, config.seed)
    val_rows = {name: Blocks(val_bins[name], T, f"{name}/val").spread(config.eval_tokens)
                for name in val_bins}
    data = dict(train=meta["fingerprint"][:16], val=val_meta["fingerprint"][:16],
                shares=loader.counts.tolist())
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


class InFloat32(TorchFunctionMode):
    """Leaves out the conversion to bf16 in torch's Muon, 20 times slower on CPUs without bf16 units."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return args[0] if func is torch.Tensor.bfloat16 else func(*args, **(kwargs or {}))


def make_optimizer(model, config):
    """[AdamW], [Adafactor] (Shazeer & Stern 2018) or [Muon, AdamW] (Jordan et al. 2024), as a list.

    Muon trains the matrices of the blocks, AdamW with rate adamw_lr the embeddings and vectors. Only matrices
    decay. A group's rate is the schedule's times its lr_scale.
    """
    def make(optimizer, groups, **options):
        if config.zero and dist.is_initialized():       # Rajbhandari et al. 2020, arXiv:1910.02054
            from torch.distributed.optim import ZeroRedundancyOptimizer     # here, for it is slow to import
            return ZeroRedundancyOptimizer(groups, optimizer, lr=config.learning_rate, **options)
        return optimizer(groups, lr=config.learning_rate, **options)

    blocks, matrices, vectors = [], [], []
    for name, p in model.named_parameters():
        muon = config.optimizer == "muon" and name.startswith("h.")
        (vectors if p.dim() < 2 else blocks if muon else matrices).append(p)
    scale = (config.adamw_lr or config.learning_rate) / config.learning_rate
    groups = [dict(params=matrices, weight_decay=config.weight_decay, lr_scale=scale),
              dict(params=vectors, weight_decay=0.0, lr_scale=scale)]
    if config.optimizer == "adafactor":
        # a step's root mean square is the rate itself, as in fine-tuning recipes; torch would multiply it by
        # that of the weights, which is left only where theirs is above 1
        return [make(torch.optim.Adafactor, groups, eps=(None, 1.0))]
    adamw = make(torch.optim.AdamW, groups, betas=(config.beta1, config.beta2), fused=True)
    if config.optimizer == "adamw":
        return [adamw]
    # updates as large as AdamW's (Liu et al. 2025, arXiv:2502.16982), so AdamW's rates are where to start
    blocks = [dict(params=blocks, weight_decay=config.weight_decay, lr_scale=1.0)]
    return [make(torch.optim.Muon, blocks, adjust_lr_fn="match_rms_adamw"), adamw]


def train_step(model, optimizers, rows, micro_batch_size, autocast, grad_clip, scaler, stop=()):
    """One step over rows (share, T + 1), micro_batch_size of them at a time: (loss, norm, stopping).

    These are the mean loss over all ranks and the gradient's norm before clipping, as numbers, and whether
    `stop` holds anything on any rank. Where loss or norm is not finite, no rank changes its weights. Waits
    for the device once, before the optimizer, which runs while the next batch is fetched.
    """
    micro_batches = rows.split(micro_batch_size)
    loss = 0
    for i, micro_batch in enumerate(micro_batches):
        idx, targets = micro_batch[:, :-1], micro_batch[:, 1:]      # each (B, T)
        last = i == len(micro_batches) - 1          # gradients are averaged over ranks once a step
        with nullcontext() if last or not dist.is_initialized() else model.no_sync():
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
    for optimizer in optimizers:
        if math.isfinite(loss) and math.isfinite(norm):
            with InFloat32() if rows.device.type == "cpu" else nullcontext():
                scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
    scaler.update()
    return loss, norm, stopping > 0


@torch.no_grad()
def evaluate(model, sources, batch_size, autocast):
    """Mean loss in nats per token on each of sources, (n, T + 1) uint16, whose rows the ranks share."""
    device = model.wte.weight.device
    totals = torch.zeros(len(sources), dtype=torch.float64)
    model.eval()        # no dropout, so no random number is drawn
    for k, rows in enumerate(sources):
        mine = torch.from_numpy(rows[RANK::WORLD].astype(np.int64))
        for i in range(0, len(mine), batch_size):
            batch = mine[i:i + batch_size].to(device)                               # (B, T + 1)
            with autocast:
                losses = model(batch[:, :-1], batch[:, 1:], reduction="none")       # (B, T)
            totals[k] += losses.cpu().double().sum()
    model.train()
    if WORLD > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
    return [total / rows[:, 1:].size for total, rows in zip(totals.tolist(), sources)]


# ---- The machine
def keep_memory():
    """Let glibc keep freed memory: on a CPU each step allocates the same activations again, and fetching them
    from the kernel can cost more than the arithmetic. The process keeps its peak (logs/speed/)."""
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
    if platform.libc_ver()[0] == "glibc":       # never trim, grow by 64 MiB, map no single block, one heap
        for key, value in ((M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
            ctypes.CDLL(None).mallopt(key, value)


@functools.cache
def matmul_flops(device, dtype):
    """FLOP/s of this device in a large product of square matrices: what MFU is measured against."""
    n, times, best = (8192, 40, math.inf) if device.type == "cuda" else (768, 60, math.inf)
    a = torch.randn(n, n, device=device).to(dtype)
    began = time.perf_counter()
    for i in range(times):
        start = time.perf_counter()
        if i > 3 and start - began > 0.5:       # half-precision can be slow beyond reason on a CPU
            break
        (a @ a)[0, 0].item()                # .item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def faster_dtype(device):
    """The dtype in which this device multiplies matrices fastest; float16 for CUDA without bf16 units."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    faster = matmul_flops(device, torch.bfloat16) > 1.2 * matmul_flops(device, torch.float32)
    return "bfloat16" if faster else "float32"


def memory(device):
    """The most memory, in bytes, that this process has held at once."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak


@contextmanager
def writing(path):
    """A full disk ends the run in one line that names the file. What was saved before stays."""
    try:
        yield
    except (OSError, RuntimeError) as e:        # torch's writer raises RuntimeError
        reason = str(e).splitlines()[0]
        raise OSError(f"{path}: not written ({reason}); make room, then the same command goes on") from None


# ---- The log
def perplexity(loss):
    return math.exp(min(loss, 50))      # a loss gone wild must not end the run


class Log:
    """NAME.jsonl, one JSON object a line, also printed; and the curve drawn from it. Only rank 0 writes."""

    def __init__(self, path, header, step):
        """Start anew at step 0, else go on from a state saved at `step` with what can be read of the file."""
        self.path, self.records, self.wandb = path, [header], None
        if RANK:
            return
        with open(path, errors="replace") if step and os.path.exists(path) else nullcontext(()) as lines:
            for line in lines:
                try:
                    record = json.loads(line.strip("\0\n"))
                    again = {"val_loss", "changed"} & record.keys()     # what is logged before the next step
                    if "config" in record:
                        self.records[0] = record
                    elif record["step"] < step or record["step"] == step and not again:
                        self.records.append(record)
                except (ValueError, KeyError, TypeError, AttributeError):       # half a line, NUL bytes
                    pass
        if project := header["config"]["wandb"]:
            try:        # the id in the header finds the same run again
                import wandb
                self.wandb = wandb.init(project=project, config=header["config"], resume="allow",
                                        name=os.path.basename(path)[:-6], id=self.records[0].get("wandb"))
            except Exception as e:      # not installed, no account, no network
                raise TrainError(f"wandb = {project}: {e}; pip install wandb, or leave it out") from None
            self.wandb.define_metric("*", step_metric="tokens")
            self.records[0]["wandb"] = self.wandb.id
        with writing(path), open(f"{path}.tmp", "w") as f:
            f.writelines(json.dumps(record) + "\n" for record in self.records)
        os.replace(f"{path}.tmp", path)

    def say(self, *text):
        if RANK == 0:
            print(*text, sep="\n", flush=True)

    def write(self, **record):
        values = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items())
        self.say("   ".join(values))
        self.records.append(record)
        if RANK == 0:
            with writing(self.path), open(self.path, "a") as f:
                f.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record)

    def plot(self, path):
        """Perplexity over tokens, without step 0: an untrained model would take most of the axis."""
        import matplotlib       # here, for it is slow to import and only rank 0 draws
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(r["tokens"], perplexity(r[key])) for r in self.records if r.get("step") and key in r]
            axes.plot(*np.array(points).reshape(-1, 2).T, style, label=label, lw=1, ms=3)
        axes.set(xlabel="tokens seen", ylabel="perplexity per token", yscale="log", title=path)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        with writing(path):
            figure.savefig(f"{path}.tmp", dpi=120, format="png")
        os.replace(f"{path}.tmp", path)
        plt.close(figure)


# ---- The plan
def memory_by_part(model, config, micro, gpus):
    """Bytes on each GPU at the peak, by part: bf16 autocast, compiled, with the kernels of model.py.

    What a layer keeps for its backward, per token and channel, is that of torch.compile's graphs: in bf16
    both norms' outputs, q, k, v, y, the MLP before and after GELU; in fp32 the stream twice; dropout masks.
    """
    N, (V, C), L = model.num_params(), model.wte.weight.shape, config.n_layer
    tokens = micro * config.block_size
    state = dict(adamw=8 * N, muon=8 * N - 48 * L * C * C, adafactor=8 * N // C)[config.optimizer]
    layer = tokens * ((36 + 2 * (config.dropout > 0)) * C + 4 * config.n_head)
    again = config.checkpoint       # layers are recomputed
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
    gpus, T = config.plan, config.block_size
    with torch.device("meta"):
        model = GPT(GPTConfig(T, vocab_size, **{key: getattr(config, key) for key in SHAPE}))
    micro, tokens = config.micro_batch_size or config.batch_size // gpus, config.batch_size * T
    steps = config.max_steps or math.ceil((config.max_tokens or tokens) / tokens)
    flops = steps * tokens * model.flops_per_token(T)
    print(f"{name} on {gpus} GPUs: {model.num_params() / 1e6:,.1f}M parameters, {steps:,} steps of "
          f"{tokens:,} tokens, {steps * tokens / 1e9:.1f}B tokens, {flops:.2e} FLOPs, micro batches of "
          f"{micro}\n\n| memory per GPU | GB |\n|---|---|")
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
    mean: dict = field(default_factory=dict)        # average: mean of the weights, on rank 0's CPU ...
    mean_of: list = field(default_factory=list)     # ... at these steps

    def add_to_mean(self, model, points):
        if not set(self.mean_of) <= points:         # those of an earlier, shorter run
            self.mean_of = []
        self.mean_of = [*self.mean_of, self.step]
        n = len(self.mean_of)
        for key, p in model.state_dict().items() if RANK == 0 else ():
            p = p.float().cpu()
            self.mean[key] = self.mean[key].lerp(p, 1 / n) if n > 1 else p.clone()


def make_model(config, given, meta, path, state):
    """(model, lineage) of a state, of init_from, or new. Raises ModelError, TrainError."""
    if state:
        model = GPT(GPTConfig(**{**state["model_config"], "dropout": config.dropout}))
        model.load_state_dict(state["model"])
        return model, state["lineage"]
    if not config.init_from:
        shape = {key: getattr(config, key) for key in ("block_size", "dropout", *SHAPE)}
        return GPT(GPTConfig(vocab_size=meta["vocab_size"], **shape)), []
    if config.init_from.endswith(".pt") and not os.path.exists(config.init_from):
        with open(path) as f:       # the configs of grown models say how they are made
            commands = [line.strip("# \n") for line in f if "grow.py" in line and config.init_from in line]
        raise TrainError("; first: ".join([f"init_from = {config.init_from}: no such file", *commands[:1]]))
    model, source = load(config.init_from)
    for key in SHAPE:
        have, asked = getattr(model.config, key), getattr(config, key)
        if key in given and have != asked:
            raise TrainError(f"{config.init_from}: {key} is {have}, but the config asks for {asked}")
    if source["tokenizer"] != meta["tokenizer"] or meta["vocab_size"] > model.config.vocab_size:
        raise TrainError(f"{config.init_from}: {model.config.vocab_size} {source['tokenizer']} tokens, but "
                         f"{config.data} holds {meta['vocab_size']} {meta['tokenizer']} tokens")
    model.crop_block_size(config.block_size)
    model.config.dropout = config.dropout
    parent = {key: source[key] for key in ("step", "tokens", "flops", "val_loss") if key in source}
    return model, source.get("lineage", []) + [{"from": config.init_from, **parent}]


def load_state(out, config, given, data):
    """(state, {key: [old, new]} of the keys that changed), or (None, {}) for a new run.

    data: what identifies the data. Raises TrainError where the state is another run's, and before a new run
    would overwrite what was trained.
    """
    path = f"{out}.state.pt"
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"        # by torchrun, after a crash
    if os.path.realpath(config.init_from) in (os.path.realpath(f"{out}{end}.pt") for end in ("", ".avg")):
        raise TrainError(f"init_from = {config.init_from}: this run would overwrite it; choose an out_dir")
    if not (config.resume or restarted):
        return None, {}
    if not os.path.exists(path):
        if os.path.exists(f"{out}.pt"):
            raise TrainError(f"{out}.pt is here without its .state.pt; --resume=false overwrites it")
        return None, {}
    state = load_pickle(path, mmap=True)        # one copy for all processes of a machine
    if not isinstance(state, dict) or "progress" not in state:
        raise TrainError(f"{path}: not a state of this version of train.py; --resume=false starts over")
    was = {**state["config"], **{key: state["model_config"][key] for key in SHAPE}, "data": state["data"]}
    same = {"resume"} | {key for key in SHAPE if config.init_from and key not in given}     # the checkpoint's
    changed = {key: [was.get(key), now] for key, now in {**vars(config), "data": data}.items()
               if was.get(key) != now and key not in same}
    for key in IDENTITY:
        if key in changed:
            old, new = changed[key]
            raise TrainError(f"{path}: {key} was {old}, now it is {new}; --resume=false starts over")
    return state, changed


def commit():
    """The repository's commit, with a + where files differ from it; "" outside a checkout."""
    git, folder = "git describe --always --dirty=+ --exclude='*' --abbrev=12", os.path.dirname(__file__)
    return subprocess.run(git, shell=True, cwd=folder or None, capture_output=True, text=True).stdout.strip()


def units(targets, tokenizer):
    """(bytes, words) of text per token of targets."""
    n_words = count_words(targets.ravel(), tokenizer)
    return token_bytes(tokenizer)[targets].mean(), max(1e-9, n_words / targets.size)


def sample(model, tokenizer, prompt, autocast):
    """400 tokens after prompt (T,), or a warning: all is saved when this comes."""
    try:
        model.config.vocab_size = tokenizer.n_vocab     # only what it can decode
        idx = torch.from_numpy(prompt.astype(np.int64))[None].to(model.wte.weight.device)       # (1, T)
        with autocast:
            tokens = model.eval().generate(idx, 400, temperature=0.8)[0].tolist()
        return f"\na sample, 400 tokens after the first {len(prompt)}:\n\n{tokenizer.decode(tokens)}"
    except Exception as e:
        return f"warning: no sample: {type(e).__name__}: {e}"


def restore(state, optimizers, scaler):
    """Moments from a state; rates, decay and betas stay those of the config."""
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        for group, old in zip(optimizer.param_groups, saved["param_groups"]):
            old.update({**group, "params": old["params"]})
        optimizer.load_state_dict(saved)
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def main(config, given, name, path, device):
    out, distributed = os.path.join(config.out_dir, name), dist.is_initialized()

    # ---- data
    loader, val_rows, meta, data = open_sources(config)
    n_blocks, tokens_per_step = sum(map(len, loader.sources)), config.batch_size * config.block_size
    max_steps = math.ceil(min(config.max_steps or math.inf, (config.max_tokens or math.inf) / tokens_per_step,
                              (config.max_epochs or math.inf) * n_blocks / config.batch_size))

    # ---- model and optimizer, new or where the run stopped
    state, changed = load_state(out, config, given, data)
    torch.manual_seed(config.seed)
    waiting = dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if distributed else None
    if LOCAL_RANK:              # the others of a machine wait, so that only one process downloads
        dist.barrier(waiting)
    tokenizer = get_tokenizer(meta["tokenizer"])
    model, lineage = make_model(config, given, meta, path, state)
    if distributed and not LOCAL_RANK:
        dist.barrier(waiting)
    model.to(device).train()
    model.checkpointing = config.checkpoint
    dtype = config.dtype if config.dtype != "auto" else state["dtype"] if state else faster_dtype(device)
    if distributed:             # ranks may have measured differently
        dist.broadcast_object_list(choice := [dtype])
        dtype = choice[0]
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    optimizers, run = make_optimizer(model, config), Progress()
    if state:
        restore(state, optimizers, scaler)
        run = Progress(**state["progress"])
    if "eval_tokens" in changed:
        run.best = math.inf     # losses on other tokens cannot be compared
    if config.compile or config.compile is None and device.type == "cuda":
        model.compile()
    runner = DistributedDataParallel(model, gradient_as_bucket_view=True) if distributed else model

    # ---- the log and its units
    shares, epochs = loader.counts / DECK, config.batch_size / n_blocks     # epochs: per step
    bytes_per_token, words_per_token = shares @ [units(rows[:, 1:], tokenizer) for rows in val_rows.values()]
    flops_per_step = model.flops_per_token(config.block_size) * tokens_per_step
    peak = WORLD * matmul_flops(device, getattr(torch, dtype))
    log = Log(f"{out}.jsonl", dict(
        config=asdict(config), parameters=model.num_params(), dtype=dtype, world=WORLD,
        versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__),
        device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or device.type,
        commit=commit(), data=meta["fingerprint"], lineage=lineage), run.step)
    log.say(f"{name}: {model.num_params() / 1e6:.1f}M parameters, {max_steps} steps of {tokens_per_step:,} "
            f"{meta['tokenizer']} tokens, {max_steps * epochs:.2f} epochs of {config.data}, "
            f"on {WORLD} x {device.type} in {dtype}", *(f"from {parent['from']}" for parent in lineage))
    if state:
        log.say(f"going on from {out}.state.pt at step {run.step}; --resume=false starts over")
    if changed:
        log.write(step=run.step, changed=changed)

    def save_model(file, loss):
        if RANK == 0:
            with writing(file):
                save(file, model, tokenizer=meta["tokenizer"], data=config.data, step=run.step,
                     tokens=run.step * tokens_per_step, flops=run.step * flops_per_step, val_loss=loss,
                     fingerprint=meta["fingerprint"], lineage=lineage)

    stop, stopping = [], False      # SIGINT and SIGTERM: finish the step, save, leave
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))
    micro = config.micro_batch_size or config.batch_size // WORLD
    mean_at = {round(max_steps * (1 - 0.2 * i / config.average)) for i in range(config.average)}
    since, since_step, saved_step = time.perf_counter(), run.step, run.step if state else -1
    while True:
        # ---- save, before the evaluation: then no step is done twice
        ending = run.step >= max_steps
        evaluating = ending or run.step % config.eval_interval == 0
        due = stopping or evaluating or run.step % config.save_interval == 0
        if due and run.step != saved_step:
            for optimizer in optimizers if config.zero and distributed else ():
                optimizer.consolidate_state_dict(to=0)
            if RANK == 0:
                with writing(f"{out}.state.pt"):
                    atomic_save(dict(model=model.state_dict(), model_config=asdict(model.config),
                                     optimizers=[optimizer.state_dict() for optimizer in optimizers],
                                     scaler=scaler.state_dict(), progress=vars(run), config=asdict(config),
                                     dtype=dtype, data=data, lineage=lineage), f"{out}.state.pt")
        if stopping:
            return log.say(f"stopped at step {run.step}; the same command goes on from {out}.state.pt")

        # ---- evaluate
        if evaluating:
            losses = evaluate(model, list(val_rows.values()), micro, autocast)
            val_loss = float(shares @ losses)
            if val_loss < run.best:
                run.best, run.best_step = val_loss, run.step
                save_model(f"{out}.pt", val_loss)
            record = dict(val_loss=val_loss, bits_per_byte=val_loss / math.log(2) / bytes_per_token,
                          word_perplexity=perplexity(val_loss / words_per_token))
            if len(losses) > 1:     # a mixture: the loss on each source, and how often it has been seen
                record["val_losses"] = dict(zip(val_rows, losses))
                record["epochs"] = dict(zip(val_rows, loader.epochs(run.step)))
            log.write(step=run.step, tokens=run.step * tokens_per_step, **record)
            if RANK == 0 and run.step:
                log.plot(f"{out}.png")
            since, since_step = time.perf_counter(), run.step
        if ending:
            break

        # ---- step
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
        record = dict(step=run.step, tokens=run.step * tokens_per_step)
        if run.skips:
            log.write(**record, skipped=f"loss {loss}, norm {norm}")
        elif run.step % config.log_interval == 0 or run.step == max_steps:
            now = time.perf_counter()
            speed = (run.step - since_step) / max(now - since, 1e-9)        # steps per second
            since, since_step = now, run.step
            log.write(**record, loss=loss, norm=norm, lr=lr, tokens_per_second=round(speed * tokens_per_step),
                      mfu=round(speed * flops_per_step / peak, 4), bytes_held=memory(device),
                      left=str(timedelta(seconds=int((max_steps - run.step) / speed))))
        if run.skips == MAX_SKIPS:
            raise TrainError(f"{MAX_SKIPS} steps in a row, up to {run.step}, were not finite; lower the "
                             f"learning_rate, or change seed; {out}.state.pt is as it was")
        if run.step in mean_at:
            run.add_to_mean(model, mean_at)

    # ---- the end: the mean of the weights, a row for a table, a sample
    if run.mean_of:
        if RANK == 0:
            model.load_state_dict(run.mean)
        for p in model.parameters() if distributed else ():
            dist.broadcast(p.data, 0)
        mean_loss = float(shares @ evaluate(model, list(val_rows.values()), micro, autocast))
        save_model(f"{out}.avg.pt", mean_loss)
        log.say(f"mean of the weights at steps {run.mean_of}: val loss {mean_loss:.4f}, {out}.avg.pt")
    train_loss = next((r["loss"] for r in reversed(log.records) if "loss" in r), math.nan)
    cells = (config.block_size, config.init_from or name, f"{train_loss:.4f}", f"{val_loss:.4f}",
             f"{perplexity(val_loss):.2f}", f"{record['word_perplexity']:.2f}",
             f"{run.best_step * epochs:.2f} of {run.step * epochs:.2f}", out)
    log.say("\n| context | model | train loss | val loss | val ppl | adj val ppl | best epoch | run |\n"
            f"{'|---' * len(cells)}|\n| {' | '.join(map(str, cells))} |")
    if log.wandb:
        log.wandb.finish()
    log.say(sample(model, tokenizer, next(iter(val_rows.values()))[0, :32], autocast) if RANK == 0 else "")


def start(argv):
    """Read the config, take the run's lock, join the other processes of torchrun and train."""
    config, given, name = configure(argv, WORLD)
    if config.plan:
        return plan(config, name)
    here = [kind for kind, has in (("cuda", torch.cuda), ("mps", torch.backends.mps), ("cpu", torch.cpu))
            if has.is_available()]
    if config.device not in ("auto", *here):
        raise TrainError(f"device = {config.device}: torch sees none here, only {', '.join(here)}")
    device = torch.device(here[0] if config.device == "auto" else config.device)
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_memory()
    with lock(os.path.join(config.out_dir, f"{name}.lock")) if RANK == 0 else nullcontext():
        if "RANK" not in os.environ:
            return main(config, given, name, argv[0], device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        main(config, given, name, argv[0], device)
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
