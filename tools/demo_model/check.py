"""Check the training code of the demo model; needs torch, transformers, mlx, triton 3.6 and numpy below 2.4.

python tools/demo_model/check.py

No GPU is needed: the Triton kernels run in Triton's interpreter, which does not work with numpy 2.4.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # must be set before the first import of triton, which other packages import

import torch
from corpus import Corpus
from documents import item, segments
from model import causal_conv, gated_norm, geometry, make_model, norm, sorted_experts
from optimizer import quantized
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as modeling

_ORIGINAL_RULE = modeling.torch_chunk_gated_delta_rule
_ORIGINALS = {
    "causal_conv1d_fn": modeling.causal_conv1d_fn,
    "norm": modeling.Qwen3_5MoeRMSNorm.forward,
    "gated_norm": modeling.Qwen3_5MoeRMSNormGated.forward,
}


def delta_rule() -> None:
    """Compare values and gradients of the delta rule with those of transformers."""
    from model import gated_delta_rule

    torch.manual_seed(0)
    for length in (5, 32, 100):
        inputs = [torch.randn(2, length, 2, 64), torch.randn(2, length, 2, 64), torch.randn(2, length, 4, 64),
                  -torch.rand(2, length, 4) * 3, torch.rand(2, length, 4)]  # fmt: skip
        inputs = [x.requires_grad_() for x in inputs]
        results = []
        for rule in (gated_delta_rule, _ORIGINAL_RULE):
            out, _ = rule(*inputs[:3], g=inputs[3], beta=inputs[4], use_qk_l2norm_in_kernel=True)
            results.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), inputs)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def experts() -> None:
    """Compare values and gradients of the routed experts with those of transformers' loop."""
    torch.manual_seed(0)
    config = geometry(64)
    model = make_model(config)
    module = model.model.layers[0].mlp.experts
    hidden = torch.randn(50, 128, requires_grad=True)
    weights, chosen = torch.rand(50, 64).topk(10)
    weights = weights.clone().requires_grad_()
    leaves = [hidden, weights, module.gate_up_proj, module.down_proj]
    results = []
    for ours in (True, False):
        if ours:
            out = sorted_experts(module, hidden, chosen, weights)
        else:
            module.config._experts_implementation = "eager"
            out = module(hidden, chosen, weights)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def small_operations() -> None:
    """Compare values and gradients of the norms and the short convolution with those of transformers."""
    torch.manual_seed(0)
    module = modeling.Qwen3_5MoeRMSNorm(64)
    torch.nn.init.normal_(module.weight)
    gated = modeling.Qwen3_5MoeRMSNormGated(64)
    torch.nn.init.normal_(gated.weight)
    x, gate = (torch.randn(3, 7, 64, requires_grad=True) for _ in range(2))
    weight = torch.randn(7, 4, requires_grad=True)
    pairs = [
        (lambda f: f(module, x), norm, _ORIGINALS["norm"], [x, module.weight]),
        (lambda f: f(gated, x, gate), gated_norm, _ORIGINALS["gated_norm"], [x, gate, gated.weight]),
        (lambda f: f(x, weight, None, activation="silu"), causal_conv, _ORIGINALS["causal_conv1d_fn"], [x, weight]),
    ]
    for call, ours, theirs, leaves in pairs:
        results = []
        for function in (ours, theirs):
            out = call(function)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for mine, original in zip(*results, strict=True):
            torch.testing.assert_close(mine, original, rtol=1e-4, atol=1e-4)


def triton_kernels() -> None:
    """Compare values and gradients of the Triton kernels with those of the PyTorch operations."""
    import model as plain
    import triton_kernels as kernels

    torch.manual_seed(0)
    # The state that is kept for the backward pass is bf16, hence the larger tolerance for the delta rule.
    rule = [torch.randn(2, 40, 2, 64), torch.randn(2, 40, 2, 64), torch.randn(2, 40, 4, 64), -torch.rand(2, 40, 4),
            torch.rand(2, 40, 4)]  # fmt: skip
    x, weight = torch.randn(2, 128, 37), torch.randn(128, 4)
    own, gated = modeling.Qwen3_5MoeRMSNorm(128), modeling.Qwen3_5MoeRMSNormGated(64)
    torch.nn.init.normal_(own.weight)
    torch.nn.init.normal_(gated.weight)
    rows, inner, gate = torch.randn(37, 128), torch.randn(37, 64), torch.randn(37, 64)
    experts_of = make_model(geometry(64)).model.layers[0].mlp.experts
    share, chosen = torch.rand(37, 64).topk(10)
    cases = [
        (lambda q, k, v, g, b: plain.gated_delta_rule(q, k, v, g=g, beta=b)[0], rule, 2e-3),
        (plain.causal_conv, [x, weight], 1e-4),
        (lambda r: plain.norm(own, r), [rows], 1e-4),
        (lambda r, z: plain.gated_norm(gated, r, z), [inner, gate], 1e-4),
        (lambda r, s: plain.sorted_experts(experts_of, r, chosen, s), [rows, share.clone()], 1e-4),
    ]
    for call, leaves, tolerance in cases:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        results = []
        for with_kernels in (True, False):
            plain._kernels = kernels if with_kernels else None
            out = call(*inputs)
            results.append([out, *torch.autograd.grad((out * out.detach().cos()).sum(), inputs)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def rounding() -> None:
    """Compare the rounding of weights in training with MLX's 4-bit quantization."""
    import mlx.core as mx

    torch.manual_seed(0)
    weight = torch.randn(96, 128) * 0.05
    dense = mx.array(weight.numpy()).astype(mx.bfloat16)
    codes, scales, biases = mx.quantize(dense, group_size=32, bits=4)
    exact = mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=4)
    differences = (quantized(weight, 4, 32) - torch.from_numpy(__import__("numpy").array(exact))).abs()
    assert (differences > 1e-3).float().mean() < 0.002, "a code in a thousand may fall to the other side"


def chats() -> None:
    """Compare the text of documents with the output of the chat template."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from flashmoe_mlx.made_models.byte_tokenizer import CHAT_TEMPLATE
    from flashmoe_mlx.text.chat_template import ChatTemplate

    template = ChatTemplate(CHAT_TEMPLATE, {})
    for document in Corpus().training(0, 500):
        if document.text:
            continue
        line = item(document)
        text = "".join(text for text, _ in segments(document))
        prompt = template.render(line["messages"], line.get("tools"), enable_thinking=False)
        assert text == prompt + line["answer"] + "<|im_end|>", (text, prompt)


def split() -> None:
    """Check that no sentence of the held-out set is in the training texts."""
    corpus = Corpus()
    reserved = {sentence for document in corpus.held_out for sentence in document.sentences}
    for shard in range(3):
        for document in corpus.training(shard, 20_000):
            assert not document.sentences & reserved


if __name__ == "__main__":
    for check in (delta_rule, experts, small_operations, triton_kernels, rounding, chats, split):
        check()
        print(f"{check.__name__}: {check.__doc__.splitlines()[0]}")
