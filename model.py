"""GPT-2, whole: three ops, the model, and its checkpoints.

    map     layer_norm               normalise each row of the residual stream
            attention                causal softmax(q k^T) v, with ALiBi and dropout
            linear_cross_entropy     the tied head and the loss in one
            GPTConfig, GPT           the model; GPT.from_pretrained reads Hugging Face folders
            save, load, export       checkpoints of our own; Hugging Face folders

Two forms, each exactly one Hugging Face architecture, so that weights travel both ways:

    pos="learned", bias=True      GPT2LMHeadModel (tanh GELU)
    pos="alibi",   bias=False     MptForCausalLM  (erf GELU)

Letters in shape comments: B sequences, T tokens, C channels (n_embd), H heads, D = C / H channels
of one head, V tokens of the vocabulary, N rows (B times T).
"""
import json
import math
import os
import pickle
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class ModelError(ValueError):
    """A configuration or a checkpoint that cannot be used; the message is one line for the user."""


def at_least_fp32(dtype):
    """Statistics, softmax and losses are computed in fp32, or in fp64 where the input is fp64."""
    return torch.promote_types(dtype, torch.float32)


# ---------------------------------------------------------------------------------------------
# layer_norm
#
#   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias          over the last dimension
#
# The residual form adds first: a pre-LN block does x = x + branch; h = layer_norm(x) at every
# turn, and one pass over the stream can do both.


def layer_norm_ref(x, weight, bias=None, eps=1e-5, residual=None):
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450) with fp32 statistics.

    x, residual: (..., C); weight, bias: (C,). Returns (..., C) in x's dtype; with `residual`,
    the pair (layer_norm(x + residual), x + residual).
    """
    if residual is not None:
        x = x + residual
    acc = at_least_fp32(x.dtype)
    y = F.layer_norm(x.to(acc), weight.shape, weight.to(acc),
                     None if bias is None else bias.to(acc), eps).to(x.dtype)
    return y if residual is None else (y, x)


layer_norm = layer_norm_ref     # no kernel yet: on every device the definition is the entry


# ---------------------------------------------------------------------------------------------
# attention
#
#   s_ij = q_i . k_j / sqrt(D) + slope * (j - i)    for j <= i, else -inf
#   p_ij = exp(s_ij) / sum_j exp(s_ij)              softmax in fp32 whatever the input is
#   y_i  = sum_j dropout(p_ij) v_j


def attention_ref(q, k, v, slopes=None, dropout_p=0.0):
    """Causal attention (Vaswani et al. 2017), optionally with ALiBi (Press et al. 2022).

    q, k, v: (B, H, T, D); slopes: (H,) or None. Returns (B, H, T, D) in v's dtype. With bf16 inputs
    the products q k^T are rounded to bf16 before they meet the bias and the softmax in fp32.
    """
    T, D = q.shape[-2:]
    i = torch.arange(T, device=q.device, dtype=at_least_fp32(q.dtype))
    distance = i[None, :] - i[:, None]                                         # (T, T), j - i
    bias = 0 * distance if slopes is None else slopes[:, None, None] * distance     # or (H, T, T)
    bias = bias.masked_fill(distance > 0, -math.inf)                           # causal
    scores = torch.add(bias, q @ k.transpose(-2, -1), alpha=1 / math.sqrt(D))  # (B, H, T, T)
    p = F.dropout(torch.softmax(scores, dim=-1), dropout_p)
    return p.to(v.dtype) @ v


attention = attention_ref       # no kernel yet: on every device the definition is the entry


def alibi_slopes(n_head):
    """ALiBi's slopes, (n_head,) fp32: 2^(-8 h / n) for h = 1..n where n is a power of two.

    Other counts take the slopes of the power of two below, then every second one of the power
    above (Press et al. 2022, arXiv:2108.12409, and their released code).
    """
    n = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * h / n) for h in range(1, n + 1)]
    slopes += [2 ** (-4 * h / n) for h in range(1, 2 * (n_head - n), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------
# linear_cross_entropy
#
#   loss_n = log sum_v exp(x_n . w_v) - x_n . w_target(n)


def linear_cross_entropy_ref(x, weight, targets, reduction="mean", ignore_index=-1):
    """Cross-entropy, in nats, of the logits x @ weight.T against targets.

    x: (N, C); weight: (V, C); targets: (N,) of int64, `ignore_index` where there is none.
    reduction: "mean" over the targets that count, or "none" for the (N,) losses.
    """
    logits = F.linear(x, weight)                                               # (N, V)
    return F.cross_entropy(logits.to(at_least_fp32(logits.dtype)), targets,
                           ignore_index=ignore_index, reduction=reduction)


linear_cross_entropy = linear_cross_entropy_ref     # no kernel yet: the definition is the entry


# ---------------------------------------------------------------------------------------------
# The model


@dataclass
class GPTConfig:
    """The shape of a model. Defaults are GPT-2 124M. Raises ModelError where it cannot be built."""
    block_size: int = 1024      # tokens of context
    vocab_size: int = 50257     # tokens that can occur; the embedding is padded to a multiple of 64
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
            raise ModelError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}: "
                             "every head takes an equal share of the channels")
        if self.pos not in ("learned", "alibi"):
            raise ModelError(f'pos="{self.pos}": expected "learned" or "alibi"')
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout={self.dropout}: expected 0 <= dropout < 1")

    @property
    def padded_vocab_size(self):
        return 64 * math.ceil(self.vocab_size / 64)     # matrix units like even shapes


class LayerNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x, residual=None):
        return layer_norm(x, self.weight, self.bias, residual=residual)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, slopes):
        B, T, C = x.shape
        H, dropout_p = self.config.n_head, self.config.dropout if self.training else 0.0
        qkv = self.c_attn(x).view(B, T, 3, H, C // H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # each (B, H, T, D), no copy
        y = attention(q, k, v, slopes, dropout_p)                   # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)                      # heads side by side again
        return F.dropout(self.c_proj(y), self.config.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        gelu = "tanh" if self.config.pos == "learned" else "none"   # GPT-2's and MPT's
        x = self.c_proj(F.gelu(self.c_fc(x), approximate=gelu))     # (B, T, 4C) inside
        return F.dropout(x, self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, slopes):
        h, x = self.ln_2(self.attn(self.ln_1(x), slopes), residual=x)
        return x + self.mlp(h)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with learned or ALiBi positions and a head tied to the embedding.

    model(idx) -> logits (B, T, V); model(idx, targets) -> the loss in nats, its mean or, with
    reduction="none", (B, T) losses. idx, targets: (B, T) int64; target -1 counts for nothing.
    Raises ModelError where T exceeds block_size and positions are learned.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.pos == "learned" else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = LayerNorm(config)
        slopes = alibi_slopes(config.n_head) if config.pos == "alibi" else None
        self.register_buffer("slopes", slopes, persistent=False)

        # GPT-2's initialisation; residual projections are scaled down so that the stream's
        # variance does not grow with depth
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        with torch.no_grad():
            self.wte.weight[config.vocab_size:] = 0     # padding: never read, never a gradient

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def hidden(self, idx):
        """The final, normalised stream (B, T, C) for idx (B, T)."""
        T = idx.size(1)
        x = self.wte(idx)
        if self.wpe is not None:
            if T > self.config.block_size:
                raise ModelError(f"{T} tokens of context, but this model's learned positions end "
                                 f"at block_size={self.config.block_size}")
            x = x + self.wpe.weight[:T]
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, self.slopes)
        return self.ln_f(x)

    def forward(self, idx, targets=None, reduction="mean"):
        x = self.hidden(idx)
        head = self.wte.weight[:self.config.vocab_size]     # padding takes no probability
        if targets is None:
            return F.linear(x, head)
        loss = linear_cross_entropy(x.flatten(0, 1), head, targets.flatten(), reduction)
        return loss.view_as(targets) if reduction == "none" else loss

    def crop_block_size(self, block_size):
        """Change the context length in place. Learned positions can only become fewer."""
        if self.wpe is not None:
            if block_size > self.config.block_size:
                raise ModelError(f"block_size={block_size}: this model's learned positions end at "
                                 f"{self.config.block_size}")
            self.wpe = nn.Embedding.from_pretrained(self.wpe.weight[:block_size].detach().clone(), freeze=False)
        self.config.block_size = block_size

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue idx (B, T) by sampling; returns (B, T + max_new_tokens). Temperature 0 is greedy."""
        for _ in range(max_new_tokens):
            x = self.hidden(idx[:, -self.config.block_size:])[:, -1]            # (B, C)
            logits = F.linear(x, self.wte.weight[:self.config.vocab_size]).float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                p = torch.softmax(logits / temperature, dim=-1)
                token = torch.multinomial(p, 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)
        return idx

    @torch.no_grad()
    def total_loss(self, tokens, starts, block_size, batch_size, autocast=nullcontext()):
        """Sum of the losses in nats over the windows tokens[s : s + block_size + 1], s in starts.

        tokens: a numpy array (n,) of integers; a window over its end is short. Each window's first
        token is context alone. Draws no random number, whatever mode the model is in.
        """
        training, device = self.training, self.wte.weight.device
        self.eval()
        total = torch.zeros((), dtype=torch.float64)
        for i in range(0, len(starts), batch_size):
            windows = [tokens[s:s + block_size + 1] for s in starts[i:i + batch_size]]
            rows = torch.full((len(windows), block_size + 1), -1)
            for row, window in zip(rows, windows):
                row[:len(window)] = torch.from_numpy(window.astype("int64"))
            rows = rows.to(device)                                  # (B, T + 1), -1 behind a short one
            with autocast:
                losses = self(rows[:, :-1].clamp(min=0), rows[:, 1:], reduction="none")     # (B, T)
            total += losses.cpu().double().sum()
        self.train(training)
        return total.item()

    @classmethod
    def from_pretrained(cls, name):
        """OpenAI's weights by name, or any local Hugging Face folder of a GPT-2 or MPT model.

        name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" (downloaded once into torch.hub's
        cache), or a folder with config.json and *.safetensors. Raises ModelError.
        """
        if os.path.isdir(name):
            hf = read_json(os.path.join(name, "config.json"))
            files = sorted(Path(name).glob("*.safetensors"))
        elif name in OPENAI:
            n_layer, n_head, n_embd = OPENAI[name]
            hf = dict(model_type="gpt2", n_layer=n_layer, n_head=n_head, n_embd=n_embd)
            files = [download_openai(name)]
        else:
            raise ModelError(f"{name}: neither a folder nor one of {', '.join(OPENAI)}")
        if not files:
            raise ModelError(f"{name}: no .safetensors in this folder; write it with save_pretrained")
        config = config_from_hf(hf, name)
        state = {}
        for file in files:
            try:
                state |= load_file(file)
            except SafetensorError as e:
                raise ModelError(f"{file}: not a whole safetensors file ({e}); delete it and try again")
        return build(config, weights_from_hf(state, config, name), name)


# ---------------------------------------------------------------------------------------------
# Checkpoints


def atomic_save(obj, path):
    """torch.save to a temporary file beside path, flushed to the disk, then renamed over it.

    A kill at any instant leaves the previous file whole.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    tmp = f"{path}.tmp"
    try:
        with open(tmp, "wb") as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        if os.path.exists(tmp):
            os.remove(tmp)
        raise


def save(path, model, **meta):
    """Write model alone: its config, its weights in fp32 on the CPU, and meta (plain values).

    model may still be wrapped by DistributedDataParallel or torch.compile.
    """
    model = getattr(model, "module", model)
    model = getattr(model, "_orig_mod", model)
    weights = {name: p.detach().float().cpu() for name, p in model.state_dict().items()}
    atomic_save({"config": asdict(model.config), "model": weights, "meta": meta}, path)


def load(path, device="cpu"):
    """Read what save wrote: (model in eval mode, meta). Raises ModelError."""
    checkpoint = load_pickle(path)
    if not isinstance(checkpoint, dict) or not {"config", "model", "meta"} <= checkpoint.keys():
        raise ModelError(f"{path}: not a checkpoint of this project (expected config, model and meta)")
    known = {f.name for f in fields(GPTConfig)}
    if checkpoint["config"].keys() != known:
        raise ModelError(f"{path}: its config has other keys than GPTConfig's: "
                         f"{', '.join(sorted(checkpoint['config'].keys() ^ known))}")
    config = GPTConfig(**checkpoint["config"])
    return build(config, checkpoint["model"], path).to(device).eval(), checkpoint["meta"]


def load_pickle(path):
    """torch.load that runs no code from the file and fails in one line. Raises ModelError."""
    if not os.path.isfile(path):
        raise ModelError(f"{path}: no such checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError):
        raise ModelError(f"{path}: not a checkpoint, or cut short")


def build(config, weights, source):
    """A GPT that takes `weights` (a state dict) as its own, without initialising it first."""
    with torch.device("meta"):
        model = GPT(config)
    expected = {name: p.shape for name, p in model.state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise ModelError(f"{source}: {name} is missing")
        if name not in expected:
            raise ModelError(f"{source}: {name} does not belong to a model of this config")
        if weights[name].shape != expected[name]:
            raise ModelError(f"{source}: {name} is {tuple(weights[name].shape)}, "
                             f"expected {tuple(expected[name])}")
    model.load_state_dict(weights, assign=True)
    for p in model.parameters():
        p.requires_grad_(True)
    if config.pos == "alibi":
        model.slopes = alibi_slopes(config.n_head)
    return model


# ---------------------------------------------------------------------------------------------
# Hugging Face folders

OPENAI = {      # name: n_layer, n_head, n_embd
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}

MPT_NAMES = (   # ours, theirs; GPT-2's names are ours behind "transformer."
    ("h.", "blocks."), ("ln_1", "norm_1"), ("ln_2", "norm_2"), ("ln_f", "norm_f"),
    ("c_attn", "Wqkv"), ("attn.c_proj", "attn.out_proj"),
    ("mlp.c_fc", "ffn.up_proj"), ("mlp.c_proj", "ffn.down_proj"),
)


def hf_name(name, pos):
    if pos == "alibi":
        for ours, theirs in MPT_NAMES:
            name = name.replace(ours, theirs)
    return f"transformer.{name}"


def hf_layout(name, p, pos):
    """GPT-2's linear layers are Hugging Face's Conv1D, which keeps its weight as (in, out)."""
    return p.t().contiguous() if pos == "learned" and ".c_" in name and p.dim() == 2 else p


def config_from_hf(hf, source):
    """GPTConfig from a Hugging Face config.json (as a dict). Raises ModelError for other models."""
    hf = {"attn_config": {}, **hf}
    if hf.get("model_type") == "gpt2":
        expected = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                        scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
        config = dict(block_size=hf.get("n_positions", 1024), n_layer=hf["n_layer"],
                      n_head=hf["n_head"], n_embd=hf["n_embd"], bias=True, pos="learned")
        if hf.get("n_inner") not in (None, 4 * hf["n_embd"]):
            raise ModelError(f"{source}: n_inner={hf['n_inner']}, expected 4 * n_embd")
    elif hf.get("model_type") == "mpt":
        expected = dict(layer_norm_epsilon=1e-5, expansion_ratio=4, no_bias=True, logit_scale=None,
                        tie_word_embeddings=True)
        attn = dict(alibi=True, alibi_bias_max=8, clip_qkv=None, softmax_scale=None, qk_ln=False)
        expected |= attn
        hf = {**hf, **{k: hf["attn_config"].get(k, v) for k, v in attn.items()}}
        config = dict(block_size=hf["max_seq_len"], n_layer=hf["n_layers"], n_head=hf["n_heads"],
                      n_embd=hf["d_model"], bias=False, pos="alibi")
    else:
        raise ModelError(f"{source}: model_type is {hf.get('model_type')}, expected gpt2 or mpt")
    for key, value in expected.items():
        if hf.get(key, value) != value:
            raise ModelError(f"{source}: {key}={hf[key]} in config.json, this model has {value}")
    return GPTConfig(vocab_size=hf.get("vocab_size", 50257), **config)


def config_to_hf(config):
    """config.json (as a dict) of the Hugging Face architecture that this config is. Raises ModelError."""
    if (config.pos, config.bias) == ("learned", True):
        return dict(architectures=["GPT2LMHeadModel"], model_type="gpt2", activation_function="gelu_new",
                    n_positions=config.block_size, n_layer=config.n_layer, n_head=config.n_head,
                    n_embd=config.n_embd, vocab_size=config.vocab_size, attn_pdrop=config.dropout,
                    resid_pdrop=config.dropout, embd_pdrop=config.dropout, tie_word_embeddings=True)
    if (config.pos, config.bias) == ("alibi", False):
        return dict(architectures=["MptForCausalLM"], model_type="mpt", max_seq_len=config.block_size,
                    n_layers=config.n_layer, n_heads=config.n_head, d_model=config.n_embd,
                    vocab_size=config.vocab_size, expansion_ratio=4, no_bias=True, learned_pos_emb=False,
                    attn_config=dict(alibi=True, alibi_bias_max=8), tie_word_embeddings=True)
    raise ModelError(f"pos={config.pos} with bias={config.bias} is no Hugging Face architecture: "
                     "learned positions go with biases (GPT-2), ALiBi without (MPT)")


def weights_from_hf(state, config, source):
    """Our state dict from theirs: renamed, transposed where they transpose, vocabulary padded."""
    with torch.device("meta"):
        names = list(GPT(config).state_dict())
    if "transformer.wte.weight" not in state:       # the hub's gpt2 files leave the prefix out
        state = {f"transformer.{name}": p for name, p in state.items()}
    weights = {}
    for name in names:
        theirs = hf_name(name, config.pos)
        if theirs not in state:
            raise ModelError(f"{source}: {theirs} is missing")
        weights[name] = hf_layout(name, state[theirs].float(), config.pos)
    padding = config.padded_vocab_size - len(weights["wte.weight"])
    weights["wte.weight"] = F.pad(weights["wte.weight"], (0, 0, 0, padding))
    return weights


def export(model, folder):
    """Write model as a Hugging Face folder that AutoModelForCausalLM loads. Raises ModelError."""
    config = model.config
    hf = config_to_hf(config)
    weights = {hf_name(name, config.pos): hf_layout(name, p.detach().float().cpu(), config.pos)
               for name, p in model.state_dict().items()}
    wte = weights["transformer.wte.weight"]
    weights["transformer.wte.weight"] = wte[:config.vocab_size].contiguous()
    os.makedirs(folder, exist_ok=True)
    save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(hf, f, indent=2)


def read_json(path):
    try:
        with open(path) as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise ModelError(f"{path}: cannot be read as JSON ({e})")


def download_openai(name):
    """Path of OpenAI's weights in torch.hub's cache, downloaded with a progress bar at first use."""
    url = f"https://huggingface.co/openai-community/{name}/resolve/main/model.safetensors"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{name}.safetensors")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
        except OSError as e:    # urllib's errors are OSErrors
            raise ModelError(f"{name}: cannot download {url} ({e}); without a network, put that file "
                             f"at {path}")
    return path
