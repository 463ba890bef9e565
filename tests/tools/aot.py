"""Every Triton kernel built for sm_80 and sm_90 with no GPU at hand, and what its machine code shows.

    python tests/tools/aot.py sm_90           a few builds: what tests/test_kernels.py runs
    python tests/tools/aot.py sm_90 --all     every head size, with and without ALiBi, dropout and ragged T
    python tests/tools/aot.py sm_90 --all 64  attention with heads of 64 alone, in minutes

The operators run as they would on the device, up to the launch: each kernel is compiled with the
arguments, types and tile sizes it would get, and disassembled. The columns:

    stack         bytes of spilled registers
    loop          instructions in the main loop (of the whole kernel where it has none)
    diagonal      instructions in the loop over the tiles that the causal mask cuts
    mma, exp2     its matrix and exponential instructions
    smem          its loads and stores of shared memory by threads
    barriers      its barriers
    loads         bits of its narrowest load from global memory
    ahead         loads still under way where it waits for a tile: 0 means that nothing was started early

Status 1 if a build breaks a rule of `faults` below.
"""
import io
import itertools
import math
import re
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import model as m                                   # noqa: E402

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
SHARED = {80: 99 * 1024, 90: 227 * 1024}            # bytes a program may have; 99 KB on sm_86 and sm_89
# instructions in the main loop for each exponential that it may have, dropout included
MOST = {("attention_fwd", 90): 21, ("attention_bwd_dq", 90): 20, ("attention_bwd_dkdv", 90): 30,
        ("attention_fwd", 80): 30, ("attention_bwd_dq", 80): 40, ("attention_bwd_dkdv", 80): 55,
        ("cross_entropy", 90): 14, ("cross_entropy", 80): 14}
COLUMNS = "warps stages registers stack shared loop diagonal mma exp2 smem barriers loads ahead".split()


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
            name, log = self.kernel.fn.__name__.removesuffix("_kernel"), io.StringIO()
            with redirect_stdout(log):
                compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.built.append((name, compiled, "serialized" in log.getvalue()))
        return build


def main_loops(sass):
    """Instructions of the loops with matrix instructions, else of the longest loop, else of the whole kernel."""
    code, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction[1])
            if target and labels.get(target[1], len(code)) < len(code) - 1:     # a jump back
                loops.append(code[labels[target[1]]:])
    with_matrix = [loop for loop in loops if any("MMA." in i for i in loop)]
    return with_matrix or [max(loops, key=len, default=code)]


def load_bits(instruction):
    """Bits that a thread reads by an LDG or LDGSTS instruction."""
    width = re.search(r"\.[US]?(8|16|64|128)\b", instruction.split("[")[0])
    return int(width[1]) if width else 32


def figures(compiled):
    """COLUMNS of a compiled kernel."""
    def tool(*words):
        return subprocess.run([BIN / words[0], *words[1:]], capture_output=True, text=True, check=True).stdout
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", cubin.name)
        loop, *others = main_loops(tool("nvdisasm", "-c", cubin.name))

    def count(pattern):
        return sum(bool(re.search(pattern, i)) for i in loop)
    waits = [int(i.split()[-1], 16) for i in loop if "DEPBAR.LE SB0" in i]
    loads = [load_bits(i) for i in loop if re.search(r"\bLDG(STS)?\.", i)]
    values = (compiled.metadata.num_warps, compiled.metadata.num_stages,
              *(int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")), compiled.metadata.shared,
              len(loop), len(others[0]) if others else None, count(r"MMA\."), count(r"MUFU\.EX2"),
              count(r"\b(LDS|STS|LDSM|STSM)\b(?!.*RZ, \[RZ\])"), count(r"\bBAR\."),
              min(loads, default=None), min(waits, default=None))
    return dict(zip(COLUMNS, values))


def faults(name, arch, row, serialized):
    """What a build must not do, as words. `serialized`: ptxas had Hopper's matrix instructions wait."""
    most = MOST.get((name, arch), math.inf) * max(1, row["exp2"])
    attention, pipelined = name.startswith("attention"), row["stages"] > 1
    matrix_on_registers = attention and arch == 90 and pipelined
    rules = {
        "spills": row["stack"] > 0,
        "too much shared memory": row["shared"] > SHARED[arch],
        "serialized": serialized,
        "waits for the load it has just started": attention and pipelined and row["ahead"] == 0,
        "narrow loads": row["loads"] < (128 if name == "cross_entropy" else 32),
        "moves data between threads": matrix_on_registers and (row["barriers"] > 2 or row["smem"] > 16),
        "more instructions than before": (pipelined or not attention) and row["loop"] > most,
    }
    return [words for words, broken in rules.items() if broken]


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


def cross_entropy(vocab_size, dtype):
    V = 64 * -(-vocab_size // 64)                   # as the model pads it
    x, w = torch.empty(2, 16, dtype=dtype, requires_grad=True), torch.empty(V, 16)
    m.linear_cross_entropy(x, w, torch.zeros(2, dtype=torch.int64), vocab_size=vocab_size)
    return f"V={vocab_size} {str(dtype)[6:]}"


def builds(arch, cases):
    """(kernel, case, figures, faults) of each build."""
    built = []
    driver.set_active(Absent(arch))
    triton.knobs.compilation.always_compile = True      # ptxas says what it serialized only as it compiles
    triton.knobs.nvidia.dump_ptxas_log = True
    tiles = m.tiles
    m.use_kernels, m.tiles = lambda x: True, lambda *args: tiles(*args[:-1], arch == 90)
    for name in [name for name in vars(m) if name.endswith("_kernel")]:
        setattr(m, name, Build(getattr(m, name), built))
    for function, *case in cases:
        label = function(*case)
        for name, compiled, serialized in built:
            row = figures(compiled)
            yield name, label, row, faults(name, arch, row, serialized)
        built.clear()


def main(arch, everything, sizes):
    bf16, fp32 = torch.bfloat16, torch.float32
    cases = [(attention, 128, bf16, True, 0.1, 1024), (cross_entropy, 50257, bf16)]
    if arch == 90:
        cases += [(attention, 64, bf16, False, 0, 1000), (layer_norm, 768, bf16, fp32, True)]
    if everything:
        cases = [(attention, *case) for case in itertools.product(
            sizes or (64, 128, 80, 32, 96), (bf16, fp32), (True, False), (0, 0.1), (1024, 1000))]
    if everything and not sizes:
        cases += [(layer_norm, C, *case) for C in (768, 1536, 8192)
                  for case in ((bf16, fp32, True), (bf16, bf16, False), (fp32, None, True))]
        cases += [(cross_entropy, V, dtype) for V in (257, 50257) for dtype in (bf16, fp32)]

    print(f"Triton {triton.__version__}, sm_{arch}\n\n| kernel | case | {' | '.join(COLUMNS)} |"
          f"\n|{'---|' * (2 + len(COLUMNS))}")
    failed = False
    for name, label, row, broken in builds(arch, cases):
        failed |= bool(broken)
        numbers = " | ".join("" if value is None else str(value) for value in row.values())
        print(f"| {name} | {label} | {numbers} |{' FAILS: ' * bool(broken)}{', '.join(broken)}", flush=True)
    return int(failed)


if __name__ == "__main__":
    target, *words = sys.argv[1:] or [""]
    sizes = [int(word) for word in words[1:] if word.isdecimal()]
    if target not in ("sm_80", "sm_90") or words not in ([], ["--all", *map(str, sizes)]):
        sys.exit(__doc__)
    sys.exit(main(int(target[3:]), bool(words), sizes))
