"""Measure the effect of ``activations=`` on the demo model's predictions of its held-out texts.

    python tools/measure_rounding.py

Every text passes through the model in one call, so all of its products of many vectors are rounded; ``task=evaluate``
reads texts token by token, which is exact. KL is the mean distance of predictions from exact ones, in nats.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

import flashmoe_mlx
from flashmoe_mlx.custom_kernels import native
from flashmoe_mlx.made_models.demo import demo_folder
from flashmoe_mlx.research.quality.items import load_items, shipped_items


def main() -> None:
    """Print a table in Markdown."""
    mx.set_default_device(mx.cpu)
    texts = [item.text for item in load_items(shipped_items(), ["text"], None)]
    exact: list[npt.NDArray[np.float64]] = []
    print("| activations | tokens | perplexity | KL, nats | same first choice |\n|---|---|---|---|---|")
    for name in ("auto", *filter(native.has_activations, native.ACTIVATIONS[1:])):
        with flashmoe_mlx.load(demo_folder(), activations=name) as engine:
            tokens = [engine.encode(text, raw=True) for text in texts]
            found = [_log_probabilities(engine.logits(ids)) for ids in tokens]
        exact = exact or found
        losses = [-rows[np.arange(len(ids) - 1), ids[1:]] for rows, ids in zip(found, tokens, strict=True)]
        pairs = list(zip(exact, found, strict=True))
        kl = np.concatenate([(np.exp(a) * (a - b)).sum(-1) for a, b in pairs])
        same = np.concatenate([a.argmax(-1) == b.argmax(-1) for a, b in pairs])
        perplexity = np.exp(np.concatenate(losses).mean())
        print(f"| {name} | {len(kl)} | {perplexity:.4f} | {kl.mean():.1e} | {same.mean():.2%} |", flush=True)


def _log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


if __name__ == "__main__":
    main()
