"""The kernels beside PyTorch's and Liger's on one GPU, in one process; Markdown tables.

    python tests/tools/bench_kernels.py                   attention, layer_norm, linear_cross_entropy
    python tests/tools/bench_kernels.py --tiles 128       attention with heads of 128 and other tiles than model.py's

Times are medians by CUDA events over tensors larger than the cache; bf16 throughout. TFLOP/s count
the causal half of the two products, and a backward as 2.5 forwards (as FlashAttention does); GB/s
count each input read once and each output written once. A peer that is missing here, or refuses
the shape, is left out.
"""
import argparse
import itertools
import platform
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import model as m                                   # noqa: E402

DEVICE = "cuda"
TOKENS, WIDTH = 16384, 2048             # of attention's inputs: 32 heads of 64 channels, or 16 of 128
BYTES = 2**28                           # of each tensor that layer_norm reads
LOSS = (8192, 50304, 1536)              # N, V, C


def milliseconds(run):
    return do_bench(run, warmup=50, rep=200, return_mode="median")


def table(title, head, rows):
    print(f"\n### {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:        # a generator: each row as it is measured
        print(f"| {' | '.join(row)} |", flush=True)


def available(run):
    """Whether a peer runs here at all."""
    try:
        run()
        return True
    except (RuntimeError, ImportError, AttributeError, NotImplementedError, TypeError) as e:
        print(f"left out: {type(e).__name__}: {str(e).splitlines()[0][:150]}", file=sys.stderr)
        return False


def gradients(run, inputs):
    """A closure of the forward and the backward together."""
    y = run()
    dy = torch.randn_like(y)
    return lambda: torch.autograd.grad(run(), inputs, dy)


# ---- attention


def attention_peers(q, k, v, packed, slopes):
    B, H, T, D = q.shape

    def sdpa(backend, **options):
        def run():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)
        return run

    i = torch.arange(T, device=DEVICE)
    bias = (slopes[:, None, None] * (i - i[:, None])).masked_fill(i > i[:, None], float("-inf")).to(q.dtype)
    peers = {
        "SDPA flash, no ALiBi": sdpa(SDPBackend.FLASH_ATTENTION, is_causal=True),
        "SDPA cuDNN, no ALiBi": sdpa(SDPBackend.CUDNN_ATTENTION, is_causal=True),
        "SDPA flash, dropout": sdpa(SDPBackend.FLASH_ATTENTION, is_causal=True, dropout_p=0.1),
        "SDPA with an ALiBi mask": sdpa(SDPBackend.EFFICIENT_ATTENTION, attn_mask=bias.expand(B, H, T, T)),
    }
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=DEVICE)
        flex = torch.compile(flex_attention, dynamic=False)
        peers["flex_attention, ALiBi"] = lambda: flex(
            q, k, v, score_mod=lambda s, b, h, i, j: s + slopes[h] * (j - i), block_mask=mask)
    except (ImportError, RuntimeError):
        pass
    return peers | {
        "ours, ALiBi": lambda: m.attention_qkv(packed, H, slopes),
        "ours, no ALiBi": lambda: m.attention_qkv(packed, H),
        "ours, ALiBi, dropout": lambda: m.attention_qkv(packed, H, slopes, 0.1),
    }


def attention_rows():
    for D, T in itertools.product((64, 128), (512, 1024, 2048)):
        B, H = max(1, TOKENS // T), WIDTH // D
        qkv = torch.randn(B, T, 3, H, D, device=DEVICE, dtype=torch.bfloat16)
        q, k, v = (t.requires_grad_() for t in qkv.permute(2, 0, 3, 1, 4))
        packed = qkv.flatten(2).detach().requires_grad_()           # (B, T, 3C), what the model has
        flops = 4 * B * H * T * T * D / 2
        for name, run in attention_peers(q, k, v, packed, m.alibi_slopes(H).to(DEVICE)).items():
            inputs = (packed,) if name.startswith("ours") else (q, k, v)
            if available(run) and available(both := gradients(run, inputs)):
                forward, whole = milliseconds(run), milliseconds(both)
                yield [str(D), str(T), name, f"{forward:.3f}", f"{flops / forward / 1e9:.0f}", f"{whole:.3f}",
                       f"{3.5 * flops / whole / 1e9:.0f}"]


def tile_rows(D):
    """Each kernel with other tiles, the other two as in model.py: time over model.py's own."""
    tiles, T, H = m.tiles, 1024, WIDTH // D
    by_rows, by_columns = ((64, 64), (128, 32), (128, 64), (128, 128)), ((32, 64), (64, 64), (32, 128), (64, 128))
    qkv = torch.randn(max(1, TOKENS // T), T, 3 * H * D, device=DEVICE, dtype=torch.bfloat16)
    slopes, hopper = m.alibi_slopes(H).to(DEVICE), torch.cuda.get_device_capability() >= (9, 0)
    y, lse = torch.empty_like(qkv[..., :WIDTH]), torch.zeros(len(qkv), H, T, device=DEVICE)
    gradients = torch.ones_like(y), torch.empty_like(qkv), torch.empty_like(lse)
    for dropout_p in (0.0, 0.125):
        seed = torch.ones(1, dtype=torch.int64, device=DEVICE) if dropout_p else None
        args, ours = (qkv, slopes, seed, dropout_p, y, lse), tiles(qkv.dtype, D, T, dropout_p > 0, hopper)

        def forward():
            m.attention_fwd(*args)

        def backward():
            m.attention_bwd(*args, *gradients)
        forward()       # for the backward's y and lse
        for name, run, shapes in (("fwd", forward, by_rows), ("dq", backward, by_rows), ("dkdv", backward, by_columns)):
            base = milliseconds(run)
            for shape, warps, stages in itertools.product(shapes, (4, 8), (2, 3)):
                tile = (*shape, warps, stages)
                m.tiles = lambda *_: ours | {name: tile}
                if available(run):
                    yield [str(D), str(dropout_p > 0), name, f"{shape[0]} x {shape[1]}, {warps} warps, {stages} stages",
                           f"{milliseconds(run) / base:.3f}" + " (model.py's)" * (ours[name] == tile)]
            m.tiles = tiles


# ---- layer_norm


def layer_norm_rows():
    def liger(x, w, b):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
        return LigerLayerNormFunction.apply(x, w, b, 1e-5)
    for C in (768, 1024, 1536, 4096):
        N = BYTES // 2 // C
        x, r = torch.randn(2, N, C, device=DEVICE, dtype=torch.bfloat16)
        w, b = torch.randn(2, C, device=DEVICE, dtype=torch.bfloat16)
        inputs = [t.requires_grad_() for t in (x, w, b)]
        compiled = torch.compile(F.layer_norm, dynamic=False)
        added = torch.compile(lambda: (F.layer_norm(x + r, (C,), w, b), x + r), dynamic=False)
        copy = milliseconds(lambda: torch.empty_like(x).copy_(x))
        speed = 2 * N * C * 2 / copy / 1e6
        yield [str(C), "copy", f"{speed:.0f}", "1.00", "", ""]
        runs = {"eager": lambda: F.layer_norm(x, (C,), w, b), "compiled": lambda: compiled(x, (C,), w, b),
                "Liger": lambda: liger(x, w, b), "ours": lambda: m.layer_norm(x, w, b)}
        for name, run in runs.items():
            if available(run):
                y = run()
                forward = milliseconds(run)
                backward = milliseconds(lambda: torch.autograd.grad(y, inputs, r, retain_graph=True))
                gbs = 2 * N * C * 2 / forward / 1e6, 3 * N * C * 2 / backward / 1e6
                yield [str(C), name, f"{gbs[0]:.0f}", f"{gbs[0] / speed:.2f}", f"{gbs[1]:.0f}", f"{gbs[1] / speed:.2f}"]
        for name, run in {"compiled, with residual": added,
                          "ours, with residual": lambda: m.layer_norm(x, w, b, residual=r)}.items():
            with torch.no_grad():
                forward = milliseconds(run)
            gbs = 4 * N * C * 2 / forward / 1e6
            yield [str(C), name, f"{gbs:.0f}", f"{gbs / speed:.2f}", "", ""]


# ---- linear_cross_entropy


def loss_rows():
    N, V, C = LOSS
    x = torch.randn(N, C, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    w = (torch.randn(V, C, device=DEVICE) * C ** -0.5).requires_grad_()        # fp32, as under autocast
    targets = torch.randint(0, V, (N,), device=DEVICE)

    def eager():
        return F.cross_entropy(F.linear(x, w.to(x.dtype)).float(), targets)
    compiled = torch.compile(eager, dynamic=False)

    def liger():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        return LigerFusedLinearCrossEntropyLoss()(w.to(x.dtype), x, targets)

    def torchs():
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x, w.to(x.dtype), targets, options=options)
    runs = {"eager": eager, "compiled": compiled, "Liger": liger, "torch's linear_cross_entropy": torchs,
            "ours": lambda: m.linear_cross_entropy(x, w, targets)}
    exact = F.cross_entropy(F.linear(x.detach().float(), w.detach()), targets).item()
    for name, run in runs.items():
        step = lambda: torch.autograd.grad(run(), (x, w))       # noqa: E731
        if available(step):
            time = milliseconds(step)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            peak = torch.cuda.max_memory_allocated() - before
            with torch.no_grad():
                error = abs(run().item() - exact)
            yield [name, f"{time:.2f}", f"{6 * N * V * C / time / 1e9:.0f}", f"{peak / 2**20:,.0f}", f"{error:.1e}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, metavar="D", help="time attention with other tile sizes")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py: torch sees no CUDA device here")
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, Python "
          f"{platform.python_version()}; `{' '.join(['python', *sys.argv])}`")
    if args.tiles:
        table("Tiles", ["D", "dropout", "kernel", "tile", "time / model.py's"], tile_rows(args.tiles))
        return
    table("linear_cross_entropy, forward and backward", ["", "ms", "TFLOP/s", "peak MiB above the inputs", "error"],
          loss_rows())
    table("layer_norm", ["C", "", "forward GB/s", "of the copy", "backward GB/s", "of the copy"], layer_norm_rows())
    table("attention", ["D", "T", "", "forward ms", "TFLOP/s", "forward + backward ms", "TFLOP/s"], attention_rows())


if __name__ == "__main__":
    main()
