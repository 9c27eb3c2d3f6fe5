"""Triton kernels for training: gated delta rule, short convolution, norms, and grouping of tokens by expert.

Each kernel has an equivalent in PyTorch in ``model.py``; ``check.py`` compares values and gradients without a GPU, by
``TRITON_INTERPRET=1``. Without these kernels, a GPU runs thousands of small operations per layer.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 16
"""Columns of the state in one warp; columns are independent of each other."""


@triton.jit
def _delta_forward(
    q, k, v, g, beta, out, states, length,
    key_heads: tl.constexpr, heads: tl.constexpr, dk: tl.constexpr, dv: tl.constexpr, columns: tl.constexpr,
    keep_states: tl.constexpr, write_out: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    b, h = pid // heads, pid % heads
    rows = tl.arange(0, dk)
    cols = tl.program_id(1) * columns + tl.arange(0, columns)
    key_at = (b * length * key_heads + h // (heads // key_heads)) * dk + rows
    value_at = (b * length * heads + h) * dv + cols
    gate_at = b * length * heads + h
    state_at = pid.to(tl.int64) * length * dk * dv + rows[:, None] * dv + cols[None, :]
    state = tl.zeros((dk, columns), tl.float32)
    kt = tl.load(k + key_at)
    qt = tl.load(q + key_at)
    vt = tl.load(v + value_at).to(tl.float32)
    gt = tl.load(g + gate_at)
    bt = tl.load(beta + gate_at)
    for t in range(length):
        more = t + 1 < length  # load the next token while this token is processed
        key_at += key_heads * dk
        next_value_at = value_at + heads * dv
        gate_at += heads
        k_next = tl.load(k + key_at, mask=more, other=0.0)
        q_next = tl.load(q + key_at, mask=more, other=0.0)
        v_next = tl.load(v + next_value_at, mask=more, other=0.0).to(tl.float32)
        g_next = tl.load(g + gate_at, mask=more, other=0.0)
        b_next = tl.load(beta + gate_at, mask=more, other=0.0)
        if keep_states:
            tl.store(states + state_at, state.to(tl.bfloat16))
            state_at += dk * dv
        state = state * tl.exp(gt)
        change = (vt - tl.sum(state * kt[:, None], 0)) * bt
        state += kt[:, None] * change[None, :]
        if write_out:
            tl.store(out + value_at, tl.sum(state * qt[:, None], 0).to(out.dtype.element_ty))
        value_at = next_value_at
        kt, qt, vt, gt, bt = k_next, q_next, v_next, g_next, b_next


@triton.jit
def _delta_backward(
    q, k, v, g, beta, states, d_out, dq, dk_out, dv_out, dg, d_beta, length, total,
    key_heads: tl.constexpr, heads: tl.constexpr, dk: tl.constexpr, dv: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    pid, block = tl.program_id(0), tl.program_id(1)
    b, h = pid // heads, pid % heads
    rows = tl.arange(0, dk)
    cols = block * columns + tl.arange(0, columns)
    last = length - 1
    key_at = ((b * length + last) * key_heads + h // (heads // key_heads)) * dk + rows
    value_at = ((b * length + last) * heads + h) * dv + cols
    gate_at = (b * length + last) * heads + h
    state_at = (pid.to(tl.int64) * length + last) * dk * dv + rows[:, None] * dv + cols[None, :]
    part_at = (block.to(tl.int64) * total + (b * length + last) * heads + h) * dk + rows
    gate_part_at = block.to(tl.int64) * total + gate_at
    d_state = tl.zeros((dk, columns), tl.float32)
    kt = tl.load(k + key_at)
    qt = tl.load(q + key_at)
    vt = tl.load(v + value_at).to(tl.float32)
    gt = tl.load(g + gate_at)
    bt = tl.load(beta + gate_at)
    ot = tl.load(d_out + value_at).to(tl.float32)
    before = tl.load(states + state_at).to(tl.float32)
    for t in range(length):
        more = t + 1 < length
        key_at -= key_heads * dk
        next_value_at = value_at - heads * dv
        gate_at -= heads
        state_at -= dk * dv
        k_next = tl.load(k + key_at, mask=more, other=0.0)
        q_next = tl.load(q + key_at, mask=more, other=0.0)
        v_next = tl.load(v + next_value_at, mask=more, other=0.0).to(tl.float32)
        g_next = tl.load(g + gate_at, mask=more, other=0.0)
        b_next = tl.load(beta + gate_at, mask=more, other=0.0)
        o_next = tl.load(d_out + next_value_at, mask=more, other=0.0).to(tl.float32)
        before_next = tl.load(states + state_at, mask=more, other=0.0).to(tl.float32)

        decay = tl.exp(gt)
        decayed = before * decay
        error = vt - tl.sum(decayed * kt[:, None], 0)
        change = error * bt
        after = decayed + kt[:, None] * change[None, :]
        tl.store(dq + part_at, tl.sum(after * ot[None, :], 1))
        d_state += qt[:, None] * ot[None, :]
        d_change = tl.sum(d_state * kt[:, None], 0)
        d_error = d_change * bt
        tl.store(dv_out + value_at, d_error.to(dv_out.dtype.element_ty))
        tl.store(d_beta + gate_part_at, tl.sum(d_change * error, 0))
        tl.store(dk_out + part_at, tl.sum(d_state * change[None, :] - decayed * d_error[None, :], 1))
        d_state -= kt[:, None] * d_error[None, :]
        tl.store(dg + gate_part_at, tl.sum(tl.sum(d_state * decayed, 1), 0))
        d_state *= decay
        part_at -= heads * dk
        gate_part_at -= heads
        value_at = next_value_at
        kt, qt, vt, gt, bt, ot, before = k_next, q_next, v_next, g_next, b_next, o_next, before_next


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        out = torch.empty_like(v)
        ctx.save_for_backward(q, k, v, g, beta)
        _DeltaRule.run(q, k, v, g, beta, out, out, False)
        return out

    @staticmethod
    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, out: Tensor, states: Tensor, keep: bool) -> None:
        batch, length, key_heads, dk = k.shape
        heads, dv = v.shape[2:]
        _delta_forward[(batch * heads, dv // _COLUMNS)](
            q, k, v, g, beta, out, states, length, key_heads, heads, dk, dv, _COLUMNS, keep, not keep, num_warps=1
        )

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, ...]:
        q, k, v, g, beta = ctx.saved_tensors
        batch, length, key_heads, dk = k.shape
        heads, dv = v.shape[2:]
        blocks, total = dv // _COLUMNS, batch * length * heads
        states = torch.empty(batch * heads, length, dk, dv, dtype=torch.bfloat16, device=q.device)
        _DeltaRule.run(q, k, v, g, beta, v, states, True)
        d_value = torch.empty_like(v)
        parts = [torch.empty(blocks, batch, length, heads, *size, device=q.device) for size in ((dk,), (dk,), (), ())]
        dq, d_key, dg, d_beta = parts
        _delta_backward[(batch * heads, blocks)](
            q, k, v, g, beta, states, d_out.contiguous(), dq, d_key, d_value, dg, d_beta, length, total,
            key_heads, heads, dk, dv, _COLUMNS, num_warps=1,
        )  # fmt: skip
        shape = (blocks, batch, length, key_heads, heads // key_heads, dk)
        return (
            dq.view(shape).sum((0, 4)), d_key.view(shape).sum((0, 4)), d_value, dg.sum(0), d_beta.sum(0)
        )  # fmt: skip


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """Apply the gated delta rule token by token.

    Args:
        q: queries, normalized and scaled, f32 [B, T, Hk, Dk].
        k: keys, normalized, f32 [B, T, Hk, Dk].
        v: values, [B, T, Hv, Dv].
        g: log decays, f32 [B, T, Hv].
        beta: write strengths, f32 [B, T, Hv].
    """
    return _DeltaRule.apply(*(x.contiguous() for x in (q, k, v, g, beta)))


@triton.jit
def _conv_forward(x, w, out, length, stride, channels: tl.constexpr, taps: tl.constexpr, block: tl.constexpr):
    b, first = tl.program_id(0), tl.program_id(1) * block
    c = tl.arange(0, channels)
    t = first + tl.arange(0, block)
    acc = tl.zeros((block, channels), tl.float32)
    for tap in tl.static_range(taps):
        s = t - (taps - 1) + tap
        seen = (s >= 0) & (s < length)
        value = tl.load(x + (b * length + s[:, None]) * stride + c[None, :], mask=seen[:, None], other=0.0)
        acc += value.to(tl.float32) * tl.load(w + c * taps + tap).to(tl.float32)[None, :]
    result = acc * tl.sigmoid(acc)
    place = (b * length + t[:, None]) * channels + c[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=(t < length)[:, None])


@triton.jit
def _conv_backward(
    x, w, d_out, d_x, d_w, length, stride, channels: tl.constexpr, taps: tl.constexpr, block: tl.constexpr
):
    b, tile = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * 64 + tl.arange(0, 64)
    t = tile * block + tl.arange(0, block)
    acc = tl.zeros((block, 64), tl.float32)
    for ahead in tl.static_range(taps):  # outputs that depend on input t
        s = t + ahead
        pre = tl.zeros((block, 64), tl.float32)
        for tap in tl.static_range(taps):
            r = s - (taps - 1) + tap
            seen = (r >= 0) & (r < length)
            value = tl.load(x + (b * length + r[:, None]) * stride + c[None, :], mask=seen[:, None], other=0.0)
            pre += value.to(tl.float32) * tl.load(w + c * taps + tap).to(tl.float32)[None, :]
        gate = tl.sigmoid(pre)
        place = (b * length + s[:, None]) * channels + c[None, :]
        d = tl.load(d_out + place, mask=(s < length)[:, None], other=0.0).to(tl.float32)
        d = d * (gate + pre * gate * (1 - gate))
        acc += d * tl.load(w + c * taps + (taps - 1) - ahead).to(tl.float32)[None, :]
        if ahead == 0:
            part = (b * tl.num_programs(1) + tile) * taps
            for tap in tl.static_range(taps):
                r = s - (taps - 1) + tap
                seen = (r >= 0) & (r < length)
                value = tl.load(x + (b * length + r[:, None]) * stride + c[None, :], mask=seen[:, None], other=0.0)
                tl.store(d_w + (part + tap) * channels + c, tl.sum(d * value.to(tl.float32), 0))
    place = (b * length + t[:, None]) * channels + c[None, :]
    tl.store(d_x + place, acc.to(d_x.dtype.element_ty), mask=(t < length)[:, None])


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        batch, length, channels = x.shape
        out = torch.empty_like(x)
        _conv_forward[(batch, triton.cdiv(length, 16))](x, weight, out, length, channels, channels, 4, 16)
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        batch, length, channels = x.shape
        d_x = torch.empty_like(x)
        tiles = triton.cdiv(length, 32)
        d_w = torch.empty(batch * tiles, 4, channels, device=x.device)
        _conv_backward[(batch, tiles, channels // 64)](
            x, weight, d_out.contiguous(), d_x, d_w, length, channels, channels, 4, 32
        )
        return d_x, d_w.sum(0).t().to(weight.dtype)


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """Return SiLU of the causal convolution of x [B, T, channels] with weight [channels, 4].

    The number of channels must be a power of two.
    """
    return _Conv.apply(x.contiguous(), weight.contiguous())


@triton.jit
def _gather_kernel(x, order, out, count, k: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    cols = tl.arange(0, width)
    inside = rows < count
    source = tl.load(order + rows, mask=inside, other=0) // k
    value = tl.load(x + source[:, None] * width + cols[None, :], mask=inside[:, None], other=0.0)
    tl.store(out + rows[:, None].to(tl.int64) * width + cols[None, :], value, mask=inside[:, None])


@triton.jit
def _combine_kernel(x, inverse, out, count, k: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    cols = tl.arange(0, width)
    inside = rows < count
    acc = tl.zeros((block, width), tl.float32)
    for choice in range(k):
        source = tl.load(inverse + rows * k + choice, mask=inside, other=0)
        acc += tl.load(x + source[:, None] * width + cols[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(out + rows[:, None] * width + cols[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None])


def _gathered(x: Tensor, order: Tensor, k: int) -> Tensor:
    out = torch.empty(len(order), x.shape[1], dtype=x.dtype, device=x.device)
    _gather_kernel[(triton.cdiv(len(order), 32),)](x, order, out, len(order), k, x.shape[1], 32)
    return out


def _combined(x: Tensor, inverse: Tensor, k: int) -> Tensor:
    count = len(inverse) // k
    out = torch.empty(count, x.shape[1], dtype=x.dtype, device=x.device)
    _combine_kernel[(triton.cdiv(count, 16),)](x, inverse, out, count, k, x.shape[1], 16)
    return out


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return _gathered(x.contiguous(), order, k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _combined(gradient.contiguous(), ctx.saved_tensors[0], ctx.k), None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _combined(x.contiguous(), inverse, k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _gathered(gradient.contiguous(), ctx.saved_tensors[0], ctx.k), None, None, None


def spread(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Return the rows of x [N, H], each repeated k times, in ``order`` [N k]."""
    return _Spread.apply(x, order, inverse, k)


def collect(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Return the sums [N, H] of the k rows of each token in x [N k, H], whose rows are in ``order``."""
    return _Collect.apply(x, order, inverse, k)


@triton.jit
def _act_forward(gate_up, share, order, out, count, width: tl.constexpr, block: tl.constexpr):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    cols = tl.arange(0, width)
    inside = rows < count
    place = rows[:, None].to(tl.int64) * (2 * width) + cols[None, :]
    gate = tl.load(gate_up + place, mask=inside[:, None], other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + width, mask=inside[:, None], other=0.0).to(tl.float32)
    own = tl.load(share + tl.load(order + rows, mask=inside, other=0), mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up * own[:, None]
    tl.store(
        out + rows[:, None].to(tl.int64) * width + cols[None, :], result.to(out.dtype.element_ty), mask=inside[:, None]
    )


@triton.jit
def _act_backward(gate_up, share, order, d_out, d_gate_up, d_share, count, width: tl.constexpr, block: tl.constexpr):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    cols = tl.arange(0, width)
    inside = rows < count
    place = rows[:, None].to(tl.int64) * (2 * width) + cols[None, :]
    gate = tl.load(gate_up + place, mask=inside[:, None], other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + width, mask=inside[:, None], other=0.0).to(tl.float32)
    source = tl.load(order + rows, mask=inside, other=0)
    own = tl.load(share + source, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_out + rows[:, None].to(tl.int64) * width + cols[None, :], mask=inside[:, None], other=0.0).to(
        tl.float32
    )
    half = tl.sigmoid(gate)
    silu = gate * half
    tl.store(d_share + source, tl.sum(d * silu * up, 1).to(d_share.dtype.element_ty), mask=inside)
    d = d * own[:, None]
    d_gate = d * up * (half + silu * (1 - half))
    tl.store(d_gate_up + place, d_gate.to(d_gate_up.dtype.element_ty), mask=inside[:, None])
    tl.store(d_gate_up + place + width, (d * silu).to(d_gate_up.dtype.element_ty), mask=inside[:, None])


class _Act(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, share: Tensor, order: Tensor) -> Tensor:
        count, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(count, width, dtype=gate_up.dtype, device=gate_up.device)
        _act_forward[(triton.cdiv(count, 32),)](gate_up, share, order, out, count, width, 32)
        ctx.save_for_backward(gate_up, share, order)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up, share, order = ctx.saved_tensors
        count, width = gate_up.shape[0], gate_up.shape[1] // 2
        d_gate_up, d_share = torch.empty_like(gate_up), torch.empty_like(share)
        _act_backward[(triton.cdiv(count, 32),)](
            gate_up, share, order, d_out.contiguous(), d_gate_up, d_share, count, width, 32
        )
        return d_gate_up, d_share, None


def act(gate_up: Tensor, share: Tensor, order: Tensor) -> Tensor:
    """Return silu(gate) * up * routing weight.

    ``gate_up`` [N, 2 I] is in ``order``; the routing weights ``share`` [N] are in the order of tokens.
    """
    return _Act.apply(gate_up.contiguous(), share.contiguous(), order)


@triton.jit
def _norm_forward(
    x, gate, weight, out, count, eps, width: tl.constexpr, plus: tl.constexpr, gated: tl.constexpr, block: tl.constexpr
):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    cols = tl.arange(0, width)
    inside = (rows < count)[:, None]
    place = rows[:, None].to(tl.int64) * width + cols[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    result = value * tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    result *= (tl.load(weight + cols).to(tl.float32) + plus)[None, :]
    if gated:
        z = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        result *= z * tl.sigmoid(z)
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    x, gate, weight, d_out, d_x, d_gate, d_weight, count, eps,
    width: tl.constexpr, plus: tl.constexpr, gated: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * block + tl.arange(0, block)
    cols = tl.arange(0, width)
    inside = (rows < count)[:, None]
    place = rows[:, None].to(tl.int64) * width + cols[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
    own = (tl.load(weight + cols).to(tl.float32) + plus)[None, :]
    scale = tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    normed = value * scale
    if gated:
        z = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        half = tl.sigmoid(z)
        silu = z * half
        d_z = d * normed * own * (half + silu * (1 - half))
        tl.store(d_gate + place, d_z.to(d_gate.dtype.element_ty), mask=inside)
        d = d * silu
    tl.store(d_weight + tl.program_id(0) * width + cols, tl.sum(d * normed, 0))
    d = d * own
    result = scale * (d - normed * (tl.sum(d * normed, 1) / width)[:, None])
    tl.store(d_x + place, result.to(d_x.dtype.element_ty), mask=inside)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, plus: float) -> Tensor:
        width = x.shape[-1]
        count = x.numel() // width
        out = torch.empty_like(x)
        other = x if gate is None else gate
        _norm_forward[(triton.cdiv(count, 32),)](x, other, weight, out, count, eps, width, plus, gate is not None, 32)
        ctx.save_for_backward(x, other, weight)
        ctx.rest = (eps, plus, gate is not None)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        x, gate, weight = ctx.saved_tensors
        eps, plus, gated = ctx.rest
        width = x.shape[-1]
        count = x.numel() // width
        programs = triton.cdiv(count, 32)
        d_x = torch.empty_like(x)
        d_gate = torch.empty_like(gate) if gated else d_x
        d_weight = torch.empty(programs, width, device=x.device)
        _norm_backward[(programs,)](
            x, gate, weight, d_out.contiguous(), d_x, d_gate, d_weight, count, eps, width, plus, gated, 32
        )
        return d_x, d_gate if gated else None, d_weight.sum(0).to(weight.dtype), None, None


def norm(x: Tensor, weight: Tensor, eps: float, plus: float = 0.0, gate: Tensor | None = None) -> Tensor:
    """Return the RMS norm over the last axis, times ``weight + plus``, times SiLU of ``gate`` if it is given."""
    return _Norm.apply(x.contiguous(), None if gate is None else gate.contiguous(), weight, eps, plus)
