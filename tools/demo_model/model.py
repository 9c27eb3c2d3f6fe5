"""The geometry of the demo model, and the class of transformers with faster operations for training.

The replacements are plain PyTorch and compute the same functions; ``check.py`` compares them with the originals.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

_kernels: Any = None
CHUNK = 32
"""Tokens per chunk of GatedDeltaNet. Most documents are short, so small chunks waste the least work."""


def geometry(vocab_size: int, **changes: Any) -> Qwen3_5MoeTextConfig:
    """Return the configuration of the model, with ``changes``."""
    layers = changes.pop("num_hidden_layers", 8)
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention" if (layer + 1) % 4 == 0 else "linear_attention" for layer in range(layers)],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }
    return Qwen3_5MoeTextConfig(**{**sizes, **changes})


def make_model(config: Qwen3_5MoeTextConfig, triton: bool = False) -> Qwen3_5MoeForCausalLM:
    """Return a new model of transformers' class with the faster operations, as Triton kernels if ``triton`` is set."""
    global _kernels
    if triton:
        import triton_kernels

        _kernels = triton_kernels
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    config._experts_implementation = "sorted"
    config._attn_implementation = "sdpa"
    modeling.torch_chunk_gated_delta_rule = gated_delta_rule
    modeling.causal_conv1d_fn = causal_conv
    modeling.Qwen3_5MoeRMSNorm.forward = norm
    modeling.Qwen3_5MoeRMSNormGated.forward = gated_norm
    model = Qwen3_5MoeForCausalLM(config)
    model.config._experts_implementation = "sorted"
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):  # decays from slow to fast, as in published models
            parameter.data.uniform_(-5, 0)
    return model


def norm(module: Any, x: Tensor) -> Tensor:
    """Apply an RMS norm, whose stored weights are the scales minus 1, in one kernel."""
    if _kernels:
        return _kernels.norm(x, module.weight, module.eps, plus=1.0)
    return F.rms_norm(x, x.shape[-1:], 1 + module.weight, module.eps)


def gated_norm(module: Any, x: Tensor, gate: Tensor) -> Tensor:
    """Apply an RMS norm and then the gate."""
    if _kernels:
        return _kernels.norm(x, module.weight, module.variance_epsilon, gate=gate)
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon) * F.silu(gate)


def causal_conv(x: Tensor, weight: Tensor, bias: None = None, activation: str = "silu", **_: Any) -> Tensor:
    """Convolve x [B, channels, T] as a sum of shifted products, which has faster gradients than a convolution."""
    assert bias is None
    assert activation == "silu"
    if _kernels:
        return _kernels.conv(x.transpose(1, 2), weight).transpose(1, 2)
    taps = weight.shape[-1]
    rows = F.pad(x.transpose(1, 2), (0, 0, taps - 1, 0))
    length = x.shape[-1]
    out = rows[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        out = out + rows[:, tap : tap + length] * weight[:, tap]
    return F.silu(out).transpose(1, 2)


class _Sort(torch.autograd.Function):
    """Repeat rows [N, H] K times and sort them by expert; the gradient is a gather rather than a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return rows[order // k]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient[inverse].view(-1, ctx.k, gradient.shape[-1]).sum(1), None, None, None


class _Permute(torch.autograd.Function):
    """Permute rows by ``order``; ``inverse`` is the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient[inverse], None, None


def sorted_experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Apply routed experts with two grouped matrix products.

    Args:
        module: layer with the weights of the experts.
        hidden: [N, H].
        chosen: indices of experts, [N, K].
        weights: routing weights, [N, K].

    Returns:
        The weighted sums of the outputs, [N, H].
    """
    k = chosen.shape[-1]
    experts, order = torch.sort(chosen.reshape(-1).to(torch.uint8))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order), device=order.device)
    counts = experts.float() if experts.device.type == "cpu" else experts.int()
    ends = torch.histc(counts, module.num_experts, 0, module.num_experts - 1).cumsum(0, dtype=torch.int32)
    if _kernels:
        rows = _kernels.spread(hidden, order, inverse, k)
        gate_up = F.grouped_mm(rows, module.gate_up_proj.transpose(1, 2), offs=ends)
        inner = _kernels.act(gate_up, weights.reshape(-1), order)
        return _kernels.collect(F.grouped_mm(inner, module.down_proj.transpose(1, 2), offs=ends), order, inverse, k)
    rows = _Sort.apply(hidden, order, inverse, k)
    gate, up = F.grouped_mm(rows, module.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    scaled = F.silu(gate) * up * _Permute.apply(weights.reshape(-1, 1), order, inverse)
    out = F.grouped_mm(scaled, module.down_proj.transpose(1, 2), offs=ends)
    return _Permute.apply(out, inverse, order).view(-1, k, hidden.shape[-1]).sum(1)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Apply the gated delta rule to whole sequences with an empty initial state; shapes as in transformers.

    This is the chunked form of transformers, but with one triangular solve for both right-hand sides, and without
    repeating keys for the heads that share them.
    """
    batch, length, key_heads, key_dim = key.shape
    heads, dim = value.shape[-2:]
    if _kernels:
        query, key = (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + 1e-6) for x in (query, key))
        return _kernels.delta_rule(query * key_dim**-0.5, key, value, g, beta.float()), None
    pad = -length % CHUNK
    chunks = (length + pad) // CHUNK

    def split(x: Tensor, groups: int) -> Tensor:  # [B, Hk, heads of one key, chunks, C, ...]
        x = F.pad(x.transpose(1, 2).float(), (0, 0, 0, pad))
        return x.reshape(batch, key_heads, groups, chunks, CHUNK, x.shape[-1])

    per_key = heads // key_heads
    query, key = (split(x, 1) for x in (query, key))
    query = query * torch.rsqrt(query.pow(2).sum(-1, keepdim=True) + 1e-6) * key_dim**-0.5
    key = key * torch.rsqrt(key.pow(2).sum(-1, keepdim=True) + 1e-6)
    value = split(value, per_key)
    beta, g = (split(x.unsqueeze(-1), per_key) for x in (beta, g))
    decay = g.squeeze(-1).cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=decay.device).triu(1)
    pairs = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    system = (key @ key.transpose(-1, -2)) * pairs * beta
    within = (query @ key.transpose(-1, -2)) * pairs
    grown = decay.exp().unsqueeze(-1)
    right = torch.cat((value * beta, key * (beta * grown)), dim=-1)
    values, keys = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        (dim, key_dim), dim=-1
    )
    query = query * grown
    kept = key * (decay[..., -1:] - decay).exp().unsqueeze(-1)
    left = decay[..., -1].exp()[..., None, None]
    state = torch.zeros(batch, key_heads, per_key, key_dim, dim, device=value.device)
    outputs = []
    # Unbind rather than index: the gradient of indexing is a full tensor of zeros.
    for v, k, q, w, kept_key, rest in zip(
        *(x.unbind(3) for x in (values, keys, query, within, kept, left)), strict=True
    ):
        new = v - k @ state
        outputs.append(q @ state + w @ new)
        if len(outputs) < chunks:
            state = state * rest + kept_key.transpose(-1, -2) @ new
    out = torch.stack(outputs, dim=3).reshape(batch, heads, -1, dim)[:, :, :length]
    return out.transpose(1, 2).to(torch.bfloat16 if value.device.type == "cuda" else out.dtype), None
