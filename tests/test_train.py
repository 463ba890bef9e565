import copy
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import socket
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
from train import Blocks, Config, ConfigError, Loader, apportion, configure, learning_rate, make_optimizer, train_step

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


MACHINE = ("tokens_per_second", "mfu", "bytes_held")


def curve(path):
    """The log without what depends on the machine."""
    return [{k: v for k, v in r.items() if k not in MACHINE} for r in records(path)[1:]]


def torchrun(n, *words, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}", "--master_port=0",
                           "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "train.py"), *words],
                          cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


# ---- configuration


def config_file(tmp_path, text=TINY):
    path = tmp_path / "tiny.py"
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_file_over_defaults(tmp_path):
    path = config_file(tmp_path)
    config, given, name = configure([path, "--learning_rate=3e-3", "--compile=true", "--max_steps=1e3",
                                     "--max_epochs=2", "--init_from=12"])
    assert name == "tiny" and "learning_rate" in given and "beta1" not in given
    assert config.learning_rate == 3e-3 and config.compile is True and config.max_epochs == 2.0
    assert config.max_steps == 1000 and type(config.max_steps) is int
    assert config.init_from == "12" and config.n_embd == 32 and config.beta1 == Config().beta1
    assert configure([path, "--max_epochs=1", "--max_steps=none"])[0].max_steps is None


WRONG = [   # words after the config file, what the message must contain
    (["--n_layers=3"], ["--n_layers=3", "n_layer?"]),
    (["--xyzzy=3"], ["unknown key xyzzy"]),
    (["--n_layer=three"], ["n_layer", "'three'", "int"]),
    (["--n_layer=2.5"], ["n_layer", "int"]),
    (["--n_layer=none"], ["n_layer", "int"]),
    (["--bias=maybe"], ["bias", "bool"]),
    (["--learning_rate=fast"], ["learning_rate", "float"]),
    (["--n_layer=0"], ["n_layer", "more than 0"]),
    (["--optimizer=sgd"], ["optimizer", "adamw, adafactor"]),
    (["--n_embd=33"], ["n_embd=33", "n_head=2"]),
    (["--max_steps=none"], ["max_steps, max_tokens or max_epochs"]),
    (["--data="], ["data is not set"]),
    (["--eval_block_size=0"], ["eval_block_size", "more than 0"]),
    (["--batch_size=8", "--micro_batch_size=3"], ["batch_size = 8", "micro_batch_size 3"]),
    (["--dropout=1.5"], ["dropout"]),
    (["--learning_rate=-1"], ["learning_rate = -1.0"]),
    (["--beta2=1"], ["beta2 = 1.0"]),
    (["n_layer=3"], ["expected --key=value"]),
]


@pytest.mark.parametrize("words, parts", WRONG, ids=[" ".join(w) for w, _ in WRONG])
def test_wrong_words_are_refused_by_name(words, parts, tmp_path):
    with pytest.raises(ConfigError) as e:
        configure([config_file(tmp_path), *words])
    assert all(part in str(e.value) for part in parts) and "\n" not in str(e.value)


@pytest.mark.parametrize("text, parts", [
    ("n_layers = 3", ["n_layers", "n_layer?"]), ("n_layer = '3'", ["n_layer", "'3'", "int"]),
    ("n_layer = True", ["n_layer", "int"]), ("n_layer = ", ["SyntaxError"]), ("import math", ["unknown key math"]),
    ("n_layer = 1 / 0", ["ZeroDivisionError"]), ("data = {'a': 0}", ["'a': 0", "share"]), ("data = {}", ["not set"]),
    ("data = {'a': '1'}", ["'a': '1'"]), ("data = {'a': 1, 'b': 1e-4}", ["b", "one sample in 1000"])])
def test_wrong_config_files_are_refused_by_name(text, parts, tmp_path):
    path = config_file(tmp_path, TINY + text)
    with pytest.raises(ConfigError) as e:
        configure([path])
    assert all(part in str(e.value) for part in [path, *parts])


def test_batch_must_divide_over_the_processes(tmp_path):
    with pytest.raises(ConfigError, match="3 processes"):
        configure([config_file(tmp_path)], world=3)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_every_config_of_the_repository_is_valid(path):
    configure([str(path)])


@pytest.mark.parametrize("name, millions", [("580M", 587), ("760M", 757), ("1.1B", 1096), ("gpt2", 124)])
def test_configs_have_the_size_of_their_name(name, millions):
    config = configure([str(ROOT / "configs" / f"{name}.py")])[0]
    with torch.device("meta"):
        model = GPT(GPTConfig(block_size=config.block_size, **{k: getattr(config, k) for k in t.SHAPE}))
    assert model.num_params() / 1e6 == pytest.approx(millions, abs=1)


# ---- data order


def test_an_epoch_is_a_permutation_and_the_next_one_another():
    blocks = Blocks([np.arange(10 * 7 + 3, dtype=np.uint16)], 7, "x")
    loader = Loader([blocks], apportion([1]), batch_size=5, seed=1)
    batches = torch.cat([loader.batch(step) for step in range(4)])      # 20 samples: two epochs of 10
    starts = batches[:, 0].tolist()
    assert sorted(starts[:10]) == sorted(starts[10:]) == [7 * i for i in range(10)]
    assert starts[:10] != starts[10:] and starts[:10] != sorted(starts[:10])
    for row in batches:     # each block is 7 tokens and the target of the last
        assert row.tolist() == list(range(row[0], row[0] + 8))
    other = Loader([blocks], apportion([1]), batch_size=5, seed=2)
    assert not torch.equal(other.batch(0), loader.batch(0))


def mixture(batch_size=8, seed=1):
    """Three sources whose tokens tell which is which: 40, 3 + 2 (in two bins) and 100 blocks of 16."""
    bins = [[np.full(16 * 40 + 9, 1)], [np.full(16 * 3 + 1, 2), np.full(5, 2), np.full(16 * 2 + 1, 3)],
            [np.full(16 * 100 + 1, 4)]]
    sources = [Blocks([tokens.astype(np.uint16) for tokens in source], 16, "x") for source in bins]
    return Loader(sources, apportion([3, 1, 2.005]), batch_size, seed)


@pytest.mark.parametrize("make", [mixture, lambda: Loader(
    [Blocks([np.random.RandomState(0).randint(0, 9, 1000).astype(np.uint16)], 16, "x")], apportion([1]), 8, 1)])
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
    seen = torch.cat([loader.batch(step) for step in range(250)])[:, 0]         # 2 groups
    for group in seen.split(1000):
        assert [int(((group == a) | (group == b)).sum()) for a, b in ((1, 1), (2, 3), (4, 4))] == [500, 166, 334]
    for part in seen.split(100):        # and it is mixed all along
        assert 30 < (part == 1).sum() < 70 and 15 < (part == 4).sum() < 55
    small = seen[(seen == 2) | (seen == 3)]     # 5 blocks: 3 of one bin, 2 of the other, in each epoch
    assert all(sorted(epoch.tolist()) == [2, 2, 2, 3, 3] for epoch in small[:330].split(5))
    assert loader.epochs(250) == [2 * 500 / 40, 2 * 166 / 5, 2 * 334 / 100]
    part = seen[:130 * 8]
    assert loader.epochs(130) == [(part == 1).sum() / 40, (part % 4 > 1).sum() / 5, (part == 4).sum() / 100]


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


def test_decay_is_on_matrices_only_and_every_parameter_is_trained_once():
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=2, n_head=2, n_embd=16))
    names = {p: n for n, p in model.named_parameters()}
    for optimizer in ("adamw", "adafactor"):
        groups = make_optimizer(model, Config(optimizer=optimizer, weight_decay=0.1)).param_groups
        decayed = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
        assert len(decayed) == sum(len(g["params"]) for g in groups) == len(names)
        for name, decay in decayed.items():
            assert decay == (0 if "ln_" in name or name.endswith("bias") else 0.1), name


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_steps_are_hugging_faces_gpt2_under_torch_adamw(micro, tmp_path):
    """An independent loop: their model and loss on the whole batch, their decay groups by name."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=4,
                                    attn_pdrop=0, resid_pdrop=0, embd_pdrop=0))
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path))
    config = Config(learning_rate=1e-2, weight_decay=0.5, beta1=0.9, beta2=0.95, grad_clip=0.5)
    optimizer = make_optimizer(ours, config)
    matrices = [p for n, p in hf.named_parameters() if "ln_" not in n and not n.endswith("bias")]
    vectors = [p for n, p in hf.named_parameters() if "ln_" in n or n.endswith("bias")]
    theirs = torch.optim.AdamW([dict(params=matrices, weight_decay=0.5), dict(params=vectors, weight_decay=0)],
                               lr=1e-2, betas=(0.9, 0.95), foreach=False)
    for step in range(5):
        rows = torch.randint(0, 64, (4, 17))
        loss, norm, _ = train_step(ours, optimizer, rows, micro, nullcontext(), config.grad_clip, NO_SCALER)
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


def test_evaluate_covers_fixed_blocks_once_and_draws_nothing():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16, dropout=0.5))
    tokens = np.random.RandomState(0).randint(0, 64, 8 * 9 + 5).astype(np.uint16)
    blocks = Blocks([tokens[:41], tokens[40:]], 8, "x")     # two bins: 5 blocks and 4
    before = torch.random.get_rng_state()
    every, two = blocks.spread(10**6), blocks.spread(16)
    loss, loss_of_two = t.evaluate(model, [every, two], 4, nullcontext())
    assert torch.equal(torch.random.get_rng_state(), before) and model.training
    assert every[:, 1:].ravel().tolist() == tokens[1:73].tolist()
    model.eval()
    losses = [model(torch.from_numpy(tokens[i:i + 8].astype("int64"))[None],
                    torch.from_numpy(tokens[i + 1:i + 9].astype("int64"))[None]).item() for i in range(0, 72, 8)]
    assert loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert loss_of_two == pytest.approx((losses[0] + losses[4]) / 2, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_change_nothing(dropout):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=3, n_head=2, n_embd=32, dropout=dropout))
        model.checkpointing = checkpointing
        rows = torch.randint(0, 50, (2, 17))
        loss = model(rows[:, :-1], rows[:, 1:])
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


def kept_for_backward(monkeypatch, **shape):
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
    kept, checkpointing = {}, shape.pop("checkpointing")
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


@pytest.mark.parametrize("dropout, checkpointing, per_channel", [(0.0, False, 36), (0.1, False, 38), (0.0, True, 4)])
def test_the_plan_knows_what_a_layer_keeps(dropout, checkpointing, per_channel, monkeypatch):
    shape = dict(n_head=2, n_embd=64, dropout=dropout, checkpointing=checkpointing)
    layer = kept_for_backward(monkeypatch, n_layer=3, **shape) - kept_for_backward(monkeypatch, n_layer=2, **shape)
    weights = 0 if checkpointing else 2 * 12 * 64 * 64
    assert (layer - weights) / (2 * 64 * 64) == pytest.approx(per_channel, rel=0.1)
    config = Config(n_layer=2, n_head=2, n_embd=64, block_size=64, dropout=dropout, checkpoint=checkpointing)
    sizes = []
    for config.n_layer in (2, 3):
        parts = t.memory_by_part(GPT(GPTConfig(n_layer=config.n_layer, n_head=2, n_embd=64)), config, 2, 1)
        sizes.append(parts["activations" + ", checkpointed" * checkpointing])
    assert sizes[1] - sizes[0] == pytest.approx(layer - weights, rel=0.1)


def test_a_step_that_is_not_finite_leaves_the_weights():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=16))
    optimizer = make_optimizer(model, Config())
    rows = torch.randint(0, 64, (2, 9))
    train_step(model, optimizer, rows, 2, nullcontext(), 1.0, NO_SCALER)
    before = [p.clone() for p in model.parameters()]
    moments = [v.clone() for p in model.parameters() for v in optimizer.state[p].values()]
    with torch.no_grad():
        model.ln_f.weight[0] = math.inf
    loss, norm, _ = train_step(model, optimizer, rows, 2, nullcontext(), 1.0, NO_SCALER)
    assert not math.isfinite(loss)
    with torch.no_grad():
        model.ln_f.weight[0] = before[[n for n, _ in model.named_parameters()].index("ln_f.weight")][0]
    assert all(map(torch.equal, model.parameters(), before))
    assert all(map(torch.equal, [v for p in model.parameters() for v in optimizer.state[p].values()], moments))
    assert all(p.grad is None for p in model.parameters())


def test_the_plan_needs_no_gpu_and_no_data(run, tmp_path):
    """1.1B by hand: 36 x 12 x 1536^2 + 50304 x 1536 + norms = 1,096.6M parameters of 4 bytes."""
    result = run("train.py", str(ROOT / "configs/1.1B.py"), "--plan=8", "--zero=true", cwd=tmp_path)
    assert result.returncode == 0 and "1,096.6M parameters" in result.stdout
    assert "| weights, fp32 | 4.4 |" in result.stdout and "shared by 8 | 1.1 |" in result.stdout
    assert "19,074 steps, 10.0B tokens" in result.stdout
    assert not list(tmp_path.iterdir())


# ---- runs, as a user starts them


def test_a_run_leaves_checkpoint_state_log_and_curve(workspace, run):
    result = run("train.py", "configs/tiny.py", cwd=workspace)
    assert result.returncode == 0, result.stderr
    for word in ("val loss", "perplexity", "bits per byte", "tok/s", "left 0:", "out/tiny.pt", "out/tiny.jsonl",
                 "out/tiny.png", "a sample"):
        assert word in result.stdout
    out = workspace / "out"
    assert sorted(f.name for f in out.iterdir()) == ["tiny.jsonl", "tiny.png", "tiny.pt", "tiny.state.pt"]
    assert (out / "tiny.png").read_bytes()[:4] == b"\x89PNG"

    header, *log = records(out / "tiny.jsonl")
    meta_json = json.loads((workspace / "data/tiny/meta.json").read_text())
    assert header["config"]["n_embd"] == 32 and header["data"] == meta_json["splits"]["train"]["sha256"]
    assert header["versions"]["torch"] == torch.__version__ and header["dtype"] == "float32"
    assert [r["step"] for r in log if "loss" in r] == [1, 2, 3, 4, 5, 6]
    vals = {r["step"]: r for r in log if "val_loss" in r}
    assert list(vals) == [0, 3, 6] and vals[6]["tokens"] == 6 * 8 * 32
    assert vals[6]["val_loss"] < vals[0]["val_loss"] == pytest.approx(math.log(257), abs=0.1)
    assert vals[6]["bits_per_byte"] == pytest.approx(vals[6]["val_loss"] / math.log(2), rel=0.05)

    model, meta = m.load(str(out / "tiny.pt"))
    best = min(vals.values(), key=lambda r: r["val_loss"])
    assert (meta["step"], meta["val_loss"], meta["tokenizer"]) == (best["step"], best["val_loss"], "bytes")
    assert meta["data"] == "data/tiny" and meta["lineage"] == [] and model.config.vocab_size == 257


def test_best_checkpoint_is_kept_when_the_loss_goes_up(workspace, run):
    run("train.py", "configs/tiny.py", cwd=workspace)
    best = m.load(str(workspace / "out/tiny.pt"))[1]
    result = run("train.py", "configs/tiny.py", "--max_steps=12", "--learning_rate=30", "--grad_clip=0", cwd=workspace)
    assert "going on" in result.stdout and result.returncode == 0
    log = records(workspace / "out/tiny.jsonl")
    assert log[-1]["step"] == 12 and log[-1]["val_loss"] > best["val_loss"]
    assert m.load(str(workspace / "out/tiny.pt"))[1] == best


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_stopped_run_goes_on_bit_for_bit(at, workspace, run):
    """With dropout, stopped by SIGTERM after step `at` and started by the same command."""
    run("train.py", "configs/tiny.py", "--out_dir=whole", cwd=workspace)
    command = [sys.executable, "-u", str(ROOT / "train.py"), "configs/tiny.py", "--out_dir=parts"]
    process = subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith(f"step      {at}/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 0 and "stopped at step" in rest or "a sample" in rest
    result = run("train.py", "configs/tiny.py", "--out_dir=parts", cwd=workspace)
    assert result.returncode == 0
    assert curve(workspace / "parts/tiny.jsonl") == curve(workspace / "whole/tiny.jsonl")
    for name in ("tiny.pt", "tiny.state.pt"):
        whole, parts = (torch.load(workspace / d / name, weights_only=True) for d in ("whole", "parts"))
        assert all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"])


@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_breaks_off_an_evaluation(world, workspace, tmp_path_factory):
    """Sent to the last rank alone, as it evaluates after step 3: all end well, and the run goes on bit for bit."""
    text = write_corpus(tmp_path_factory.mktemp("long") / "text", documents=400)
    prepare.prepare([str(text)], str(workspace / "data/long"), "bytes", 0.9)
    words = ["configs/tiny.py", "--data=data/long", "--max_steps=4", "--eval_tokens=1e9", "--compile=false"]
    launch = [sys.executable, "-u", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
              str(ROOT / "train.py"), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    assert subprocess.run([*launch, "--out_dir=whole"], cwd=workspace, env=env, capture_output=True).returncode == 0
    agent = subprocess.Popen([*launch, "--out_dir=parts"], cwd=workspace, env=env, text=True, stdout=subprocess.PIPE)
    for line in agent.stdout:
        if line.startswith("step      3/"):
            break
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        if f"RANK={world - 1}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            os.kill(int(child), signal.SIGTERM)
    rest, _ = agent.communicate(timeout=120)
    assert agent.returncode == 0 and "stopped at step 3" in rest and "val loss" not in rest
    assert subprocess.run([*launch, "--out_dir=parts"], cwd=workspace, env=env, capture_output=True).returncode == 0
    assert curve(workspace / "parts/tiny.jsonl") == curve(workspace / "whole/tiny.jsonl")
    whole, parts = (m.load(str(workspace / d / "tiny.pt"))[0].state_dict() for d in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_mixture_of_sources(workspace, run, refused):
    """Three parts of the tiny corpus to one of another; the log says how much of each and the loss on each."""
    prepare.prepare([str(write_corpus(workspace / "other", documents=9))], str(workspace / "data/other"), "bytes", 0.3)
    (workspace / "configs/mixed.py").write_text(TINY + """
data = {"data/tiny": 0.75, "data/other": 0.25}
max_steps = 125
eval_interval = 125
""")
    result = run("train.py", "configs/mixed.py", cwd=workspace)
    assert result.returncode == 0, result.stderr
    log = records(workspace / "out/mixed.jsonl")
    blocks = {name: (os.path.getsize(workspace / name / "train.bin") // 2 - 1) // 32
              for name in ("data/tiny", "data/other")}
    assert log[-1]["epochs"] == {"data/tiny": 750 / blocks["data/tiny"], "data/other": 250 / blocks["data/other"]}
    losses = log[-1]["val_losses"]
    assert log[-1]["val_loss"] == pytest.approx(0.75 * losses["data/tiny"] + 0.25 * losses["data/other"])
    for name, loss in losses.items():       # each as the best checkpoint, this one, has it on that bin alone
        tokens = np.fromfile(workspace / name / "val.bin", dtype="<u2")
        n = (len(tokens) - 1) // 32
        starts = np.arange(min(n, 16)) * n // min(n, 16) * 32
        model = m.load(str(workspace / "out/mixed.pt"))[0]
        assert loss == pytest.approx(model.total_loss(tokens, starts, 32, 8) / (len(starts) * 32), rel=1e-5)
        assert f"{250 / blocks['data/other']:.2f} epochs   data/other" in result.stdout
    result = run("eval.py", "--ckpt", "out/mixed.pt", "--tasks=none", cwd=workspace)
    assert "| data/tiny/val.bin |" in result.stdout and "| data/other/val.bin |" in result.stdout
    result = run("grow.py", "out/mixed.pt", "out/grown.pt", "--n_layer=3", cwd=workspace)
    assert "tokens of data/tiny, data/other" in result.stdout
    (workspace / "configs/mixed.py").write_text(TINY + 'data = {"data/tiny": 0.5, "data/other": 0.5}')
    assert "other data" in refused("train.py", "configs/mixed.py", cwd=workspace)
    # the same two as one source: the blocks of both, once an epoch
    result = run("train.py", "configs/tiny.py", "--data=data/tiny,data/other", cwd=workspace)
    assert f"6 steps of 256 tokens, {6 * 8 / sum(blocks.values()):.2f} epochs" in result.stdout
    shutil.copytree(workspace / "data/other", workspace / "data/gpt2")
    meta = (workspace / "data/gpt2/meta.json").read_text()
    (workspace / "data/gpt2/meta.json").write_text(meta.replace('"bytes",', '"gpt2",'))
    assert "data/gpt2: gpt2 tokens, but data/tiny holds bytes tokens" in refused(
        "train.py", "configs/tiny.py", "--data=data/tiny,data/gpt2", cwd=workspace)


def test_validation_at_a_longer_context(workspace, run, refused):
    result = run("train.py", "configs/tiny.py", "--pos=alibi", "--bias=false", "--eval_block_size=128", cwd=workspace)
    assert result.returncode == 0 and "context 128" in result.stdout, result.stderr
    best = min((r for r in records(workspace / "out/tiny.jsonl") if "val_loss" in r), key=lambda r: r["val_loss"])
    model, meta = m.load(str(workspace / "out/tiny.pt"))
    tokens = np.fromfile(workspace / "data/tiny/val.bin", dtype="<u2")
    n = (len(tokens) - 1) // 128
    starts = np.arange(4) * n // 4 * 128        # 512 tokens
    assert best["val_loss"] == pytest.approx(model.total_loss(tokens, starts, 128, 1) / 512, rel=1e-5)
    assert "learned positions end at block_size = 32" in refused(
        "train.py", "configs/tiny.py", "--eval_block_size=64", "--out_dir=other", cwd=workspace)


WANDB = """
import json, os
class Error(Exception): pass
class Run:
    def __init__(self, id): self.id = id
    def define_metric(self, *words, **keys): pass
    def log(self, record): print(json.dumps([self.id, record]), file=open(os.environ["SEEN"], "a"))
    def finish(self): self.log("finished")
def init(project, name, config, id, resume):
    if project == "locked": raise Error("no key")
    assert (name, resume, config["wandb"]) == ("tiny", "allow", project)
    return Run(id or "new")
"""


def test_weights_and_biases_goes_on_in_the_same_run(workspace, refused):
    """On a stand-in for its library."""
    words = ["train.py", "configs/tiny.py", "--wandb=mine"]
    if not importlib.util.find_spec("wandb"):
        assert "pip install wandb" in refused(*words, cwd=workspace)
    (workspace / "lib").mkdir()
    (workspace / "lib/wandb.py").write_text(WANDB)
    env = {**os.environ, "PYTHONPATH": str(workspace / "lib"), "SEEN": str(workspace / "seen")}

    def train(*more):
        return subprocess.run([sys.executable, str(ROOT / "train.py"), *words[1:], *more], cwd=workspace, env=env,
                              capture_output=True, text=True)
    assert train("--max_steps=4").returncode == 0
    header = json.loads((workspace / "out/tiny.jsonl").read_text().splitlines()[0])
    assert header["wandb"] == "new"
    assert train().returncode == 0
    seen = records(workspace / "seen")
    assert {id for id, _ in seen} == {"new"} and [r for _, r in seen].count("finished") == 2
    assert [r["step"] for _, r in seen if "loss" in r] == [1, 2, 3, 4, 5, 6]
    result = train("--wandb=locked", "--resume=false")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (1, "train.py: wandb: no key")


def test_divergence_ends_the_run_and_keeps_the_state(workspace, run, refused):
    run("train.py", "configs/tiny.py", "--max_steps=2", cwd=workspace)
    state = (workspace / "out/tiny.state.pt").read_bytes()
    line = refused("train.py", "configs/tiny.py", "--max_steps=90", "--learning_rate=1e30", "--min_lr=1e30",
                   "--save_interval=90", "--eval_interval=90", cwd=workspace)
    assert "10 steps in a row" in line and "not finite" in line and "learning_rate" in line
    assert (workspace / "out/tiny.state.pt").read_bytes() == state
    assert "skipped" in records(workspace / "out/tiny.jsonl")[-1]


def test_a_state_of_an_older_version_is_refused(workspace, run, refused):
    assert run("train.py", "configs/tiny.py", "--max_steps=1", cwd=workspace).returncode == 0
    path = workspace / "out/tiny.state.pt"
    state = torch.load(path, weights_only=True)
    del state["counts"]
    torch.save(state, path)
    before = path.read_bytes()
    assert "older one; pass --resume=false" in refused("train.py", "configs/tiny.py", cwd=workspace)
    assert path.read_bytes() == before


def test_a_full_disk_keeps_the_old_state_and_the_run_goes_on(workspace, run):
    run("train.py", "configs/tiny.py", "--max_steps=2", cwd=workspace)
    state = (workspace / "out/tiny.state.pt").read_bytes()
    result = subprocess.run([sys.executable, str(ROOT / "train.py"), "configs/tiny.py"], cwd=workspace, text=True,
                            capture_output=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9**5, 9**5)))
    assert len(state) > 9**5 and result.returncode == 0, result.stderr
    assert "tiny.state.pt not written" in result.stderr and "Traceback" not in result.stderr
    assert (workspace / "out/tiny.state.pt").read_bytes() == state
    assert not list((workspace / "out").glob("*.tmp"))


def test_fp16_scales_its_loss(workspace, run):
    result = run("train.py", "configs/tiny.py", "--dtype=float16", cwd=workspace)
    assert result.returncode == 0, result.stderr
    log = [r for r in records(workspace / "out/tiny.jsonl") if "val_loss" in r]
    assert log[-1]["val_loss"] < log[0]["val_loss"]
    assert torch.load(workspace / "out/tiny.state.pt", weights_only=True)["scaler"]["scale"] > 1


def test_shared_optimizer_state_changes_nothing(workspace, run):
    """zero = True on two processes: the log of the run without, also across a stop; its state is whole."""
    words = ["configs/tiny.py", "--micro_batch_size=2", "--checkpoint=true"]
    assert torchrun(2, *words, "--out_dir=zero", "--zero=true", "--max_steps=4", cwd=workspace).returncode == 0
    # max_steps is part of the schedule: the plain run must stop at four too
    assert torchrun(2, *words, "--out_dir=four", "--max_steps=4", cwd=workspace).returncode == 0
    assert curve(workspace / "zero/tiny.jsonl") == curve(workspace / "four/tiny.jsonl")
    for out, zero in (("zero", "true"), ("four", "false")):
        result = torchrun(2, *words, f"--out_dir={out}", f"--zero={zero}", cwd=workspace)
        assert result.returncode == 0 and "going on" in result.stdout, result.stderr
    assert curve(workspace / "zero/tiny.jsonl") == curve(workspace / "four/tiny.jsonl")
    states = [torch.load(workspace / out / "tiny.state.pt", weights_only=True)["optimizer"]["state"]
              for out in ("zero", "four")]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for i in states[0]:
        assert all(torch.equal(states[0][i][k], states[1][i][k]) for k in ("exp_avg", "exp_avg_sq"))


def test_a_killed_rank_is_restarted_by_torchrun(workspace, run):
    run("train.py", "configs/tiny.py", "--max_steps=300", "--out_dir=whole", cwd=workspace)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--max-restarts=2",
               str(ROOT / "train.py"), "configs/tiny.py", "--max_steps=300", "--out_dir=parts"]
    agent = subprocess.Popen(command, cwd=workspace, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log, deadline = workspace / "parts/tiny.jsonl", time.time() + 60
    while not (log.exists() and len(log.read_text().splitlines()) > 20):
        assert time.time() < deadline
        time.sleep(0.05)
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    errors = agent.communicate()[1]
    assert agent.returncode == 0, errors
    for a, b in zip(curve(workspace / "parts/tiny.jsonl"), curve(workspace / "whole/tiny.jsonl"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


def test_the_mean_of_the_last_weights(workspace, run, refused):
    """Of steps 18 and 20; asked for too late it is refused."""
    words = ["configs/tiny.py", "--schedule=constant", "--dropout=0.1"]
    result = run("train.py", *words, "--max_steps=20", "--average=2", "--out_dir=a", cwd=workspace)
    assert result.returncode == 0 and "steps 18, 20: val loss" in result.stdout, result.stderr
    run("train.py", *words, "--max_steps=18", "--out_dir=b", cwd=workspace)
    early, late = (torch.load(workspace / d / "tiny.state.pt", weights_only=True)["model"] for d in ("b", "a"))
    model, meta = m.load(str(workspace / "a/tiny.avg.pt"))
    for name, p in model.state_dict().items():
        torch.testing.assert_close(p, (early[name] + late[name]) / 2)
    assert f"val loss {meta['val_loss']:.4f}" in result.stdout
    line = refused("train.py", *words, "--max_steps=18", "--average=3", "--out_dir=b", cwd=workspace)
    assert "average was 0" in line


def test_a_run_ends_with_a_row_for_the_table(workspace, run):
    result = run("train.py", "configs/tiny.py", cwd=workspace)
    row = [line for line in result.stdout.splitlines() if line.startswith("| 32 | ")][0].split(" | ")
    log = records(workspace / "out/tiny.jsonl")
    val_loss = [r["val_loss"] for r in log if "val_loss" in r][-1]
    assert float(row[2]) == pytest.approx(log[-2]["loss"], abs=1e-4)
    assert float(row[3]) == pytest.approx(val_loss, abs=1e-4) and row[7] == "out/tiny |"
    tokens = np.fromfile(workspace / "data/tiny/val.bin", dtype="<u2")
    n = (len(tokens) - 1) // 32
    starts = np.arange(16) * n // 16 * 32
    text = bytes(int(t) if t < 256 else 32 for s in starts for t in tokens[s + 1:s + 33])
    assert float(row[5].replace(",", "")) == pytest.approx(math.exp(val_loss * 512 / len(text.decode(errors="replace").split())),
                                                           rel=1e-3)


def test_two_machines_meet(workspace):
    """Two torchrun agents, one process each, that find each other over the network (here: loopback)."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-id=7",
               "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", str(ROOT / "train.py"), "configs/tiny.py"]
    agents = [subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
              for _ in range(2)]
    outputs = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert sum("2 processes on cpu" in out for out, _ in outputs) == 1


def test_two_processes_see_the_same_batches_and_learn_the_same(workspace, run):
    run("train.py", "configs/tiny.py", "--dropout=0", "--out_dir=one", cwd=workspace)
    result = torchrun(2, "configs/tiny.py", "--dropout=0", "--out_dir=two", cwd=workspace)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("   val loss") == 3      # one voice
    result = torchrun(2, "configs/tiny.py", "--dropout=0", "--micro_batch_size=2", "--out_dir=accumulated",
                      cwd=workspace)
    assert result.returncode == 0, result.stderr
    one = curve(workspace / "one/tiny.jsonl")
    for other in ("two", "accumulated"):
        for a, b in zip(one, curve(workspace / other / "tiny.jsonl"), strict=True):
            assert a.keys() == b.keys()
            assert all(a[k] == pytest.approx(b[k], rel=1e-4) for k in a)


def test_adafactor_is_that_of_fine_tuning_recipes():
    """Hugging Face's, with the rate taken as it is: no scaling by the weights' size, no relative step."""
    torch.manual_seed(0)
    ours = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=False))
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(ours, Config(optimizer="adafactor", learning_rate=1e-3, weight_decay=0.0))
    reference = Adafactor(theirs.parameters(), lr=1e-3, scale_parameter=False, relative_step=False, warmup_init=False)
    for _ in range(5):
        rows = torch.randint(0, 64, (4, 17))
        for model, steps in ((ours, optimizer), (theirs, reference)):
            steps.zero_grad()
            model(rows[:, :-1], rows[:, 1:]).backward()
            steps.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        if "ln_" not in name:       # a layer norm's weights are near 1, and torch scales what is above
            assert (p - q).abs().max() < 2e-6, name


def test_fine_tuning_starts_from_a_hugging_face_folder(workspace, run):
    """configs/wikitext2.py on a stand-in: Adafactor, one epoch, from GPT-2 weights."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    hf.save_pretrained(workspace / "hf")
    result = run("train.py", str(ROOT / "configs/wikitext2.py"), "--data=data/tiny", "--init_from=hf", "--block_size=32",
                 "--dtype=float32", cwd=workspace)
    assert result.returncode == 0 and "comes from hf\n" in result.stdout, result.stderr
    n_blocks = (len((workspace / "data/tiny/train.bin").read_bytes()) // 2 - 1) // 32
    log = records(workspace / "out/wikitext2.jsonl")
    assert log[-1]["step"] == math.ceil(n_blocks / 8)
    model, meta = m.load(str(workspace / "out/wikitext2.pt"))
    assert meta["lineage"] == [{"from": "hf"}] and model.config.block_size == 32

    vals = [r["val_loss"] for r in log if "val_loss" in r]
    tokens = np.fromfile(workspace / "data/tiny/val.bin", dtype="<u2").astype("int64")
    rows = torch.from_numpy(np.stack([tokens[i:i + 33] for i in range(0, len(tokens) - 33, 32)]))
    with torch.no_grad():
        logits = hf.eval()(rows[:, :-1]).logits.flatten(0, 1)
    assert vals[0] == pytest.approx(torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).item(), rel=1e-5)
    assert vals[-1] < vals[0]


def test_bf16_learns_about_the_same(workspace, run):
    losses = []
    for words in (["--dropout=0"], ["--dropout=0", "--dtype=bfloat16"]):
        assert run("train.py", "configs/tiny.py", "--resume=false", *words, cwd=workspace).returncode == 0
        losses.append(records(workspace / "out/tiny.jsonl")[-1]["val_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


# ---- what bad input gets


def test_bad_runs_touch_nothing(workspace, refused, run):
    assert run("train.py", "configs/tiny.py", cwd=workspace).returncode == 0
    out = workspace / "out"
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    data = workspace / "data/tiny/train.bin"
    good = data.read_bytes()

    def line(*words):
        return refused("train.py", *words, cwd=workspace)
    assert "did you mean n_layer?" in line("configs/tiny.py", "--n_layers=2")
    assert "no such config file" in line("configs/none.py")
    assert "config file first" in line()
    assert "no such bin" in line("configs/tiny.py", "--data=data/none")
    assert "block_size=100000" in line("configs/tiny.py", "--block_size=100000", "--resume=false")
    assert "n_layer was 2, now it is 3" in line("configs/tiny.py", "--n_layer=3")
    assert "no such checkpoint" in line("configs/tiny.py", "--resume=false", "--init_from=none.pt")
    assert "not a checkpoint" in line("configs/tiny.py", "--resume=false", "--init_from=configs/tiny.py")
    assert "n_layer is 2, but the config asks for 3" in line("configs/tiny.py", "--resume=false",
                                                             "--init_from=out/tiny.pt", "--n_layer=3")
    assert "positions end at 32" in line("configs/tiny.py", "--resume=false", "--init_from=out/tiny.pt",
                                         "--block_size=64")
    data.write_bytes(good[:-2])
    assert "cut short" in line("configs/tiny.py")
    data.write_bytes(good[:40] + b"xx" + good[42:])
    assert "outside the vocabulary" in line("configs/tiny.py")
    data.write_bytes(good[:40] + b"x\0" + good[42:])
    assert "sha256" in line("configs/tiny.py")
    data.write_bytes(good)
    prepare.prepare(["python"], str(workspace / "data/other"), "bytes", 0.05)
    assert "other data" in line("configs/tiny.py", "--data=data/other")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before


def test_interrupt_before_the_first_step_is_quiet(workspace):
    command = [sys.executable, "-u", str(ROOT / "train.py"), "configs/tiny.py", "--max_steps=100000"]
    process = subprocess.Popen(command, cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
