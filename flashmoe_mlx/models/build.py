"""Put a model together from its resident tensors."""

from collections.abc import Collection
from dataclasses import replace
from typing import Protocol

import mlx.core as mx

from flashmoe_mlx.custom_kernels import AttentionWeights, DeltaWeights, ExpertWeights, Kernels
from flashmoe_mlx.errors import PackError
from flashmoe_mlx.layers.attention import Attention
from flashmoe_mlx.layers.gated_delta_net import GatedDeltaNet
from flashmoe_mlx.layers.linear import Linear
from flashmoe_mlx.layers.rope import Rope
from flashmoe_mlx.models.config import ModelConfig
from flashmoe_mlx.models.decoder import DecoderLayer, Model
from flashmoe_mlx.models.parameters import Kind, quantisation_of, resident_parameters
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.moe.on_host import ExpertsOnHost
from flashmoe_mlx.moe.router import Router
from flashmoe_mlx.moe.shared_expert import SharedExpert
from flashmoe_mlx.moe.strategies import choose_strategy
from flashmoe_mlx.stores.allocation import at_cache_lines
from flashmoe_mlx.stores.contract import ExpertStore

_EXACT = ("A_log", "dt_bias")
"""Parameters of the decay, which is an exponential of an exponential."""
_SCALES = (mx.float32, mx.bfloat16, mx.float16)


class ResidentTensors(Protocol):
    """The resident tensors of a model on disk, under the names of ``parameters``."""

    @property
    def names(self) -> Collection[str]:
        """What is there."""
        ...

    def take(self, name: str) -> mx.array:
        """Read a tensor, to be taken no more than once: none should stay in memory twice."""
        ...


def build_model(
    config: ModelConfig,
    tensors: ResidentTensors,
    store: ExpertStore,
    experts_k: int,
    kernels: Kernels,
    dtype: mx.Dtype,
) -> Model:
    """The model with its resident weights in memory and activations of ``dtype``.

    Raises:
        PackError: a tensor is missing or has the wrong shape.
    """
    matrices: dict[str, Linear] = {}
    vectors: dict[str, mx.array] = {}
    resident = _Resident(tensors, dtype, kernels)
    for parameter in resident_parameters(config):
        if parameter.kind is Kind.MATRIX:
            matrices[parameter.name] = resident.linear(parameter.name, parameter.shape)
        else:
            vectors[parameter.name] = resident.vector(parameter.name, parameter.shape)

    def linear(name: str) -> Linear:
        found = matrices[name]
        return replace(found, bias=vectors[f"{name}.bias"]) if f"{name}.bias" in vectors else found

    frequencies = None if config.rope.yarn is None else config.rope.frequencies()
    layers = []
    for layer, full_attention in enumerate(config.full_attention):
        prefix = f"model.layers.{layer}"
        mixer: Attention | GatedDeltaNet
        if full_attention:
            own = f"{prefix}.self_attn"
            mixer = Attention(
                AttentionWeights(
                    config.num_heads,
                    config.num_kv_heads,
                    config.head_dim,
                    config.rope.dim,
                    config.rope.theta,
                    _stretched(vectors[f"{own}.q_norm.weight"], config.rope),
                    _stretched(vectors[f"{own}.k_norm.weight"], config.rope),
                    config.rms_norm_eps,
                    frequencies,
                ),
                kernels,
                linear(f"{own}.q_proj"),
                linear(f"{own}.k_proj"),
                linear(f"{own}.v_proj"),
                linear(f"{own}.o_proj"),
            )
        else:
            own = f"{prefix}.linear_attn"
            mixer = GatedDeltaNet(
                DeltaWeights(
                    config.linear_key_heads,
                    config.linear_value_heads,
                    config.linear_key_dim,
                    config.linear_value_dim,
                    vectors[f"{own}.conv1d.weight"],
                    vectors[f"{own}.A_log"],
                    vectors[f"{own}.dt_bias"],
                    vectors[f"{own}.norm.weight"],
                    config.rms_norm_eps,
                ),
                kernels,
                linear(f"{own}.in_proj_qkv"),
                linear(f"{own}.in_proj_z"),
                linear(f"{own}.in_proj_b"),
                linear(f"{own}.in_proj_a"),
                linear(f"{own}.out_proj"),
            )
        shared = ExpertWeights(*(linear(f"{prefix}.mlp.shared_expert.{part}_proj") for part in ("gate", "up", "down")))
        strategy = choose_strategy(kernels, store.layout, dtype, shared)
        router = Router(
            linear(f"{prefix}.mlp.gate"),
            vectors[f"{prefix}.post_attention_layernorm.weight"],
            config.rms_norm_eps,
            experts_k,
            linear(f"{prefix}.mlp.shared_expert_gate"),
            kernels.rms_norm,
            on_host=isinstance(strategy, ExpertsOnHost),
        )
        layers.append(
            DecoderLayer(
                kernels,
                config.rms_norm_eps,
                vectors[f"{prefix}.input_layernorm.weight"],
                mixer,
                MixtureOfExperts(layer, store, router, SharedExpert(shared, kernels.expert_mlp), strategy),
            )
        )
    embedding = linear("model.embed_tokens")
    head = embedding if config.tie_word_embeddings else linear("lm_head")
    touched = resident.nbytes - (0 if config.tie_word_embeddings else embedding.nbytes)
    return Model(kernels, config, embedding, layers, vectors["model.norm.weight"], head, touched)


def _stretched(norm: mx.array, rope: Rope) -> mx.array:
    """Return the factors ``norm`` [head dim] with YaRN's attention factor in those of the rotated dimensions.

    A rotation is linear, so it makes no difference whether its input is scaled or its output.
    """
    if rope.yarn is None:
        return norm
    rotated = mx.arange(len(norm)) < rope.dim
    stretched = mx.where(rotated, norm.astype(mx.float32) * rope.yarn.attention_factor, norm).astype(norm.dtype)
    mx.eval(stretched)
    return stretched


class _Resident:
    """Takes tensors out of files one by one, in the types that the model computes with."""

    def __init__(self, tensors: ResidentTensors, dtype: mx.Dtype, kernels: Kernels) -> None:
        self._tensors = tensors
        self._kernels = kernels
        self._dtype = dtype
        self.nbytes = 0

    def _take(self, name: str, dtype: mx.Dtype | None) -> mx.array:
        if name not in self._tensors.names:
            raise PackError(f"resident weights: tensor {name} is missing; delete the pack and make it again")
        array = self._tensors.take(name)
        if dtype is not None:
            array = array.astype(dtype)
        mx.eval(array)
        self.nbytes += array.nbytes
        return array

    def vector(self, name: str, shape: tuple[int, ...]) -> mx.array:
        array = self._take(name, mx.float32 if name.endswith(_EXACT) else self._dtype)
        _check(name, array, shape)
        return array

    def linear(self, name: str, shape: tuple[int, ...]) -> Linear:
        if f"{name}.scales" not in self._tensors.names:
            weight = self._take(f"{name}.weight", self._dtype)
            _check(f"{name}.weight", weight, shape)
            return Linear(weight)
        weight = self._take(f"{name}.weight", None)
        # Activations and scales of one type, or MLX converts the scales in every product; ours take either.
        dtype = None if self._kernels.accepts_any_scale_dtype else self._dtype
        scales, biases = (self._take(f"{name}.{part}", dtype) for part in ("scales", "biases"))
        bits, group_size = quantisation_of(f"resident weights: {name}", shape, weight.shape, scales.shape)
        _check(f"{name}.biases", biases, scales.shape)
        if weight.dtype != mx.uint32 or scales.dtype != biases.dtype or scales.dtype not in _SCALES:
            types = ", ".join(str(part.dtype).rpartition(".")[2] for part in (weight, scales, biases))
            raise PackError(
                f"resident weights: {name} has weight, scales and biases of types {types}; codes must be uint32, both "
                "others of one floating type; delete the pack and make it again",
                code="wrong_types",
            )
        if self._kernels.routed_experts_cpu is not None:  # kernels for CPUs read in place
            weight, scales, biases = map(at_cache_lines, (weight, scales, biases))
        return Linear(weight, scales, biases, bits, group_size, products=self._kernels.products)


def _check(name: str, array: mx.array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise PackError(f"resident weights: {name} has shape {list(array.shape)}, config.json needs {list(shape)}")
