import re
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grow as g
import model as m
import train as t
from grow import GrowError
from model import GPT, GPTConfig, ModelError
from prepare import DataError


def tiny(seed=0, **config):
    """A GPT in float64 whose every entry is random, as after training: norms and biases too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=67, n_layer=2, n_head=2, n_embd=16), **config})).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.wte.weight[model.config.vocab_size:] = 0
    return model.eval()


def grown(model, depth="identity", noise=g.NOISE, **size):
    """model made larger, in float64, as plain weights in a plain GPT."""
    new = replace(model.config, **size)
    return m.build(new, dict(g.grow_weights(model, new, depth, noise)), "grown").eval()


def tokens(seed=0, B=2, T=16):
    return torch.randint(67, (B, T), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------
# Width and depth


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pos=st.sampled_from(("learned", "alibi")), bias=st.booleans(), head=st.integers(2, 5), n_head=st.integers(1, 6),
       m_=st.integers(1, 3), more=st.integers(0, 7), n_layer=st.integers(1, 3), layers=st.integers(0, 3),
       block_size=st.sampled_from((16, 24)))
def test_growth_keeps_the_function(pos, bias, head, n_head, m_, more, n_layer, layers, block_size):
    model = tiny(pos=pos, bias=bias, n_head=n_head, n_embd=head * n_head, n_layer=n_layer)
    larger = grown(model, n_head=n_head + more, n_embd=m_ * head * (n_head + more), n_layer=n_layer + layers,
                   block_size=block_size)
    idx = tokens()
    with torch.no_grad():
        logits = model(idx)
        assert (larger(idx) - logits).abs().max() < 1e-10 < logits.abs().max()
    assert len(larger.h) == n_layer + layers and larger.wte.weight.shape == (128, m_ * head * (n_head + more))


@pytest.mark.parametrize("old, new", [(dict(n_head=12, n_embd=48), dict(n_head=16, n_embd=64)),        # 768 to 1024
                                      (dict(n_head=4, n_embd=16), dict(n_head=4, n_embd=32)),
                                      (dict(n_head=4, n_embd=16), dict(n_head=8, n_embd=32))])
@pytest.mark.parametrize("pos", ["learned", "alibi"])
def test_every_weight_learns_and_copies_part(pos, old, new):
    model = grown(tiny(pos=pos, bias=pos == "learned", **old), n_layer=3, **new).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for step in range(5):
        rows = tokens(step, T=17)
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        stuck = (p == before[name])[:67] if name == "wte.weight" else p == before[name]
        assert not stuck.any(), name
    C = old["n_embd"]
    twins = torch.arange(new["n_embd"] - C)     # channel i + C began as a copy of channel i
    channels = model.wte.weight[:67].t()
    assert (channels[twins] - channels[twins + C]).abs().max(dim=1).values.min() > 1e-6


def test_rounding_does_not_grow_from_layer_to_layer():
    """Copies of a channel must stay equal to the last bit, or the noise that parts readers feeds on their difference."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=67, n_layer=36, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        larger = grown(model, n_head=4, n_embd=32).float()
        exact, rounded = model.double()(tokens()), larger(tokens())
    assert (rounded - exact).abs().max() < 1e-4 * exact.abs().max()


def test_layers_of_the_reports():
    assert g.sources("adjacent", 18, 36) == [i for i in range(18) for _ in range(2)]
    doubled = [i for i in range(18) if g.sources("adjacent", 18, 24).count(i) == 2]
    assert doubled == [0, 3, 6, 9, 12, 15] and len(g.sources("adjacent", 18, 24)) == 24
    assert g.sources("stack", 3, 6) == [0, 1, 2, 0, 1, 2]
    assert g.sources("stack", 32, 48) == [*range(24), *range(8, 32)]           # SOLAR 10.7B
    assert g.sources("stack", 4, 10) == [0, 1, 2, 0, 1, 2, 3, 1, 2, 3]
    assert g.sources("middle", 4, 8) == [0, 1, 2, 1, 2, 1, 2, 3]
    for depth in g.DEPTH:
        assert g.sources(depth, 4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("depth", ["adjacent", "stack", "middle"])
@pytest.mark.parametrize("pos", ["learned", "alibi"])
def test_a_deeper_model_runs_the_old_layers_in_that_order(pos, depth):
    model = tiny(pos=pos, bias=pos == "learned", n_layer=3)
    deeper = grown(model, depth, n_layer=5)
    idx = tokens()
    x, branch = model.wte(idx) + (model.wpe.weight if pos == "learned" else 0), None
    for j in g.sources(depth, 3, 5):
        x, branch = model.h[j](x, branch, model.slopes)
    assert torch.allclose(deeper(idx), model.ln_f(x + branch) @ model.wte.weight[:67].t(), atol=1e-12)
    pointers = [p.data_ptr() for p in [*deeper.parameters(), *model.parameters()]]
    assert len(set(pointers)) == len(pointers)          # copies can part


def test_head_size_that_is_no_multiple():
    with pytest.raises(GrowError, match="n_head=2: heads of 12 .* multiple of the source's 8; n_head can be 3"):
        grown(tiny(), n_embd=24)
    with pytest.raises(GrowError, match="change n_embd"):
        grown(tiny(), n_embd=20)


# ---------------------------------------------------------------------------------------------
# The optimizer


def descend(model, optimizer, steps):
    """Training steps as train.py makes them, without noise of any kind."""
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["lr_scale"]
        t.train_step(model, optimizer, tokens(step, B=4, T=17), 2, nullcontext(), 0.0,
                     torch.amp.GradScaler("cpu", enabled=False))


@pytest.mark.parametrize("bias, k", [(True, 2), (False, 2), (True, 3)])
def test_grown_optimizer_follows_the_sources_trajectory(bias, k):
    model, config = tiny(bias=bias), t.Config(weight_decay=0.1)
    optimizer = t.make_optimizer(model, config)
    descend(model, optimizer, range(5))
    larger = grown(model, noise=0, n_embd=16 * k, n_head=2 * k)
    state = g.grow_optimizer(optimizer.state_dict(), model.config, larger.config, "identity")
    optimizers = {}
    for name, settings_ in (("grown", state["settings"]), ("fresh", None)):
        copy = m.build(larger.config, {key: p.clone() for key, p in larger.state_dict().items()}, "copy")
        optimizers[name] = copy, t.make_optimizer(copy, config, settings_)
    t.load_moments(optimizers["grown"][1], state["moments"])
    start = model(tokens())
    for each in ((model, optimizer), *optimizers.values()):
        descend(*each, range(5, 15))
    logits = model(tokens())
    change = {name: (each(tokens()) - logits).abs().max() for name, (each, _) in optimizers.items()}
    assert change["grown"] < 1e-9 and change["fresh"] > 0.1 and (logits - start).abs().max() > 0.1


def test_new_entries_of_the_optimizer_have_no_momentum_and_a_mean_variance():
    model = tiny(bias=False)
    optimizer = t.make_optimizer(model, t.Config())
    descend(model, optimizer, range(3))
    new = replace(model.config, n_embd=24, n_head=3, n_layer=3)
    state = g.grow_optimizer(optimizer.state_dict(), model.config, new, "identity")["moments"]
    old = {name: optimizer.state[p] for name, p in model.named_parameters()}
    norm = state["h.0.ln_1.weight"]
    assert torch.equal(norm["exp_avg"][16:], torch.zeros(8))
    assert torch.allclose(norm["exp_avg_sq"][16:], norm["exp_avg_sq"][:16].mean())
    assert norm["step"] == 3
    # s = sqrt(24 / 16): a norm's weight is 1 / s as large, so its gradient is s times as large
    assert torch.allclose(norm["exp_avg"][:16], old["h.0.ln_1.weight"]["exp_avg"] * 1.5 ** 0.5)
    added = state["h.1.mlp.c_fc.weight"]        # of 2 to 3 layers, 0 comes twice
    assert not added["exp_avg"].any() and (added["exp_avg_sq"] > 0).all()
    assert state["h.2.mlp.c_fc.weight"]["exp_avg"].any()


# ---------------------------------------------------------------------------------------------
# The command


def mean_loss(model, path):
    stream = torch.from_numpy(np.fromfile(path, dtype="<u2").astype("int64"))
    losses = [model(stream[None, i:i + 32], stream[None, i + 1:i + 33]).item() for i in range(0, len(stream) - 32, 32)]
    return sum(losses) / len(losses)


def test_grow_then_train_then_evaluate(workspace, run):
    assert run("train.py", "configs/tiny.py", cwd=workspace).returncode == 0
    words = ("out/tiny.pt", "out/grown-init.pt", "--n_layer=5", "--n_embd=48", "--depth=identity")
    result = run("grow.py", *words, cwd=workspace)
    assert result.returncode == 0, result.stderr
    source, meta = m.load(str(workspace / "out/tiny.pt"))
    larger, larger_meta = m.load(str(workspace / "out/grown-init.pt"))
    val, idx = workspace / "data/tiny/val.bin", torch.randint(257, (2, 32))
    assert (larger(idx) - source(idx)).abs().max() < 1e-4
    printed = [float(x) for x in re.findall(r"val loss (\S+)", result.stdout)]
    assert printed == pytest.approx([mean_loss(source, val), mean_loss(larger, val)], abs=1e-4)
    exact, rounded = map(float, re.search(r"float64 (\S+), weights rounded to fp32 (\S+),", result.stdout).groups())
    assert exact < 1e-10 < rounded < 1e-4 and "IDENTICAL" not in result.stdout
    for model in (source, larger):
        assert f"{model.num_params() / 1e6:.1f}M parameters, {model.flops_per_token(32) / 1e6:,.1f} MF" in result.stdout
    (parent,) = larger_meta["lineage"]
    assert parent["from"] == "out/tiny.pt" and "n_layer 2 to 5 (identity), n_embd 32 to 48" in parent["how"]
    assert parent["flops"] == meta["tokens"] * source.flops_per_token(32) == meta["flops"] > 0

    # the optimizer comes along; and a run that is stopped and goes on ends where one left alone ends
    start = ("configs/tiny.py", "--init_from=out/grown-init.pt", "--n_layer=5", "--n_embd=48", "--n_head=3",
             "--schedule=constant")
    for out, steps in (("a", 3), ("a", 6), ("b", 6)):
        result = run("train.py", *start, f"--out_dir=out/{out}", f"--max_steps={steps}", cwd=workspace)
        assert result.returncode == 0, result.stderr
    assert re.search(r"(?m)^comes from out/tiny.pt: n_layer 2 to 5 .* tokens, .* FLOPs$", result.stdout)
    assert re.search(r"(?m)^comes from out/grown-init.pt$", result.stdout)
    assert "out/grown-init.optimizer.pt: AdamW goes on from it" in result.stdout
    a, b = (m.load_pickle(str(workspace / f"out/{out}/tiny.state.pt")) for out in "ab")
    assert all(torch.equal(p, b["model"][name]) for name, p in a["model"].items())
    steps = {float(own["step"]) for own in a["optimizer"]["state"].values()}
    assert steps == {12.0} and len(a["optimizer"]["param_groups"]) > 2         # 6 of the source, 6 of its own
    trained, trained_meta = m.load(str(workspace / "out/b/tiny.pt"))
    assert trained_meta["lineage"][0] == parent and trained_meta["lineage"][1]["from"] == "out/grown-init.pt"
    assert mean_loss(trained, val) < printed[1]
    result = run("eval.py", "--ckpt", "out/tiny.pt", "out/b/tiny.pt", "--tasks=none", cwd=workspace)
    assert result.returncode == 0 and result.stdout.count("out/") == 2


def test_copies_that_nothing_parts_are_found_out(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    m.save("out/a.pt", tiny(vocab_size=257), tokenizer="bytes", data="data/tiny")
    for noise, still in (("0.5", False), ("0", True)):
        g.main(["out/a.pt", "out/b.pt", "--n_embd=32", f"--noise={noise}", "--force"])
        assert ("STILL IDENTICAL" in capsys.readouterr().out) == still


def test_bad_input_writes_nothing(workspace, refused, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    model = tiny(vocab_size=257)
    m.save("out/a.pt", model, tokenizer="bytes", data="data/tiny")
    m.save("out/b.pt", model, tokenizer="bytes")
    m.atomic_save({"weights": 1}, "out/odd.pt")
    m.atomic_save(dict(config=dict(optimizer="adamw"), model={}, optimizer={}, step=1), "out/b.state.pt")
    before = {f.name: f.read_bytes() for f in (workspace / "out").iterdir()}

    def line(*words):
        with pytest.raises((GrowError, DataError, ModelError)) as e:
            g.main(list(words))
        assert "\n" not in str(e.value)
        return str(e.value)
    assert "did you mean --n_layer?" in refused("grow.py", "out/a.pt", "out/c.pt", "--n_layers=6", cwd=workspace)
    assert "out/odd.pt: not a checkpoint" in refused("grow.py", "out/odd.pt", "out/c.pt", "--n_layer=6", cwd=workspace)
    assert "--n_embd=8: smaller than the source's 16" in line("out/a.pt", "out/c.pt", "--n_layer=6", "--n_embd=8")
    assert "heads of 12 channels" in line("out/a.pt", "out/c.pt", "--n_embd=24", "--n_head=2")
    assert "nothing to grow" in line("out/a.pt", "out/c.pt")
    assert "out/b.pt exists; pass --force" in line("out/a.pt", "out/b.pt", "--n_layer=6")
    assert "pass --fresh_optimizer" in line("out/b.pt", "out/c.pt", "--n_layer=6")
    assert "no such bin" in line("out/a.pt", "out/c.pt", "--n_layer=6", "--data=data/none")
    assert {f.name: f.read_bytes() for f in (workspace / "out").iterdir()} == before
    g.main(["out/b.pt", "out/a.pt", "--n_layer=6", "--fresh_optimizer", "--force"])
    assert "random tokens" in capsys.readouterr().out
    assert m.load("out/a.pt")[0].config.n_layer == 6


def test_a_growth_that_is_not_exact_is_refused(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    m.save("out/a.pt", tiny(vocab_size=257), tokenizer="bytes", data="data/tiny")
    rules = g.rules

    def forgetful(old, new):        # the last norm is left as it was: the tied head then sees the stream k s^2 times
        return {**rules(old, new), "ln_f.weight": rules(old, new)["ln_1.weight"]}
    monkeypatch.setattr(g, "rules", forgetful)
    with pytest.raises(GrowError, match="the function changed by .* nothing was written"):
        g.main(["out/a.pt", "out/c.pt", "--n_embd=32"])
    assert [f.name for f in (workspace / "out").iterdir()] == ["a.pt"]
