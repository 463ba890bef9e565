import re

import numpy as np
import pytest
import torch

import grow as g
import model as m
from grow import GrowError
from model import GPT, GPTConfig


def tiny(n_layer=3, **config):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(block_size=32, vocab_size=257, n_layer=n_layer, n_head=2, n_embd=16), **config}))


def test_layers_of_the_reports():
    assert g.sources(18, 36) == [i for i in range(18) for _ in range(2)]
    doubled = [i for i in range(18) if g.sources(18, 24).count(i) == 2]
    assert doubled == [0, 3, 6, 9, 12, 15] and len(g.sources(18, 24)) == 24
    assert g.sources(4, 4) == [0, 1, 2, 3]


@pytest.mark.parametrize("form", [dict(pos="alibi", bias=False), dict(pos="learned", bias=True)])
@pytest.mark.parametrize("n_layer", [3, 5, 6])
def test_each_layer_is_a_copy_that_can_part(form, n_layer):
    model = tiny(**form)
    grown = g.deepen(model, n_layer)
    assert grown.config.n_layer == n_layer and len(grown.h) == n_layer
    for j in range(n_layer):
        old = model.h[j * 3 // n_layer].state_dict()
        assert all(torch.equal(p, old[name]) for name, p in grown.h[j].state_dict().items())
    for name in ("wte.weight", "ln_f.weight"):
        assert torch.equal(grown.state_dict()[name], model.state_dict()[name])
    pointers = [p.data_ptr() for p in [*grown.parameters(), *model.parameters()]]
    assert len(set(pointers)) == len(pointers)

    idx = torch.randint(0, 257, (2, 32))        # the same function, by running the old blocks in that order
    x, branch = model.eval().wte(idx) + (model.wpe.weight if form["pos"] == "learned" else 0), None
    for j in range(n_layer):
        x, branch = model.h[j * 3 // n_layer](x, branch, model.slopes)
    assert torch.equal(grown(idx), model.ln_f(x + branch) @ model.wte.weight[:257].t())


def test_fewer_layers_are_refused():
    with pytest.raises(GrowError, match="smaller than the source's 3"):
        g.deepen(tiny(), 2)


def mean_loss(model, path):
    tokens = torch.from_numpy(np.fromfile(path, dtype="<u2").astype("int64"))
    losses = [model(tokens[None, i:i + 32], tokens[None, i + 1:i + 33]).item() for i in range(0, len(tokens) - 32, 32)]
    return sum(losses) / len(losses)


def test_grow_then_train_then_evaluate(workspace, run):
    assert run("train.py", "configs/tiny.py", cwd=workspace).returncode == 0
    result = run("grow.py", "out/tiny.pt", "out/grown-init.pt", "--n_layer=5", cwd=workspace)
    assert result.returncode == 0, result.stderr
    source, meta = m.load(str(workspace / "out/tiny.pt"))
    grown, grown_meta = m.load(str(workspace / "out/grown-init.pt"))
    printed = [float(x) for x in re.findall(r"val loss (\S+)", result.stdout)]
    val = workspace / "data/tiny/val.bin"
    assert printed == pytest.approx([mean_loss(source, val), mean_loss(grown, val)], abs=1e-4)
    assert "2 layers" in result.stdout and "5 layers" in result.stdout
    (parent,) = grown_meta["lineage"]
    assert parent["from"] == "out/tiny.pt" and "2 to 5" in parent["how"] and parent["tokens"] == meta["tokens"]

    result = run("train.py", "configs/tiny.py", "--init_from=out/grown-init.pt", "--n_layer=5", "--out_dir=out/grown",
                 cwd=workspace)
    assert result.returncode == 0, result.stderr
    trained, trained_meta = m.load(str(workspace / "out/grown/tiny.pt"))
    assert trained.config.n_layer == 5 and trained_meta["lineage"][0] == parent
    assert trained_meta["lineage"][1]["from"] == "out/grown-init.pt"
    assert mean_loss(trained, val) < printed[1]
    result = run("eval.py", "--ckpt", "out/tiny.pt", "out/grown/tiny.pt", cwd=workspace)
    assert result.returncode == 0 and result.stdout.count("out/") == 2


def test_bad_input_writes_nothing(workspace, refused, run):
    out = workspace / "out"
    m.save(str(out / "a.pt"), tiny(), tokenizer="bytes", data="data/tiny")
    m.save(str(out / "b.pt"), tiny(), tokenizer="bytes")
    before = {f.name: f.read_bytes() for f in out.iterdir()}

    def line(*words):
        return refused("grow.py", *words, cwd=workspace)
    assert "did you mean --n_layer?" in line("out/a.pt", "out/c.pt", "--n_layer=6", "--n_layers=6")
    assert "smaller" in line("out/a.pt", "out/c.pt", "--n_layer=2")
    assert "out/b.pt exists; pass --force" in line("out/a.pt", "out/b.pt", "--n_layer=6")
    assert "no such checkpoint" in line("out/none.pt", "out/c.pt", "--n_layer=6")
    assert "not a checkpoint" in line("configs/tiny.py", "out/c.pt", "--n_layer=6")
    assert "--data" in line("out/b.pt", "out/c.pt", "--n_layer=6")
    assert "no such bin" in line("out/b.pt", "out/c.pt", "--n_layer=6", "--data=data/none")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert run("grow.py", "out/a.pt", "out/b.pt", "--n_layer=6", "--force", cwd=workspace).returncode == 0
    assert m.load(str(out / "b.pt"))[0].config.n_layer == 6
