"""Build a model with hyper-connections from its resident tensors and a store with its experts."""

from dataclasses import replace

import mlx.core as mx

from flashmoe_mlx.custom_kernels import Kernels
from flashmoe_mlx.models.config import layer_prefix
from flashmoe_mlx.models.hyper_config import BEHIND, HyperConfig
from flashmoe_mlx.models.hyper_decoder import HyperLayer, HyperModel
from flashmoe_mlx.models.parameters import EMBEDDING, HEAD
from flashmoe_mlx.models.weights import ResidentTensors, ResidentWeights
from flashmoe_mlx.progress import report
from flashmoe_mlx.stores.contract import ExpertStore


def build_hyper_model(
    config: HyperConfig,
    tensors: ResidentTensors,
    store: ExpertStore,
    experts_k: int,
    kernels: Kernels,
    dtype: mx.Dtype,
) -> HyperModel:
    """Build a model with its resident weights in memory; see ``build_model``.

    Raises:
        PackError: a tensor is missing or has the wrong shape or type.
    """
    report("reading the weights that all tokens use")
    weights = ResidentWeights(tensors, config.resident_parameters(), dtype, kernels)
    layers = []
    # Mixers project vectors that no norm precedes, so that joint projections would have no use.
    of_mixers = replace(kernels, routed_experts_gpu=None)
    for layer in range(config.num_layers):
        prefix, ngrams = layer_prefix(layer), config.ngrams(layer)
        layers.append(
            HyperLayer(
                layer,
                kernels,
                config.mixer(layer).build(prefix, weights, of_mixers),
                config.feed_forward(layer).build(layer, layer, prefix, weights, kernels, store, experts_k),
                None if ngrams is None else ngrams.build(prefix, weights),
                config.connection.build(f"{prefix}attn_hyper_connection.", weights),
                config.connection.build(f"{prefix}mlp_hyper_connection.", weights),
            )
        )
    embedding = weights.linear(EMBEDDING)
    head = embedding if config.tie_word_embeddings else weights.linear(HEAD)
    touched = weights.nbytes - (0 if config.tie_word_embeddings else embedding.nbytes)
    behind = config.last_connection.build(BEHIND, weights)
    return HyperModel(kernels, config, embedding, layers, behind.norm, head, touched, behind)
