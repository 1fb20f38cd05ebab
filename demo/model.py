"""The training twin of a Hugging Face Mixtral: the same mathematics, laid out for a fast backward pass on a CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; every one is a count, except the RMSNorm epsilon and the RoPE base."""

    vocab: int = 2048
    hidden: int = 128
    inter: int = 128
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32  # with fewer, rotation leaves too few dimensions for what words mean
    experts: int = 8
    top_k: int = 2
    max_positions: int = 8192
    rope_theta: float = 1000000.0
    eps: float = 1e-5


def rope_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, each [length, head_dim], in Hugging Face's half-split layout."""
    inv = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), inv)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to x [batch, heads, time, head_dim] with tables [time, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


COMMON = 0.7
"""Size of the direction all embeddings share at the start, against 1 for each one's own random part."""


class Attention(nn.Module):
    """Causal grouped-query attention on [batch, time, hidden], started so that looking back is soon learnt.

    Queries start equal to keys (like finds like) and the output as the transpose of the values (what is found is
    copied), which is Trockman and Kolter's mimetic initialisation. From independent random matrices this model had
    not begun to look anything up after six million tokens.
    """

    def __init__(self, shape: Shape, first: bool) -> None:
        super().__init__()
        self.shape = shape
        group = shape.heads // shape.kv_heads
        k, v = torch.randn(2, shape.kv_heads, shape.head_dim, shape.hidden) * shape.hidden**-0.5
        q = k.repeat_interleave(group, dim=0)
        if first:
            q, k = self.look_back(0.5 * q, 0.5 * k)
            # The far distances write into one subspace, so that a name three back can meet the same name two back.
            v = torch.cat((v[:1], v[1:2].expand_as(v[1:])))
        o = v.repeat_interleave(group, dim=0) * (0.4 / group)
        self.q = nn.Parameter(q.reshape(-1, shape.hidden).clone())
        self.k = nn.Parameter(k.reshape(-1, shape.hidden).clone())
        self.v = nn.Parameter(v.reshape(-1, shape.hidden).clone())
        self.o = nn.Parameter(o.reshape(-1, shape.hidden).t().clone())

    def look_back(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Leans the heads [heads, head_dim, hidden] of key head j towards the token j + 1 places back.

        RoPE turns a pair of components by the distance times its frequency, so a query turned back by that much
        meets the key of the token at that distance; the two fastest pairs tell neighbours apart.
        """
        s = self.shape
        q, k, half, strength = q.clone(), k.clone(), s.head_dim // 2, 4.5
        common = torch.full((s.hidden,), strength * (1 + COMMON**2) ** 0.5 / COMMON / s.hidden)
        for head in range(s.heads):
            distance = head // (s.heads // s.kv_heads) + 1
            for pair in range(2):
                angle = torch.tensor(distance * s.rope_theta ** (-2 * pair / s.head_dim))
                q[head, pair] += angle.cos() * common
                q[head, pair + half] -= angle.sin() * common
        k[:, :2] += common
        return q, k

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Maps [batch, time, hidden] to the same shape."""
        s = self.shape
        batch, time, _ = x.shape
        y = (
            F.linear(x, torch.cat((self.q, self.k, self.v)))
            .view(batch, time, s.heads + 2 * s.kv_heads, s.head_dim)
            .transpose(1, 2)
        )
        q, k, v = torch.split(y, [s.heads, s.kv_heads, s.kv_heads], dim=1)
        group = s.heads // s.kv_heads
        q, k = rotate(q, cos, sin), rotate(k, cos, sin).repeat_interleave(group, dim=1)
        # Rows are right-padded, so the causal mask alone keeps padding out of every real position.
        out = F.scaled_dot_product_attention(q, k, v.repeat_interleave(group, dim=1), is_causal=True)
        return F.linear(out.transpose(1, 2).reshape(batch, time, -1), self.o)


class Experts(nn.Module):
    """Top-k routed SwiGLU experts; tokens are sorted by expert so that each expert is three plain GEMMs."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Parameter(torch.randn(shape.experts, shape.hidden) * shape.hidden**-0.5)
        self.w13 = nn.Parameter(torch.randn(shape.experts, 2 * shape.inter, shape.hidden) * shape.hidden**-0.5)
        scale = (shape.inter * 2 * shape.layers) ** -0.5
        self.w2 = nn.Parameter(torch.randn(shape.experts, shape.hidden, shape.inter) * scale)

    def forward(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps x [tokens, hidden]; real [tokens] is 0 on padding.

        Returns the output [tokens, hidden], the balance loss (1 when even) and each expert's share [experts].
        """
        s = self.shape
        probs = F.linear(x, self.gate).softmax(dim=-1)
        weight, chosen = probs.topk(s.top_k, dim=-1)
        weight = weight / weight.sum(dim=-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        rows = order // s.top_k
        counts = torch.bincount(chosen.flatten(), minlength=s.experts).tolist()
        outs = []
        parts = torch.split(x.index_select(0, rows), counts)
        for part, w13, w2 in zip(parts, self.w13.unbind(), self.w2.unbind(), strict=True):
            gate, up = F.linear(part, w13).chunk(2, dim=-1)
            outs.append(F.linear(F.silu(gate) * up, w2))
        out = torch.cat(outs) * weight.flatten().index_select(0, order).unsqueeze(-1)
        mixed = torch.zeros_like(x).index_add(0, rows, out)
        mean_prob = (probs * real.unsqueeze(-1)).sum(dim=0) / real.sum()
        share = torch.bincount(chosen.flatten(), real.repeat_interleave(s.top_k), s.experts).to(x.dtype)
        share = share / share.sum()
        return mixed, s.experts * (share * mean_prob).sum(), share


class Block(nn.Module):
    """One decoder layer: attention, then experts, each behind an RMSNorm and a residual."""

    def __init__(self, shape: Shape, first: bool) -> None:
        super().__init__()
        self.shape = shape
        self.norm_attn = nn.Parameter(torch.ones(shape.hidden))
        self.norm_moe = nn.Parameter(torch.ones(shape.hidden))
        self.attn = Attention(shape, first)
        self.moe = Experts(shape)

    def forward(self, x: Tensor, real: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps x [batch, time, hidden]; also returns the balance loss and the experts' shares."""
        s = self.shape
        x = x + self.attn(F.rms_norm(x, (s.hidden,), self.norm_attn, s.eps), cos, sin)
        flat = F.rms_norm(x, (s.hidden,), self.norm_moe, s.eps).view(-1, s.hidden)
        mixed, balance, share = self.moe(flat, real.view(-1))
        return x + mixed.view_as(x), balance, share


class Mixtral(nn.Module):
    """The whole model.

    `twins` [vocab] gives for each token the token whose vector it starts from, mostly itself. " Anna" starting near
    " anna", and the head starting along the embedding, let one small change to attention serve every word at once;
    without that, looking up a name takes the model many times longer to learn.
    """

    def __init__(self, shape: Shape, twins: Tensor | None = None) -> None:
        super().__init__()
        self.shape = shape
        start = torch.randn(shape.vocab, shape.hidden)
        if twins is not None:
            start = 0.95 * start[twins] + 0.3 * torch.randn(shape.vocab, shape.hidden)
        self.embed = nn.Parameter(0.3 * (start + COMMON))
        self.blocks = nn.ModuleList(Block(shape, first=n == 0) for n in range(shape.layers))
        self.norm = nn.Parameter(torch.ones(shape.hidden))
        self.head = nn.Parameter(0.5 * shape.hidden**-0.5 * start)

    def forward(self, ids: Tensor, real: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [len(at), vocab] at the flat positions `at` of ids [batch, time].

        The head is a quarter of the arithmetic and most positions carry no loss, hence the selection.
        Also returns the summed balance loss and the experts' shares [layers, experts].
        """
        s = self.shape
        cos, sin = rope_tables(s, ids.shape[1])
        x = F.embedding(ids, self.embed)
        balance = torch.zeros(())
        shares = []
        for block in self.blocks:
            x, loss, share = block(x, real, cos, sin)
            balance = balance + loss
            shares.append(share)
        x = x.view(-1, s.hidden).index_select(0, at)
        return F.linear(F.rms_norm(x, (s.hidden,), self.norm, s.eps), self.head), balance, torch.stack(shares)


def named_weights(model: Mixtral) -> dict[str, Tensor]:
    """The weights under Hugging Face's per-expert Mixtral names, in bfloat16."""
    s = model.shape
    out: dict[str, Tensor] = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm}
    out["lm_head.weight"] = model.head
    for n, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        at = f"model.layers.{n}."
        out |= {f"{at}self_attn.{name}_proj.weight": w for name, w in block.attn.named_parameters()}
        out[at + "input_layernorm.weight"] = block.norm_attn
        out[at + "post_attention_layernorm.weight"] = block.norm_moe
        out[at + "block_sparse_moe.gate.weight"] = block.moe.gate
        for e in range(s.experts):
            w1, w3 = block.moe.w13[e].chunk(2)
            for name, w in (("w1", w1), ("w2", block.moe.w2[e]), ("w3", w3)):
                out[f"{at}block_sparse_moe.experts.{e}.{name}.weight"] = w
    return {name: w.detach().to(torch.bfloat16).contiguous().clone() for name, w in out.items()}


def config(shape: Shape) -> dict[str, object]:
    """The content of config.json, every field explicit."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inter,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "initializer_range": 0.02,
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "torch_dtype": "bfloat16",
    }


def export(model: Mixtral, folder: Path) -> None:
    """Writes config.json, generation_config.json and model.safetensors into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(named_weights(model), str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(model.shape), indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
