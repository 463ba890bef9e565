"""A run killed (SIGKILL) again and again at random moments, beside the same run left alone.

    python tests/tools/soak.py --kills 50
    python tests/tools/soak.py --kills 20 --processes 2       each time one of them, drawn by lot; torchrun ends the other

After every kill each checkpoint on disk must load; at the end weights, optimizer state and log must
be those of the run left alone, bit for bit. A kill can fall into the start, a step, an evaluation
or a save. Prints one table; status 1 where anything differs.
"""
import argparse
import collections
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import model as m                                   # noqa: E402
import prepare                                      # noqa: E402

CONFIG = """
data = "{data}"
block_size = 64
batch_size = 8
max_steps = {steps}
eval_interval = 50
eval_tokens = 2048
save_interval = 7
warmup_steps = 10
learning_rate = 1e-3
dropout = 0.1
dtype = "float32"
n_layer = 2
n_head = 2
n_embd = 64
bias = False
pos = "alibi"
"""


def start(folder, out, processes, optimizer):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *launcher, ROOT / "train.py", folder / "soak.py", f"--out_dir={out}",
                             f"--optimizer={optimizer}"],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def kill(process, processes, lots):
    """SIGKILL the run, or one rank of it; returns the seconds until all of it is gone."""
    began = time.time()
    if processes == 1:
        process.kill()
    else:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if ranks:       # else torchrun has not come so far
            os.kill(int(lots.choice(ranks)), signal.SIGKILL)
        else:
            process.kill()
    process.communicate()
    return time.time() - began


def same(a, b):
    """Whether two nested structures of tensors and numbers are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


MACHINE = ("tokens_per_second", "mfu", "bytes_held", "left")       # of the log, what two runs need not share


def contents(path):
    """Of a checkpoint; but the state's config has another out_dir, and its log speeds (see `log`)."""
    return {k: v for k, v in m.load_pickle(str(path)).items() if path.name == "soak.pt" or k not in ("config", "log")}


def log(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in MACHINE} for r in records if "step" in r]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", default="adamw")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare.prepare(["python"], str(folder / "data"), "bytes", 0.05)
        (folder / "soak.py").write_text(CONFIG.format(data=folder / "data", steps=args.steps))
        began, first = time.time(), None
        process = start(folder, folder / "alone", args.processes, args.optimizer)
        while process.poll() is None:
            time.sleep(0.1)
            if first is None and (folder / "alone/soak.state.pt").exists():
                first = time.time() - began         # seconds until the first checkpoint
        assert process.returncode == 0, process.stderr.read()
        alone = time.time() - began
        state = folder / "killed/soak.state.pt"
        kills, corrupt, startup, longest, reached = 0, 0, 0, 0, collections.Counter()
        while kills < args.kills:
            process = start(folder, folder / "killed", args.processes, args.optimizer)
            try:
                process.wait(timeout=first * moments.uniform(0.5, 2))
                sys.exit(f"the run ended after {kills} kills: give it more --steps\n{process.stderr.read()}")
            except subprocess.TimeoutExpired:
                longest = max(longest, kill(process, args.processes, moments))
            kills += 1
            for path in (folder / "killed").glob("*.pt"):
                try:
                    m.load_pickle(str(path))
                except m.ModelError as e:
                    corrupt += 1
                    print(e)
            startup += not state.exists()
            leftovers = [path.name for path in (folder / "killed").glob("*.tmp")]
            reached["while writing a file" if leftovers else "elsewhere"] += 1
        last = start(folder, folder / "killed", args.processes, args.optimizer)
        _, errors = last.communicate()
        assert last.returncode == 0, errors
        equal = {name: same(*(contents(folder / run / name) for run in ("alone", "killed")))
                 for name in ("soak.pt", "soak.state.pt")}
        equal["soak.jsonl"] = log(folder / "alone/soak.jsonl") == log(folder / "killed/soak.jsonl")
        print(f"torch {torch.__version__}, Python {platform.python_version()}; {args.optimizer}, {args.processes} process(es), "
              f"{args.steps} steps, {alone:.0f} s left alone\n\n| | |\n|---|---|\n| kills | {kills} |\n| of them before the first "
              f"checkpoint | {startup} |\n| of them while a file was being written | {reached['while writing a file']} |\n"
              f"| longest time from a kill to the end of all processes | {longest:.1f} s |\n"
              f"| checkpoints that did not load | {corrupt} |")
        for name, answer in equal.items():
            print(f"| {name} equal to the run left alone | {answer} |")
        sys.exit(int(corrupt > 0 or not all(equal.values())))


if __name__ == "__main__":
    main()
