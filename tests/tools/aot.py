"""Every Triton kernel built for sm_80 and sm_90 with no GPU at hand, and what each build uses.

    python tests/tools/aot.py sm_90           the shapes that the tests build
    python tests/tools/aot.py sm_90 --all     every head size, with and without ALiBi, dropout and ragged T

The operators run as they would on the device, up to the launch: each kernel is compiled with the
arguments, types and tile sizes it would get. Registers and stack (where spilled registers go) are
read off the cubin by cuobjdump; ptxas says when it had to serialize Hopper's asynchronous matrix
instructions, which costs much of their speed. Status 1 if a kernel spills, does not fit in shared
memory, or is serialized.
"""
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import model as m                                   # noqa: E402

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED = {80: 99 * 1024, 90: 227 * 1024}            # bytes a program may have; 99 KB on sm_86 and sm_89


class Absent:
    """What Triton asks its driver for, for a device that is not here."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Build:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel, built):
        self.kernel, self.built = kernel, built

    def __getitem__(self, grid):
        def build(*args, **options):
            self.built.append((self.kernel.fn.__name__, options, self.kernel.warmup(*args, grid=grid, **options)))
        return build


def usage(compiled, arch):
    """(registers, stack bytes, shared bytes, serialized) of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        text = subprocess.run([BIN / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True,
                              check=True).stdout
        name = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"]).group(1)
        warnings = subprocess.run([BIN / "ptxas", "-v", f"--gpu-name={name}", ptx, "-o", Path(folder, "again")],
                                  capture_output=True, text=True, check=True).stderr
    registers, stack = (int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK"))
    return registers, stack, compiled.metadata.shared, "serialized" in warnings


def attention(D, dtype, alibi, dropout_p, T):
    q, k, v = torch.randn(1, T, 3, 2, D, dtype=dtype).permute(2, 0, 3, 1, 4)
    y = m.attention(*(t.requires_grad_() for t in (q, k, v)), m.alibi_slopes(2) if alibi else None, dropout_p)
    torch.autograd.grad(y, (q, k, v), torch.empty_like(y))
    return f"D={D} {str(dtype)[6:]}{', ALiBi' * alibi}{', dropout' * (dropout_p > 0)}, T={T}"


def layer_norm(C, branch, stream, bias):
    x, w = torch.empty(2, C, dtype=branch, requires_grad=True), torch.empty(C, requires_grad=True)
    r = None if stream is None else torch.empty(2, C, dtype=stream)
    y = m.layer_norm(x, w, torch.empty(C) if bias else None, residual=r)
    torch.autograd.grad(y if r is None else y[0], (x, w), torch.empty(2, C, dtype=branch))
    return f"C={C} {str(branch)[6:]}" + (f" + {str(stream)[6:]}" if r is not None else "") + ", bias" * bias


def cross_entropy(V, dtype):
    x, w = torch.empty(2, 16, dtype=dtype, requires_grad=True), torch.empty(V, 16)
    m.linear_cross_entropy(x, w, torch.zeros(2, dtype=torch.int64))
    m.linear_cross_entropy(x, w, torch.zeros(2, dtype=torch.int64), "none")
    return f"V={V} {str(dtype)[6:]}"


def main(arch, everything):
    built, bf16, fp32 = [], torch.bfloat16, torch.float32
    driver.set_active(Absent(arch))
    m.use_kernels, m.is_hopper = lambda x: True, lambda x: arch == 90
    for name in [name for name in vars(m) if name.endswith("_kernel")]:
        setattr(m, name, Build(getattr(m, name), built))
    cases = [(attention, D, bf16, True, p, T) for D, p, T in
             ((64, 0, 1024), (64, 0.1, 1024), (128, 0, 1024), (128, 0.1, 1024), (80, 0.1, 1000))]
    cases += [(attention, D, fp32, True, 0.1, 1000) for D in (64, 128)]
    if everything:
        cases = [(attention, *case) for case in itertools.product(
            (32, 64, 80, 96, 128), (bf16, fp32), (True, False), (0, 0.1), (1024, 1000))]
    cases += [(layer_norm, C, *case) for C in (768, 1536, 8192)
              for case in ((bf16, fp32, True), (bf16, bf16, False), (fp32, None, True))]
    cases += [(cross_entropy, V, dtype) for V in (320, 50304) for dtype in (bf16, fp32)]

    print(f"Triton {triton.__version__}, sm_{arch}\n\n| kernel | case | warps | stages | registers | stack bytes "
          "| shared KB |\n|---|---|---|---|---|---|---|")
    failed = False
    for function, *case in cases:
        label = function(*case)
        for name, options, compiled in built:
            registers, stack, shared, serialized = usage(compiled, arch)
            bad = stack > 0 or shared > SHARED[arch] or serialized
            failed |= bad
            print(f"| {name.removesuffix('_kernel')} | {label} | {options['num_warps']} | "
                  f"{options.get('num_stages', '')} | {registers} | {stack} | {shared / 1024:.0f} |"
                  f"{' serialized' * serialized}{' FAILS' * bad}", flush=True)
        built.clear()
    return int(failed)


if __name__ == "__main__":
    target, *words = sys.argv[1:] or [""]
    if target not in ("sm_80", "sm_90") or words not in ([], ["--all"]):
        sys.exit(__doc__)
    sys.exit(main(int(target[3:]), bool(words)))
