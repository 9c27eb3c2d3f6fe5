"""Build a model from its resident tensors and a store with its experts."""

import mlx.core as mx

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.layers.mlp import Mlp
from flashmoe_mlx.models.config import ModelConfig, layer_prefix
from flashmoe_mlx.models.decoder import DecoderLayer, Model
from flashmoe_mlx.models.feed_forward import MoeBlock
from flashmoe_mlx.models.parameters import EMBEDDING, FINAL_NORM, HEAD
from flashmoe_mlx.models.weights import ResidentTensors, ResidentWeights
from flashmoe_mlx.moe.experts import MixtureOfExperts
from flashmoe_mlx.progress import report
from flashmoe_mlx.stores.contract import ExpertStore


def build_model(
    config: ModelConfig,
    tensors: ResidentTensors,
    store: ExpertStore,
    experts_k: int,
    kernels: Kernels,
    dtype: mx.Dtype,
) -> Model:
    """Build a model with its resident weights in memory.

    Args:
        config: the geometry of the model.
        tensors: its resident tensors on disk.
        store: serves its routed experts.
        experts_k: routed experts of a token in each layer.
        kernels: the kernels to compute with.
        dtype: the type of activations.

    Raises:
        PackError: a tensor is missing or has the wrong shape or type.
    """
    report("reading the weights that all tokens use")
    moe_layers = config.moe_layers
    weights = ResidentWeights(tensors, config.resident_parameters(), dtype, kernels)
    layers: list[DecoderLayer] = []
    feed_forward: MixtureOfExperts | Mlp
    for layer in range(config.num_layers):
        prefix, block = layer_prefix(layer), config.feed_forward(layer)
        if isinstance(block, MoeBlock):
            number = moe_layers.index(layer)
            feed_forward = block.build(number, layer, prefix, weights, kernels, store, experts_k)
        else:
            feed_forward = block.build(prefix, weights, kernels)
        layers.append(
            DecoderLayer(
                layer,
                kernels,
                config.mixer(layer).build(prefix, weights, kernels),
                feed_forward,
                config.rms_norm_eps,
                weights.vector(f"{prefix}input_layernorm.weight"),
            )
        )
    embedding = weights.linear(EMBEDDING)
    head = embedding if config.tie_word_embeddings else weights.linear(HEAD)
    touched = weights.nbytes - (0 if config.tie_word_embeddings else embedding.nbytes)
    return Model(kernels, config, embedding, layers, weights.vector(FINAL_NORM), head, touched)
