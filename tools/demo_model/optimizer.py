"""Muon for matrices, Adam for all other parameters, and quantization-aware training of the experts.

Master weights are f32. The model computes with copies, in which the weights of experts are gradually rounded to the
values of MLX's 4-bit quantization. Gradients of the copies are applied to the masters unchanged (straight-through).
"""

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that moves singular values towards 1 (K. Jordan et al., "Muon", 2024)."""
_BY_ADAM = ("embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate", "in_proj_a", "in_proj_b", "conv1d")


def quantized(weight: Tensor, bits: int, group_size: int) -> Tensor:
    """Quantize the bf16 values of ``weight`` [..., in] like ``mx.quantize`` (min-max), and dequantize them."""
    groups = weight.bfloat16().float().unflatten(-1, (-1, group_size))
    high, low = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    most = 2**bits - 1
    from_low = low.abs() > high.abs()
    scale = ((high - low) / most).clamp_min(1e-7)
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = torch.round(edge / scale)
    scale = torch.where(steps != 0, edge / torch.where(steps != 0, steps, 1), scale)
    bias = torch.where(steps != 0, edge, 0)
    codes = torch.round((groups - bias) / scale).clamp(0, most)
    scale, bias = scale.bfloat16().float(), bias.bfloat16().float()  # MLX rounds them after choosing the codes
    return (codes * scale + bias).flatten(-2)


def orthogonal(update: Tensor, steps: int = 5) -> Tensor:
    """Return nearly orthogonal matrices for ``update`` [B, m, n] with m <= n."""
    a, b, c = _COEFFICIENTS
    x = update.bfloat16() if update.is_cuda else update
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.transpose(-2, -1)
        x = a * x + (b * square + c * square @ square) @ x
    return x.float()


class Optimizer:
    """An optimizer whose ``step`` applies the gradients to the master weights and updates the model's weights.

    ``rate`` is the learning rate of Muon, with which Adam's rate scales. ``rounding`` goes from 0 (experts are not
    rounded) to 1 (experts are quantized). These two are tensors, so that a captured step can be replayed with different
    values.
    """

    def __init__(self, model: nn.Module, bits: int, group_size: int, muon: float, adam: float, decay: float) -> None:
        device = next(model.parameters()).device
        self.rate = torch.zeros((), device=device)
        self.rounding = torch.zeros((), device=device)
        self.steps = torch.zeros((), device=device)
        self._muon, self._adam, self._decay = muon, adam, decay
        self._bits, self._group_size = bits, group_size
        self.masters: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._adam_names: list[str] = []
        self._shapes: dict[tuple[int, int], list[tuple[str, bool]]] = {}
        for name, parameter in self._parameters.items():
            self.masters[name] = parameter.detach().float().clone()
            parameter.data = parameter.data.bfloat16() if parameter.is_cuda else parameter.data
            parameter.grad = torch.zeros_like(parameter)
            if parameter.dim() < 2 or any(part in name for part in _BY_ADAM):
                self._adam_names.append(name)
            else:
                rows, columns = self._pieces(name, parameter).shape[-2:]
                wide = rows <= columns
                self._shapes.setdefault((min(rows, columns), max(rows, columns)), []).append((name, wide))
        self._first = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self._second = {name: torch.zeros_like(self.masters[name]) for name in self._adam_names}

    def _pieces(self, name: str, tensor: Tensor) -> Tensor:
        """Return a parameter as matrices [B, rows, columns]; gate and up projections are separate matrices."""
        rows, columns = tensor.shape[-2:]
        return tensor.reshape(-1, rows // 2 if name.endswith("gate_up_proj") else rows, columns)

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights by their gradients, and set the gradients to zero."""
        self.steps += 1
        self._step_muon()
        self._step_adam()
        self.renew()
        for parameter in self._parameters.values():
            assert parameter.grad is not None
            parameter.grad.zero_()

    def _step_muon(self) -> None:
        for group in self._shapes.values():
            updates = []
            for name, wide in group:
                gradient = self._parameters[name].grad
                assert gradient is not None
                momentum = self._first[name]
                momentum.lerp_(gradient.float(), 0.05)
                update = self._pieces(name, torch.lerp(gradient.float(), momentum, 0.95))
                updates.append(update if wide else update.transpose(-2, -1))
            joined = orthogonal(torch.cat(updates))
            sizes = [len(update) for update in updates]
            for (name, wide), update in zip(group, joined.split(sizes), strict=True):
                master = self.masters[name]
                own = update if wide else update.transpose(-2, -1)
                gain = max(1.0, own.shape[-2] / own.shape[-1]) ** 0.5
                master.mul_(1 - self.rate * self._muon * self._decay)
                master.sub_(own.reshape(master.shape) * (self.rate * self._muon * gain))

    def _step_adam(self) -> None:
        correction = torch.sqrt(1 - 0.98**self.steps) / (1 - 0.9**self.steps)
        for name in self._adam_names:
            gradient = self._parameters[name].grad
            assert gradient is not None
            first, second = self._first[name], self._second[name]
            first.lerp_(gradient.float(), 0.1)
            second.lerp_(gradient.float().square(), 0.02)
            self.masters[name].sub_(first / (second.sqrt() + 1e-10) * (self.rate * self._adam * correction))

    def forget(self) -> None:
        """Reset the state of the optimizer."""
        for tensor in (self.steps, *self._first.values(), *self._second.values()):
            tensor.zero_()

    @torch.no_grad()
    def renew(self) -> None:
        """Copy the master weights to the model, with rounded experts."""
        for name, parameter in self._parameters.items():
            master = self.masters[name]
            if ".experts." in name:
                rounded = quantized(master, self._bits, self._group_size)
                master = torch.lerp(master, rounded, self.rounding)
            parameter.data.copy_(master)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights to save: the masters in bf16, with experts that are not rounded."""
        return {name: master.bfloat16() for name, master in self.masters.items()}
