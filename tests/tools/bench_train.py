"""Training speed beside nanoGPT's, in one process, in turns, on the same weights and batches.

    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python prepare.py python --out data/python --tokenizer bytes
    python tests/tools/bench_train.py ../nanoGPT

nanoGPT runs its own model, optimizer and step as its train.py does on this kind of device: fp32
on a CPU, bf16 autocast on CUDA; both are compiled on CUDA, and on a CPU with --compile. It is
timed first as it comes, then in turns with ours under the memory setting that ours makes for the
whole process.
"""
import argparse
import importlib.util
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from model import GPT, GPTConfig                                                    # noqa: E402
from prepare import open_bin                                                        # noqa: E402
from train import Config, Loader, choose_device, cut, make_optimizer, train_step                 # noqa: E402

SHAPES = {      # name: n_layer, n_head, n_embd, block_size, batch_size, vocab_size
    "small": (6, 6, 384, 256, 16, 320),
    "124M": (12, 12, 768, 512, 2, 50304),
}


def nanogpt_step(nano, ours, shape, device, compiled):
    """nanoGPT with our initial weights; returns step(rows) -> loss."""
    n_layer, n_head, n_embd, block_size, _, vocab_size = shape
    model = nano.GPT(nano.GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head,
                                    n_embd=n_embd, dropout=0.0, bias=True)).to(device)
    weights = {f"transformer.{name}": p for name, p in ours.state_dict().items()}
    model.load_state_dict({**weights, "lm_head.weight": weights["transformer.wte.weight"]})
    optimizer = model.configure_optimizers(0.1, 3e-4, (0.9, 0.95), device)
    run = torch.compile(model) if compiled else model
    context = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else nullcontext()

    def step(rows):
        with context:
            _, loss = run(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss
    return step


def our_step(model, dtype, device, compiled):
    optimizers = make_optimizer(model, Config(learning_rate=3e-4, weight_decay=0.1, beta1=0.9, beta2=0.95))
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    if compiled:
        model.compile()
    scaler = torch.amp.GradScaler(device, enabled=False)
    return lambda rows: train_step(model, optimizers, rows, len(rows), autocast, 1.0, scaler)[0]


def timed(step, rows):
    start = time.perf_counter()
    loss = float(step(rows))        # waits for the device
    return time.perf_counter() - start, loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--data", default="data/python", help="a folder that prepare.py made")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="torch.compile both, on a CPU too")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("nanogpt", Path(args.nanogpt) / "model.py")
    nano = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nano)
    tokens, _ = open_bin(f"{args.data}/train.bin")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = args.compile or device == "cuda"
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads{', both compiled' * compiled}")

    rows_of = {}
    for name, shape in SHAPES.items():
        n_layer, n_head, n_embd, block_size, batch_size, vocab_size = shape
        loader = Loader([cut([tokens], block_size, args.data)], [1], batch_size, 1)
        rows_of[name] = [loader.batch(s).to(device) for s in range(args.steps)]

    alone = {}      # before choose_device: its memory setting on a CPU lasts for the process
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(shape[3], shape[5], *shape[:3])).to(device)
        step = nanogpt_step(nano, model, shape, device, compiled)
        alone[name] = statistics.median(timed(step, rows)[0] for rows in rows_of[name][2:])
    config = Config()
    choose_device(config)
    print(f"ours in {config.dtype}\n")

    table, profiles = [], []
    for name, shape in SHAPES.items():
        torch.manual_seed(0)
        model = GPT(GPTConfig(shape[3], shape[5], *shape[:3])).to(device)
        theirs = nanogpt_step(nano, model, shape, device, compiled)
        ours = our_step(model, config.dtype, device, compiled)
        seconds, losses = {theirs: [], ours: []}, {}
        for rows in rows_of[name]:
            for step in (theirs, ours):
                t, losses[step] = timed(step, rows)
                seconds[step].append(t)
        a, b = (statistics.median(seconds[step][2:]) for step in (theirs, ours))
        per_step = shape[3] * shape[4]
        table.append(f"| {name} | {per_step / alone[name]:,.0f} | {per_step / a:,.0f} | {per_step / b:,.0f} | "
                     f"{alone[name] / b:.2f} | {a / b:.2f} | {losses[theirs]:.4f} | {losses[ours]:.4f} |")
        with torch.profiler.profile() as profile:
            timed(ours, rows_of[name][0])
        events = sorted(profile.key_averages(), key=lambda e: -e.self_cpu_time_total)
        total = sum(e.self_cpu_time_total for e in events)
        head = f"\nwhere a step of ours goes, {name}:\n\n| operation | calls | ms | share |\n|---|---|---|---|\n"
        profiles.append(head + "\n".join(
            f"| {e.key} | {e.count} | {e.self_cpu_time_total / 1e3:.1f} | {e.self_cpu_time_total / total:.1%} |"
            for e in events[:12]))
    print("| shape | nanoGPT alone tok/s | nanoGPT in turns | ours in turns | ours / alone | ours / in turns "
          f"| nanoGPT loss after {args.steps} steps | our loss |\n|---|---|---|---|---|---|---|---|")
    print("\n".join(table + profiles))


if __name__ == "__main__":
    main()
