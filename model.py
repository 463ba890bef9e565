"""GPT-2, whole: three ops with their Triton kernels, the model, and its checkpoints.

    layer_norm               normalise each row of the residual stream
    attention                causal softmax(q k^T) v, with ALiBi and dropout
    linear_cross_entropy     the tied head and the loss in one
    GPTConfig, GPT           the model: forward, loss, generation
    save, load               checkpoints: a .pt of ours, or a Hugging Face model
    export                   a Hugging Face folder: python model.py out/1.1B.pt --export hf/1.1B

Each op in turn: its mathematics, NAME_ref (plain PyTorch, the definition), the Triton kernels, the custom
operators that launch them (torch.compile takes these whole), their autograd Function, and NAME, the entry.

The model has two forms, each a Hugging Face architecture, so that weights travel both ways: learned
positions with biases are GPT2LMHeadModel (tanh GELU), ALiBi without are MptForCausalLM (erf GELU).

Letters in shape comments: B sequences, T tokens, C channels (n_embd), H heads, D = C / H channels of a head,
V tokens of the vocabulary, N rows (B times T). A kernel's tile has M rows (queries) by N columns (keys).
"""
from __future__ import annotations      # tl.constexpr is only named where there is no Triton

import math
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.checkpoint import checkpoint

try:
    import triton
    import triton.language as tl
except ImportError:         # none for macOS and Windows: the references serve there
    triton = None


class ModelError(ValueError):
    """A configuration or a checkpoint that cannot be used; the message is one line for the user."""


# ---- Kernels or references

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"      # Triton reads it too, as it decorates
CACHED = 12 * 2**20     # bytes of k and v that attention leaves the L2 cache to hold
CHUNK = 2**27           # logits that linear_cross_entropy holds at a time: 256 MiB of bf16
jit = triton.jit if triton else lambda kernel: kernel
if triton:
    LOG2E = tl.constexpr(math.log2(math.e))
    WIDEN = tl.constexpr(INTERPRET)     # the interpreter is numpy, which knows no bf16


def use_kernels(x):
    """CUDA tensors take the kernels; under TRITON_INTERPRET=1 CPU tensors do too. fp64 never does."""
    return triton is not None and (x.is_cuda or INTERPRET) and x.dtype != torch.float64


def launch_rows(kernel, programs, block, *args):
    """Launch a kernel that reads rows in blocks, with a thread for every 16 elements of a block."""
    with torch.cuda.device_of(args[0]):
        kernel[programs,](*args, block, num_warps=min(16, max(1, block // 512)))


# ---- layer_norm
#
#   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias          over the last dimension
#
#   with xhat = (x - mean) * rstd and g = dy * weight:
#   dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd,  dweight = sum dy * xhat,  dbias = sum dy


def layer_norm_ref(x, weight, bias=None, eps=1e-5, residual=None):
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450) with fp32 statistics.

    x, residual: (..., C); weight, bias: (C,). Returns (..., C) in x's dtype. With `residual`, returns
    (layer_norm(x + residual), x + residual), the sum in the wider dtype of the two: under autocast a
    bf16 branch joins an fp32 stream."""
    s = x if residual is None else x + residual
    acc = torch.promote_types(s.dtype, torch.float32)
    bias = None if bias is None else bias.to(acc)
    y = F.layer_norm(s.to(acc), weight.shape, weight.to(acc), bias, eps).to(x.dtype)
    return y if residual is None else (y, s)


@jit
def layer_norm_fwd_kernel(
    x, residual, weight, bias,  # (N, C), (N, C) or None, (C,), (C,) or None
    y, s,                       # (N, C): the result, and the sum where there is a residual
    eps, C: tl.constexpr, BLOCK_C: tl.constexpr,
):
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    at = tl.program_id(0).to(tl.int64) * C + c
    h = tl.load(x + at, inside, 0.0).to(tl.float32)
    if residual is not None:
        h = (h + tl.load(residual + at, inside, 0.0).to(tl.float32)).to(s.dtype.element_ty)
        tl.store(s + at, h, inside)
        h = h.to(tl.float32)                # normalise the sum as it is stored
    centred = tl.where(inside, h - tl.sum(h, 0) / C, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)
    out = centred * rstd * tl.load(weight + c, inside, 0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + c, inside, 0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), inside)


@jit
def layer_norm_bwd_kernel(
    dy, s, weight,              # (N, C), (N, C), (C,): s is what the forward normalised
    ds,                         # (N, C) or None: the gradient that reaches s by other ways
    dx, dresidual,              # (N, C): the same gradient twice, each in its dtype; the latter may be None
    dparams,                    # (2, programs, C) fp32: each program's share of dweight and dbias
    eps, N, C: tl.constexpr, BLOCK_C: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    c = tl.arange(0, BLOCK_C)
    inside = c < C
    w = tl.load(weight + c, inside, 0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_C,), tl.float32)
    db = tl.zeros((BLOCK_C,), tl.float32)
    at = program.to(tl.int64) * C + c
    for _ in range(program, N, programs):
        g = tl.load(dy + at, inside, 0.0).to(tl.float32)
        h = tl.load(s + at, inside, 0.0).to(tl.float32)
        centred = tl.where(inside, h - tl.sum(h, 0) / C, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / C + eps)     # cheaper than to store and read it
        xhat = centred * rstd
        dw += g * xhat
        db += g
        g *= w
        d = (g - tl.sum(g, 0) / C - xhat * (tl.sum(g * xhat, 0) / C)) * rstd
        if ds is not None:
            d += tl.load(ds + at, inside, 0.0).to(tl.float32)
        tl.store(dx + at, d.to(dx.dtype.element_ty), inside)
        if dresidual is not None:
            tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), inside)
        at += programs * C
    tl.store(dparams + program * C + c, dw, inside)
    tl.store(dparams + (programs + program) * C + c, db, inside)


@custom_op("gpt::layer_norm", mutates_args=("y", "s"))
def layer_norm_fwd(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None,
                   y: Tensor, s: Tensor | None, eps: float) -> None:
    C = x.size(-1)
    launch_rows(layer_norm_fwd_kernel, x.numel() // C, triton.next_power_of_2(C),
                x, residual, weight, bias, y, s, eps, C)


@custom_op("gpt::layer_norm_backward", mutates_args=("dx", "dresidual", "dparams"))
def layer_norm_bwd(dy: Tensor, s: Tensor, weight: Tensor, ds: Tensor | None, dx: Tensor,
                   dresidual: Tensor | None, dparams: Tensor, eps: float) -> None:
    C = dy.size(-1)
    launch_rows(layer_norm_bwd_kernel, dparams.size(1), triton.next_power_of_2(C),
                dy, s, weight, ds, dx, dresidual, dparams, eps, dy.numel() // C, C)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps):
        y, s = torch.empty_like(x), None
        if residual is not None:
            residual = residual.contiguous()
            s = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
        layer_norm_fwd(x, residual, weight, bias, y, s, eps)
        ctx.save_for_backward(x if s is None else s, weight)
        ctx.eps, ctx.bias, ctx.residual = eps, bias is not None, None if s is None else residual.dtype
        return y if s is None else (y, s)

    @staticmethod
    def backward(ctx, dy, ds=None):
        s, weight = ctx.saved_tensors
        C = s.size(-1)
        ds = None if ds is None else ds.contiguous()
        dx = torch.empty_like(s, dtype=dy.dtype)
        dresidual = None if ds is None else torch.empty_like(s, dtype=ctx.residual)
        programs = min(s.numel() // C, max(128, 2**20 // C))        # they fill any GPU, with many rows each
        dparams = s.new_empty(2, programs, C, dtype=torch.float32)
        layer_norm_bwd(dy.contiguous(), s, weight, ds, dx, dresidual, dparams, ctx.eps)
        dweight, dbias = dparams.sum(1).to(weight.dtype)
        return dx, dresidual, dweight, dbias if ctx.bias else None, None


def layer_norm(x, weight, bias=None, eps=1e-5, residual=None):
    """layer_norm_ref's contract, for C up to 8192: one pass over the rows, one more backward."""
    if not use_kernels(x):
        return layer_norm_ref(x, weight, bias, eps, residual)
    return LayerNormFunction.apply(x.contiguous(), residual, weight, bias, eps)


# ---- attention
#
#   s_ij = q_i . k_j / sqrt(D) + slope * (j - i)    for j <= i, else -inf
#   p_ij = exp(s_ij) / sum_j exp(s_ij)              softmax in fp32 whatever the input is
#   y_i  = sum_j dropout(p_ij) v_j
#
#   with dp_ij = dropout(dy_i . v_j), delta_i = dy_i . y_i and ds_ij = p_ij (dp_ij - delta_i):
#   dq_i = sum_j ds_ij k_j / sqrt(D),   dk_j = sum_i ds_ij q_i / sqrt(D),   dv_j = sum_i dropout(p_ij) dy_i


def attention_ref(q, k, v, slopes=None, dropout_p=0.0):
    """Causal attention (Vaswani et al. 2017), optionally with ALiBi (Press et al. 2022).

    q: (B, H, T, D); k, v: (B, H, S, D), S >= T: the queries are the last T of S positions. slopes:
    (H,) or None. Returns (B, H, T, D) in v's dtype. With bf16 inputs q k^T is rounded to bf16."""
    T, D = q.shape[-2:]
    i = torch.arange(k.size(2), device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    distance = i[None, :] - i[-T:, None]                                       # (T, S), j - i
    bias = 0 * distance if slopes is None else slopes[:, None, None] * distance     # or (H, T, S)
    bias = bias.masked_fill(distance > 0, -math.inf)                           # causal
    scores = torch.add(bias, q @ k.transpose(-2, -1), alpha=1 / math.sqrt(D))  # (B, H, T, S)
    p = F.dropout(torch.softmax(scores, dim=-1), dropout_p)
    return p.to(v.dtype) @ v


# The kernels follow FlashAttention-2 (Dao 2023, arXiv:2307.08691). A program owns M rows (or, for dk
# and dv, N columns) of one head and walks over the other side in tiles, those that the diagonal cuts
# last. No two programs write to the same place: no atomics, and results repeat bit for bit.
#
# Scores are in base 2, because exp2 is what the hardware has: log2(e) is part of `scale`. They are
# scaled in the multiply-add that subtracts the maximum, so slopes are divided by `scale`.
#
# ALiBi adds slope * (j - m // 128 * 128), m the tile's first row. Within a row this differs from
# slope * (j - i) by a constant, which softmax ignores. It is the same in all three kernels, needs no
# term per row, and stays small enough for fp32 where weights are large.
#
# The causal mask is i >= j + shift, with shift = n - m counted apart: the loop's variable itself is
# widened to 64 bits for the addresses, and every comparison would be too.


@jit
def dot(a, b, acc=None):
    """a b (+ acc), summed in fp32; fp32 inputs as three TF32 products, whose error is like fp32's."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@jit
def tile_at(x, start, ROWS: tl.constexpr, stride, T, D: tl.constexpr):
    """Rows start, start + 1, ... of x (T, D) as (ROWS, BLOCK_D): pointers, which rows and columns x has."""
    BLOCK_D: tl.constexpr = 32 if D <= 32 else 64 if D <= 64 else 128
    row, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    x += tl.cast(start, tl.int64) * stride
    return x + row * stride + d, start + row < T, d < D


@jit
def load_tile(x, start, ROWS: tl.constexpr, stride, T, D: tl.constexpr, EDGE: tl.constexpr):
    """A tile of x, zero beyond D and beyond T, which only a tile with EDGE may reach."""
    at, in_T, in_D = tile_at(x, start, ROWS, stride, T, D)
    return tl.load(at, in_T & in_D if EDGE else in_D, 0.0)


@jit
def store_tile(x, values, start, ROWS: tl.constexpr, stride, T, D: tl.constexpr):
    at, in_T, in_D = tile_at(x, start, ROWS, stride, T, D)
    tl.store(at, values.to(x.dtype.element_ty), in_T & in_D)


@jit
def this_head(qkv, slopes, seed, scale, T, H: tl.constexpr, D: tl.constexpr):
    """This program's q, k and v (T, D), its head's offset in qkv, y and lse, its slope, its dropout key.

    The grid is (heads of a group, tiles, groups), and programs start in this order: those at work
    share the k and v of one group of heads, which fit in the L2 cache."""
    bh = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    b, h = (bh // H).to(tl.int64), bh % H
    q_at, y_at, lse_at = (b * T * 3 * H + h) * D, (b * T * H + h) * D, bh * (tl.cdiv(T, 128) * 128)
    q = qkv + q_at
    slope = 0.0 if slopes is None else tl.load(slopes + h) * (LOG2E / scale)
    key = 0 if seed is None else tl.randint(tl.load(seed), bh).to(tl.uint32, bitcast=True)
    return q, q + H * D, q + 2 * H * D, q_at, y_at, lse_at, slope, key


@jit
def dropout_mask(key, dropout_p, m, i, n, j):
    """Which weights of rows m + i and columns n + j survive dropout, by (seed, head, row, column) alone.

    One call of Philox 2x32 (Salmon et al. 2011; 7 rounds pass their tests) gives 16 bits to each of the four
    weights in rows i, i + 8 and columns j, j + 8. After a matrix instruction one thread holds all four, also
    where the tile is transposed: the compiler makes the call once, and nothing moves between threads."""
    a, b = (m + (i - (i & 8))).to(tl.uint32), (n + (j - (j & 8))).to(tl.uint32)
    for _ in tl.static_range(7):
        a, b = tl.umulhi(a, 0xD256D193) ^ key ^ b, a * 0xD256D193
        key += 0x9E3779B9
    word = tl.where((j & 8) == 0, a, b)
    word = tl.where((i & 8) == 0, word, word << 16)     # its upper 16 bits decide
    return word >= tl.cast(dropout_p * 2**32, tl.uint32)


@jit
def attention_fwd_kernel(
    qkv, slopes,                # (B, T, 3, H, D); (H,) fp32 or None
    seed, dropout_p,            # (1,) int64 or None for no dropout; a multiple of 2^-16
    y, lse,                     # (B, T, H, D); (B, H, T rounded up to 128) fp32: log2 sum_j 2^s_ij
    scale, T, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EDGE: tl.constexpr,
):
    q, k, v, q_at, y_at, lse_at, slope, key = this_head(qkv, slopes, seed, scale, T, H, D)
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * M     # the longest rows first
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    q_m = load_tile(q, m, M, 3 * H * D, T, D, EDGE)
    acc = tl.zeros(q_m.shape, tl.float32)
    l_i = tl.zeros((M,), tl.float32)                    # running sum_j p_ij
    m_i = tl.full((M,), -float("inf"), tl.float32)      # running max_j s_ij
    for diagonal in tl.static_range(2):
        shift = 0 if diagonal else -m
        for n in range(m if diagonal else 0, min(m + M, T) if diagonal else m, N):
            k_n = load_tile(k, n, N, 3 * H * D, T, D, EDGE and diagonal)
            s = dot(q_m, tl.trans(k_n))                 # (M, N)
            if slopes is not None:
                s += slope * (n - m // 128 * 128) + slope * j
            if diagonal:
                s = tl.where(i >= j + shift, s, -float("inf"))
            m_ij = tl.maximum(m_i, tl.max(s, 1) * scale)
            alpha = tl.exp2(m_i - m_ij)
            p = tl.exp2(s * scale - m_ij[:, None])
            l_i = l_i * alpha + tl.sum(p, 1)
            m_i = m_ij
            if seed is not None:
                p = tl.where(dropout_mask(key, dropout_p, m, i, n, j), p, 0.0)
            v_n = load_tile(v, n, N, 3 * H * D, T, D, EDGE and diagonal)
            acc = dot(p.to(v_n.dtype), v_n, acc * alpha[:, None])
            shift += N
    tl.store(lse + lse_at + m + tl.arange(0, M), m_i + tl.log2(l_i))
    store_tile(y + y_at, acc / (l_i * (1 - dropout_p))[:, None], m, M, H * D, T, D)


@jit
def attention_bwd_dq_kernel(
    qkv, slopes, seed, dropout_p, y, lse,       # as the forward had and left them
    dy, dqkv,                   # like y, like qkv
    delta,                      # like lse: dy . y * (1 - dropout_p), for the pass over columns
    scale, T, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EDGE: tl.constexpr,
):
    q, k, v, q_at, y_at, lse_at, slope, key = this_head(qkv, slopes, seed, scale, T, H, D)
    m = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    i, j = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    q_m = load_tile(q, m, M, 3 * H * D, T, D, EDGE)
    dy_m = load_tile(dy + y_at, m, M, H * D, T, D, EDGE)
    y_m = load_tile(y + y_at, m, M, H * D, T, D, EDGE)
    rows = lse_at + m + tl.arange(0, M)
    lse_m = tl.load(lse + rows)
    delta_m = tl.sum(dy_m.to(tl.float32) * y_m.to(tl.float32), 1) * (1 - dropout_p)
    tl.store(delta + rows, delta_m)
    dq = tl.zeros(q_m.shape, tl.float32)
    for diagonal in tl.static_range(2):
        shift = 0 if diagonal else -m
        for n in range(m if diagonal else 0, min(m + M, T) if diagonal else m, N):
            k_n = load_tile(k, n, N, 3 * H * D, T, D, EDGE and diagonal)
            v_n = load_tile(v, n, N, 3 * H * D, T, D, EDGE and diagonal)
            s = dot(q_m, tl.trans(k_n))                 # (M, N)
            if slopes is not None:
                s += slope * (n - m // 128 * 128) + slope * j
            p = tl.exp2(s * scale - lse_m[:, None])
            if diagonal:
                p = tl.where(i >= j + shift, p, 0.0)
            dp = dot(dy_m, tl.trans(v_n))
            if seed is not None:
                dp = tl.where(dropout_mask(key, dropout_p, m, i, n, j), dp, 0.0)
            ds = p * (dp - delta_m[:, None])
            dq = dot(ds.to(k_n.dtype), k_n, dq)
            shift += N
    store_tile(dqkv + q_at, dq * (scale / LOG2E / (1 - dropout_p)), m, M, 3 * H * D, T, D)


@jit
def attention_bwd_dkdv_kernel(
    qkv, slopes, seed, dropout_p, y, lse, dy, dqkv, delta,      # as for dq
    scale, T, H: tl.constexpr, D: tl.constexpr, M: tl.constexpr, N: tl.constexpr, EDGE: tl.constexpr,
):
    q, k, v, q_at, y_at, lse_at, slope, key = this_head(qkv, slopes, seed, scale, T, H, D)
    n = tl.program_id(1) * N                            # the longest columns first
    i, j = tl.arange(0, M)[None, :], tl.arange(0, N)[:, None]       # tiles are transposed: (N, M)
    k_n = load_tile(k, n, N, 3 * H * D, T, D, EDGE)
    v_n = load_tile(v, n, N, 3 * H * D, T, D, EDGE)
    dk = tl.zeros(k_n.shape, tl.float32)
    dv = tl.zeros(k_n.shape, tl.float32)
    for diagonal in tl.static_range(2):
        shift = 0 if diagonal else -N
        for m in range(n if diagonal else n + N, min(n + N, T) if diagonal else T, M):
            rows = lse_at + m + tl.arange(0, M)
            q_m = load_tile(q, m, M, 3 * H * D, T, D, EDGE)
            dy_m = load_tile(dy + y_at, m, M, H * D, T, D, EDGE)
            s = dot(k_n, tl.trans(q_m))                 # (N, M)
            if slopes is not None:
                s += slope * (n - m // 128 * 128) + slope * j
            dp = dot(v_n, tl.trans(dy_m))
            p = tl.exp2(s * scale - tl.load(lse + rows)[None, :])
            if diagonal:
                p = tl.where(i >= j + shift, p, 0.0)
            dropped_p = p
            if seed is not None:        # dropped from both at once: to keep the mask would take registers
                mask = dropout_mask(key, dropout_p, m, i, n, j)
                dropped_p, dp = tl.where(mask, p, 0.0), tl.where(mask, dp, 0.0)
            ds = p * (dp - tl.load(delta + rows)[None, :])
            dv = dot(dropped_p.to(dy_m.dtype), dy_m, dv)
            dk = dot(ds.to(q_m.dtype), q_m, dk)
            shift -= M
    dk_at = dqkv + q_at + H * D
    store_tile(dk_at, dk * (scale / LOG2E / (1 - dropout_p)), n, N, 3 * H * D, T, D)
    store_tile(dk_at + H * D, dv / (1 - dropout_p), n, N, 3 * H * D, T, D)


def tiles(dtype, D, T, dropout, hopper):
    """(M, N, warps, stages) of the three kernels: large, but spilling no register (tests/tools/aot.py).

    Fixed, not tuned at run time: other tiles round differently, and a resumed run must end with the same
    bits. Before Hopper they fit the 99 KB of a 24 GB card. With 2 stages the loop waits for each load."""
    wide = D > 64
    if dtype == torch.float32:
        return dict(fwd=(16, 16, 8, 1) if wide else (16 if dropout else 32, 16, 4, 1),
                    dq=(16, 16, 8, 1) if wide else (32, 16 if D <= 32 else 32, 4, 1), dkdv=(16, 16, 4, 1))
    if not hopper:
        return dict(fwd=(128, 32, 8, 3) if wide else (64, 64, 4, 3), dq=(64, 32, 4, 3),
                    dkdv=(32, 32, 4, 3) if dropout else (32, 64, 8, 3))
    return dict(fwd=(128, 64, 8 if wide or dropout else 4, 3), dq=(128, 64, 8, 3),
                dkdv=(32 if wide and dropout and T % 128 else 64, 128, 8, 3))


def launch(kernel, name, qkv, slopes, seed, dropout_p, y, lse, *gradients):
    (B, T, C), H = y.shape, lse.size(1)
    D, BH = C // H, B * H
    hopper = qkv.is_cuda and torch.cuda.get_device_capability(qkv.device) >= (9, 0)
    M, N, num_warps, num_stages = tiles(qkv.dtype, D, T, seed is not None, hopper)[name]
    own = max(M, N)             # rows, or for dk and dv columns, of a program
    fit = max(1, CACHED // (2 * T * D * qkv.element_size()))            # heads whose k and v the cache holds
    groups = next(n for n in range(triton.cdiv(BH, fit), BH + 1) if BH % n == 0)
    with torch.cuda.device_of(qkv):
        kernel[BH // groups, triton.cdiv(T, own), groups](
            qkv, slopes, seed, dropout_p, y, lse, *gradients, LOG2E / math.sqrt(D), T, H, D, M, N,
            T % own > 0, num_warps=num_warps, num_stages=num_stages)


@custom_op("gpt::attention", mutates_args=("y", "lse"))
def attention_fwd(qkv: Tensor, slopes: Tensor | None, seed: Tensor | None, dropout_p: float, y: Tensor,
                  lse: Tensor) -> None:
    launch(attention_fwd_kernel, "fwd", qkv, slopes, seed, dropout_p, y, lse)


@custom_op("gpt::attention_backward", mutates_args=("dqkv", "delta"))
def attention_bwd(qkv: Tensor, slopes: Tensor | None, seed: Tensor | None, dropout_p: float, y: Tensor,
                  lse: Tensor, dy: Tensor, dqkv: Tensor, delta: Tensor) -> None:
    args = qkv, slopes, seed, dropout_p, y, lse, dy, dqkv, delta
    launch(attention_bwd_dq_kernel, "dq", *args)
    launch(attention_bwd_dkdv_kernel, "dkdv", *args)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, n_head, slopes, seed, dropout_p):
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        y = qkv.new_empty(B, T, C)
        lse = qkv.new_zeros(B, n_head, (T + 127) // 128 * 128, dtype=torch.float32)
        attention_fwd(qkv, slopes, seed, dropout_p, y, lse)
        ctx.dropout_p = dropout_p
        ctx.save_for_backward(qkv, slopes, seed, y, lse)
        return y

    @staticmethod
    def backward(ctx, dy):
        qkv, slopes, seed, y, lse = ctx.saved_tensors
        dqkv, delta = torch.empty_like(qkv), torch.zeros_like(lse)
        attention_bwd(qkv, slopes, seed, ctx.dropout_p, y, lse, dy.contiguous(), dqkv, delta)
        return dqkv, None, None, None, None


def attention_qkv(qkv, n_head, slopes=None, dropout_p=0.0, past=None):
    """`attention` on the output of one projection: qkv (B, T, 3C) -> (B, T, C), heads side by side.

    past: a list, empty at first, of k and v so far, (B, H, S, D) each, to which these tokens' are added.
    The kernels take memory in O(T) and D up to 128 (ModelError beyond), and round only the weights to bf16,
    on their way to v. dropout_p becomes a multiple of 2^-16; the seed is drawn by torch's generator."""
    B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
    q, k, v = qkv.view(B, T, 3, n_head, C // n_head).permute(2, 0, 3, 1, 4)     # each (B, H, T, D)
    if past is not None:
        k, v = (torch.cat(pair, dim=2) for pair in zip(past, (k, v))) if past else (k, v)
        past[:] = k, v
    if T < k.size(2) or not use_kernels(qkv):           # few queries on kept keys need no kernel
        return attention_ref(q, k, v, slopes, dropout_p).transpose(1, 2).reshape(B, T, C)
    if C // n_head > 128:
        raise ModelError(f"heads of {C // n_head} channels: the kernels take up to 128; raise n_head")
    dropout_p = min(round(dropout_p * 2**16), 2**16 - 1) / 2**16
    seed = torch.randint(2**31, (1,), device=qkv.device) if dropout_p else None
    return AttentionFunction.apply(qkv.contiguous(), n_head, slopes, seed, dropout_p)


def attention(q, k, v, slopes=None, dropout_p=0.0):
    """attention_ref's contract for S = T."""
    B, H, T, D = q.shape
    qkv = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4).reshape(B, T, 3 * H * D)
    return attention_qkv(qkv, H, slopes, dropout_p).view(B, T, H, D).transpose(1, 2)


def alibi_slopes(n_head):
    """ALiBi's slopes, (n_head,) fp32 (Press et al. 2022, arXiv:2108.12409): 2^(-8 h / n) for h = 1..n, with n
    the power of two at or below n_head; then, as in their code, every second one of the power above."""
    n = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    slopes += [2 ** (-4 * h / n) for h in range(1, 2 * (n_head - n), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


# ---- linear_cross_entropy
#
#   loss_n = log sum_v exp(x_n . w_v) - x_n . w_target(n)
#
#   with p_nv = exp(x_n . w_v - log sum exp), for the sum of the losses:
#   dlogits_nv = p_nv - [v = target(n)],   dx = dlogits w,   dw = dlogits^T x


def linear_cross_entropy_ref(x, weight, targets, reduction="mean", ignore_index=-1, vocab_size=None):
    """Cross-entropy, in nats, of the logits x @ weight.T against targets.

    x: (N, C); weight: (V, C), of which rows from vocab_size on are padding and take no
    probability; targets: (N,) of int64, `ignore_index` where there is none. reduction: "mean"
    over the targets that count, or "none" for the (N,) losses, which have no gradient."""
    logits = F.linear(x, weight[:vocab_size])                                  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)


@jit
def cross_entropy_kernel(
    logits,                     # (N, V), columns from vocab_size on are padding; GRADIENT: becomes dlogits
    targets, losses,            # (N,) int64, (N,) fp32
    ignore_index, vocab_size, GRADIENT: tl.constexpr, V, BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0)
    logits += n.to(tl.int64) * V
    target = tl.load(targets + n)
    counts = target != ignore_index
    target = target.to(tl.int32)                        # so that columns are compared in 32 bits
    cols = tl.arange(0, BLOCK_V)
    m_i, l_i = -float("inf"), 0.0                       # running maximum, and sum of exp(x - m_i)
    for v in range(0, V, BLOCK_V):      # masked by V, a multiple of 64, so that loads are 16 bytes wide
        x = tl.load(logits + v + cols, v + cols < V, 0.0).to(tl.float32)
        x = tl.where(v + cols < vocab_size, x, -float("inf"))
        m_ij = tl.maximum(m_i, tl.max(x, 0))
        l_i = l_i * tl.exp2((m_i - m_ij) * LOG2E) + tl.sum(tl.exp2(x * LOG2E - m_ij * LOG2E), 0)
        m_i = m_ij
    lse = m_i + tl.log(l_i)
    hit = tl.load(logits + target, counts, 0.0).to(tl.float32)
    tl.store(losses + n, tl.where(counts, lse - hit, 0.0))
    if GRADIENT:
        tl.debug_barrier()      # every thread has read its logit of the target
        g = tl.where(counts, 1.0, 0.0)
        for v in range(0, V, BLOCK_V):
            x = tl.load(logits + v + cols, v + cols < V, 0.0).to(tl.float32)
            p = tl.where(v + cols < vocab_size, tl.exp2(x * LOG2E - lse * LOG2E), 0.0)
            d = (p - tl.where(v + cols == target, 1.0, 0.0)) * g
            tl.store(logits + v + cols, d.to(logits.dtype.element_ty), v + cols < V)


@custom_op("gpt::linear_cross_entropy", mutates_args=("losses", "dx", "dw"))
def lce(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, vocab_size: int,
        losses: Tensor, dx: Tensor | None, dw: Tensor | None) -> None:
    """Losses, and unless dx is None their sum's gradients. A chunk's logits become dlogits while at hand."""
    N, V = x.size(0), weight.size(0)
    chunk, block = triton.cdiv(N, triton.cdiv(N * V, CHUNK)), min(8192, triton.next_power_of_2(V))
    w, targets, buffer = weight.to(x.dtype), targets.contiguous(), x.new_empty(chunk, V)
    for n in range(0, N, chunk):
        rows = slice(n, min(n + chunk, N))
        logits = torch.mm(x[rows], w.t(), out=buffer[:rows.stop - n])          # (chunk, V)
        launch_rows(cross_entropy_kernel, len(logits), block,
                    logits, targets[rows], losses[rows], ignore_index, vocab_size, dx is not None, V)
        if dx is not None:
            torch.mm(logits, w, out=dx[rows])
            if x.is_cuda and x.dtype != torch.float32:      # bf16 operands, their products summed in fp32
                torch.addmm(dw, logits.t(), x[rows], out_dtype=torch.float32, out=dw)
            else:
                dw.addmm_(logits.t().float(), x[rows].float())


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, *args):
        losses, dx = x.new_empty(x.size(0), dtype=torch.float32), torch.empty_like(x)
        dw = torch.zeros_like(weight, dtype=torch.float32)
        lce(x, weight, *args, losses, dx, dw)
        ctx.save_for_backward(dx, dw.to(weight.dtype))
        return losses.sum()

    @staticmethod
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        return dx * g, dw * g, None, None, None


def linear_cross_entropy(x, weight, targets, reduction="mean", ignore_index=-1, vocab_size=None):
    """linear_cross_entropy_ref's contract, never holding the (N, V) logits. The mean finds its gradients in
    the forward pass: three products with the weight, not four (as Liger-Kernel, arXiv:2410.10989)."""
    if reduction == "none":
        x, weight = x.detach(), weight.detach()
    if not use_kernels(x):
        return linear_cross_entropy_ref(x, weight, targets, reduction, ignore_index, vocab_size)
    args = x, weight, targets, ignore_index, vocab_size or weight.size(0)
    if reduction == "mean" and torch.is_grad_enabled():
        return LinearCrossEntropyFunction.apply(*args) / (targets != ignore_index).sum()
    losses = x.new_empty(x.size(0), dtype=torch.float32)
    lce(*args, losses, None, None)
    return losses if reduction == "none" else losses.sum() / (targets != ignore_index).sum()


# ---- The model


@dataclass
class GPTConfig:
    """The shape of a model. Defaults are GPT-2 124M. Raises ModelError where it cannot be built."""
    block_size: int = 1024      # tokens of context
    vocab_size: int = 50257     # the embedding has more rows, up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0        # on embeddings, attention weights and both residual branches
    bias: bool = True           # in the linear layers and the layer norms
    pos: str = "learned"        # "learned" or "alibi"

    def __post_init__(self):
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, key) < 1:
                raise ModelError(f"{key}={getattr(self, key)}: expected at least 1")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_embd={self.n_embd}: expected a multiple of n_head={self.n_head}")
        if self.pos not in ("learned", "alibi"):
            raise ModelError(f'pos="{self.pos}": expected "learned" or "alibi"')
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout={self.dropout}: expected 0 <= dropout < 1")
        self.padded_vocab_size = 64 * math.ceil(self.vocab_size / 64)       # matrix units like even shapes


class LayerNorm(nn.LayerNorm):
    def forward(self, x, residual=None):
        return layer_norm(x, self.weight, self.bias, self.eps, residual)


class Block(nn.Module):
    """A layer: attention, then an MLP, each on the normalised stream and added to it."""

    def __init__(self, config):
        super().__init__()
        self.config, C, bias = config, config.n_embd, config.bias
        self.ln_1 = LayerNorm(C, bias=bias)
        self.attn = nn.ModuleDict(dict(c_attn=nn.Linear(C, 3 * C, bias), c_proj=nn.Linear(C, C, bias)))
        self.ln_2 = LayerNorm(C, bias=bias)
        self.mlp = nn.ModuleDict(dict(c_fc=nn.Linear(C, 4 * C, bias), c_proj=nn.Linear(4 * C, C, bias)))

    def forward(self, x, branch, slopes, past=None):
        """x: the stream (B, T, C); branch: what the layer before still adds to it, or None. Both anew."""
        dropout_p = self.config.dropout if self.training else 0.0
        gelu = "tanh" if self.config.pos == "learned" else "none"               # GPT-2's and MPT's
        h, x = (self.ln_1(x), x) if branch is None else self.ln_1(branch, residual=x)
        h = attention_qkv(self.attn.c_attn(h), self.config.n_head, slopes, dropout_p, past)
        h = F.dropout(self.attn.c_proj(h), dropout_p)                           # (B, T, C)
        h, x = self.ln_2(h, residual=x)
        h = F.gelu(self.mlp.c_fc(h), approximate=gelu)                          # (B, T, 4C)
        return x, F.dropout(self.mlp.c_proj(h), dropout_p)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with learned or ALiBi positions and a head tied to the embedding.

    model(idx) -> logits (B, T, V); model(idx, targets) -> the mean loss in nats, or with
    reduction="none" the (B, T) losses. idx, targets: (B, T) int64; targets of -1 are ignored.
    Raises ModelError where T exceeds block_size and positions are learned."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.pos == "learned" else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, bias=config.bias)
        slopes = alibi_slopes(config.n_head) if config.pos == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)
        self.checkpointing = False      # recompute each layer in the backward instead of keeping it

        # as in GPT-2: projections into the residual stream are smaller, else its variance grows with depth
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        with torch.no_grad():
            self.wte.weight[config.vocab_size:] = 0     # padding: never read, its gradient stays 0

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """FLOPs to train on a token at context T: 6 per weight (Kaplan et al. 2020), and causal attention."""
        weights = self.num_params() - (0 if self.wpe is None else self.wpe.weight.numel())
        return 6 * weights + 6 * self.config.n_layer * self.config.n_embd * T

    def hidden(self, idx, cache=None):
        """The residual stream after the last norm, (B, T, C), for idx (B, T). cache: a list for each layer,
        empty at first, that keeps keys and values; the next call with it continues after these tokens."""
        past = cache[0][0].size(2) if cache and cache[0] else 0
        T = past + idx.size(1)
        x = self.wte(idx)
        if self.wpe is not None:
            if T > self.config.block_size:
                raise ModelError(f"{T} tokens: learned positions end at block_size={self.config.block_size}")
            x = x + self.wpe.weight[past:T]
        x, branch = F.dropout(x, self.config.dropout, self.training), None
        for i, block in enumerate(self.h):
            if self.checkpointing and self.training and i < len(self.h) - 1:    # the last is needed at once
                # one sum, not the pair, for which torch.compile would save no memory
                x = checkpoint(lambda x, block: torch.add(*block(x, None, self.slopes)),
                               x, block, use_reentrant=False)
            else:
                x, branch = block(x, branch, self.slopes, cache and cache[i])
        return self.ln_f(branch, residual=x)[0]

    def forward(self, idx, targets=None, reduction="mean"):
        x = self.hidden(idx)
        V, weight = self.config.vocab_size, self.wte.weight     # rows from V on are padding: no logits
        if targets is None:
            return F.linear(x, weight[:V])
        loss = linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten(), reduction, vocab_size=V)
        return loss.view_as(targets) if reduction == "none" else loss

    def crop_block_size(self, block_size):
        """Change the context length in place. Learned positions can only become fewer, else ModelError."""
        if self.wpe is not None:
            if block_size > len(self.wpe.weight):
                raise ModelError(f"block_size={block_size}: learned positions end at {len(self.wpe.weight)}")
            self.wpe.weight = nn.Parameter(self.wpe.weight[:block_size].detach().clone())
        self.config.block_size = block_size

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue idx (B, T), sampling from the top_k likeliest tokens; returns (B, T + max_new_tokens).
        Temperature 0 is greedy."""
        block_size, V = self.config.block_size, self.config.vocab_size
        for i in range(max_new_tokens):
            if i == 0 or idx.size(1) > block_size:      # a window that slides changes every position
                cache, token = [[] for _ in self.h], idx[:, -block_size:]
            x = self.hidden(token, cache)[:, -1]                                # (B, C)
            logits = F.linear(x, self.wte.weight[:V]).float()                   # (B, V)
            if top_k is not None:
                logits[logits < logits.topk(min(top_k, V)).values[:, -1:]] = -math.inf
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)                         # (B, 1)
            else:
                p = torch.softmax(logits / temperature, dim=-1)
                token = torch.multinomial(p, 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)
        return idx


# ---- Checkpoints


def atomic_save(obj, path):
    """torch.save to a temporary file, flushed to the disk, then renamed: a kill leaves the old file whole."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    tmp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(tmp, "wb") as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:        # a full disk; torch's writer raises RuntimeError
        raise OSError(f"{path}: not written ({str(e).splitlines()[0]}); the same command goes on") from None
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def save(path, model, *, tokenizer, **meta):
    """Write a GPT: its config, its weights in fp32, meta (plain values). tokenizer: "gpt2" or "bytes"."""
    weights = {name: p.detach().float().cpu() for name, p in model.state_dict().items()}
    atomic_save(dict(config=asdict(model.config), model=weights, meta={"tokenizer": tokenizer} | meta), path)


def load(source, device="cpu"):
    """(model in eval mode, meta) from what save wrote, or from a Hugging Face folder or hub name.
    meta["tokenizer"] is "gpt2" or "bytes". Raises ModelError, also where the tokenizer is another."""
    if not str(source).endswith(".pt"):
        model, meta = from_hugging_face(source), {"tokenizer": hugging_face_tokenizer(source)}
        return model.to(device).eval(), meta
    checkpoint = load_pickle(source)
    if not isinstance(checkpoint, dict) or not {"config", "model", "meta"} <= checkpoint.keys():
        raise ModelError(f"{source}: not a checkpoint of this project (expected config, model and meta)")
    meta = checkpoint["meta"]
    if meta.get("tokenizer") not in TOKENS:
        raise ModelError(f"{source}: tokenizer={meta.get('tokenizer')} in its meta, expected gpt2 or bytes")
    return build(checkpoint["config"], checkpoint["model"], source).to(device).eval(), meta


def load_pickle(path, mmap=False):
    """torch.load that runs no code from the file and fails in one line. Raises ModelError."""
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:       # torch has no type of its own for a damaged file
        raise ModelError(f"{path}: not a checkpoint, or cut short")


def build(config, weights, source):
    """The GPT of a config (a dict) that takes `weights`, a state dict, as its own. Raises ModelError."""
    try:
        with torch.device("meta"):      # initialises nothing
            model = GPT(GPTConfig(**config))
        model.load_state_dict(weights, assign=True)
    except (TypeError, RuntimeError) as e:
        raise ModelError(f"{source}: {' '.join(str(e).split())[:300]}")
    model.slopes = alibi_slopes(model.config.n_head) if model.config.pos == "alibi" else None
    return model


# ---- Hugging Face, in and out, by transformers

# what config.json must say; the last two may leave no trace in the logits of a probe
SUPPORTED = dict(model_type=["gpt2", "mpt"], layer_norm_epsilon=[1e-5], clip_qkv=[None])
# what each tokenizer makes of a text that others cut differently, and of its last token
PROBE = "It's 12,345 O'Clock\r\n\n naïve  e\u0301 🙂"
TOKENS = {"bytes": [*PROBE.encode(), 256], "gpt2": [
    1026, 338, 1105, 11, 27712, 440, 6, 44758, 201, 628, 41492, 220, 304, 136, 223, 32485, 50256]}


@contextmanager
def hugging_face(source):
    """Import transformers, and turn what it raises about source, of any type, into a ModelError."""
    try:
        import transformers
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(f"transformers {transformers.__version__} is too old")
        transformers.logging.set_verbosity_error()
        yield transformers
    except Exception as e:
        advice = "" if os.path.isdir(source) else "; give a .pt, a folder or, with a network, a hub name"
        advice = "; pip install -U transformers" if isinstance(e, ImportError) else advice
        raise ModelError(f"{source}: {' '.join(str(e).split())[:300]}{advice}")


def hf_layout(name, p):
    """A weight in the other's layout: Hugging Face, whose name it is, has GPT-2's c_NAME as (in, out)."""
    return p.detach().t().contiguous() if ".c_" in name and p.dim() == 2 else p.detach()


def from_hugging_face(source):
    """The GPT-2 or MPT of a hub name ("gpt2-xl", "distilgpt2") or a folder. Raises ModelError, also for a
    model that computes other logits than a GPT with its weights does."""
    with hugging_face(source) as transformers:
        theirs = transformers.AutoConfig.from_pretrained(source)
    settings = theirs.to_dict().get("attn_config", {}) | theirs.to_dict()
    for key, values in SUPPORTED.items():
        if settings.get(key) not in values:
            raise ModelError(f"{source}: {key}={settings.get(key)} in config.json, expected one of {values}")
    with hugging_face(source) as transformers:
        hf, loading = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True)
    masks = {key for key in loading["unexpected_keys"] if key.endswith((".attn.bias", ".attn.masked_bias"))}
    if faults := loading["mismatched_keys"] | loading["missing_keys"] | loading["unexpected_keys"] - masks:
        raise ModelError(f"{source}: config.json and the weights disagree about {min(map(str, faults))}")

    learned = theirs.model_type == "gpt2"
    block_size = settings.get("n_positions") or settings.get("block_size") or settings["max_seq_len"]
    config = GPTConfig(block_size, theirs.vocab_size, theirs.num_hidden_layers, theirs.num_attention_heads,
                       theirs.hidden_size, bias=learned, pos="learned" if learned else "alibi")
    with torch.device("meta"):
        names = GPT(config).state_dict()        # their parameters come in the same order
    # clone: theirs may be the file itself, mapped, which somebody may write anew
    weights = {name: hf_layout(key, p).clone() for name, (key, p) in zip(names, hf.named_parameters())}
    weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, -config.vocab_size % 64))
    model = build(asdict(config), weights, source)
    idx = torch.arange(min(64, block_size))[None] * 997 % config.vocab_size         # (1, T)
    with torch.no_grad():
        logits = hf(idx).logits                                                     # (1, T, V)
        difference = (model(idx) - logits).abs().max() / logits.std()
    if not difference < 1e-4:       # rounding makes up to 2e-5, erf GELU for tanh GELU 7e-4
        raise ModelError(f"{source}: it computes other logits than this model ({difference:.2%} apart)")
    return model


GPT.from_pretrained = staticmethod(from_hugging_face)


def hugging_face_tokenizer(source):
    """Which of prepare.py's tokenizers a Hugging Face source has: "gpt2" or "bytes". Raises ModelError."""
    with hugging_face(source) as transformers:
        theirs = transformers.AutoTokenizer.from_pretrained(source)
        tokens = theirs.encode(PROBE + "<|endoftext|>", add_special_tokens=False)
    for name, ours in TOKENS.items():
        if tokens == ours and len(theirs) == ours[-1] + 1:
            return name
    raise ModelError(f"{source}: its tokenizer ({len(theirs)} tokens) is missing, or not GPT-2's or bytes")


def export(model, folder, tokenizer):
    """Write model and tokenizer (a tiktoken.Encoding) as a folder that AutoModelForCausalLM and AutoTokenizer
    load, and llama.cpp converts. Raises ModelError."""
    config, T = model.config, model.config.block_size
    if config.bias != (config.pos == "learned"):
        raise ModelError(f"pos={config.pos} with bias={config.bias} is neither GPT-2 nor MPT: not exported")
    shape = dict(vocab_size=config.vocab_size, num_hidden_layers=config.n_layer,
                 num_attention_heads=config.n_head, hidden_size=config.n_embd,
                 bos_token_id=tokenizer.eot_token, eos_token_id=tokenizer.eot_token)
    os.makedirs(folder, exist_ok=True)
    with hugging_face(folder) as transformers:
        if config.pos == "learned":     # llama.cpp reads n_ctx
            theirs = transformers.GPT2Config(**shape, n_positions=T, n_ctx=T, attn_pdrop=config.dropout,
                                             resid_pdrop=config.dropout, embd_pdrop=config.dropout)
        else:       # ALiBi works beyond the training context, in transformers up to max_seq_len
            theirs = transformers.MptConfig(**shape, max_seq_len=8 * T, block_size=T, use_cache=True)
        with torch.device("meta"):
            hf = transformers.AutoModelForCausalLM.from_config(theirs)
        weights = {key: hf_layout(key, p)[:len(q)].float().cpu()        # without the padding
                   for p, (key, q) in zip(model.parameters(), hf.named_parameters())}
        hf.save_pretrained(folder, state_dict=weights)
        if config.pos == "alibi":       # as llama.cpp spells it; transformers looks at model_type
            hf.config.architectures = ["MPTForCausalLM"]
            hf.config.save_pretrained(folder)
        hf_tokenizer(tokenizer, T).save_pretrained(folder)


def hf_tokenizer(tokenizer, model_max_length):
    """A GPT2Tokenizer with the same tokens as a tiktoken.Encoding."""
    from transformers import GPT2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges
    letters = bytes_to_unicode()        # GPT-2's files have a letter for each byte
    vocab = {"".join(letters[byte] for byte in tokenizer.decode_single_token_bytes(i)): i
             for i in range(tokenizer.eot_token)}
    merges = generate_merges(vocab, None)       # as in tiktoken, all pairs of tokens that make a third
    vocab["<|endoftext|>"] = tokenizer.eot_token
    return GPT2Tokenizer(vocab=vocab, merges=merges, model_max_length=model_max_length)


if __name__ == "__main__":
    from prepare import DataError, Parser, get_tokenizer        # not needed as a module
    parser = Parser("Write a checkpoint as a Hugging Face folder: config, weights and tokenizer.")
    parser.add_argument("checkpoint", help="a .pt of train.py or grow.py")
    parser.add_argument("--export", required=True, metavar="DIR")
    args = parser.parse_args()
    try:
        model, meta = load(args.checkpoint)
        export(model, args.export, get_tokenizer(meta["tokenizer"]))
    except (ModelError, DataError, OSError) as e:
        sys.exit(f"model.py: {e}")
