"""What needs a GPU, in pieces of a few minutes each; every piece prints a table.

    python tests/tools/gpu.py correct                 the kernels against float64: tests/kernel_cases.py on this device
    python tests/tools/gpu.py kernels                 their speed beside PyTorch's and Liger's: tests/tools/bench_kernels.py
    python tests/tools/gpu.py tiles D                 other tile sizes for attention with heads of D
    python tests/tools/gpu.py speed PATH_TO_NANOGPT   tests/tools/bench_train.py on this device
    python tests/tools/gpu.py eval DIR                eval.py's four tasks for a 124M model; DIR holds the test sets
    python tests/tools/gpu.py 1.1B                    some steps of configs/1.1B.py at context 1024, one GPU
"""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from model import GPT, GPTConfig                    # noqa: E402
from train import configure, make_optimizer, matmul_flops, memory_by_part, train_step      # noqa: E402


def run_1_1b(steps=8):
    """Tokens/s, MFU and peak memory (beside the plan's) of configs/1.1B.py on random tokens, a micro batch a step."""
    config = configure([str(ROOT / "configs/1.1B.py")])[0]
    model = GPT(config.gpt_config()).to("cuda").train()
    optimizers = make_optimizer(model, config)
    model.compile()
    autocast, scaler = torch.autocast("cuda", torch.bfloat16), torch.amp.GradScaler("cuda", enabled=False)
    peak = matmul_flops(torch.device("cuda"), torch.bfloat16)
    print(f"matmul peak {peak / 1e12:.0f} TFLOP/s\n\n| micro batch | tokens/s | MFU | peak GB | planned GB | loss |\n"
          "|---|---|---|---|---|---|")
    for micro in (1, 2, 4, 8):
        torch.cuda.reset_peak_memory_stats()
        try:
            for step in range(steps):
                if step == 3:       # after compilation
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                rows = torch.randint(0, 50257, (micro, config.block_size + 1), device="cuda")
                loss, _, _ = train_step(model, optimizers, rows, micro, autocast, config.grad_clip, scaler)
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            print(f"| {micro} | out of memory | | | | |")
            break
        speed = (steps - 3) * micro * config.block_size / (time.perf_counter() - start)
        mfu = speed * model.flops_per_token(config.block_size) / peak
        planned = sum(memory_by_part(model, config, micro, 1).values())
        print(f"| {micro} | {speed:,.0f} | {mfu:.1%} | {torch.cuda.max_memory_allocated() / 1e9:.1f} | "
              f"{planned / 1e9:.1f} | {loss:.3f} |", flush=True)


def evaluation(folder):
    """Seconds for every item of the four tasks, tokenizing included, in fp32 and bf16; random weights."""
    import eval
    from prepare import get_tokenizer, test_items
    model, tokenizer = GPT(GPTConfig()).to("cuda").eval(), get_tokenizer("gpt2")
    print("| task | items | fp32, s | bf16, s |\n|---|---|---|---|")
    for task, (function, kind) in eval.TASKS.items():
        examples, seconds = [function(item) for item in test_items(task, folder)], []
        for enabled in (False, True):
            with_bf16 = torch.autocast("cuda", torch.bfloat16, enabled=enabled)
            eval.run_task(kind, examples[:8], model, tokenizer, 1024, 64, with_bf16)       # kernels are built
            start = time.perf_counter()
            eval.run_task(kind, examples, model, tokenizer, 1024, 64, with_bf16)
            seconds.append(time.perf_counter() - start)
        print(f"| {task} | {len(examples):,} | {seconds[0]:.1f} | {seconds[1]:.1f} |", flush=True)


def speed(nanogpt):
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.RandomState(0).randint(0, 320, 10**6)
        tokens.astype("<u2").tofile(Path(folder) / "train.bin")
        return script("bench_train.py", nanogpt, "--data", folder)


def script(name, *words):
    return subprocess.run([sys.executable, str(ROOT / "tests/tools" / name), *words]).returncode


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("gpu.py: torch sees no CUDA device here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    match sys.argv[1:]:
        case ["correct"]:
            cases = str(ROOT / "tests/kernel_cases.py")
            sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-q", cases]).returncode)
        case ["kernels"]:
            sys.exit(script("bench_kernels.py"))
        case ["tiles", D]:
            sys.exit(script("bench_kernels.py", "--tiles", D))
        case ["speed", nanogpt]:
            sys.exit(speed(nanogpt))
        case ["eval", folder]:
            evaluation(folder)
        case ["1.1B"]:
            run_1_1b()
        case _:
            sys.exit(__doc__)
