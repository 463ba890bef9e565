"""What needs a GPU, in pieces of a few minutes each; every piece prints a table.

    python tests/gpu.py correct                 ops and model on CUDA against float64 on the CPU
    python tests/gpu.py speed PATH_TO_NANOGPT   tests/bench_train.py on this device
    python tests/gpu.py 1.1B                    some steps of configs/1.1B.py at context 1024, one GPU
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import model as m                                   # noqa: E402
from model import GPT, GPTConfig                    # noqa: E402
from train import configure, make_optimizer, train_step, SHAPE      # noqa: E402


def relative(a, b):
    return ((a.double().cpu() - b).norm() / b.norm()).item()


def correct():
    """Relative errors |CUDA - fp64| / |fp64|, with the bound that each must meet."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 257, 128, dtype=torch.float64)
    x, w = torch.randn(300, 768, dtype=torch.float64), torch.randn(1000, 768, dtype=torch.float64) / 28
    t = torch.randint(0, 1000, (300,))
    slopes = m.alibi_slopes(12)
    gpt = GPT(GPTConfig(block_size=128, vocab_size=1000, n_layer=4, n_head=12, n_embd=768, pos="alibi", bias=False))
    idx = torch.randint(0, 1000, (2, 128))
    cases = {
        "attention": lambda c: m.attention(c(q), c(k), c(v), slopes.to(c(q).device)),
        "layer_norm": lambda c: m.layer_norm(c(x), c(w[0])),
        "linear_cross_entropy": lambda c: m.linear_cross_entropy(c(x), c(w), t.to(c(x).device), "none"),
        "GPT": lambda c: gpt.to(c(x))(idx.to(c(x).device)),
    }
    print("| op | dtype | relative error | bound |\n|---|---|---|---|")
    failed = False
    for name, run in cases.items():
        with torch.no_grad():
            exact = run(lambda a: a)
            for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
                error = relative(run(lambda a: a.to("cuda", dtype)), exact)
                failed |= not error < bound
                print(f"| {name} | {dtype} | {error:.1e} | {bound:.0e} |")
                gpt.to("cpu", torch.float64)
    sys.exit(int(failed))


def run_1_1b(steps=8):
    """Tokens/s and peak memory of configs/1.1B.py on random tokens, one micro batch a step."""
    config = configure([str(ROOT / "configs/1.1B.py")])[0]
    model = GPT(GPTConfig(block_size=config.block_size, dropout=config.dropout,
                          **{key: getattr(config, key) for key in SHAPE})).to("cuda").train()
    optimizer = make_optimizer(model, config)
    model.compile()
    autocast = torch.autocast("cuda", torch.bfloat16)
    print("| micro batch | tokens/s | peak GiB | loss |\n|---|---|---|---|")
    for micro in (1, 2, 4, 8):
        try:
            for step in range(steps):
                if step == 3:       # after compilation
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                rows = torch.randint(0, 50257, (micro, config.block_size + 1), device="cuda")
                loss, _ = train_step(model, optimizer, rows, micro, autocast, config.grad_clip)
            loss = loss.item()      # waits for the device
        except torch.cuda.OutOfMemoryError:
            print(f"| {micro} | out of memory | | |")
            break
        speed = (steps - 3) * micro * config.block_size / (time.perf_counter() - start)
        print(f"| {micro} | {speed:,.0f} | {torch.cuda.max_memory_allocated() / 2**30:.1f} | {loss:.3f} |", flush=True)


def speed(nanogpt):
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.RandomState(0).randint(0, 320, 10**6)
        tokens.astype("<u2").tofile(Path(folder) / "train.bin")
        sys.exit(subprocess.run([sys.executable, str(ROOT / "tests/bench_train.py"), nanogpt, "--data", folder]).returncode)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu.py: torch sees no CUDA device here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    piece, *words = sys.argv[1:] or [""]
    if piece == "correct":
        correct()
    elif piece == "1.1B":
        run_1_1b()
    elif piece == "speed" and words:
        speed(words[0])
    else:
        sys.exit(__doc__)
