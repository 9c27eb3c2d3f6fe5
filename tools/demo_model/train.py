"""Make the demo model: tokenizer, corpus, training, checkpoint, all from one seed.

    python tools/demo_model/train.py --out DIR --minutes 7.5

needs an NVIDIA GPU with bf16 (on a CPU ``--steps 3 --documents 24`` tries the code), torch, triton, transformers with
qwen3_5_moe, and tokenizers. DIR gets a published checkpoint in bf16, of which ``pack.py`` makes what ships, the
tokenizer's files and ``log.jsonl``. The learning rate follows the clock, or ``--steps`` for a run that repeats another
exactly as far as the GPU's sums do.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from corpus import Corpus
from data import GIVEN, LENGTHS, OWN, Batch, Stream, encoded, padded
from model import geometry, make_model
from optimiser import Optimiser
from safetensors.torch import save_file
from tokenizer import train_tokenizer, write_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

_SHARD_BYTES = 14_000_000
_WARM_UP, _ROUNDING_FROM, _ROUNDING_TO = 0.01, 0.5, 0.6
"""Shares of the training at which the rate is full, and between which the experts come to be rounded to 4 bits."""


class Trainer:
    """The model, its optimiser and the losses; on a GPU every pass is captured once and replayed."""

    def __init__(self, arguments: argparse.Namespace, vocab_size: int, rows: list[int]) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(arguments.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.config = geometry(vocab_size)
        self.model = make_model(self.config, triton=self.device.type == "cuda").to(self.device).train()
        self.optimiser = Optimiser(self.model, 4, 32, arguments.muon, arguments.adam, arguments.decay)
        self._prompt_weight = arguments.prompt_weight
        self._routers: list[tuple[Tensor, Tensor]] = []
        for module in self.model.modules():
            if isinstance(module, Qwen3_5MoeTopKRouter):
                module.register_forward_hook(lambda _m, _i, out: self._routers.append((out[0], out[2])))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self.device)

        experts = self.config.num_experts
        self.usage = zeros(self.config.num_hidden_layers, experts) + 1 / experts
        """Share of the tokens' choices that each expert of each layer got lately."""
        self._counts = torch.zeros_like(self.usage)
        self._scale = zeros(2)  # one over the step's weight of losses, one over its tokens
        self._balance = zeros()
        self.sums = zeros(2, 2)
        """Sum of losses and number of tokens, of prompts and of the model's own."""
        self._inputs = [
            (
                torch.zeros(count, length, dtype=torch.long, device=self.device),
                torch.zeros(count, length, dtype=torch.uint8, device=self.device),
            )
            for count, length in zip(rows, LENGTHS, strict=True)
        ]
        self._passes = [lambda pair=pair: self._pass(*pair) for pair in self._inputs]
        self._move: Any = self._finish
        self.pass_milliseconds: list[float] = []

    def capture(self) -> None:
        """Record every pass and the optimiser's step as CUDA graphs."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for ids, roles in self._inputs:
                ids.random_(0, 256)
                roles.fill_(OWN)
            for _ in range(2):
                for one in self._passes:
                    one()
            self._finish()
        torch.cuda.current_stream().wait_stream(side)
        pool = torch.cuda.graph_pool_handle()
        graphs = []
        for one in [*self._passes, self._finish]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                one()
            graphs.append(graph)
        self._passes = [graph.replay for graph in graphs[:-1]]
        self._move = graphs[-1].replay
        self.pass_milliseconds = self.milliseconds()
        for parameter in self.model.parameters():
            parameter.grad.zero_()
        for tensor in (self.sums, self._counts):
            tensor.zero_()
        self.optimiser.forget()
        self.usage.fill_(1 / self.config.num_experts)

    def milliseconds(self) -> list[float]:
        """What each pass and the optimiser's step take, once captured."""
        found = []
        for one in [*self._passes, self._move]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(3):
                one()
            end.record()
            end.synchronize()
            found.append(round(start.elapsed_time(end) / 3, 2))
        return found

    def logits(self, ids: Tensor) -> Tensor:
        """Of every position; the masks are plain causal ones, which each layer's own operation knows."""
        masks = {"full_attention": None, "linear_attention": None}
        return self.model(input_ids=ids, attention_mask=masks, use_cache=False).logits

    def _pass(self, ids: Tensor, roles: Tensor) -> None:
        self._routers.clear()
        logits = self.logits(ids)[:, :-1].float()
        role = roles[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(role)
        given, own = (role == GIVEN).float(), (role == OWN).float()
        loss = (losses * (given * self._prompt_weight + own)).sum() * self._scale[0]
        present = (roles > 0).float().flatten()
        for layer, (scores, chosen) in enumerate(self._routers):
            mean = (scores.float().softmax(-1) * present.unsqueeze(-1)).sum(0) * self._scale[1]
            loss = loss + self._balance * self.config.num_experts * (self.usage[layer] * mean).sum()
            weights = present.unsqueeze(-1).expand_as(chosen).reshape(-1)
            self._counts[layer].scatter_add_(0, chosen.reshape(-1), weights)
        self._routers.clear()
        loss.backward()
        with torch.no_grad():
            for index, mask in enumerate((given, own)):
                self.sums[index, 0] += (losses * mask).sum()
                self.sums[index, 1] += mask.sum()

    @torch.no_grad()
    def _finish(self) -> None:
        self.optimiser.step()
        self.usage.lerp_(self._counts / self._counts.sum(-1, keepdim=True), 0.1)
        self._counts.zero_()

    def step(self, batches: list[Batch], rate: float, rounding: float, balance: float) -> None:
        """One step over the batches, one a length."""
        tokens = sum(int((batch.roles > 0).sum()) for batch in batches)
        own = sum(int((batch.roles[:, 1:] == OWN).sum()) for batch in batches)
        given = tokens - own - sum(len(batch.ids) for batch in batches)
        scale = torch.tensor([1 / (own + self._prompt_weight * given), 1 / tokens])
        self._scale.copy_(scale, non_blocking=True)
        self.optimiser.rate.fill_(rate)
        self.optimiser.rounding.fill_(rounding)
        self._balance.fill_(balance)
        for batch, (ids, roles), one in zip(batches, self._inputs, self._passes, strict=True):
            for tensor, values in ((ids, batch.ids), (roles, batch.roles)):
                host = torch.from_numpy(values)
                tensor.copy_(host.pin_memory() if tensor.is_cuda else host, non_blocking=True)
            one()
        self._move()

    @torch.no_grad()
    def examine(self, documents: dict[str, list[tuple[list[int], list[int]]]]) -> dict[str, Any]:
        """Loss a token and share of answers that are all right, token for token, of each kind of document."""
        found: dict[str, Any] = {}
        for kind, rows in documents.items():
            right, loss, tokens = 0, 0.0, 0
            for length in LENGTHS:
                fitting = [row for row in rows if LENGTHS[int(np.searchsorted(LENGTHS, len(row[0])))] == length]
                if not fitting:
                    continue
                batch = padded(fitting, length)
                ids = torch.from_numpy(batch.ids).to(self.device)
                logits = self.logits(ids)[:, :-1].float()
                role = torch.from_numpy(batch.roles)[:, 1:].to(self.device)
                losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(role)
                loss += float(losses[role > 0].sum())
                tokens += int((role > 0).sum())
                # Only the last answer is asked for: the model's own tokens after the last prompt.
                positions = torch.arange(length - 1, device=self.device)
                last = torch.where(role == GIVEN, positions, -1).amax(1, keepdim=True)
                wrong = (logits.argmax(-1) != ids[:, 1:]) & (role == OWN) & (positions > last)
                right += int((~wrong.any(1)).sum())
            found[kind] = {"loss": round(loss / tokens, 4), "exact": round(right / len(rows), 4), "of": len(rows)}
        self._routers.clear()
        return found

    def save(self, folder: Path) -> None:
        """The checkpoint, bf16, in shards of at most 14 MB, as published ones are."""
        tensors = {name: weight.cpu().contiguous() for name, weight in self.optimiser.weights().items()}
        shards: list[dict[str, Tensor]] = [{}]
        for name, tensor in tensors.items():
            size = sum(other.nbytes for other in shards[-1].values())
            if size + tensor.nbytes > _SHARD_BYTES:
                shards.append({})
            shards[-1][name] = tensor
        places = {}
        for index, shard in enumerate(shards):
            name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            save_file(shard, folder / name, {"format": "pt"})
            places |= dict.fromkeys(shard, name)
        total = sum(tensor.nbytes for tensor in tensors.values())
        index_file = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1) + "\n")
        settings = self.config.to_dict()
        settings = {key: value for key, value in settings.items() if not key.startswith("_")}
        settings |= {"architectures": ["Qwen3_5MoeForCausalLM"], "dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def _rate(progress: float) -> float:
    """Rises quickly, stays, and falls to nothing over the last two thirds."""
    return min(1.0, progress / _WARM_UP, (1 - progress) / 0.65)


def _rounding(progress: float) -> float:
    return min(1.0, max(0.0, (progress - _ROUNDING_FROM) / (_ROUNDING_TO - _ROUNDING_FROM)))


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="of training, after everything is ready")
    parser.add_argument("--steps", type=int, help="in place of --minutes")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of an earlier run, in place of training it")
    parser.add_argument("--documents", type=int, default=544, help="of a step")
    parser.add_argument("--workers", type=int, default=14, help="processes that write texts")
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--adam", type=float, default=0.004)
    parser.add_argument("--decay", type=float, default=0.03)
    parser.add_argument("--balance", type=float, default=0.0003)
    parser.add_argument("--late-balance", type=float, default=0.00003, help="from half of the training on")
    parser.add_argument("--prompt-weight", type=float, default=0.05)
    parser.add_argument("--log-every", type=float, default=5.0, help="seconds")
    parser.add_argument("--examinations", type=int, default=8)
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel anew")
    arguments = parser.parse_args()
    if (arguments.minutes is None) == (arguments.steps is None):
        parser.error("give --minutes or --steps")
    began = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    corpus = Corpus(arguments.seed)
    earlier = arguments.tokenizer
    tokenizer = Tokenizer.from_file(str(earlier)) if earlier else train_tokenizer(corpus)
    write_tokenizer(tokenizer, arguments.out)
    held_out: dict[str, list[Any]] = {}
    for document in corpus.held_out:
        held_out.setdefault(document.kind, []).append(encoded(document, tokenizer))
    stream = Stream(corpus, tokenizer, arguments.documents, arguments.workers)
    trainer = Trainer(arguments, tokenizer.get_vocab_size(), stream.rows)
    cuda = trainer.device.type == "cuda"
    if cuda and not arguments.no_graphs:
        trainer.capture()
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{parameters} parameters, rows {stream.rows}, ready after {time.monotonic() - began:.1f} s", flush=True)

    log = (arguments.out / "log.jsonl").open("w")

    def note(**values: Any) -> None:
        log.write(json.dumps(values) + "\n")
        log.flush()
        print(" ".join(f"{key}={value}" for key, value in values.items()), flush=True)

    note(
        kind="start",
        parameters=parameters,
        torch=torch.__version__,
        arguments={**vars(arguments), "out": "", "tokenizer": ""},
        rows=stream.rows,
        pass_milliseconds=trainer.pass_milliseconds,
        device=torch.cuda.get_device_name() if cuda else "cpu",
    )
    start = logged = time.monotonic()
    seconds = 60 * (arguments.minutes or 0)
    step = tokens = examined = 0
    waited = 0.0
    progress = 0.0
    while progress < 1:
        before = time.monotonic()
        batches = stream.next()
        waited += time.monotonic() - before
        balance = arguments.balance if progress < 0.5 else arguments.late_balance
        trainer.step(batches, _rate(progress), _rounding(progress), balance)
        step += 1
        tokens += sum(int((batch.roles > 0).sum()) for batch in batches)
        if cuda and step % 4 == 0:
            torch.cuda.synchronize()  # the clock must not run ahead of the work
        now = time.monotonic()
        progress = step / arguments.steps if arguments.steps else (now - start) / seconds
        if now - logged > arguments.log_every or progress >= 1:
            logged = now
            (given_loss, given), (own_loss, own) = trainer.sums.tolist()
            trainer.sums.zero_()
            usage = trainer.usage.cpu()
            entropy = float((-(usage + 1e-9).log() * usage).sum(-1).exp().mean())
            note(
                kind="step",
                step=step,
                seconds=round(now - start, 1),
                tokens=tokens,
                waited=round(waited, 1),
                tokens_per_second=round(tokens / (now - start)),
                rate=round(_rate(min(progress, 1)), 3),
                own_loss=round(own_loss / own, 4),
                prompt_loss=round(given_loss / max(given, 1), 4),
                effective_experts=round(entropy, 1),
                least_used=round(float(usage.min()) * 64, 3),
                most_used=round(float(usage.max()) * 64, 3),
            )
        if progress >= (examined + 1) / arguments.examinations and progress < 1:
            examined += 1
            note(kind="held_out", step=step, **trainer.examine(held_out))
        if examined == arguments.examinations - 1 and progress < 1 and not (arguments.out / "config.json").exists():
            trainer.save(arguments.out)  # a run that is cut short leaves something
    note(kind="held_out", step=step, **trainer.examine(held_out))
    trainer.save(arguments.out)
    note(
        kind="end",
        step=step,
        tokens=tokens,
        seconds=round(time.monotonic() - start, 1),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else None,
    )
    stream.close()


if __name__ == "__main__":
    main()
