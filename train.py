"""Train a GPT.

    python train.py configs/quickstart.py                               one process
    python train.py configs/quickstart.py --max_steps=20 --dtype=float32
    torchrun --nproc_per_node=8 train.py configs/1.1B.py                one node of 8 GPUs
    python train.py configs/1.1B.py --plan=8                            what that would take

A config file is plain assignments to the keys of Config below; --key=value comes after it and
wins. The run is named after its config file. It writes, for configs/NAME.py, into out_dir:

    NAME.pt         the model with the best validation loss so far (what eval.py and grow.py read)
    NAME.state.pt   everything needed to go on: the same command continues from it
    NAME.jsonl      the log; its first line holds config, versions, device, commit and data
    NAME.png        training and validation perplexity over tokens seen
    NAME.avg.pt     with average=K: the mean of the weights at K points of the last fifth
"""
import ctypes
import difflib
import json
import math
import os
import platform
import runpy
import signal
import subprocess
import sys
import time
import types
import typing
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")     # no fragments; torch reads it

import numpy as np                                                              # noqa: E402
import torch                                                                    # noqa: E402
import torch.distributed as dist                                                # noqa: E402
from torch.nn.parallel import DistributedDataParallel                           # noqa: E402

from model import OPENAI, GPT, GPTConfig, ModelError, atomic_save, load, load_pickle, save    # noqa: E402
from prepare import DataError, NoBin, count_words, get_tokenizer, open_data, token_bytes    # noqa: E402

MAX_SKIPS = 10                          # steps in a row whose loss or gradient is not finite
PATIENCE = timedelta(minutes=10)        # how long a rank waits for another before all of them end


class ConfigError(ValueError):
    """A key, a value or a combination that cannot be trained; the message is one line."""


class Diverged(RuntimeError):
    """MAX_SKIPS steps in a row were not finite."""


# ---------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Config:
    # where
    data: str | dict = ""               # folder that prepare.py made, "a,b": several as one, {"a": share, ...}: mixed
    out_dir: str = "out"
    init_from: str = ""                 # a .pt, a Hugging Face folder, gpt2 ... gpt2-xl; "": scratch
    resume: bool = True                 # go on from NAME.state.pt where it exists
    wandb: str = ""                     # project of Weights & Biases to log to as well
    seed: int = 1337
    # how
    device: str = "auto"                # auto: cuda, else mps, else cpu
    dtype: str = "auto"                 # float32, or bfloat16 or float16 by autocast; auto: the fastest here
    compile: bool | None = None         # torch.compile; None: on CUDA only
    checkpoint: bool = False            # recompute each layer in the backward: far less memory, a third more work
    zero: bool = False                  # AdamW's state shared out over the processes (ZeRO stage 1)
    # batches; block_size and batch_size do not depend on the number of processes
    block_size: int = 1024              # tokens of context
    batch_size: int = 512               # sequences per step, over all processes
    micro_batch_size: int | None = None     # sequences at once per process; None: its whole share
    # length: training ends at the first of those that are set
    max_steps: int | None = None
    max_tokens: int | None = None
    max_epochs: float | None = None
    # every so many steps
    eval_interval: int = 500
    eval_tokens: int = 2**18            # validation tokens of each source each time, always the same ones
    eval_block_size: int | None = None  # context of the validation; longer than block_size with ALiBi alone
    save_interval: int = 500
    log_interval: int = 10
    # optimizer
    optimizer: str = "adamw"            # adamw or adafactor
    learning_rate: float = 6e-4
    min_lr: float = 6e-5                # where the schedule ends
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
CHOICES = dict(device=("auto", "cuda", "mps", "cpu"), dtype=("auto", "float32", "bfloat16", "float16"),
               optimizer=("adamw", "adafactor"), schedule=("cosine", "linear", "constant"),
               pos=("learned", "alibi"))
NOT_NEGATIVE = ("learning_rate", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "average", "seed")
POSITIVE = ("block_size", "batch_size", "micro_batch_size", "max_steps", "max_tokens", "max_epochs",
            "eval_interval", "eval_tokens", "eval_block_size", "save_interval", "log_interval", "n_layer", "n_head",
            "n_embd")


def configure(argv, world=1):
    """(Config, names of the keys that were set, run name) from a config file and --key=value words.

    world: the number of processes that share a batch. Raises ConfigError, before anything is loaded.
    """
    if not argv or argv[0].startswith("--"):
        raise ConfigError("expected a config file first: python train.py configs/NAME.py [--key=value ...]")
    path, *overrides = argv
    if not os.path.isfile(path):
        raise ConfigError(f"{path}: no such config file")
    try:
        values = {k: v for k, v in runpy.run_path(path).items() if not k.startswith("_")}
    except Exception as e:      # whatever a wrong line in it raises
        raise ConfigError(f"{path}: {type(e).__name__}: {e}") from None
    settings = [(path, key, value) for key, value in values.items()]
    for word in overrides:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise ConfigError(f"{word}: expected --key=value")
        settings.append((word, key, value))

    config = Config()
    types_ = typing.get_type_hints(Config)
    for source, key, value in settings:
        if key not in types_:
            near = difflib.get_close_matches(key, types_, n=1)
            raise ConfigError(f"{source}: unknown key {key}" + (f", did you mean {near[0]}?" if near else
                              "; the keys are those of Config in train.py"))
        setattr(config, key, convert(value, types_[key], f"{source}: {key}", from_text=source != path))
    check(config, path, world)
    return config, {key for _, key, _ in settings}, os.path.basename(path).removesuffix(".py")


def convert(value, type_, name, from_text):
    """value as type_ (int, float, bool, str, or one of them | None). Raises ConfigError."""
    options = typing.get_args(type_) if isinstance(type_, types.UnionType) else (type_,)
    wanted = options[0]
    try:
        if from_text and wanted is not str:
            if value.lower() == "none" and types.NoneType in options:
                return None
            value = {"true": True, "false": False}[value.lower()] if wanted is bool else float(value)
        if type(value) in options:
            return value
        if wanted in (int, float) and type(value) in (int, float) and wanted(value) == value:
            return wanted(value)
    except (KeyError, ValueError, OverflowError):
        pass
    expected = " or ".join("None" if t is types.NoneType else t.__name__ for t in options)
    raise ConfigError(f"{name} = {value!r}, expected {expected}")


def check(config, path, world):
    """Refuse what cannot be trained. Raises ConfigError."""
    for key, choices in CHOICES.items():
        if getattr(config, key) not in choices:
            raise ConfigError(f'{path}: {key} = "{getattr(config, key)}", expected one of {", ".join(choices)}')
    for key in POSITIVE:
        if getattr(config, key) is not None and getattr(config, key) <= 0:
            raise ConfigError(f"{path}: {key} = {getattr(config, key)}, expected more than 0")
    for key in NOT_NEGATIVE:
        if getattr(config, key) < 0:
            raise ConfigError(f"{path}: {key} = {getattr(config, key)}, expected 0 or more")
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(config, key) < 1:
            raise ConfigError(f"{path}: {key} = {getattr(config, key)}, expected 0 or more and less than 1")
    if not config.data:
        raise ConfigError(f"{path}: data is not set; expected a folder that prepare.py made")
    if isinstance(config.data, dict):
        for name, share in config.data.items():
            if type(name) is not str or type(share) not in (int, float) or not 0 < share < math.inf:
                raise ConfigError(f"{path}: data = {{{name!r}: {share!r}}}, expected a folder and its share, above 0")
        rare = [name for name, n in zip(config.data, apportion(list(config.data.values()))) if n == 0]
        if rare:
            raise ConfigError(f"{path}: data: the share of {', '.join(rare)} is less than one sample in {GROUP}")
    if config.wandb:
        try:
            from wandb import init      # noqa: F401; "import wandb" would take a folder of that name
        except ImportError:
            raise ConfigError(f"{path}: wandb = {config.wandb}: pip install wandb first, or leave it out") from None
    if config.max_steps is config.max_tokens is config.max_epochs is None:
        raise ConfigError(f"{path}: no length; set max_steps, max_tokens or max_epochs")
    micro = config.micro_batch_size or config.batch_size // world
    if micro == 0 or config.batch_size % (world * micro):
        raise ConfigError(f"{path}: batch_size = {config.batch_size} is not a multiple of {world} processes "
                          f"x micro_batch_size {micro or 1}")
    if config.zero and config.optimizer != "adamw":
        raise ConfigError(f"{path}: zero = True goes with optimizer = adamw, not {config.optimizer}, whose state "
                          "is small")
    try:
        GPTConfig(**{key: getattr(config, key) for key in ("block_size", "dropout", *SHAPE)})
    except ModelError as e:
        raise ConfigError(f"{path}: {e}") from None


# ---------------------------------------------------------------------------------------------
# Data: which tokens a step sees is a pure function of (seed, step)

GROUP = 1000        # samples of a mixture in which every source has exactly its share


class Blocks:
    """The blocks of block_size tokens, each with its targets one token on, of several bins as one list."""

    def __init__(self, bins, block_size, name):
        self.bins, self.block_size = bins, block_size
        self.ends = np.cumsum([(len(tokens) - 1) // block_size for tokens in bins])
        if not len(self):
            raise DataError(f"{name}: {sum(map(len, bins)):,} tokens, expected more than block_size={block_size}")

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, i):
        """Block i: (block_size + 1,) uint16."""
        k = np.searchsorted(self.ends, i, side="right")
        start = (i - (self.ends[k - 1] if k else 0)) * self.block_size
        return self.bins[k][start:start + self.block_size + 1]

    def spread(self, n_tokens):
        """So many blocks as hold n_tokens, spread evenly over all: (n, block_size + 1) uint16."""
        n = min(len(self), math.ceil(n_tokens / self.block_size))
        return np.stack([self[i * len(self) // n] for i in range(n)])


def apportion(shares):
    """Of each source how many samples are in a GROUP: whole numbers, by largest remainder."""
    exact = np.array(shares) / sum(shares) * GROUP
    counts = exact.astype(int)
    counts[np.argsort(counts - exact, kind="stable")[:GROUP - counts.sum()]] += 1
    return counts


class Loader:
    """Batches of blocks, each source's in a new random order each epoch, every block once.

    sources: Blocks; counts: of each, how many samples are in a GROUP (apportion). Sample i of a step
    is the same for any number of processes, so a run needs no loader state to resume, and sees the
    same batches when it is moved to more GPUs.
    """

    def __init__(self, sources, counts, batch_size, seed):
        self.sources, self.counts, self.batch_size, self.seed = sources, counts, batch_size, seed
        self.epoch, self.order = [None] * len(sources), [None] * len(sources)
        self.group = None

    def source(self, sample):
        """(k, i): the sample-th sample since the start of training is source k's i-th."""
        if len(self.sources) == 1:
            return 0, sample
        group, i = divmod(sample, GROUP)
        if group != self.group:     # numpy guarantees that RandomState's streams never change
            deck = np.repeat(np.arange(len(self.sources)), self.counts)
            self.group, self.deck = group, np.random.RandomState([self.seed, group, 0, 0]).permutation(deck)
        k = self.deck[i]
        return k, group * int(self.counts[k]) + int((self.deck[:i] == k).sum())

    def block(self, sample):
        """(source, block number) of the sample-th sample."""
        k, i = self.source(sample)
        epoch, i = divmod(i, len(self.sources[k]))
        if epoch != self.epoch[k]:      # a key of another length is another stream
            key = [self.seed, epoch, k] if k else [self.seed, epoch]
            self.epoch[k], self.order[k] = epoch, np.random.RandomState(key).permutation(len(self.sources[k]))
        return k, self.order[k][i]

    def batch(self, step, rank=0, world=1):
        """This rank's share of a step: (batch_size / world, block_size + 1) int64 on the CPU."""
        share = self.batch_size // world
        first = step * self.batch_size + rank * share
        picks = [self.block(first + i) for i in range(share)]
        return torch.from_numpy(np.stack([self.sources[k][i] for k, i in picks]).astype(np.int64))

    def epochs(self, step):
        """How often each source has been seen when `step` steps are done."""
        groups, rest = divmod(step * self.batch_size, GROUP)
        seen = groups * self.counts
        for sample in range(groups * GROUP, groups * GROUP + rest):
            seen[self.source(sample)[0]] += 1
        return [float(n / len(blocks)) for n, blocks in zip(seen, self.sources)]


# ---------------------------------------------------------------------------------------------
# The step


def learning_rate(step, config, max_steps):
    """Linear warmup over warmup_steps, then the schedule down to min_lr at max_steps."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + share * (config.learning_rate - config.min_lr)


def make_optimizer(model, config, settings=None):
    """AdamW (Loshchilov & Hutter 2019) or Adafactor (Shazeer & Stern 2018); decay on matrices only.

    settings: {name: dict(lr_scale, eps)} where the model was grown with its optimizer; the decay of a
    step, rate times weight_decay, stays that of the source.
    """
    groups = {}
    for name, p in model.named_parameters():
        own = settings[name] if settings else dict(lr_scale=1.0)
        decay = config.weight_decay / own["lr_scale"] if p.dim() >= 2 else 0.0
        group = groups.setdefault((p.dim() >= 2, *own.values()), dict(params=[], names=[], weight_decay=decay, **own))
        group["params"].append(p)
        group["names"].append(name)
    groups = list(groups.values())
    if config.optimizer == "adafactor":
        # a step's root mean square is the rate itself, as in fine-tuning recipes; torch's own is times the weights',
        # which is left only where theirs is above 1
        return torch.optim.Adafactor(groups, lr=config.learning_rate, eps=(None, 1.0))
    adamw = dict(lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    if config.zero and dist.is_initialized():       # Rajbhandari et al. 2020, arXiv:1910.02054
        from torch.distributed.optim import ZeroRedundancyOptimizer     # here, for it takes long to import
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **adamw)
    return torch.optim.AdamW(groups, **adamw)


def load_moments(optimizer, moments):
    """Start optimizer, new, from moments {name: dict(step, exp_avg, exp_avg_sq)}, which grow.py wrote."""
    index, groups, state = 0, [], {}
    for group in optimizer.param_groups:
        groups.append({**group, "params": list(range(index, index + len(group["params"])))})
        for name, p in zip(group["names"], group["params"]):    # a shorter context takes the first positions
            state[index] = {key: x[:len(p)] if x.dim() else x for key, x in moments[name].items()}
            index += 1
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


def train_step(model, optimizer, rows, micro_batch_size, autocast, grad_clip, scaler, stop=()):
    """One optimizer step over rows (share, T + 1), micro_batch_size of them at a time.

    Returns (loss, norm, stopping): the mean loss over all ranks and the gradient's norm before
    clipping, as numbers, and whether `stop` holds anything on any rank. Where loss or norm is not
    finite the weights stay as they are, on every rank. Waits for the device once, before the
    optimizer, which runs while the next batch is fetched.
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
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    report = torch.stack([loss.float(), norm.float(), torch.full_like(loss, bool(stop)).float()])
    if dist.is_initialized():
        dist.all_reduce(report)                     # what is not finite on one rank is so on all
        report /= dist.get_world_size()
    loss, norm, stopping = report.tolist()          # the wait
    if math.isfinite(loss) and math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm, stopping > 0


def evaluate(model, sources, batch_size, autocast, rank=0, world=1, stop=()):
    """Mean loss in nats per token on each of sources: blocks (n, T + 1), which the ranks share.

    None where, on any rank, `stop` came to hold something before the end.
    """
    totals = torch.zeros(len(sources) + 1, dtype=torch.float64)     # summed losses, and how many were asked to stop
    for k, rows in enumerate(sources):
        mine, T = rows[rank::world], rows.shape[1] - 1
        for i in range(0, len(mine), batch_size):
            if stop:
                break
            part = mine[i:i + batch_size]
            totals[k] += model.total_loss(part.ravel(), np.arange(len(part)) * (T + 1), T, batch_size, autocast)
    totals[-1] = bool(stop)
    if world > 1:
        totals = totals.to(model.wte.weight.device)
        dist.all_reduce(totals)
    *totals, stopped = totals.tolist()
    return None if stopped else [total / rows[:, 1:].size for total, rows in zip(totals, sources)]


# ---------------------------------------------------------------------------------------------
# The machine


def keep_memory():
    """Let glibc keep freed memory instead of handing it back to the kernel.

    On the CPU each step allocates the same activations again; fetching every one anew, page by
    page, can cost more than the arithmetic. The price is memory: the process keeps its peak, which
    gaps between the blocks can double (logs/bench-cpu.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):    # not glibc
        return
    M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8
    for key, value in ((M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
        mallopt(key, value)     # never trim, grow in 64 MiB, no mappings of single blocks, one heap


def matmul_flops(device, dtype):
    """FLOP/s that this device reaches in a large product of square matrices: the measure of MFU."""
    n, repeats, times = (8192, 10, 6) if device.type == "cuda" else (768, 1, 60)
    a = torch.randn(n, n, device=device).to(dtype)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        for _ in range(repeats):
            b = a @ a
        b[0, 0].item()                      # .item() waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 * repeats / min(seconds)


def faster_dtype(device):
    """("bfloat16", "float16" or "float32", why): the one in which this device multiplies matrices faster."""
    if device.type == "cuda":
        has = torch.cuda.get_device_capability(device) >= (8, 0)
        return ("bfloat16", "has bf16 units") if has else ("float16", "has no bf16 units")
    fp32, bf16 = (matmul_flops(device, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    return ("bfloat16" if bf16 > 1.2 * fp32 else "float32",
            f"measured {fp32:,.0f} GFLOP/s in fp32, {bf16:,.0f} in bf16")


def memory(device):
    """The most memory, in bytes, that this process has held at once; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource         # Windows has none
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def commit():
    """The repository's commit, with a + where files differ from it; None outside a checkout."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty=+",
           "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def full_disk_survived(path):
    """Writing may fail for want of space: the files before it stand, the run says so and goes on."""
    try:
        yield
    except (OSError, RuntimeError) as e:        # torch's writer raises RuntimeError
        reason = str(e).splitlines()[0]
        print(f"warning: {path} not written ({reason}); the last one stands, training goes on", file=sys.stderr)


def perplexity(loss):
    return math.exp(min(loss, 50))      # a loss gone wild must not end the run


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# ---------------------------------------------------------------------------------------------
# The log


class Log:
    """NAME.jsonl, one JSON object a line, and the curve drawn from it."""

    def __init__(self, path, header, step):
        """Start a new log, or, going on from a state saved at `step`, drop what came after it.

        Raises ConfigError where Weights & Biases, asked for, does not let us in.
        """
        self.path, records = path, [header]
        if step and os.path.exists(path):
            with open(path) as f:
                records = [json.loads(line) for line in f if line.endswith("\n")]
            # at `step` itself training lines stand, evaluation is about to happen again
            records = [r for r in records if "config" in r or r["step"] < step
                       or r["step"] == step and "val_loss" not in r]
        self.wandb = None
        if header["config"]["wandb"]:
            import wandb
            try:        # the id in the first line finds the same run again; what is logged twice is the same twice
                self.wandb = wandb.init(project=header["config"]["wandb"], name=os.path.basename(path)[:-len(".jsonl")],
                                        config=header["config"], id=records[0].get("wandb"), resume="allow")
            except wandb.Error as e:
                raise ConfigError(f"wandb: {str(e).splitlines()[0]}") from None
            self.wandb.define_metric("*", step_metric="tokens")
            records[0]["wandb"] = self.wandb.id
        with open(f"{path}.tmp", "w") as f:
            f.writelines(json.dumps(record) + "\n" for record in records)
        os.replace(f"{path}.tmp", path)
        self.records = records

    def write(self, **record):
        self.records.append(record)
        with open(self.path, "a") as f:
            f.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record)

    def plot(self, path):
        import matplotlib       # here, for only rank 0 draws
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
            points = [(r["tokens"], perplexity(r[key])) for r in self.records if key in r]
            if points:
                axes.plot(*zip(*points), style, label=label, lw=1, ms=3)
        axes.set(xlabel="tokens seen", ylabel="perplexity per token", yscale="log",
                 title=os.path.basename(path).removesuffix(".png"))
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        figure.savefig(f"{path}.tmp", dpi=120, format="png")
        os.replace(f"{path}.tmp", path)
        plt.close(figure)


# ---------------------------------------------------------------------------------------------
# The plan


def memory_by_part(model, config, micro, gpus):
    """Bytes on each GPU at the peak, by part: bf16 autocast, compiled, with the kernels of model.py.

    What a layer keeps for its backward was read off the graphs that torch.compile makes (and is in
    tests/test_train.py): per token and channel, in bf16, the two norms' outputs, q, k, v, y, and the
    MLP before and after its GELU; in fp32 the stream twice; a byte for each dropout mask.
    """
    N, V = model.num_params(), model.wte.weight.size(0)
    L, H, C = config.n_layer, config.n_head, config.n_embd
    tokens = micro * config.block_size
    layer = tokens * ((36 + 2 * (config.dropout > 0)) * C + 4 * H)
    adafactor = sum(4 * (p.size(0) + p.size(1)) if p.dim() == 2 else 4 * p.numel() for p in model.parameters())
    adamw = 8 * N // (gpus if config.zero else 1)
    return {
        "weights, fp32": 4 * N,
        "gradients, fp32": 4 * N,
        f"{config.optimizer} state" + f", shared by {gpus}" * (config.zero and gpus > 1):
            adamw if config.optimizer == "adamw" else adafactor,
        "weights, bf16 copies": 2 * (12 * C * C if config.checkpoint else N),
        "activations" + ", checkpointed" * config.checkpoint:
            layer + (L - 1) * tokens * 4 * C if config.checkpoint else L * layer,
        "one layer's backward": tokens * 28 * C + (layer if config.checkpoint else 0),
        "loss": max(6 * V * C + 2 * min(tokens * V, 2**27), 8 * V * C),
    }


def plan(config, name, gpus):
    """What a run would take, on any machine; nothing is trained and no data is needed."""
    try:
        vocab_size = open_data(config.data, "val")[1]["vocab_size"]
    except NoBin:
        vocab_size = 50257
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=vocab_size, **{key: getattr(config, key) for key in ("block_size", *SHAPE)}))
    micro = config.micro_batch_size or config.batch_size // gpus
    tokens_per_step = config.batch_size * config.block_size
    flops = model.flops_per_token(config.block_size)
    steps = config.max_steps or (config.max_tokens and math.ceil(config.max_tokens / tokens_per_step))
    print(f"{name} on {gpus} GPU{'s' * (gpus > 1)}: {model.num_params() / 1e6:,.1f}M parameters, a vocabulary of "
          f"{vocab_size:,}, {flops / 1e9:.2f} GFLOPs per token, {tokens_per_step:,} tokens per step: "
          f"{config.batch_size // (gpus * micro)} micro batches of {micro} x "
          f"{config.block_size} on each GPU\n\n| memory per GPU | GB |\n|---|---|")
    parts = memory_by_part(model, config, micro, gpus)
    for part, size in {**parts, "together": sum(parts.values())}.items():
        print(f"| {part} | {size / 1e9:.1f} |")
    if steps:
        total = steps * tokens_per_step * flops
        print(f"\n{steps:,} steps, {steps * tokens_per_step / 1e9:.1f}B tokens, {total:.2e} FLOPs; by what each GPU "
              "reaches of them a second (MFU times its measured matmul peak):\n\n| TFLOP/s per GPU | hours |\n"
              "|---|---|")
        for speed in (100, 200, 300, 400):
            print(f"| {speed} | {total / (speed * 1e12 * gpus) / 3600:,.0f} |")


# ---------------------------------------------------------------------------------------------


def make_model(config, given, meta):
    """(model, lineage) as init_from says. Raises ModelError, ConfigError."""
    if not config.init_from:
        shape = {key: getattr(config, key) for key in ("block_size", "dropout", *SHAPE)}
        return GPT(GPTConfig(vocab_size=meta["vocab_size"], **shape)), []
    if config.init_from in OPENAI or os.path.isdir(config.init_from):
        model, source = GPT.from_pretrained(config.init_from), {}
    else:
        model, source = load(config.init_from)
    for key in SHAPE:
        have, asked = getattr(model.config, key), getattr(config, key)
        if key in given and have != asked:
            raise ConfigError(f"{config.init_from}: {key} is {have}, but the config asks for {asked}")
    if source.get("tokenizer", meta["tokenizer"]) != meta["tokenizer"]:
        raise ConfigError(f"{config.init_from}: trained on {source['tokenizer']} tokens, but {config.data} "
                          f"holds {meta['tokenizer']} tokens")
    if meta["vocab_size"] > model.config.vocab_size:
        raise ConfigError(f"{config.init_from}: a vocabulary of {model.config.vocab_size}, but {config.data} "
                          f"uses {meta['vocab_size']} tokens")
    model.crop_block_size(config.block_size)
    model.config.dropout = config.dropout
    parent = {key: source[key] for key in ("step", "tokens", "flops", "val_loss") if key in source}
    return model, source.get("lineage", []) + [{"from": config.init_from, **parent}]


def main(argv):
    # one process, or one of torchrun's
    rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in
                               (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    master = rank == 0
    say = print if master else lambda *_: None
    gpus = [word.partition("=")[2] or "8" for word in argv if word.partition("=")[0] == "--plan"]
    if gpus and not (gpus[-1].isdecimal() and int(gpus[-1])):
        raise ConfigError(f"--plan={gpus[-1]}: expected a number of GPUs")
    argv = [word for word in argv if word.partition("=")[0] != "--plan"]
    config, given, name = configure(argv, int(gpus[-1]) if gpus else world)
    if gpus:
        return plan(config, name, int(gpus[-1]))

    here = [d for d, has in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()),
                             ("cpu", True)) if has]
    if config.device not in ("auto", *here):
        raise ConfigError(f"device = {config.device}: torch sees none here, only {', '.join(here)}")
    device = torch.device(here[0] if config.device == "auto" else config.device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if device.type == "cpu":
        keep_memory()
    distributed = "RANK" in os.environ
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)

    # data
    sources, meta = open_data(config.data, "train")
    val_sources, _ = open_data(config.data, "val")
    shares = list(config.data.values()) if isinstance(config.data, dict) else [1.0]
    loader = Loader([Blocks(bins, config.block_size, name) for name, bins in sources.items()], apportion(shares),
                    config.batch_size, config.seed)
    n_blocks = sum(map(len, loader.sources))
    eval_block_size = config.eval_block_size or config.block_size
    val_blocks = [Blocks(bins, eval_block_size, f"{name}, validation").spread(config.eval_tokens)
                  for name, bins in val_sources.items()]
    tokenizer = get_tokenizer(meta["tokenizer"])
    weights = loader.counts / GROUP
    bytes_per_token = weights @ [token_bytes(tokenizer)[rows[:, 1:]].mean() for rows in val_blocks]
    val_tokens = [rows[:, 1:].size for rows in val_blocks]
    val_words = [count_words(rows[:, 1:].ravel(), tokenizer) for rows in val_blocks]
    words_per_token = max(1e-9, weights @ np.divide(val_words, val_tokens))
    tokens_per_step = config.batch_size * config.block_size
    max_steps = math.ceil(min(
        config.max_steps or math.inf,
        (config.max_tokens or math.inf) / tokens_per_step,
        (config.max_epochs or math.inf) * n_blocks / config.batch_size))

    # the model, new or where its last run stopped
    path = os.path.join(config.out_dir, name)
    os.makedirs(config.out_dir, exist_ok=True)
    torch.manual_seed(config.seed)
    state = None
    if config.resume and os.path.exists(f"{path}.state.pt"):
        state = load_pickle(f"{path}.state.pt", mmap=True)      # one copy for all processes of a machine
        if not isinstance(state, dict) or "counts" not in state:        # what states hold since mixtures
            raise ModelError(f"{path}.state.pt: not a state of train.py, or of an older one; pass --resume=false to "
                             "start over")
        for key in ("block_size", "batch_size", "optimizer", "seed", *SHAPE):
            if key in given and state["config"][key] != getattr(config, key):
                raise ConfigError(f"{path}.state.pt: {key} was {state['config'][key]}, now it is "
                                  f"{getattr(config, key)}; pass --resume=false to start over")
        if (state["fingerprint"], state["counts"]) != (meta["fingerprint"], loader.counts.tolist()):
            raise ConfigError(f"{path}.state.pt: trained on other data than {config.data} holds now; pass "
                              "--resume=false to start over")
        model, lineage = GPT(GPTConfig(**state["model_config"])), state["lineage"]
        model.load_state_dict(state["model"])
        model.config.dropout = config.dropout
    else:
        model, lineage = make_model(config, given, meta)
    if model.wpe is not None and eval_block_size > config.block_size:
        raise ConfigError(f"eval_block_size = {eval_block_size}: learned positions end at block_size = "
                          f"{config.block_size}; a longer context takes pos = alibi")
    model.to(device).train()
    model.checkpointing = config.checkpoint
    beside = config.init_from.removesuffix(".pt") + ".optimizer.pt"
    settings, moments = None, None
    if state:
        settings = {name: {key: group[key] for key in ("lr_scale", "eps")}
                    for group in state["optimizer"]["param_groups"] for name in group["names"]}
    elif config.init_from and os.path.exists(beside):
        if config.optimizer != "adamw":
            say(f"{beside}: AdamW's, so Adafactor is new")
        else:
            say(f"{beside}: AdamW goes on from it")
            grown = load_pickle(beside, mmap=True)
            settings, moments = grown["settings"], grown["moments"]
    optimizer = make_optimizer(model, config, settings)
    if moments:
        load_moments(optimizer, moments)
    dtype, why = config.dtype, "as configured"
    if dtype == "auto":
        choice = [(state["dtype"], "as before") if state else faster_dtype(device)]
        if distributed:         # one choice for all ranks
            dist.broadcast_object_list(choice, device=device)
        dtype, why = choice[0]
    autocast = torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    step, best, best_step, skips = 0, math.inf, 0, 0    # skips: steps in a row, up to this one, that were not finite
    mean = {}                                           # of the weights, on rank 0's CPU
    if state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best, best_step, skips, mean = (state[key] for key in ("step", "best", "best_step", "skips", "mean"))
    mean_at = sorted({round(max_steps * (1 - 0.2 * i / config.average)) for i in range(config.average)})
    if mean_at and step >= mean_at[0] and state["config"]["average"] != config.average:
        raise ConfigError(f"{path}.state.pt: average was {state['config']['average']} when step {mean_at[0]} went by, "
                          f"now it is {config.average}; pass --average={state['config']['average']}")
    peak = world * matmul_flops(device, getattr(torch, dtype))
    flops_per_step = model.flops_per_token(config.block_size) * tokens_per_step

    compiled = device.type == "cuda" if config.compile is None else config.compile
    if compiled:
        model.compile()
    runner = model
    if distributed:
        runner = DistributedDataParallel(model, device_ids=[local_rank] if device.type == "cuda" else None,
                                         gradient_as_bucket_view=True)      # gradients live once

    say(f"{name}: {model.num_params() / 1e6:.1f}M parameters, {meta['tokenizer']} tokens, "
        f"{sum(len(tokens) for bins in sources.values() for tokens in bins):,} for training from {config.data}")
    say(f"{world} process{'es' * (world > 1)} on {device.type}, {dtype} ({why}), {max_steps} steps of "
        f"{tokens_per_step:,} tokens, {max_steps * config.batch_size / n_blocks:.2f} epochs")
    if state:
        say(f"going on from {path}.state.pt at step {step}; --resume=false starts over")
    for parent in lineage:
        say(f"comes from {parent['from']}{': ' * ('how' in parent)}{parent.get('how', '')}"
            + (f", {parent['tokens'] / 1e6:,.1f}M tokens, {parent.get('flops', 0):.2e} FLOPs"
               if parent.get("tokens") else ""))
    log = None
    if master:
        versions = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
        log = Log(f"{path}.jsonl", dict(
            config=asdict(config), parameters=model.num_params(), dtype=dtype, world=world, versions=versions,
            device=torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or device.type,
            commit=commit(), data=meta["fingerprint"], lineage=lineage), step)

    # SIGINT and SIGTERM: finish the step, save, leave
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))

    def save_state():
        if config.zero and distributed:
            optimizer.consolidate_state_dict(to=0)
        if master:
            with full_disk_survived(f"{path}.state.pt"):
                atomic_save(dict(model=model.state_dict(), model_config=asdict(model.config), step=step, best=best,
                                 best_step=best_step, skips=skips, mean=mean, optimizer=optimizer.state_dict(),
                                 scaler=scaler.state_dict(), config=asdict(config), dtype=dtype,
                                 fingerprint=meta["fingerprint"], counts=loader.counts.tolist(), lineage=lineage),
                            f"{path}.state.pt")

    def save_model(file, loss):
        save(file, model, step=step, tokens=step * tokens_per_step, flops=step * flops_per_step, val_loss=loss,
             tokenizer=meta["tokenizer"], data=config.data, fingerprint=meta["fingerprint"], lineage=lineage)

    micro = config.micro_batch_size or config.batch_size // world
    eval_batch_size = max(1, micro * config.block_size // eval_block_size)
    began, began_step = time.time(), step
    since, since_step = began, step
    stopping = False
    while not stopping:
        if step % config.eval_interval == 0 or step >= max_steps:       # its state is already saved
            losses = evaluate(model, val_blocks, eval_batch_size, autocast, rank, world, stop)
            if losses is None:
                stopping = True
                continue
            val_loss = float(weights @ losses)
            bits_per_byte = val_loss / math.log(2) / bytes_per_token
            say(f"step {step:6}   val loss {val_loss:.4f}   perplexity {perplexity(val_loss):,.2f}   "
                f"bits per byte {bits_per_byte:.4f}")
            by_source = {}
            if len(sources) > 1:
                epochs = loader.epochs(step)
                by_source = dict(val_losses=dict(zip(sources, losses)), epochs=dict(zip(sources, epochs)))
                for source, loss, times in zip(sources, losses, epochs):
                    say(f"              val loss {loss:.4f}   {times:.2f} epochs   {source}")
            if master:
                with full_disk_survived(path):
                    log.write(step=step, tokens=step * tokens_per_step, val_loss=val_loss, bits_per_byte=bits_per_byte,
                              word_perplexity=perplexity(val_loss / words_per_token), **by_source)
                    if val_loss < best:
                        save_model(f"{path}.pt", val_loss)
                    log.plot(f"{path}.png")
            if val_loss < best:
                best, best_step = val_loss, step
            since, since_step = time.time(), step
            if step == began_step:
                began = since       # the first evaluation comes before any step
        if step >= max_steps:
            break

        lr = learning_rate(step, config, max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # dropout, the only draw in a step, depends on (seed, step, rank) alone
        torch.manual_seed(int(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0]))
        rows = loader.batch(step, rank, world)
        if device.type == "cuda":
            rows = rows.pin_memory()
        rows = rows.to(device, non_blocking=True)
        loss, norm, stopping = train_step(runner, optimizer, rows, micro, autocast, config.grad_clip, scaler, stop)
        step += 1

        if math.isfinite(loss) and math.isfinite(norm):
            skips = 0
        else:
            skips += 1
            say(f"step {step:6}   skipped: loss {loss}, norm {norm}")
            if master:
                with full_disk_survived(path):
                    log.write(step=step, tokens=step * tokens_per_step, skipped=f"loss {loss}, norm {norm}")
            if skips == MAX_SKIPS:
                raise Diverged(f"{name}: {skips} steps in a row, up to step {step}, were not finite; {path}.state.pt "
                               "is as it was last saved; lower learning_rate, or change seed")
        if (step % config.log_interval == 0 or step == max_steps) and not skips:
            now = time.time()
            speed = (step - since_step) / (now - since)         # steps per second
            mfu, held = speed * flops_per_step / peak, memory(device)
            left = (max_steps - step) * (now - began) / (step - began_step)
            since, since_step = now, step
            say(f"step {step:6}/{max_steps}   {step * tokens_per_step / 1e6:.2f}M tokens   loss {loss:.4f}   "
                f"norm {norm:.2f}   lr {lr:.2e}   {speed * tokens_per_step:,.0f} tok/s   "
                f"MFU {mfu:.0%}   {held / 2**30:.1f} GiB   left {clock(left)}")
            if master:
                with full_disk_survived(path):
                    log.write(step=step, tokens=step * tokens_per_step, loss=loss, norm=norm, lr=lr,
                              tokens_per_second=round(speed * tokens_per_step), mfu=round(mfu, 4), bytes_held=held)
        if step in mean_at and master:
            n = mean_at.index(step)
            for key, p in model.state_dict().items():
                p = p.float().cpu()
                mean[key] = mean[key].lerp(p, 1 / (n + 1)) if n else p.clone()
        if stopping or step == max_steps or step % config.save_interval == 0 or step % config.eval_interval == 0:
            save_state()
    if stopping:
        say(f"stopped at step {step}; the same command " +
            (f"goes on from {path}.state.pt" if step else "starts over"))
    elif master:
        start = torch.from_numpy(val_blocks[0][:1, :32].astype(np.int64)).to(device)
        generator = torch.Generator(device).manual_seed(config.seed)
        with autocast:
            sample = model.eval().generate(start, 400, temperature=0.8, generator=generator)[0].tolist()
        train_loss = next((r["loss"] for r in reversed(log.records) if "loss" in r), math.nan)
        epochs = config.batch_size / n_blocks
        say(f"\na sample, 400 tokens after the first {start.size(1)} for validation:\n\n{tokenizer.decode(sample)}\n\n"
            f"on {sum(val_tokens):,} tokens for validation, {sum(val_words):,} words, {bits_per_byte:.4f} bits per byte"
            f"{f', context {eval_block_size}' * (eval_block_size != config.block_size)}:\n\n"
            "| context | model | train loss | val loss | val ppl | adj val ppl | best epoch | run |\n|---|---|---|---|"
            f"---|---|---|---|\n| {config.block_size} | {config.init_from or f'{model.num_params() / 1e6:.1f}M'} | "
            f"{train_loss:.4f} | {val_loss:.4f} | {perplexity(val_loss):,.2f} | "
            f"{perplexity(val_loss / words_per_token):,.2f} | {best_step * epochs:.2f} of {step * epochs:.2f} | {path} "
            f"|\n\ncheckpoint {path}.pt\nlog        {path}.jsonl\ncurve      {path}.png")
    if mean_at and not stopping:
        if master:
            model.load_state_dict(mean)
        for p in model.parameters() if distributed else ():
            dist.broadcast(p.data, 0)
        mean_loss = float(weights @ evaluate(model, val_blocks, eval_batch_size, autocast, rank, world))
        say(f"mean of the weights at steps {', '.join(map(str, mean_at))}: val loss {mean_loss:.4f} (the last alone "
            f"{val_loss:.4f}), {path}.avg.pt")
        if master:
            with full_disk_survived(f"{path}.avg.pt"):
                save_model(f"{path}.avg.pt", mean_loss)
    if log and log.wandb:
        log.wandb.finish()
    if distributed:
        dist.barrier()      # a rank that leaves early takes its connections away from the others
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)         # at Python's own end gloo's threads abort one process in some fifty


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
        sys.exit()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:       # before the first step; later the run saves first
        sys.exit(130)
    except (ConfigError, DataError, Diverged, ModelError, OSError) as e:
        sys.exit(f"train.py: {e}" if os.environ.get("RANK", "0") == "0" else 1)
