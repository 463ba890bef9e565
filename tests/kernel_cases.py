"""The Triton kernels against float64: on CPU tensors by Triton's interpreter, or on a GPU.

    TRITON_INTERPRET=1 python -m pytest tests/kernel_cases.py
    python -m pytest tests/kernel_cases.py                           with a GPU

Triton decides when model.py is imported whether it interprets, so these tests need a process of
their own; tests/test_kernels.py starts it. An error may be twice that of PyTorch's own operator at
the same precision, plus EPSILON of the largest value: in fp32 the step between neighbouring numbers
around 64, the size of ALiBi's term at the far end of a tile.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter

import model as m
from model import GPT, GPTConfig

DEVICE = "cpu" if m.INTERPRET else "cuda"
torch.set_default_device(DEVICE)
EPSILON = {torch.float32: 4e-6, torch.bfloat16: 1e-3}
DTYPES = [torch.float32, torch.bfloat16]


def convert_float(data, source, target, rounding, original=interpreter._convert_float):
    """fp32 to bf16 to the nearest even, as GPUs do; the interpreter cuts the last bits off."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
    return original(data, source, target, rounding).reshape(data.shape)


interpreter._convert_float = convert_float
# A launch prepares the modules that it sees; that each function it calls prepares them again is most of the time
m.core = tl.core
interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)


def test_the_kernels_are_what_runs():
    assert m.use_kernels(torch.zeros(1)) and not m.use_kernels(torch.zeros(1, dtype=torch.float64))


def results(op, inputs, grads):
    """Outputs of op(*inputs) and the gradients of the inputs that are floating point, as one list."""
    inputs = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in inputs if t.is_floating_point()]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [g.to(y.dtype) for g, y in zip(grads, outputs)])]


def check(ours, theirs, exact_op, inputs, grads, dtype):
    """Bound the errors of ours by those of theirs, both against exact_op in float64."""
    exact = results(exact_op, [t.double() if t.is_floating_point() else t for t in inputs], grads)
    for i, (a, b, e) in enumerate(zip(results(ours, inputs, grads), results(theirs, inputs, grads), exact)):
        assert a.shape == e.shape and a.isfinite().all(), i
        bound = 2 * (b.double() - e).abs().max() + EPSILON[dtype] * e.abs().max().clamp(min=1)
        assert (a.double() - e).abs().max() <= bound, (i, (a.double() - e).abs().max(), bound)


# ---- attention


def torch_attention(slopes):
    """PyTorch's own, with ALiBi's bias as the paper writes it, slope * (j - i), in the inputs' precision."""
    def attention(q, k, v):
        i = torch.arange(q.size(2))
        bias = torch.zeros(1, 1, 1) if slopes is None else slopes[:, None, None]
        bias = (bias.double() * (i - i[:, None])).masked_fill(i > i[:, None], -math.inf)
        return F.scaled_dot_product_attention(q, k, v, bias.to(q.dtype))
    return attention


@pytest.mark.parametrize("dtype, T, D, H", [
    (torch.float32, 1, 64, 3), (torch.float32, 77, 80, 2), (torch.float32, 40, 128, 1), (torch.float32, 140, 32, 1),
    (torch.bfloat16, 1, 64, 3), (torch.bfloat16, 77, 80, 2), (torch.bfloat16, 130, 128, 1), (torch.bfloat16, 140, 32, 1)])
@pytest.mark.parametrize("alibi", [True, False])
def test_attention(dtype, T, D, H, alibi, monkeypatch):
    tiles = m.tiles
    monkeypatch.setattr(m, "tiles", lambda *args: tiles(*args[:-1], D == 32))       # Hopper's are larger
    torch.manual_seed(T)
    q, k, v = torch.randn(3, 1, H, T, D).to(dtype)
    slopes = m.alibi_slopes(H) if alibi else None
    check(lambda *qkv: m.attention(*qkv, slopes), torch_attention(slopes), torch_attention(slopes), (q, k, v),
          [torch.randn(1, H, T, D)], dtype)


def test_attention_of_one_projection():
    """The packed form, each part of its gradient where it belongs, whatever the memory order of its input."""
    torch.manual_seed(0)
    qkv, slopes, dy = torch.randn(2, 18, 3 * 3 * 16), m.alibi_slopes(3), torch.randn(2, 18, 48)

    def packed(qkv):
        return m.attention_qkv(qkv, 3, slopes)

    def plain(qkv):
        q, k, v = qkv.view(2, 18, 3, 3, 16).permute(2, 0, 3, 1, 4)
        return torch_attention(slopes)(q, k, v).transpose(1, 2).reshape(2, 18, 48)
    check(packed, plain, plain, [qkv], [dy], torch.float32)
    other_order = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, results(packed, [other_order], [dy]), results(packed, [qkv], [dy])))


def test_grid_covers_every_head_once(monkeypatch):
    """Heads in groups that share the cache: with room for 2 of 6 heads the result is the same."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 8, 3 * 3 * 16)
    y = m.attention_qkv(qkv, 3)
    monkeypatch.setattr(m, "CACHED", 2 * 2 * 8 * 16 * 4)
    assert torch.equal(m.attention_qkv(qkv, 3), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_extreme_scores(dtype):
    """Scores around +-1e4, and rows that are constant or zero: no overflow, no NaN, still the softmax."""
    torch.manual_seed(0)
    q, k, v = (100 * torch.randn(3, 1, 1, 70, 32)).to(dtype)
    q[:, :, 10], k[:, :, 20], q[:, :, 30:33], k[:, :, 40:50] = 0, 0, 77, -77
    slopes = m.alibi_slopes(1)
    exact = torch_attention(slopes)(q.double(), k.double(), v.double())
    theirs = (torch_attention(slopes)(q, k, v).double() - exact).abs().max()
    y, dq, dk, dv = results(lambda *qkv: m.attention(*qkv, slopes), (q, k, v), [torch.randn(1, 1, 70, 32)])
    assert all(t.isfinite().all() for t in (y, dq, dk, dv))
    assert (y.double() - exact).abs().max() <= 2 * theirs + 1e-3 * exact.abs().max()


def test_attention_never_looks_ahead():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 70, 32)
    y = m.attention(q, k, v, m.alibi_slopes(1))
    for j in (0, 31, 64, 69):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, j], v2[:, :, j] = torch.randn(2, 1, 1, 32)
        same = (m.attention(q, k2, v2, m.alibi_slopes(1)) == y).all(-1)[0, 0]
        assert same[:j].all() and not same[j:].any()


def weights(q, k, slopes, dropout_p, seed):
    """The (B, H, T, T) weights after dropout, read off by columns of an identity for v."""
    B, H, T, D = q.shape
    columns = []
    for part in torch.eye(T).split(D, dim=1):
        v = F.pad(part, (0, D - part.size(1))).expand(B, H, T, D)
        torch.manual_seed(seed)
        columns.append(m.attention(q, k, v, slopes, dropout_p)[..., :part.size(1)])
    return torch.cat(columns, dim=-1)


@pytest.fixture
def other_tiles(monkeypatch):
    def other_tiles(M):
        monkeypatch.setattr(m, "tiles", lambda *_: {name: (M, M, 4, 1) for name in ("fwd", "dq", "dkdv")})
    return other_tiles


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_mask(p, other_tiles):
    """It drops the rate it says, every head and row its own weights, and no tile size changes it."""
    torch.manual_seed(0)
    other_tiles(64)
    q, k = torch.zeros(2, 2, 2, 100, 128)
    causal = torch.ones(100, 100).tril().bool()
    kept = weights(q, k, None, p, seed=3) > 0
    n = 4 * causal.sum()
    dropped = (~kept & causal).sum() / n
    assert abs(dropped - p) < 4 * math.sqrt(p * (1 - p) / n)
    share = (1 - p) ** 2 + p ** 2       # of weights that two independent masks treat alike
    for a, b in ((kept[0, 0], kept[0, 1]), (kept[0, 0], kept[1, 0]), (kept[0, 0, 1:, :-1], kept[0, 0, :-1, :-1]),
                 (kept[0, 0, :, 1:], kept[0, 0, :, :-1]), (kept[0, 0, 8:, :-8], kept[0, 0, :-8, :-8]),
                 (kept[0, 0, 8:, 8:], kept[0, 0, 8:, :-8]), (kept[0, 0, 8:, 8:], kept[0, 0, :-8, :-8]),
                 (kept[0, 0], (weights(q, k, None, p, seed=4) > 0)[0, 0])):
        both = causal[:a.size(0), :a.size(1)].tril(-1)
        assert abs((a == b)[both].float().mean() - share) < 0.02
    other_tiles(32)
    assert torch.equal(weights(q, k, None, p, seed=3) > 0, kept)


@pytest.mark.parametrize("p", [1 / 65536, 0.5])
def test_dropout_backward_uses_the_same_mask(p):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 40, 64)
    slopes, causal = m.alibi_slopes(1), torch.ones(40, 40).tril().bool()
    mask = (weights(q, k, slopes, p, seed=3) != 0) / (1 - round(p * 65536) / 65536)
    assert ((mask > 0) <= causal).all()

    def ours(q, k, v):
        torch.manual_seed(3)
        return m.attention(q, k, v, slopes, p)

    def plain(q, k, v):
        i = torch.arange(40)
        s = q @ k.mT / 8 + slopes.to(q.dtype)[:, None, None] * (i - i[:, None])
        return (torch.softmax(s.masked_fill(~causal, -math.inf), -1) * mask.to(q.dtype)) @ v
    check(ours, plain, plain, (q, k, v), [torch.randn(1, 1, 40, 64)], torch.float32)


# ---- layer_norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 100, 768, 8192])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(C, bias, dtype):
    torch.manual_seed(C)
    x, w = (3 * torch.randn(1, 3, C) + 2).to(dtype), torch.randn(C)
    inputs = (x, w, torch.randn(C)) if bias else (x, w)
    check(m.layer_norm, lambda x, w, b=None: F.layer_norm(x, (C,), w.to(x.dtype), None if b is None else b.to(x.dtype)),
          lambda x, w, b=None: F.layer_norm(x, (C,), w, b), inputs, [torch.randn(1, 3, C)], dtype)


@pytest.mark.parametrize("branch", DTYPES)
@pytest.mark.parametrize("stream", DTYPES)
def test_layer_norm_adds_the_residual(branch, stream):
    """Every mixture of types; the sum is in the wider one, the norm in the branch's."""
    torch.manual_seed(0)
    inputs = (torch.randn(3, 200).to(branch), torch.randn(200), torch.randn(200), torch.randn(3, 200).to(stream))
    wide = torch.promote_types(branch, stream)

    def theirs(x, w, b, r):
        s = x + r
        return F.layer_norm(s.float(), (200,), w, b).to(x.dtype), s

    def exact(x, w, b, r):
        return F.layer_norm(x + r, (200,), w, b), x + r
    narrow = torch.bfloat16 if torch.bfloat16 in (branch, stream) else torch.float32
    ours = lambda x, w, b, r: m.layer_norm(x, w, b, residual=r)     # noqa: E731
    y, s = ours(*inputs)
    assert (y.dtype, s.dtype) == (branch, wide)
    check(ours, theirs, exact, inputs, [torch.randn(3, 200), torch.randn(3, 200)], narrow)


def test_layer_norm_of_extreme_rows():
    x = torch.randn(5, 300)
    x[0], x[1], x[2], x[3] = 0, 1e4, x[2] * 1e4, x[3] * 1e-6
    y, dx, dw, db = results(m.layer_norm, (x, torch.ones(300), torch.zeros(300)), [torch.randn(5, 300)])
    assert all(t.isfinite().all() for t in (y, dx, dw, db))
    torch.testing.assert_close(y, F.layer_norm(x.double(), (300,)).float(), atol=1e-5, rtol=1e-5)


# ---- linear_cross_entropy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V, vocab_size", [(128, 101), (101, 101), (9000, 8500)])
def test_linear_cross_entropy(V, vocab_size, dtype, monkeypatch):
    torch.manual_seed(V)
    x, w = torch.randn(7, 48).to(dtype), (0.3 * torch.randn(V, 48)).to(dtype)
    targets = torch.randint(0, vocab_size, (7,))
    targets[2] = -1
    monkeypatch.setattr(m, "CHUNK", 3 * V)              # three chunks, the last one short

    def loss(x, w, reduction="mean"):
        return F.cross_entropy(F.linear(x, w[:vocab_size]), targets, ignore_index=-1, reduction=reduction)
    check(lambda x, w: m.linear_cross_entropy(x, w, targets, vocab_size=vocab_size), loss, loss, (x, w),
          [torch.randn(())], dtype)
    losses = m.linear_cross_entropy(x, w, targets, "none", vocab_size=vocab_size)
    exact = loss(x.double(), w.double(), "none")
    bound = 2 * (loss(x, w, "none") - exact).abs().max() + EPSILON[dtype] * exact.max()
    assert losses.shape == (7,) and (losses - exact).abs().max() <= bound
    with torch.no_grad():                               # no gradients are computed, the mean is the same
        mean = m.linear_cross_entropy(x, w, targets, vocab_size=vocab_size)
    torch.testing.assert_close(mean, losses.sum() / (targets != -1).sum())


def test_linear_cross_entropy_under_autocast_keeps_the_weight_gradient_in_fp32():
    torch.manual_seed(0)
    x, w = torch.randn(5, 32).bfloat16(), torch.randn(64, 32, requires_grad=True)
    m.linear_cross_entropy(x, w, torch.arange(5)).backward()
    assert w.grad.dtype == torch.float32
    exact = w.detach().double().requires_grad_()
    F.cross_entropy(x.double() @ exact.t(), torch.arange(5)).backward()
    assert (w.grad - exact.grad).abs().max() < 1e-2 * exact.grad.abs().max()


def test_linear_cross_entropy_of_extreme_logits():
    x, w = torch.zeros(4, 16), torch.randn(40, 16)
    x[1], x[2], x[3] = 1e3 * w[5], -1e3 * w[6], 1e4
    targets = torch.tensor([0, 5, 6, -1])
    losses = m.linear_cross_entropy(x, w, targets, "none")
    exact = F.cross_entropy((x.double() @ w.double().t()), targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(losses, exact.float(), rtol=1e-5, atol=1e-5)
    dx, dw = results(lambda x, w: m.linear_cross_entropy(x, w, targets), (x, w), [torch.ones(())])[1:]
    assert dx.isfinite().all() and dw.isfinite().all() and not dx[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])      # the kernels, the reference
def test_losses_without_reduction_have_no_gradient(dtype):
    x, w = torch.randn(4, 8, dtype=dtype, requires_grad=True), torch.randn(5, 8, dtype=dtype, requires_grad=True)
    assert not m.linear_cross_entropy(x, w, torch.arange(4), "none").requires_grad


# ---- the operators in torch, and the model on them


def test_operators_are_registered_as_torch_wants_them():
    """torch.library.opcheck: schema, shapes without data, autograd, and tracing by torch.compile."""
    qkv, y, lse = torch.randn(1, 3, 3 * 1 * 16), torch.zeros(1, 3, 16), torch.zeros(1, 1, 128)
    dropped = m.alibi_slopes(1), torch.tensor([7]), 0.125
    (x, r, y2, s2, dx), w = torch.randn(5, 2, 24), torch.randn(24)
    head, targets = torch.randn(30, 24), torch.randint(0, 30, (2,))
    for op, args in (
            (m.attention_fwd, (qkv, *dropped, y, lse)),
            (m.attention_fwd, (qkv, None, None, 0.0, y, lse)),
            (m.attention_bwd, (qkv, *dropped, y, lse, torch.randn(1, 3, 16), qkv.clone(), lse.clone())),
            (m.layer_norm_fwd, (x, r, w, w, y2, s2, 1e-5)),
            (m.layer_norm_fwd, (x, None, w, None, y2, None, 1e-5)),
            (m.layer_norm_bwd, (y2, x, w, r, dx, s2, torch.zeros(2, 2, 24), 1e-5)),
            (m.lce, (x, head, targets, -1, 28, torch.zeros(2), dx, torch.zeros(30, 24))),
            (m.lce, (x, head, targets, -1, 28, torch.zeros(2), None, None))):
        torch.library.opcheck(op, args)


def test_gradients_that_are_views_are_read_by_their_strides():
    qkv, x, w = torch.randn(1, 8, 96, requires_grad=True), torch.randn(3, 16, requires_grad=True), torch.randn(16)
    for op, t in ((lambda: m.attention_qkv(qkv, 1), qkv), (lambda: m.layer_norm(x, w), x)):
        y = op()
        grads = [torch.autograd.grad(op(), t, g)[0] for g in (torch.ones(()).expand(y.shape), torch.ones(y.shape))]
        assert torch.equal(*grads)


def small(dropout=0.0, **shape):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=70, n_layer=1, n_head=2, n_embd=32, dropout=dropout, **shape))


@pytest.mark.parametrize("shape", [dict(pos="alibi", bias=False), dict(pos="learned")])
def test_the_model_compiles_without_a_graph_break(shape):
    model, idx = small(**shape), torch.randint(0, 70, (1, 5))
    loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    again = compiled(idx[:, :-1], idx[:, 1:])
    again.backward()
    torch.testing.assert_close(again, loss)
    for p, g in zip(model.parameters(), grads):
        torch.testing.assert_close(p.grad, g, atol=1e-5, rtol=1e-4)


def test_dropout_repeats_with_torchs_seed():
    model, idx = small(0.2, pos="alibi"), torch.randint(0, 70, (1, 5))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(idx[:, :-1], idx[:, 1:]).item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("bf16, steps", [(False, 20), (True, 5)])
def test_training_is_the_same_with_kernels_and_references(bf16, steps, monkeypatch):
    """Steps of AdamW on the same batches."""
    idx, curves = torch.randint(0, 70, (steps, 1, 4)), []
    for use_kernels in (m.use_kernels, lambda x: False):
        monkeypatch.setattr(m, "use_kernels", use_kernels)
        model, losses = small(pos="alibi", bias=False), []
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for rows in idx:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                loss = model(rows[:, :-1], rows[:, 1:])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    torch.testing.assert_close(*curves, atol=2e-2 if bf16 else 1e-5, rtol=0)
    assert curves[0].std() > 1e-2       # it did learn something


def test_heads_too_wide_are_refused():
    q = torch.zeros(1, 1, 4, 160)
    with pytest.raises(m.ModelError, match="160 channels.*128"):
        m.attention(q, q, q)
