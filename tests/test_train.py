import copy
import functools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, write_corpus
from functorch.compile import min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.optimization import Adafactor

import model as m
import prepare
import train as t
from model import GPT, GPTConfig
from train import (Config, Loader, TrainError, apportion, configure, cut, learning_rate, make_optimizer, spread,
                   train_step)

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
TINY_GPT = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32)
MACHINE = ("tokens_per_second", "mfu", "bytes_held", "left")


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(path):
    """The log without its header and without what depends on the machine."""
    return [{k: v for k, v in r.items() if k not in MACHINE} for r in records(path)[1:]]


def state_of(folder, name="tiny.state.pt"):
    return torch.load(folder / name, weights_only=True)


def same(a, b):
    """Whether two nested structures of tensors and numbers are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def same_end(a, b):
    """Whether two runs ended with the same log, weights and optimizer state, bit for bit."""
    return curve(a / "tiny.jsonl") == curve(b / "tiny.jsonl") and all(
        same(state_of(a)[key], state_of(b)[key]) for key in ("model", "optimizers", "progress"))


@pytest.fixture
def train(workspace, monkeypatch, capsys):
    """train("--key=value", ...) runs configs/tiny.py in this process and returns what it printed."""
    monkeypatch.chdir(workspace)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def train(*words, config="configs/tiny.py"):
        capsys.readouterr()
        t.start([config, *words])
        return capsys.readouterr().out
    yield train
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def torchrun(workspace):
    """torchrun(processes, "--key=value", ...) -> Popen of configs/tiny.py under torchrun."""
    def torchrun(processes, *words, launcher=()):
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", *launcher,
                                 f"--nproc_per_node={processes}", str(ROOT / "train.py"), "configs/tiny.py", *words],
                                cwd=workspace, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return torchrun


def ended(process):
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def at_step(step, action, monkeypatch):
    """Do action when the run in this process comes to its step-th step."""
    real, calls = t.train_step, []

    def wrapped(*args):
        calls.append(1)
        if len(calls) == step:
            action()
        return real(*args)
    monkeypatch.setattr(t, "train_step", wrapped)


# ---- configuration


def config_file(tmp_path, text=TINY):
    path = tmp_path / "tiny.py"
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_file_over_defaults(tmp_path):
    path = config_file(tmp_path, "import math\nfrom pathlib import Path\n" + TINY)      # imports are no keys
    config, given, name = configure([path, "--learning_rate=3e-3", "--compile", "true", "--max_steps=1e3",
                                     "--max_epochs", "2", "--init_from=12", "--out_dir=~/x", "--dropout", "0"])
    assert name == "tiny" and "learning_rate" in given and "beta1" not in given
    assert config.learning_rate == 3e-3 and config.compile is True and config.max_epochs == 2.0
    assert config.max_steps == 1000 and type(config.max_steps) is int
    assert config.init_from == "12" and config.n_embd == 32 and config.beta1 == Config().beta1
    assert config.out_dir == os.path.expanduser("~/x") and config.dropout == 0
    assert configure([path, "--max_epochs=1", "--max_steps=none"])[0].max_steps is None
    mixed = config_file(tmp_path, TINY + "data = {'~/a': 1, 'b': 0.5}")
    assert configure([mixed])[0].data == {os.path.expanduser("~/a"): 1, "b": 0.5}


@pytest.mark.parametrize("words, parts", [
    ("--n_layers=3", ["n_layers", "n_layer?"]), ("--xyzzy 3", ["xyzzy"]), ("--n_layer=three", ["n_layer", "'three'", "int"]),
    ("--n_layer 2.5", ["n_layer", "int"]), ("--n_layer=none", ["n_layer"]), ("--bias=maybe", ["bias", "bool"]),
    ("--bias", ["bias", "bool"]), ("--learning_rate=nan", ["learning_rate", "nan"]), ("--min_lr=inf", ["min_lr", "inf"]),
    ("--max_steps=inf", ["max_steps", "inf"]), ("--seed=4294967296", ["seed"]), ("--seed=1e400", ["seed"]),
    ("--n_layer=0", ["n_layer"]), ("--micro_batch_size=0", ["micro_batch_size"]), ("--max_tokens=0", ["max_tokens"]),
    ("--learning_rate=0", ["learning_rate"]), ("--weight_decay=-1", ["weight_decay"]),
    ("--optimizer=sgd", ["optimizer", "adamw or adafactor or muon"]), ("--n_embd=33", ["n_embd=33", "n_head=2"]),
    ("--pos=rotary", ["pos"]), ("--max_steps=none", ["max_steps, max_tokens or max_epochs"]), ("--data=", ["data"]),
    ("--batch_size=8 --micro_batch_size=3", ["batch_size", "micro_batch_size 3"]), ("--dropout=1.5", ["dropout"]),
    ("--beta2=1", ["beta2"]), ("--adamw_lr=1e-3", ["adamw_lr", "muon"])])
def test_wrong_words_are_refused_by_name(words, parts, tmp_path):
    with pytest.raises((TrainError, m.ModelError)) as e:
        configure([config_file(tmp_path), *words.split()])
    assert all(part in str(e.value) for part in parts) and "\n" not in str(e.value)


@pytest.mark.parametrize("text, parts", [
    ("n_layers = 3", ["n_layers", "n_layer?"]), ("n_layer = [3]", ["n_layer", "int"]), ("n_layer = True", ["n_layer"]),
    ("n_layer = ", ["SyntaxError"]), ("n_layer = 1 / 0", ["ZeroDivisionError"]), ("data = {'a': 0}", ["'a': 0"]),
    ("data = {}", ["data"]), ("data = {'a': '1'}", ["'a': '1'"]), ("data = {'a': 1, 'b': 1e-4}", ["'b'", "1000"])])
def test_wrong_config_files_are_refused_by_name(text, parts, tmp_path):
    path = config_file(tmp_path, TINY + text)
    with pytest.raises(TrainError) as e:
        configure([path])
    assert all(part in str(e.value) for part in [path, *parts]) and "\n" not in str(e.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_every_config_of_the_repository_is_valid(path):
    config = configure([str(path)])[0]
    with torch.device("meta"):
        model = GPT(config.gpt_config())
    millions = {"580M": 587, "760M": 757, "1.1B": 1096, "gpt2": 124}.get(path.stem)
    assert millions is None or model.num_params() / 1e6 == pytest.approx(millions, abs=1)
    with pytest.raises(TrainError, match="1009 processes"):
        configure([str(path)], world=1009)


# ---- data order


def one_source():
    return Loader([cut([np.random.RandomState(0).randint(0, 9, 1000).astype(np.uint16)], 16, "x")], [1], 8, 1)


def mixture():
    """Three sources whose tokens tell which is which: 40, 3 + 2 (in two bins) and 100 blocks of 16."""
    bins = [[np.full(16 * 40 + 9, 1)], [np.full(16 * 3 + 1, 2), np.full(5, 2), np.full(16 * 2 + 1, 3)],
            [np.full(16 * 100 + 1, 4)]]
    sources = [cut([tokens.astype(np.uint16) for tokens in source], 16, "x") for source in bins]
    return Loader(sources, [3, 1, 2.005], 8, 1)


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    blocks = cut([np.arange(10 * 7 + 3, dtype=np.uint16)], 7, "x")
    loader = Loader([blocks], [1], batch_size=5, seed=1)
    batches = torch.cat([loader.batch(step) for step in range(4)])      # 20 samples: two epochs of 10
    starts = batches[:, 0].tolist()
    assert sorted(starts[:10]) == sorted(starts[10:]) == [7 * i for i in range(10)]
    assert starts[:10] != starts[10:] and starts[:10] != sorted(starts[:10])
    for row in batches:     # each block is 7 tokens and the target of the last
        assert row.tolist() == list(range(row[0], row[0] + 8))
    assert not torch.equal(Loader([blocks], [1], batch_size=5, seed=2).batch(0), loader.batch(0))


@pytest.mark.parametrize("make", [one_source, mixture])
def test_batches_do_not_depend_on_processes_or_history(make):
    loader = make()
    in_order = [loader.batch(step) for step in range(300)]
    for step in (299, 3, 131):      # a fresh loader, any step first
        fresh = make()
        for world in (1, 2, 8):
            assert torch.equal(torch.cat([fresh.batch(step, r, world) for r in range(world)]), in_order[step])


def test_a_mixture_has_its_shares_and_every_block_of_a_source_once_an_epoch():
    loader = mixture()
    # by hand: 3, 1, 2.005 of 6.005 are 499.58, 166.53, 333.89 in 1000; the largest remainders go up
    assert loader.counts.tolist() == [500, 166, 334]
    seen = torch.cat([loader.batch(step) for step in range(250)])[:, 0]         # 2 decks
    for deck in seen.split(1000):
        assert [int(((deck == a) | (deck == b)).sum()) for a, b in ((1, 1), (2, 3), (4, 4))] == [500, 166, 334]
    for part in seen.split(100):        # and it is mixed all along
        assert 30 < (part == 1).sum() < 70 and 15 < (part == 4).sum() < 55
    small = seen[(seen == 2) | (seen == 3)]     # 5 blocks: 3 of one bin, 2 of the other, in each epoch
    assert all(sorted(epoch.tolist()) == [2, 2, 2, 3, 3] for epoch in small[:330].split(5))


def test_sources_of_equal_length_come_in_different_orders():
    loader = Loader([cut([np.arange(16 * 50 + 1, dtype=np.uint16)], 16, "x")] * 2, [1, 1], 8, 1)
    blocks = [(k, int(loader.block(i)[0])) for i, k in enumerate(loader.deck)]
    one, two = ([block for source, block in blocks if source == k][:50] for k in (0, 1))
    assert sorted(one) == sorted(two) == list(range(0, 800, 16)) and one != two


@pytest.mark.parametrize("shares, counts", [
    ([1, 1, 1], [334, 333, 333]), ([0.7, 0.3], [700, 300]), ([1, 10**9], [0, 1000]), ([2], [1000]),
    ([0.1] * 7, [143, 143, 143, 143, 143, 143, 142])])
def test_shares_become_whole_samples(shares, counts):
    assert apportion(shares).tolist() == counts


# ---- the step


def test_schedules_by_hand():
    config = Config(learning_rate=1.0, min_lr=0.1, warmup_steps=10, schedule="cosine")
    lr = [learning_rate(step, config, 110) for step in range(111)]
    assert lr[0] == pytest.approx(0.1) and lr[9] == lr[10] == 1.0
    assert lr[60] == pytest.approx(0.55) and lr[110] == pytest.approx(0.1)
    assert lr[35] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    config.schedule = "linear"
    assert learning_rate(35, config, 110) == pytest.approx(0.1 + 0.9 * 0.75)
    config.schedule = "constant"
    assert learning_rate(109, config, 110) == 1.0


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon"])
def test_decay_is_on_matrices_only_and_every_parameter_is_trained_once(optimizer):
    model = GPT(GPTConfig(**TINY_GPT))
    names = {p: n for n, p in model.named_parameters()}
    groups = [g for o in make_optimizer(model, Config(optimizer=optimizer, weight_decay=0.1)) for g in o.param_groups]
    decayed = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert len(decayed) == sum(len(g["params"]) for g in groups) == len(names)
    for name, decay in decayed.items():
        assert decay == (0 if "ln_" in name or name.endswith("bias") else 0.1), name


@pytest.mark.parametrize("micro", [4, 1])
def test_steps_are_hugging_faces_gpt2_under_torch_adamw(micro):
    """An independent loop: their model and loss on the whole batch, their decay groups by name."""
    torch.manual_seed(0)
    ours = GPT(GPTConfig(**TINY_GPT))
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2,
                                    attn_pdrop=0, resid_pdrop=0, embd_pdrop=0))
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")      # theirs lie the other way round
    weights = {f"transformer.{n}": p.T if n.endswith(linear) else p for n, p in ours.state_dict().items()}
    hf.load_state_dict(weights, strict=False)
    config = Config(learning_rate=1e-2, weight_decay=0.5, beta1=0.9, beta2=0.95, grad_clip=0.5)
    optimizers = make_optimizer(ours, config)
    matrices = [p for n, p in hf.named_parameters() if "ln_" not in n and not n.endswith("bias")]
    vectors = [p for n, p in hf.named_parameters() if "ln_" in n or n.endswith("bias")]
    theirs = torch.optim.AdamW([dict(params=matrices, weight_decay=0.5), dict(params=vectors, weight_decay=0)],
                               lr=1e-2, betas=(0.9, 0.95), foreach=False)
    for _ in range(5):
        rows = torch.randint(0, 64, (4, 17))
        loss, norm, _ = train_step(ours, optimizers, rows, micro, nullcontext(), config.grad_clip, NO_SCALER)
        logits = hf(rows[:, :-1]).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        expected.backward()
        expected_norm = torch.cat([p.grad.flatten() for p in hf.parameters()]).norm()
        for p in hf.parameters():
            p.grad *= min(1, 0.5 / expected_norm)
        theirs.step()
        theirs.zero_grad()
        assert loss == pytest.approx(expected.item(), abs=2e-5)
        assert norm == pytest.approx(expected_norm.item(), abs=2e-5, rel=1e-4)


def test_adafactor_is_that_of_fine_tuning_recipes():
    """Hugging Face's, with the rate taken as it is: no scaling by the weights' size, no relative step."""
    torch.manual_seed(0)
    ours = GPT(GPTConfig(**TINY_GPT, bias=False))
    theirs = copy.deepcopy(ours)
    optimizers = make_optimizer(ours, Config(optimizer="adafactor", learning_rate=1e-3, weight_decay=0.0))
    reference = Adafactor(theirs.parameters(), lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False)
    for _ in range(5):
        rows = torch.randint(0, 64, (4, 17))
        train_step(ours, optimizers, rows, 4, nullcontext(), 0, NO_SCALER)
        theirs(rows[:, :-1], rows[:, 1:]).backward()
        reference.step()
        reference.zero_grad()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        if "ln_" not in name:       # a layer norm's weights are near 1, and torch scales what is above
            assert (p - q).abs().max() < 2e-6, name


def test_muon_in_double_precision():
    """The update of Jordan et al. 2024, scaled to AdamW's as Liu et al. 2025 do, written out in fp64."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY_GPT))
    optimizers = make_optimizer(model, Config(optimizer="muon", learning_rate=0.01, adamw_lr=0.002, weight_decay=0.1))
    for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
        group["lr"] = 0.01 * group["lr_scale"]
    reference = {n: p.detach().double() for n, p in model.named_parameters()}
    momentum = {n: torch.zeros_like(p) for n, p in reference.items()}
    for _ in range(3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        rows = torch.randint(0, 64, (4, 17))
        loss = model(rows[:, :-1], rows[:, 1:])
        grads = dict(zip(before, torch.autograd.grad(loss, list(model.parameters()))))
        train_step(model, optimizers, rows, 4, nullcontext(), 0, NO_SCALER)
        for name, p in model.named_parameters():
            if not name.startswith("h.") or p.dim() < 2:        # AdamW's first steps are about its rate
                assert 0 < (p - before[name]).abs().max() < 0.002 * 1.6, name
                continue
            g = grads[name].double()
            momentum[name].lerp_(g, 0.05)
            x = g.lerp(momentum[name], 0.95)
            x = x / x.norm()
            x = x.T if len(x) > x.size(1) else x
            for _ in range(5):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            x = x if x.shape == g.shape else x.T
            reference[name] = reference[name] * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(max(g.shape)) * x
            assert (p - reference[name]).abs().max() < 1e-5, name       # bf16 would be off by 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_leaves_the_weights(optimizer):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY_GPT))
    optimizers = make_optimizer(model, Config(optimizer=optimizer))
    rows = torch.randint(0, 64, (2, 17))
    train_step(model, optimizers, rows, 2, nullcontext(), 1.0, NO_SCALER)
    model.ln_f.weight.data[0] = math.inf
    before = copy.deepcopy([model.state_dict(), [o.state_dict() for o in optimizers]])
    loss, norm, _ = train_step(model, optimizers, rows, 2, nullcontext(), 1.0, NO_SCALER)
    assert not math.isfinite(loss) and same(before, [model.state_dict(), [o.state_dict() for o in optimizers]])
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_covers_fixed_blocks_once_and_draws_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    tokens = np.random.RandomState(0).randint(0, 64, 8 * 9 + 5).astype(np.uint16)
    blocks = cut([tokens[:41], tokens[40:]], 8, "x")     # two bins: 5 blocks and 4
    before = torch.random.get_rng_state()
    every, two = spread(blocks, 10**6), spread(blocks, 2)
    loss, loss_of_two = t.evaluate(model, [every, two], 4, nullcontext())
    assert torch.equal(torch.random.get_rng_state(), before) and model.training
    assert every[:, 1:].ravel().tolist() == tokens[1:73].tolist()
    model.eval()
    losses = [model(torch.from_numpy(tokens[i:i + 8].astype("int64"))[None],
                    torch.from_numpy(tokens[i + 1:i + 9].astype("int64"))[None]).item() for i in range(0, 72, 8)]
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert loss_of_two == pytest.approx((losses[0] + losses[4]) / 2, rel=1e-6)


@pytest.mark.parametrize("units, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_trains_in_bf16_where_it_has_units_for_it(units, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
    automatic, asked = Config(device="cpu"), Config(device="cpu", dtype="float16")
    t.choose_device(automatic)
    t.choose_device(asked)
    assert (automatic.dtype, asked.dtype) == (dtype, "float16")


# ---- the plan


def kept_for_backward(monkeypatch, checkpointing, **shape):
    """Bytes that a compiled forward under bf16 autocast keeps for its backward, weights aside, as torch's
    partitioner decides. The kernels are traced, not run."""
    class Seen(Exception):
        pass

    def forward(graph, _):
        for node in graph.graph.output_node().args[0]:
            value = node.meta["val"] if isinstance(node, torch.fx.Node) and node.op != "placeholder" else None
            if isinstance(value, torch.Tensor) and value.numel() > 1:
                kept[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()     # views count once
        raise Seen
    kept = {}
    monkeypatch.setattr(m, "use_kernels", lambda x: True)
    model = GPT(GPTConfig(pos="alibi", bias=False, vocab_size=256, block_size=64, **shape))
    model.checkpointing = checkpointing
    backend = aot_autograd(fw_compiler=forward, partition_fn=partial(min_cut_rematerialization_partition,
                                                                      compiler="inductor"))
    rows = torch.randint(0, 256, (2, 65))
    with pytest.raises(BackendCompilerFailed, match="Seen"), torch.autocast("cpu", torch.bfloat16):
        torch.compile(model, backend=backend, fullgraph=True)(rows[:, :-1], rows[:, 1:])
    torch._dynamo.reset()
    return sum(kept.values())


@pytest.mark.parametrize("dropout, checkpointing, per_channel", [(0.1, False, 38), (0.0, True, 4)])
def test_the_plan_knows_what_a_layer_keeps(dropout, checkpointing, per_channel, monkeypatch):
    kept = functools.partial(kept_for_backward, monkeypatch, checkpointing, n_head=2, n_embd=64, dropout=dropout)
    layer = kept(n_layer=3) - kept(n_layer=2)
    weights = 0 if checkpointing else 2 * 12 * 64 * 64
    assert (layer - weights) / (2 * 64 * 64) == pytest.approx(per_channel, rel=0.1)
    config = Config(n_layer=2, n_head=2, n_embd=64, block_size=64, dropout=dropout, checkpoint=checkpointing)
    sizes = []
    for config.n_layer in (2, 3):
        model = GPT(GPTConfig(n_layer=config.n_layer, n_head=2, n_embd=64))
        sizes.append(t.memory_by_part(model, config, 2, 1)["activations"])
    assert sizes[1] - sizes[0] == pytest.approx(layer - weights, rel=0.1)


def test_the_plan_needs_no_gpu_and_no_data(tmp_path, monkeypatch, capsys):
    """1.1B by hand: 36 x 12 x 1536^2 + 50304 x 1536 + norms = 1,096.6M parameters of 4 bytes."""
    monkeypatch.chdir(tmp_path)
    t.start([str(ROOT / "configs/1.1B.py"), "--plan=8", "--zero=true"])
    out = capsys.readouterr().out
    assert "1,096.6M parameters" in out and "19,074 steps" in out and "10.0B in all" in out
    assert "| weights and gradients, fp32 | 8.8 |" in out and "| adamw state | 1.1 |" in out
    assert not list(tmp_path.iterdir())


def test_the_plan_is_of_the_model_that_is_trained(workspace, train):
    """Its vocabulary is that of the data, where there is data."""
    words = "--n_embd=256", "--max_steps=1"
    sizes = [re.search(r"([\d.]+)M parameters", train(*words, *more))[1] for more in (("--plan=1",), ())]
    assert sizes[0] == sizes[1] and float(sizes[0]) < 5         # GPT-2's vocabulary alone would be 12.9


# ---- runs


def test_a_run_leaves_checkpoint_state_log_and_curve(workspace, train):
    out = train()
    folder = workspace / "out"
    assert sorted(f.name for f in folder.iterdir()) == ["tiny.jsonl", "tiny.png", "tiny.pt", "tiny.state.pt"]
    assert (folder / "tiny.png").read_bytes()[:4] == b"\x89PNG"
    header, *log = records(folder / "tiny.jsonl")
    meta_json = json.loads((workspace / "data/tiny/meta.json").read_text())
    assert header["config"]["n_embd"] == 32 and header["data"] == meta_json["splits"]["train"]["sha256"]
    assert header["versions"]["torch"] == torch.__version__ and header["dtype"] == "float32"
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
    vals = {r["step"]: r for r in log if "val_loss" in r}
    assert list(vals) == [0, 3, 6] and vals[6]["tokens"] == 6 * 8 * 32
    assert vals[6]["val_loss"] < vals[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert vals[6]["bits_per_byte"] == pytest.approx(vals[6]["val_loss"] / math.log(2), rel=0.05)

    model, meta = m.load(str(folder / "tiny.pt"))
    best = min(vals.values(), key=lambda r: r["val_loss"])
    assert (meta["step"], meta["val_loss"], meta["tokenizer"]) == (best["step"], best["val_loss"], "bytes")
    assert meta["data"] == "data/tiny" and meta["lineage"] == [] and model.config.vocab_size == 257

    row = [line for line in out.splitlines() if line.startswith("| 32 | ")][0].split(" | ")
    tokens = np.fromfile(workspace / "data/tiny/val.bin", dtype="<u2")
    n = (len(tokens) - 1) // 32
    starts = np.arange(16) * n // 16 * 32
    text = bytes(int(token) if token < 256 else 32 for s in starts for token in tokens[s + 1:s + 33])
    words = len(text.decode(errors="replace").split())
    assert [float(cell.replace(",", "")) for cell in row[2:6]] == pytest.approx(
        [log[-2]["loss"], vals[6]["val_loss"], math.exp(vals[6]["val_loss"]), math.exp(vals[6]["val_loss"] * 512 / words)],
        rel=1e-3)


def test_every_step_draws_other_dropout(workspace, train, monkeypatch):
    seeds, manual_seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    train("--max_steps=4")
    assert len(set(seeds)) == len(seeds) == 5       # the initialisation's, and one a step


def test_best_checkpoint_is_kept_when_the_loss_goes_up(workspace, train):
    train()
    best = m.load(str(workspace / "out/tiny.pt"))[1]
    train("--max_steps=12", "--learning_rate=30", "--grad_clip=0")
    log = records(workspace / "out/tiny.jsonl")
    assert log[-1]["step"] == 12 and log[-1]["val_loss"] > best["val_loss"]
    assert m.load(str(workspace / "out/tiny.pt"))[1] == best


@pytest.mark.parametrize("words", ["", "--optimizer=muon --micro_batch_size=2", "--optimizer=muon --dtype=float16",
                                   "--optimizer=adafactor --average=2"])
def test_a_stopped_run_goes_on_bit_for_bit(words, workspace, train, monkeypatch):
    """With dropout: SIGTERM in step 2, a crash in step 5, each time the same command again."""
    train("--out_dir=whole", *words.split())
    command = ["--out_dir=parts", *words.split()]
    with monkeypatch.context() as patch:
        at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM), patch)
        assert "stopped at step 2" in train(*command)
    with monkeypatch.context() as patch:
        at_step(3, functools.partial(next, iter(())), patch)        # StopIteration
        with pytest.raises(StopIteration):
            train(*command)
    train(*command)
    assert same_end(workspace / "parts", workspace / "whole")
    losses = [r["val_loss"] for r in curve(workspace / "parts/tiny.jsonl") if "val_loss" in r]
    assert losses[-1] < losses[0]


def test_a_run_is_never_mixed_with_another(workspace, train):
    """Every key that makes a run what it is, by its effective value: one line with key and both values, and nothing
    changes on disk."""
    (workspace / "configs/other.py").write_text(TINY.replace("batch_size = 8", ""))
    train()
    prepare.prepare([str(write_corpus(workspace / "text", documents=9))], str(workspace / "data/other"), "bytes", 0.3)
    (workspace / "out/other.state.pt").write_bytes((workspace / "out/tiny.state.pt").read_bytes())
    before = {f.name: f.read_bytes() for f in (workspace / "out").iterdir()}

    def refused(*words, key, config="configs/tiny.py"):
        with pytest.raises(TrainError) as e:
            train(*words, config=config)
        message = str(e.value)
        assert "\n" not in message and "--resume=false" in message and f" {key} was " in message
        assert before.items() <= {f.name: f.read_bytes() for f in (workspace / "out").iterdir()}.items()
        return message
    for key, value in dict(seed=7, batch_size=4, block_size=16, optimizer="adafactor", n_layer=3, n_head=4, n_embd=64,
                           bias=False, pos="alibi", init_from="x.pt", data="data/other").items():
        message = refused(f"--{key}={value}", key=key)
        assert key == "data" or f"now it is {value}" in message
    assert "was 8, now it is 512" in refused("--block_size=32", key="batch_size", config="configs/other.py")
    val = workspace / "data/tiny/val.bin"
    (workspace / "data/tiny/meta.json").write_text(json.dumps(dict(tokenizer="bytes", vocab_size=257, splits={})))
    val.write_bytes(val.read_bytes()[2:])
    refused(key="data")


def test_other_keys_change_take_effect_and_are_logged(workspace, train):
    train("--max_steps=4", "--out_dir=a")
    for folder in ("b", "c"):
        (workspace / folder).mkdir()
        for file in (workspace / "a").iterdir():
            (workspace / folder / file.name).write_bytes(file.read_bytes())
    train("--max_steps=5", "--out_dir=a")
    out = train("--max_steps=5", "--out_dir=b", "--weight_decay=50", "--beta1=0.5", "--dtype=float16")
    changed = [r for r in records(workspace / "b/tiny.jsonl") if "changed" in r]
    assert changed[0]["step"] == 4 and changed[0]["changed"]["weight_decay"] == [0.1, 50.0]
    assert changed[0]["changed"]["dtype"] == ["float32", "float16"] and "weight_decay" in out
    shrunk, plain = (state_of(workspace / folder)["model"]["h.0.mlp.c_fc.weight"].norm() for folder in ("b", "a"))
    assert shrunk < 0.97 * plain
    train("--max_steps=5", "--out_dir=b", "--dtype=float16", "--weight_decay=50", "--beta1=0.5")
    assert len([r for r in records(workspace / "b/tiny.jsonl") if "changed" in r]) == 1
    train("--max_steps=5", "--out_dir=c", "--eval_tokens=32")       # the best loss on other tokens is no measure
    last = records(workspace / "c/tiny.jsonl")[-1]
    assert last["step"] == 5 and state_of(workspace / "c")["config"]["eval_tokens"] == 32


def test_nothing_trained_is_overwritten_unasked(workspace, train, refused, monkeypatch):
    train("--max_steps=2")
    out = workspace / "out"
    with pytest.raises(TrainError, match="overwrite"):
        train("--init_from=./out/tiny.pt", "--resume=false")
    with prepare.lock(out / "tiny.lock"):       # the same run is at work elsewhere; another one may use this folder
        assert "tiny.lock" in refused("train.py", "configs/tiny.py", cwd=workspace)
        (workspace / "configs/second.py").write_text(TINY)
        train("--max_steps=1", config="configs/second.py")
    (out / "tiny.state.pt").unlink()
    model = (out / "tiny.pt").read_bytes()
    with pytest.raises(TrainError, match="tiny.pt.*--resume=false"):
        train()
    assert (out / "tiny.pt").read_bytes() == model
    with monkeypatch.context() as patch:        # started over, then killed at once: the older state cannot come back
        at_step(1, functools.partial(next, iter(())), patch)
        with pytest.raises(StopIteration):
            train("--resume=false", "--seed=3")
    assert state_of(out)["config"]["seed"] == 3 and state_of(out)["progress"]["step"] == 0


@pytest.mark.parametrize("name", ["tiny.jsonl", "tiny.png"])
def test_a_full_disk_is_one_line_that_names_the_file(name, workspace, refused):
    (workspace / "full").mkdir()
    (workspace / "full" / name).symlink_to("/dev/full")
    line = refused("train.py", "configs/tiny.py", "--max_steps=2", "--out_dir=full", cwd=workspace)
    assert f"full/{name}" in line


def test_a_damaged_log_comes_back_whole(workspace, train, monkeypatch):
    log = workspace / "out/tiny.jsonl"
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)      # a clock that stands still does no harm
    train("--max_steps=4")
    good = records(log)
    lines = log.read_text().splitlines()
    for damage in (lines[:3] + ["\0" * 60] + lines[4:] + ['{"step": 4, "lo'], lines[1:], [], ["[1]", '"x"', "null"]):
        log.write_text("\n".join(damage))
        train("--max_steps=4")
        assert records(log) == good
    log.unlink()
    train("--max_steps=4")
    assert records(log) == good


def test_the_end_cannot_lose_the_run(workspace, train, monkeypatch):
    """A model with more tokens than its tokenizer has; then a sample that fails, after all else."""
    model = GPT(GPTConfig(block_size=32, vocab_size=2000, n_layer=2, n_head=2, n_embd=32))
    model.wte.weight.data[257:2000] *= 20
    m.save(str(workspace / "big.pt"), model, tokenizer="bytes")
    assert "a sample" in train("--init_from=big.pt", "--max_steps=1")

    def broken(*_, **__):
        assert (workspace / "average/tiny.avg.pt").exists()
        raise RuntimeError("no sample today")
    monkeypatch.setattr(GPT, "generate", broken)
    out = train("--average=2", "--out_dir=average")
    assert "warning" in out and "no sample today" in out and "| 32 | " in out


def test_the_mean_of_the_last_weights(workspace, train):
    """Of steps 5 and 6: its weights are the mean of those that runs saved there."""
    out = train("--max_steps=6", "--average=2", "--save_interval=5", "--out_dir=a", "--schedule=constant")
    train("--max_steps=5", "--out_dir=b", "--schedule=constant")
    early, late = (state_of(workspace / folder)["model"] for folder in ("b", "a"))
    model, meta = m.load(str(workspace / "a/tiny.avg.pt"))
    for name, p in model.state_dict().items():
        torch.testing.assert_close(p, (early[name] + late[name]) / 2)
    assert f"[5, 6]: val loss {meta['val_loss']:.4f}" in out
    train("--max_steps=12", "--average=2", "--out_dir=a", "--schedule=constant")        # those of the shorter run are gone
    assert state_of(workspace / "a")["progress"]["mean_of"] == [11, 12]
    run, layer = t.Progress(), torch.nn.Linear(1, 1, bias=False)
    for run.step, value in enumerate((1.0, 2.0, 6.0)):
        torch.nn.init.constant_(layer.weight, value)
        run.add_to_mean(layer, {0, 1, 2})
    assert run.mean["weight"].item() == 3


def test_a_mixture_of_sources(workspace, train):
    """Three parts of the tiny corpus to one of another; the log has the loss on each."""
    prepare.prepare([str(write_corpus(workspace / "other", documents=9))], str(workspace / "data/other"), "bytes", 0.3)
    (workspace / "configs/mixed.py").write_text(TINY + """
data = {"data/tiny": 0.75, "data/other": 0.25}
max_steps = 125
eval_interval = 125
""")
    train(config="configs/mixed.py")
    log = records(workspace / "out/mixed.jsonl")
    losses = log[-1]["val_losses"]
    assert log[-1]["val_loss"] == pytest.approx(0.75 * losses["data/tiny"] + 0.25 * losses["data/other"])
    model = m.load(str(workspace / "out/mixed.pt"))[0]
    for name, loss in losses.items():       # each as the best checkpoint, this one, has it on that bin alone
        tokens = torch.from_numpy(np.fromfile(workspace / name / "val.bin", dtype="<u2").astype("int64"))
        rows = tokens.unfold(0, 33, 32)
        n = min(len(rows), 16)
        rows = rows[torch.arange(n) * len(rows) // n]
        with torch.no_grad():
            assert loss == pytest.approx(model(rows[:, :-1], rows[:, 1:]).item(), rel=1e-4)
    (workspace / "configs/mixed.py").write_text(TINY + 'data = {"data/tiny": 0.5, "data/other": 0.5}')
    with pytest.raises(TrainError, match="data was"):
        train(config="configs/mixed.py")


def test_weights_and_biases_goes_on_in_the_same_run(workspace, train, monkeypatch):
    """On a stand-in for its library."""
    class Run:
        id, seen = "new", []

        def define_metric(self, *words, **keys):
            pass

        def log(self, record):
            self.seen.append(record)

        def finish(self):
            self.seen.append("finished")

    def init(project, name, config, id, resume):
        if project == "locked":
            raise ValueError("no key")
        assert (name, resume, config["wandb"], id) == ("tiny", "allow", "mine", "new" if Run.seen else None)
        return Run()
    monkeypatch.setitem(sys.modules, "wandb", type(sys)("wandb"))
    monkeypatch.setattr(sys.modules["wandb"], "init", init, raising=False)
    train("--wandb=mine", "--max_steps=4")
    train("--wandb=mine")
    assert Run.seen.count("finished") == 2 and records(workspace / "out/tiny.jsonl")[0]["wandb"] == "new"
    assert [r["step"] for r in Run.seen if "loss" in r] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(TrainError, match="wandb = locked: no key"):
        train("--wandb=locked", "--out_dir=other")
    monkeypatch.setitem(sys.modules, "wandb", None)     # not installed
    with pytest.raises(TrainError, match="pip install wandb"):
        train("--wandb=mine", "--out_dir=other")


def test_divergence_ends_the_run_and_keeps_the_state(workspace, train):
    train("--max_steps=2")
    state = (workspace / "out/tiny.state.pt").read_bytes()
    with pytest.raises(TrainError, match="10 steps in a row.*learning_rate"):
        train("--max_steps=90", "--learning_rate=1e30", "--min_lr=1e30", "--save_interval=90", "--eval_interval=90")
    assert (workspace / "out/tiny.state.pt").read_bytes() == state
    assert "skipped" in records(workspace / "out/tiny.jsonl")[-1]


def test_a_state_of_an_older_version_is_refused(workspace, train):
    (workspace / "out").mkdir()
    torch.save(dict(step=3), workspace / "out/tiny.state.pt")
    with pytest.raises(TrainError, match="tiny.state.pt.*--resume=false"):
        train()


def test_a_run_starts_from_a_checkpoint_and_says_how_to_make_it(workspace, train):
    (workspace / "configs/tiny.py").write_text(
        "# grown:  python grow.py out/small.pt out/init.pt --n_layer=2\n" + TINY + 'init_from = "out/init.pt"')
    with pytest.raises(TrainError, match="out/init.pt: no such file.*python grow.py out/small.pt out/init.pt --n_layer=2"):
        train()
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_embd=32))
    m.save(str(workspace / "out/init.pt"), model, tokenizer="bytes", step=7, tokens=70, lineage=[{"from": "small"}])
    (workspace / "configs/tiny.py").write_text(TINY.replace("n_head = 2", "") + 'init_from = "out/init.pt"')
    train("--max_steps=2")
    (workspace / "out/init.pt").unlink()        # a run that goes on does not need it
    train()
    made, meta = m.load(str(workspace / "out/tiny.pt"))
    assert meta["lineage"] == [{"from": "small"}, {"from": "out/init.pt", "step": 7, "tokens": 70}]
    assert made.config.block_size == 32 and made.config.n_head == 4
    m.save(str(workspace / "gpt2.pt"), model, tokenizer="gpt2")
    m.save(str(workspace / "few.pt"), GPT(GPTConfig(**TINY_GPT)), tokenizer="bytes")
    for words, parts in ((["--init_from=gpt2.pt"], ["gpt2.pt", "gpt2 tokens", "bytes tokens"]),
                         (["--init_from=few.pt"], ["few.pt", "64", "257"]),
                         (["--init_from=gpt2.pt", "--n_head=2"], ["gpt2.pt", "n_head is 4", "2"]),
                         (["--init_from=none.pt"], ["none.pt"])):
        with pytest.raises(TrainError) as e:
            train(*words, "--out_dir=other")
        assert all(part in str(e.value) for part in parts)


def test_fine_tuning_starts_from_hugging_face(workspace, train, monkeypatch):
    """configs/wikitext2.py; model.load reads the folder, here by a stand-in."""
    model = GPT(GPTConfig(block_size=64, vocab_size=257, n_layer=2, n_head=4, n_embd=32))
    monkeypatch.setattr(t, "load", lambda source: (model, dict(tokenizer="bytes")) if source == "gpt2-medium" else None)
    train("--data=data/tiny", "--block_size=32", "--dtype=float32", config=str(ROOT / "configs/wikitext2.py"))
    log = records(workspace / "out/wikitext2.jsonl")
    assert log[-1]["step"] == math.ceil(((workspace / "data/tiny/train.bin").stat().st_size // 2 - 1) // 32 / 8)
    assert m.load(str(workspace / "out/wikitext2.pt"))[1]["lineage"] == [{"from": "gpt2-medium"}]
    vals = [r["val_loss"] for r in log if "val_loss" in r]
    assert vals[-1] < vals[0]


# ---- by the command line


def test_mistakes_are_one_line(workspace, refused):
    assert "n_layer?" in refused("train.py", "configs/tiny.py", "--n_layers", "2", cwd=workspace)
    (workspace / "data/tiny/val.bin").unlink()
    assert "data/tiny/val.bin" in refused("train.py", "configs/tiny.py", cwd=workspace)


def test_a_full_disk_ends_the_run_in_one_line_and_it_goes_on(workspace, train):
    train("--max_steps=2")
    train("--max_steps=6", "--out_dir=whole")
    state = (workspace / "out/tiny.state.pt").read_bytes()
    limit = len(state) // 2
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), "configs/tiny.py"], cwd=workspace, text=True,
                            capture_output=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("train.py: out/tiny.state.pt: not written")
    assert (workspace / "out/tiny.state.pt").read_bytes() == state and not list((workspace / "out").glob("*.tmp"))
    train()
    assert records(workspace / "out/tiny.jsonl")[-1]["step"] == 6


# ---- several processes


def test_processes_learn_what_one_does_and_go_on_bit_for_bit(workspace, train, torchrun):
    """Two processes with Muon, ZeRO, micro batches and recomputed layers, beside one plain process; then again with
    a SIGTERM to torchrun."""
    words = ["--dropout=0", "--optimizer=muon", "--max_steps=24", "--save_interval=8", "--eval_interval=12"]
    shared = [*words, "--zero=true", "--micro_batch_size=2", "--checkpoint=true"]
    train(*words, "--out_dir=one")
    out = ended(torchrun(2, *shared, "--out_dir=whole"))
    assert out.count("step 12   tokens 3072   val_loss") == 1       # one voice
    for a, b in zip(curve(workspace / "whole/tiny.jsonl"), curve(workspace / "one/tiny.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    one, two = (state_of(workspace / folder)["optimizers"] for folder in ("one", "whole"))
    assert [len(part["state"]) for part in one] == [len(part["state"]) for part in two]
    for i, entry in one[0]["state"].items():
        torch.testing.assert_close(entry["momentum_buffer"], two[0]["state"][i]["momentum_buffer"], rtol=1e-2, atol=1e-5)
    agent = torchrun(2, *shared, "--out_dir=parts")
    for line in agent.stdout:
        if line.startswith("step 5 "):
            agent.send_signal(signal.SIGTERM)
            break
    assert "stopped at step" in agent.communicate(timeout=120)[0]
    assert 5 <= state_of(workspace / "parts")["progress"]["step"] < 24
    ended(torchrun(2, *shared, "--out_dir=parts"))
    assert same_end(workspace / "parts", workspace / "whole")


def test_a_killed_rank_is_restarted_by_torchrun(workspace, train, torchrun):
    """Also where the command says --resume=false: what torchrun starts again goes on."""
    words = ["--max_steps=80", "--save_interval=5", "--eval_interval=40"]
    train(*words, "--out_dir=whole")
    agent = torchrun(1, *words, "--out_dir=parts", "--resume=false", launcher=["--max-restarts=2"])
    for line in agent.stdout:
        if line.startswith("step 10 "):
            break
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    assert "going on from parts/tiny.state.pt at step" in ended(agent)
    for a, b in zip(curve(workspace / "parts/tiny.jsonl"), curve(workspace / "whole/tiny.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
