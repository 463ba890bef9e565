"""grow.py: the function stays, copies part, and nothing is written that is not exact."""
from copy import deepcopy
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grow as g
import model as m
from model import GPT, GPTConfig, ModelError
from prepare import get_tokenizer


def tiny(seed=0, **config):
    """A GPT in float64 whose every entry is random, as after training: norms and biases too."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=67, n_layer=2, n_head=2, n_embd=16), **config})).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
        model.wte.weight[model.config.vocab_size:] = 0
    return model.eval()


def grown(model, depth="identity", **size):
    """model made larger, in float64."""
    new, model = replace(model.config, **size), deepcopy(model)
    silent = g.deepen(model, depth, new.n_layer)
    return m.build(asdict(new), dict(g.grow_weights(model, new, silent)), "grown").eval()


def tokens(seed=0, B=2, T=16):
    return torch.randint(67, (B, T), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pos=st.sampled_from(("learned", "alibi")), bias=st.booleans(), D=st.integers(2, 5), n_head=st.integers(1, 6),
       wider=st.integers(1, 3), more=st.integers(0, 7), n_layer=st.integers(1, 3), layers=st.integers(0, 3),
       block_size=st.sampled_from((16, 24)))
def test_growth_keeps_the_function(pos, bias, D, n_head, wider, more, n_layer, layers, block_size):
    model = tiny(pos=pos, bias=bias, n_head=n_head, n_embd=D * n_head, n_layer=n_layer)
    N = wider * D * (n_head + more)
    larger = grown(model, n_head=n_head + more, n_embd=N, n_layer=n_layer + layers, block_size=block_size)
    with torch.no_grad():
        logits = model(tokens())
        assert (larger(tokens()) - logits).abs().max() < 1e-10 < logits.abs().max()
    assert len(larger.h) == n_layer + layers and larger.wte.weight.shape == (128, N)


KINDS = {   # from 3 layers, 4 heads, width 16
    "heads": dict(n_head=8, n_embd=32),
    "some heads": dict(n_head=5, n_embd=20),
    "wider heads": dict(n_head=4, n_embd=32),
    "3 times wider heads": dict(n_head=4, n_embd=48),
    "more and wider heads": dict(n_head=5, n_embd=40),
    "identity": dict(n_layer=5),
    "adjacent": dict(n_layer=5, depth="adjacent"),
    "stack": dict(n_layer=5, depth="stack"),
    "context": dict(block_size=24),
    "all": dict(n_head=6, n_embd=48, n_layer=5, block_size=24),
    "all, adjacent": dict(n_head=6, n_embd=48, n_layer=5, block_size=24, depth="adjacent"),
}


def closest(x):
    """The distance of the two closest rows of x (n, d)."""
    distance = (x[:, None] - x).square().sum(-1).sqrt()
    return distance.fill_diagonal_(torch.inf).min()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pos", ["learned", "alibi"])
def test_every_weight_learns_and_all_copies_part(pos, kind):
    model = grown(tiny(pos=pos, n_layer=3, n_head=4), **KINDS[kind]).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(5):
        rows = tokens(step, B=4, T=model.config.block_size + 1)
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    after = {name: p.detach() for name, p in model.named_parameters()}
    after["wte.weight"] = after["wte.weight"][:67]      # the others are padding
    for name in [name for name in after if name.endswith("c_attn.bias")]:
        after[name] = after[name].view(3, -1)[::2]      # softmax does not see the bias of k
        before[name] = before[name].view(3, -1)[::2]
    for name, p in after.items():
        assert (p != before[name][:len(p)]).all(), name
        if p.dim() == 1:
            assert closest(p[:, None]) > 1e-9, name
        elif not name.endswith("bias"):
            assert min(closest(p), closest(p.t())) > 1e-6, name
        else:
            assert min(closest(part[:, None]) for part in p) > 1e-9, name
    for kind in {name.split(".", 2)[2] for name in after if name.startswith("h.")}:
        assert closest(torch.stack([after[f"h.{j}.{kind}"].flatten() for j in range(len(model.h))])) > 1e-6, kind


@pytest.mark.parametrize("n_head", [2, 4])
def test_rounding_does_not_grow_from_layer_to_layer(n_head):
    """Copies of a channel must stay equal to the last bit, or the noise that parts readers feeds on their difference."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=67, n_layer=36, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        larger = grown(model, n_head=n_head, n_embd=32).float()
        exact, rounded = model.double()(tokens()), larger(tokens())
    assert (rounded - exact).abs().max() < 1e-4 * exact.abs().max()


def test_layers_of_the_papers():
    assert g.layer_map("adjacent", 18, 36) == [i for i in range(18) for _ in range(2)]
    doubled = [i for i in range(18) if g.layer_map("adjacent", 18, 24).count(i) == 2]
    assert doubled == [0, 3, 6, 9, 12, 15] and len(g.layer_map("adjacent", 18, 24)) == 24
    assert g.layer_map("stack", 3, 6) == [0, 1, 2, 0, 1, 2]
    assert g.layer_map("stack", 32, 48) == [*range(24), *range(8, 32)]          # SOLAR 10.7B
    assert g.layer_map("stack", 4, 10) == [0, 1, 2, 0, 1, 2, 3, 1, 2, 3]
    assert g.layer_map("stack", 4, 4) == g.layer_map("identity", 4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("depth", ["adjacent", "stack"])
def test_a_deeper_model_runs_the_old_layers_in_that_order(depth):
    model = tiny(n_layer=3)
    deeper = grown(model, depth, n_layer=5, n_embd=32, n_head=4)
    x, branch = model.wte(tokens()) + model.wpe.weight, None
    for j in g.layer_map(depth, 3, 5):
        x, branch = model.h[j](x, branch, model.slopes)
    assert torch.allclose(deeper(tokens()), model.ln_f(x + branch) @ model.wte.weight[:67].t(), atol=1e-12)


# ---------------------------------------------------------------------------------------------
# The command


@pytest.mark.parametrize("depth", ["identity", "adjacent", "stack"])
def test_the_command(depth, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny(vocab_size=257).float()
    m.save("a.pt", model, tokenizer="bytes", data="data/x", fingerprint="f", step=3, tokens=4, flops=5, val_loss=6.0)
    g.main(["a.pt", "b.pt", "--n_layer=3", "--n_embd=40", "--block_size=24", f"--depth={depth}"])
    g.main(["b.pt", "c.pt", "--n_layer=4"])
    assert f"{model.flops_per_token(16) / 1e6:,.1f} MFLOPs per token" in capsys.readouterr().out
    b, meta = m.load("b.pt")
    assert b.config == replace(model.config, n_layer=3, n_embd=40, n_head=5, block_size=24)
    assert {key: meta[key] for key in ("tokenizer", "data", "fingerprint", "step", "tokens", "flops")} == dict(
        tokenizer="bytes", data="data/x", fingerprint="f", step=0, tokens=0, flops=0)
    assert "val_loss" not in meta           # it is not known
    c, meta = m.load("c.pt")
    a, b = meta["lineage"]
    assert (a["from"], a["step"], a["tokens"], a["flops"], a["val_loss"], b["from"]) == ("a.pt", 3, 4, 5, 6.0, "b.pt")
    assert "n_layer 2 to 3" in a["how"] and depth in a["how"] and "n_embd 16 to 40" in a["how"]
    if depth == "identity":
        idx = torch.randint(257, (2, 16))
        assert (c(idx) - model(idx)).abs().max() < 1e-4
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.pt", "b.pt", "c.pt"]


def test_grow_then_train(workspace, run, monkeypatch):
    monkeypatch.chdir(workspace)
    m.save("a.pt", tiny(vocab_size=257, block_size=32).float(), tokenizer="bytes", data="data/tiny")
    g.main(["a.pt", "out/b.pt", "--n_embd=32"])
    result = run("train.py", "configs/tiny.py", "--init_from=out/b.pt", "--n_head=4", "--max_steps=2", cwd=workspace)
    assert result.returncode == 0, result.stderr
    trained, meta = m.load("out/tiny.pt")
    assert trained.config.n_embd == 32 and [parent["from"] for parent in meta["lineage"]] == ["a.pt", "out/b.pt"]


def test_a_hugging_face_folder_is_a_source(tmp_path, monkeypatch):
    """It has a tokenizer, but no history."""
    monkeypatch.chdir(tmp_path)
    model = tiny(vocab_size=257).float()
    m.export(model, "hf", get_tokenizer("bytes"))
    g.main(["hf", "b.pt", "--n_layer=3", "--n_embd=32"])
    larger, meta = m.load("b.pt")
    assert meta["tokenizer"] == "bytes" and meta["lineage"] == [{"from": "hf", "how": meta["lineage"][0]["how"]}]
    with torch.no_grad():
        torch.testing.assert_close(larger(tokens()), model(tokens()), rtol=0, atol=1e-4)


def test_bad_input_writes_nothing(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    m.save("a.pt", tiny(vocab_size=257).float(), tokenizer="bytes")
    m.atomic_save({"weights": 1}, "odd.pt")
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def line(*words):
        with pytest.raises(ModelError) as e:
            g.main(list(words))
        assert "\n" not in str(e.value)
        return str(e.value)
    assert "n_embd=8" in refused("grow.py", "a.pt", "c.pt", "--n_embd=8", cwd=tmp_path)
    assert "odd.pt" in line("odd.pt", "c.pt", "--n_layer=6")
    assert "--n_embd=8" in line("a.pt", "c.pt", "--n_layer=6", "--n_embd=8")
    assert "--n_head=2" in line("a.pt", "c.pt", "--n_embd=24", "--n_head=2")
    assert "n_embd=20" in line("a.pt", "c.pt", "--n_embd=20")
    assert "--n_layer" in line("a.pt", "c.pt")
    assert "odd.pt" in line("a.pt", "odd.pt", "--n_layer=6")
    assert "--seed" in line("a.pt", "c.pt", "--n_layer=6", f"--seed={10**20}")
    assert "nan" in line("a.pt", "c.pt", "--n_embd=32", "--noise=nan")
    rules = g.rules
    for depth in ("identity", "adjacent"):      # without its rule, ln_f makes the tied head see the stream k s^2 times
        monkeypatch.setattr(g, "rules", lambda *args: {**rules(*args), "ln_f.weight": rules(*args)["ln_1.weight"]})
        assert "function" in line("a.pt", "c.pt", "--n_embd=32", "--n_layer=3", f"--depth={depth}")
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    monkeypatch.setattr(g, "rules", rules)
    g.main(["a.pt", "odd.pt", "--n_layer=6", "--force"])
    assert m.load("odd.pt")[0].config.n_layer == 6
