import json
import math
import os
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import gpt2

os.environ["HF_HUB_OFFLINE"] = "1"      # huggingface_hub reads it once; no test waits for a network
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM)

import model as m                                       # noqa: E402
from model import GPT, GPTConfig, ModelError            # noqa: E402
from prepare import get_tokenizer                       # noqa: E402

TINY = dict(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=16)
BYTES = get_tokenizer("bytes")


def hugging_face(kind="gpt2", **settings):
    """A small GPT2LMHeadModel or MptForCausalLM whose biases and norms are not the initial 0 and 1."""
    torch.manual_seed(0)
    common = dict(vocab_size=257, num_hidden_layers=2, num_attention_heads=4, hidden_size=48,
                  initializer_range=0.2, bos_token_id=256, eos_token_id=256)
    if kind == "gpt2":
        hf = GPT2LMHeadModel(GPT2Config(**common | dict(n_positions=40) | settings))
    else:
        hf = MptForCausalLM(MptConfig(**common | dict(max_seq_len=40) | settings))
    for p in hf.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return hf.eval()


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def change(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


# ---- Hugging Face, in and out


@pytest.mark.parametrize("kind, n_head", [("gpt2", 4), ("mpt", 4), ("mpt", 3), ("mpt", 12)])
def test_agrees_with_hugging_face_both_ways(kind, n_head, tmp_path):
    hf = hugging_face(kind, num_attention_heads=n_head)
    hf.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs"))
    idx, targets = torch.randint(0, 257, (2, 2, 33))
    logits = hf(idx).logits
    assert ours(idx).shape == (2, 33, 257)
    close(ours(idx), logits)

    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    our_loss = ours(idx, targets)
    our_loss.backward()
    close(our_loss, loss)
    close(ours(idx, targets, reduction="none"), F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))

    # every gradient, under its name there
    theirs = dict(hf.named_parameters())
    mpt_names = {"h.": "blocks.", "ln_1": "norm_1", "ln_2": "norm_2", "ln_f": "norm_f", "c_attn": "Wqkv",
                 "attn.c_proj": "attn.out_proj", "mlp.c_fc": "ffn.up_proj", "mlp.c_proj": "ffn.down_proj"}
    for name, p in ours.named_parameters():
        grad = p.grad.t() if kind == "gpt2" and ".c_" in name and p.dim() == 2 else p.grad
        for a, b in mpt_names.items() if kind == "mpt" else ():
            name = name.replace(a, b)
        close(grad[:257], theirs.pop(f"transformer.{name}").grad)
    assert not theirs

    m.export(ours, str(tmp_path / "back"), BYTES)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(hf)
    close(back(idx).logits, logits)
    assert GPT.from_pretrained(str(tmp_path / "back")).config == ours.config


def sharded(hf, folder):
    hf.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_on_the_hub(hf, folder):
    """As openai-community/gpt2 is: no prefix, the causal masks of old versions, a config that says little."""
    hf.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = dict(hf.transformer.state_dict())
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="gpt2", n_ctx=40, n_positions=40, n_embd=48, n_head=4, n_layer=2, vocab_size=257)))


def with_its_head(hf, folder):
    hf.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({key: p.clone() for key, p in hf.state_dict().items()}, folder / "pytorch_model.bin")


def in_half_precision(hf, folder):
    hf.half().save_pretrained(folder)
    hf.float()


def resized(hf, folder):
    hf.resize_token_embeddings(270)
    hf.save_pretrained(folder)


@pytest.mark.parametrize("kind, write", [
    ("gpt2", as_on_the_hub), ("gpt2", with_its_head), ("gpt2", resized), ("mpt", sharded),
    ("mpt", in_half_precision)])
def test_files_as_people_have_them(kind, write, tmp_path):
    hf = hugging_face(kind)
    write(hf, tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path)), torch.randint(0, 257, (1, 20))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")       # what was read is not the file itself, mapped
    close(ours(idx), hf(idx).logits)


@pytest.mark.parametrize("kind, settings, named", [
    ("gpt2", dict(activation_function="gelu"), "logits"), ("gpt2", dict(layer_norm_epsilon=1e-6), "epsilon"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "logits"),
    ("gpt2", dict(tie_word_embeddings=False), "logits"), ("gpt2", dict(n_inner=64), "mlp.c_fc"),
    ("mpt", dict(layer_norm_epsilon=1e-6), "epsilon"), ("mpt", dict(attn_config=dict(clip_qkv=99.0)), "clip_qkv"),
    ("mpt", dict(attn_config=dict(softmax_scale=0.5)), "logits")])
def test_what_computes_something_else_is_refused(kind, settings, named, tmp_path):
    hugging_face(kind, **settings).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=named):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("settings, named", [
    (dict(vocab_size=260), "wte.*257.*260"), (dict(n_positions=50), "wpe"), (dict(n_layer=3), r"h\.2"),
    (dict(n_layer=1), r"h\.1"), (dict(model_type="llama"), "llama"), (dict(n_embd="48"), "n_embd")])
def test_a_config_that_does_not_fit_its_weights_is_refused(settings, named, tmp_path):
    hugging_face().save_pretrained(tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(ModelError, match=named) as e:
        GPT.from_pretrained(str(tmp_path))
    assert "\n" not in str(e.value)


def test_a_folder_or_name_without_a_model_is_one_line(tmp_path, monkeypatch):
    hugging_face().save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-99])
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "cut"), str(tmp_path / "empty"), "no-such/model", "a/b/c"):
        with pytest.raises(ModelError, match=source) as e:
            m.load(source)
        assert "\n" not in str(e.value)
    assert "network" in str(e.value)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)        # as if it were not installed
    with pytest.raises(ModelError, match="pip install -U transformers"):
        m.load(str(tmp_path / "cut"))


def test_export_is_what_llama_cpp_reads(tmp_path):
    m.export(GPT(GPTConfig(**TINY)), str(tmp_path / "gpt2"), BYTES)
    m.export(GPT(GPTConfig(**TINY, pos="alibi", bias=False)), str(tmp_path / "mpt"), BYTES)
    gpt2, mpt = (json.loads((tmp_path / kind / "config.json").read_text()) for kind in ("gpt2", "mpt"))
    assert gpt2["architectures"] == ["GPT2LMHeadModel"] and gpt2["n_ctx"] == gpt2["n_positions"] == 8
    assert mpt["architectures"] == ["MPTForCausalLM"] and mpt["attn_config"]["alibi_bias_max"] == 8
    assert AutoTokenizer.from_pretrained(tmp_path / "mpt").model_max_length == 8
    with pytest.raises(ModelError, match="bias"):
        m.export(GPT(GPTConfig(**TINY, pos="alibi")), str(tmp_path / "neither"), BYTES)
    assert not (tmp_path / "neither").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        m.export(GPT(GPTConfig(**TINY)), str(tmp_path / "file"), BYTES)


def test_an_alibi_export_generates_beyond_the_training_context(tmp_path):
    hugging_face("mpt").save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs"))
    m.export(ours, str(tmp_path / "hf"), BYTES)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    idx = torch.tensor([list(b"def f")])
    out = back.generate(idx, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)
    for t in range(5, 65):
        assert ours(out[:, :t])[0, -1].argmax() == out[0, t]


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_the_exported_tokenizer_makes_the_same_tokens(name, tmp_path):
    tokenizer = gpt2() if name == "gpt2" else get_tokenizer(name)
    config = TINY | dict(vocab_size=tokenizer.n_vocab)
    m.export(GPT(GPTConfig(**config)), str(tmp_path), tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot_token
    rng = random.Random(0)
    words = [tokenizer.decode([rng.randrange(tokenizer.eot_token)]) for _ in range(3000)]
    texts = ["", "It's  DON'T\r\n\n\tnaïve e\u0301 日本 🙂 ", "=" * 99]
    texts += ["".join(rng.choices(words, k=8)) for _ in range(500)]
    texts += ["".join(rng.choices("ab- ", k=30)) for _ in range(500)]
    for text in texts:
        assert theirs.encode(text) == tokenizer.encode_ordinary(text), text
        assert theirs.decode(theirs.encode(text)) == text
    assert m.load(str(tmp_path))[1] == {"tokenizer": name}


def test_another_tokenizer_is_refused(tmp_path):
    hugging_face().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):      # none at all
        m.load(str(tmp_path))
    m.hf_tokenizer(BYTES, 8).save_pretrained(tmp_path)
    assert m.load(str(tmp_path))[1]["tokenizer"] == "bytes"
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<pad>"])
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="tokenizer"):
        m.load(str(tmp_path))


# ---- the ops, against hand-written float64


def by_hand_attention(q, k, v, slopes):
    """One query at a time, from the formula."""
    out = torch.zeros_like(v)
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            for i in range(q.size(2)):
                s = torch.stack([q[b, h, i] @ k[b, h, j] / math.sqrt(q.size(-1)) + slopes[h] * (j - i)
                                 for j in range(i + 1)])
                p = (s - s.max()).exp()
                out[b, h, i] = (p / p.sum()) @ v[b, h, :i + 1]
    return out


@pytest.mark.parametrize("T", [1, 13])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention_is_the_formula(T, alibi):
    torch.manual_seed(T)
    q, k, v = torch.randn(3, 2, 3, T, 8, dtype=torch.float64)
    slopes = m.alibi_slopes(3) if alibi else None
    expected = by_hand_attention(q, k, v, [0, 0, 0] if slopes is None else slopes.double())
    torch.testing.assert_close(m.attention(q, k, v, slopes), expected)


@pytest.mark.parametrize("alibi", [False, True])
def test_bf16_attention_is_no_worse_than_eager_pytorch(alibi):
    """Error against fp64, beside the same attention with bias and softmax output in bf16."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 8, 300, 64).bfloat16()
    slopes = m.alibi_slopes(8) if alibi else torch.zeros(8)
    i = torch.arange(300)
    bias = (slopes[:, None, None] * (i - i[:, None])).masked_fill(i > i[:, None], -math.inf)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), bias.double())
    eager = torch.softmax(q @ k.transpose(-2, -1) / 8 + bias.bfloat16(), dim=-1) @ v
    theirs = (eager.double() - exact).abs()
    ours = (m.attention(q, k, v, slopes if alibi else None).double() - exact).abs()
    assert ours.max() < 2 * theirs.max() + 1e-3
    assert ours.mean() <= theirs.mean()


def test_attention_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 512, 8)
    v = torch.ones(1, 1, 512, 8)
    last = m.attention(q, k, v, dropout_p=0.25)[0, 0, 256:, 0]      # every weight is 1 / (i + 1)
    assert abs(last.mean() - 1) < 0.02 and last.std() > 0
    assert m.attention(q, k, v).std() < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_layer_norm_is_the_formula(bias):
    torch.manual_seed(0)
    x, r = torch.randn(2, 5, 24, dtype=torch.float64) * 3 + 7, torch.randn(2, 5, 24, dtype=torch.float64)
    w, b = torch.randn(24, dtype=torch.float64), torch.randn(24, dtype=torch.float64) if bias else None

    def formula(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred ** 2).mean(-1, keepdim=True) + 1e-5).sqrt() * w + (b if bias else 0)
    torch.testing.assert_close(m.layer_norm(x, w, b), formula(x))
    y, stream = m.layer_norm(x, w, b, residual=r)
    torch.testing.assert_close(stream, x + r)
    torch.testing.assert_close(y, formula(x + r))


def test_layer_norm_statistics_are_fp32_for_bf16():
    x = (torch.randn(4, 512) + 40).bfloat16()       # bf16 statistics would lose this variance
    expected = F.layer_norm(x.double(), (512,))
    assert (m.layer_norm(x, torch.ones(512)).double() - expected).abs().max() < 0.02


def test_linear_cross_entropy_is_the_formula():
    torch.manual_seed(0)
    x, w = torch.randn(7, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64)
    t = torch.tensor([3, 0, 10, -1, 5, -1, 2])
    logits = x @ w.t()
    expected = [0.0 if t[i] < 0 else logits[i].exp().sum().log() - logits[i, t[i]] for i in range(7)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(m.linear_cross_entropy(x, w, t, "none"), expected)
    torch.testing.assert_close(m.linear_cross_entropy(x, w, t), expected.sum() / 5)


# ---- the model


def test_alibi_slopes_of_the_paper():
    assert m.alibi_slopes(8).tolist() == [2.0 ** -h for h in range(1, 9)]
    twelve = [2 ** -h for h in range(1, 9)] + [2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5]
    assert m.alibi_slopes(12).tolist() == pytest.approx(twelve, rel=1e-6)
    assert m.alibi_slopes(1).tolist() == [2.0 ** -8]


@pytest.mark.parametrize("pos", ["learned", "alibi"])
def test_no_token_sees_a_later_one(pos):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=3, n_embd=24, pos=pos)).eval()
    idx = torch.randint(0, 50, (1, 16))
    for j in range(16):
        changed = idx.clone()
        changed[0, j] = (idx[0, j] + 1) % 50
        same = (model(idx) == model(changed))[0].all(-1)
        assert same[:j].all() and not same[j]


def test_initialisation_is_gpt2s():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=1000, n_layer=8, n_head=4, n_embd=256))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            p = p[:1000] if name == "wte.weight" else p
            assert p.std().item() == pytest.approx(std, rel=0.03) and abs(p.mean()) < 3e-4, name
    assert model.wte.weight.shape == (1024, 256) and not model.wte.weight[1000:].any()


def test_sizes_of_the_published_models():
    """Radford et al. 2019, as Hugging Face counts them, without padding."""
    with torch.device("meta"):
        for n_layer, n_head, n_embd, millions in ((12, 12, 768, 124.4), (48, 25, 1600, 1557.6)):
            model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
            assert (model.num_params() - 47 * n_embd) / 1e6 == pytest.approx(millions, abs=0.1)


def test_dropout_acts_in_training_only():
    model, idx = GPT(GPTConfig(**TINY, dropout=0.5)), torch.randint(0, 9, (1, 8))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_alibi_reads_past_block_size_and_learned_positions_refuse():
    idx = torch.randint(0, 9, (1, 12))
    assert GPT(GPTConfig(**TINY, pos="alibi"))(idx).shape == (1, 12, 9)
    with pytest.raises(ModelError, match="block_size=8"):
        GPT(GPTConfig(**TINY))(idx)


def test_crop_block_size_keeps_the_function():
    model, idx = GPT(GPTConfig(**TINY | dict(block_size=16))).eval(), torch.randint(0, 9, (1, 8))
    before = model(idx)
    model.crop_block_size(8)
    assert torch.equal(model(idx), before) and model.wpe.weight.requires_grad
    with pytest.raises(ModelError, match="block_size=16"):
        model.crop_block_size(16)


def test_greedy_generation_takes_the_likeliest_token():
    torch.manual_seed(0)
    model, start = GPT(GPTConfig(**TINY)).eval(), torch.tensor([[1, 2, 3]])
    idx = start
    for _ in range(9):      # beyond block_size the context slides
        idx = torch.cat((idx, model(idx[:, -8:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(start, 9, temperature=0), idx)
    assert torch.equal(model.generate(start, 9, top_k=1), idx)


@pytest.mark.parametrize("wrong", [dict(n_embd=10, n_head=4), dict(pos="rotary"), dict(n_layer=0), dict(dropout=1.0)])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ModelError, match=list(wrong)[0]):
        GPTConfig(**wrong)


# ---- checkpoints


def test_save_and_load_give_the_model_back(tmp_path):
    torch.manual_seed(0)
    path, model = str(tmp_path / "a.pt"), GPT(GPTConfig(**TINY, pos="alibi", bias=False))
    m.save(path, model, tokenizer="bytes", step=3, lineage=[{"from": "x"}])
    back, meta = m.load(path)
    idx = torch.randint(0, 9, (1, 8))
    assert torch.equal(back(idx), model.eval()(idx)) and back.config == model.config
    assert meta == {"tokenizer": "bytes", "step": 3, "lineage": [{"from": "x"}]} and not back.training
    assert all(p.requires_grad for p in back.parameters())
    m.save(path, model.bfloat16(), tokenizer="bytes")
    assert all(p.dtype == torch.float32 for p in m.load(path)[0].parameters())


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path, model = str(tmp_path / "a.pt"), GPT(GPTConfig(**TINY))
    m.save(path, model, tokenizer="gpt2", step=1)

    def disk_full(obj, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError):
        m.save(path, model, tokenizer="gpt2", step=2)
    assert m.load(path)[1]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path, model = tmp_path / "a.pt", GPT(GPTConfig(**TINY))

    def refused(match):
        with pytest.raises(ModelError, match=match) as e:
            m.load(str(path))
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    refused("no such")
    path.write_text("hello")
    refused("not a checkpoint")
    torch.save({"weights": 1}, path)
    refused("config, model and meta")
    m.save(str(path), model, tokenizer="bytes")
    whole = torch.load(path, weights_only=True)
    for wrong, match in ((dict(meta={}), "tokenizer"), (dict(meta={"tokenizer": "bpe"}), "bpe"),
                         (dict(config=whole["config"] | {"rotary": True}), "rotary"),
                         (dict(config=whole["config"] | {"n_layer": 2}), r"h\.1\."),
                         (dict(config=whole["config"] | {"n_embd": 32}), "wte.weight")):
        torch.save(whole | wrong, path)
        refused(match)
    m.save(str(path), model, tokenizer="bytes")
    path.write_bytes(path.read_bytes()[:-2000])
    refused("cut short")
    torch.save(whole, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:111])       # here torch raises struct.error
    refused("cut short")


def test_the_command_exports_a_checkpoint(run, refused, tmp_path):
    m.save(str(tmp_path / "a.pt"), GPT(GPTConfig(**TINY | dict(vocab_size=257))), tokenizer="bytes")
    result = run("model.py", "a.pt", "--export", "hf", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert m.load(str(tmp_path / "hf"))[1] == {"tokenizer": "bytes"}
    assert "b.pt" in refused("model.py", "b.pt", "--export", "hf", cwd=tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    m.atomic_save({"step": 1}, str(path))

    def full(obj, f):
        f.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="a.pt"):
        m.atomic_save({"step": 2}, str(path))
    assert m.load_pickle(str(path)) == {"step": 1} and [f.name for f in tmp_path.iterdir()] == ["a.pt"]
