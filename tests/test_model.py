import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM

import model as m
from model import GPT, GPTConfig, ModelError


def gpt2(n_head=4, vocab_size=101):
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_positions=40, n_embd=48, n_layer=3, n_head=n_head,
                                    attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, initializer_range=0.2))
    for name, p in hf.named_parameters():       # biases start at 0 and norms at 1, where they hide mistakes
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return hf


def mpt(n_head=4, vocab_size=101):
    torch.manual_seed(0)
    hf = MptForCausalLM(MptConfig(vocab_size=vocab_size, max_seq_len=40, d_model=48, n_layers=3, n_heads=n_head,
                                  initializer_range=0.2, attn_config=dict(alibi=True)))
    for name, p in hf.named_parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return hf


@pytest.mark.parametrize("make, n_head", [(gpt2, 4), (gpt2, 3), (mpt, 4), (mpt, 12), (mpt, 3)])
def test_agrees_with_hugging_face_both_ways(make, n_head, tmp_path):
    hf = make(n_head)
    hf.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(str(tmp_path / "theirs"))
    idx = torch.randint(0, 101, (2, 33))
    targets = torch.randint(0, 101, (2, 33))

    logits = hf(idx).logits
    assert ours(idx).shape == (2, 33, 101)
    torch.testing.assert_close(ours(idx), logits, atol=1e-5, rtol=1e-5)

    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    our_loss = ours(idx, targets)
    our_loss.backward()
    torch.testing.assert_close(our_loss, loss, atol=1e-5, rtol=1e-5)
    per_token = ours(idx, targets, reduction="none")
    torch.testing.assert_close(per_token, F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"),
                               atol=1e-5, rtol=1e-5)

    theirs = dict(hf.named_parameters())
    names = ({"h.": "blocks.", "ln_1": "norm_1", "ln_2": "norm_2", "ln_f": "norm_f", "c_attn": "Wqkv",
              "attn.c_proj": "attn.out_proj", "mlp.c_fc": "ffn.up_proj", "mlp.c_proj": "ffn.down_proj"}
             if make is mpt else {})
    for name, p in ours.named_parameters():
        for a, b in names.items():
            name = name.replace(a, b)
        grad = theirs.pop(f"transformer.{name}").grad
        mine = p.grad[:101] if "wte" in name else p.grad
        mine = mine.t() if make is gpt2 and ".c_" in name and mine.dim() == 2 else mine
        torch.testing.assert_close(mine, grad, atol=1e-5, rtol=1e-5)
    assert not theirs       # every one of their parameters was compared

    m.export(ours, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(back) is type(hf)
    torch.testing.assert_close(back(idx).logits, logits, atol=1e-5, rtol=1e-5)


def test_named_gpt2_is_found_in_the_cache(tmp_path, monkeypatch):
    """What `from_pretrained("gpt2")` reads: the hub's file, whose names lack the prefix."""
    from safetensors.torch import save_file
    monkeypatch.setattr(m, "OPENAI", {"gpt2": (3, 4, 48)})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=3, n_head=4))
    (tmp_path / "checkpoints").mkdir()
    save_file({name: p.contiguous() for name, p in hf.transformer.state_dict().items()},
              tmp_path / "checkpoints" / "gpt2.safetensors")
    ours, idx = GPT.from_pretrained("gpt2"), torch.randint(0, 50257, (1, 9))
    torch.testing.assert_close(ours(idx), hf.eval()(idx).logits, atol=1e-5, rtol=1e-5)


def test_no_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def unreachable(*_):
        raise OSError("unreachable")
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(ModelError, match=f"huggingface.co.*{tmp_path}/checkpoints/gpt2-xl.safetensors"):
        GPT.from_pretrained("gpt2-xl")


@pytest.mark.parametrize("key, value", [("activation_function", "relu"), ("n_inner", 64), ("model_type", "llama"),
                                        ("layer_norm_epsilon", 1e-6)])
def test_another_architecture_is_refused(key, value, tmp_path):
    gpt2().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=key):
        GPT.from_pretrained(str(tmp_path))


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


def test_attention_dropout_keeps_the_mean_and_drops_the_rate():
    torch.manual_seed(0)
    q = k = torch.zeros(1, 1, 512, 8)
    v = torch.ones(1, 1, 512, 8)
    y = m.attention(q, k, v, dropout_p=0.25)        # every weight is 1 / (i + 1)
    last = y[0, 0, 256:, 0]
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
    expected = torch.tensor([0.0 if t[i] < 0 else logits[i].exp().sum().log() - logits[i, t[i]] for i in range(7)],
                            dtype=torch.float64)
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
    with torch.device("meta"):      # Radford et al. 2019, counted by Hugging Face without padding
        for name, millions in (("gpt2", 124.4), ("gpt2-medium", 354.8), ("gpt2-large", 774.0), ("gpt2-xl", 1557.6)):
            n_layer, n_head, n_embd = m.OPENAI[name]
            model = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
            assert (model.num_params() - 47 * n_embd) / 1e6 == pytest.approx(millions, abs=0.1)


def test_dropout_acts_in_training_only():
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=16, dropout=0.5))
    idx = torch.randint(0, 9, (1, 8))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_alibi_reads_past_block_size_and_learned_positions_refuse():
    config = dict(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=16)
    idx = torch.randint(0, 9, (1, 12))
    assert GPT(GPTConfig(**config, pos="alibi"))(idx).shape == (1, 12, 9)
    with pytest.raises(ModelError, match="block_size=8"):
        GPT(GPTConfig(**config))(idx)


def test_crop_block_size_keeps_the_function():
    model = GPT(GPTConfig(block_size=16, vocab_size=9, n_layer=1, n_head=1, n_embd=16)).eval()
    idx = torch.randint(0, 9, (1, 8))
    before = model(idx)
    model.crop_block_size(8)
    assert torch.equal(model(idx), before) and model.wpe.weight.requires_grad
    with pytest.raises(ModelError, match="block_size=16"):
        model.crop_block_size(16)


def test_greedy_generation_takes_the_likeliest_token():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=16)).eval()
    idx = torch.tensor([[1, 2, 3]])
    for _ in range(9):      # beyond block_size the context slides
        idx = torch.cat((idx, model(idx[:, -8:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(torch.tensor([[1, 2, 3]]), 9, temperature=0), idx)
    assert torch.equal(model.generate(torch.tensor([[1, 2, 3]]), 9, top_k=1), idx)


@pytest.mark.parametrize("wrong", [dict(n_embd=10, n_head=4), dict(pos="rotary"), dict(n_layer=0), dict(dropout=1.0)])
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(ModelError, match=list(wrong)[0]):
        GPTConfig(**wrong)


# ---- checkpoints


def test_save_and_load_give_the_model_back(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=2, n_head=2, n_embd=16, pos="alibi", bias=False))
    m.save(str(tmp_path / "a.pt"), torch.compile(model), step=3, lineage=[{"from": "x"}])
    back, meta = m.load(str(tmp_path / "a.pt"))
    idx = torch.randint(0, 9, (1, 8))
    assert torch.equal(back(idx), model.eval()(idx)) and back.config == model.config
    assert meta == {"step": 3, "lineage": [{"from": "x"}]} and not back.training
    assert all(p.requires_grad for p in back.parameters())
    raw = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(raw["model"]) == set(model.state_dict())
    m.save(str(tmp_path / "b.pt"), model.bfloat16())
    assert all(p.dtype == torch.float32 for p in m.load(str(tmp_path / "b.pt"))[0].parameters())


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=16))
    m.save(str(path), model, step=1)

    def disk_full(obj, f):
        f.write(b"half of it")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError):
        m.save(str(path), model, step=2)
    assert m.load(str(path))[1]["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(ModelError, match="no such"):
        m.load(str(path))
    path.write_text("hello")
    with pytest.raises(ModelError, match="not a checkpoint"):
        m.load(str(path))
    torch.save({"weights": 1}, path)
    with pytest.raises(ModelError, match="not a checkpoint of this project"):
        m.load(str(path))
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=16))
    m.save(str(path), model)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match="cut short"):
        m.load(str(path))
