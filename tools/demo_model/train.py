"""Make the demo model from one seed: tokenizer, corpus, training and checkpoint.

    python tools/demo_model/train.py --out DIR --minutes 7.5

This needs an NVIDIA GPU with bf16, torch, triton, transformers with qwen3_5_moe, and tokenizers. On a CPU, use
``--steps 3 --documents 24`` to test the code. The script writes to DIR a bf16 checkpoint in the published format, from
which ``pack.py`` makes the pack of the package, the tokenizer files, and ``log.jsonl``. The schedule of the learning
rate depends on the time, or on ``--steps`` for a reproducible run (up to the order of sums on the GPU).
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
from data import GIVEN, LENGTHS, OWN, Batch, Stream, encode_document, pad_rows
from model import geometry, make_model
from optimizer import Optimizer
from safetensors.torch import save_file
from tokenizer import train_tokenizer, write_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTopKRouter

_SHARD_BYTES = 14_000_000
_WARM_UP, _ROUNDING_FROM, _ROUNDING_TO = 0.01, 0.5, 0.6
"""Points of the training, as shares: the full learning rate, and the beginning and end of rounding the experts."""


class Trainer:
    """The model, its optimizer and the losses. On a GPU, every forward and backward pass is captured and replayed."""

    def __init__(self, arguments: argparse.Namespace, vocab_size: int, rows: list[int]) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(arguments.seed)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.config = geometry(vocab_size)
        self.model = make_model(self.config, triton=self.device.type == "cuda").to(self.device).train()
        self.optimizer = Optimizer(self.model, 4, 32, arguments.muon, arguments.adam, arguments.decay)
        self._prompt_weight = arguments.prompt_weight
        self._routers: list[tuple[Tensor, Tensor]] = []
        for module in self.model.modules():
            if isinstance(module, Qwen3_5MoeTopKRouter):
                module.register_forward_hook(lambda _m, _i, out: self._routers.append((out[0], out[2])))

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, device=self.device)

        experts = self.config.num_experts
        self.usage = zeros(self.config.num_hidden_layers, experts) + 1 / experts
        """Recent share of each expert among the choices of its layer."""
        self._counts = torch.zeros_like(self.usage)
        self._scale = zeros(2)  # 1 / total weight of the losses, 1 / number of tokens
        self._balance = zeros()
        self.sums = zeros(2, 2)
        """Sum of losses and number of tokens, for prompts and for answers."""
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
        """Capture every pass and the step of the optimizer as CUDA graphs."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for ids, roles in self._inputs:
                ids.random_(0, 256)
                roles.fill_(OWN)
            for _ in range(2):
                for run_pass in self._passes:
                    run_pass()
            self._finish()
        torch.cuda.current_stream().wait_stream(side)
        pool = torch.cuda.graph_pool_handle()
        graphs = []
        for operation in [*self._passes, self._finish]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                operation()
            graphs.append(graph)
        self._passes = [graph.replay for graph in graphs[:-1]]
        self._move = graphs[-1].replay
        self.pass_milliseconds = self.milliseconds()
        for parameter in self.model.parameters():
            parameter.grad.zero_()
        for tensor in (self.sums, self._counts):
            tensor.zero_()
        self.optimizer.forget()
        self.usage.fill_(1 / self.config.num_experts)

    def milliseconds(self) -> list[float]:
        """Measure the milliseconds of each captured pass and of the optimizer's step."""
        found = []
        for operation in [*self._passes, self._move]:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(3):
                operation()
            end.record()
            end.synchronize()
            found.append(round(start.elapsed_time(end) / 3, 2))
        return found

    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits of every position; each layer applies its causal mask itself."""
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
        self.optimizer.step()
        self.usage.lerp_(self._counts / self._counts.sum(-1, keepdim=True), 0.1)
        self._counts.zero_()

    def step(self, batches: list[Batch], rate: float, rounding: float, balance: float) -> None:
        """Train on the batches of a step, one batch per length."""
        tokens = sum(int((batch.roles > 0).sum()) for batch in batches)
        own = sum(int((batch.roles[:, 1:] == OWN).sum()) for batch in batches)
        given = tokens - own - sum(len(batch.ids) for batch in batches)
        scale = torch.tensor([1 / (own + self._prompt_weight * given), 1 / tokens])
        self._scale.copy_(scale, non_blocking=True)
        self.optimizer.rate.fill_(rate)
        self.optimizer.rounding.fill_(rounding)
        self._balance.fill_(balance)
        for batch, (ids, roles), run_pass in zip(batches, self._inputs, self._passes, strict=True):
            for tensor, values in ((ids, batch.ids), (roles, batch.roles)):
                host = torch.from_numpy(values)
                tensor.copy_(host.pin_memory() if tensor.is_cuda else host, non_blocking=True)
            run_pass()
        self._move()

    @torch.no_grad()
    def examine(self, documents: dict[str, list[tuple[list[int], list[int]]]]) -> dict[str, Any]:
        """Return the loss per token, and the share of answers with only correct tokens, for each kind of document."""
        found: dict[str, Any] = {}
        for kind, rows in documents.items():
            right, loss, tokens = 0, 0.0, 0
            for length in LENGTHS:
                fitting = [row for row in rows if LENGTHS[int(np.searchsorted(LENGTHS, len(row[0])))] == length]
                if not fitting:
                    continue
                batch = pad_rows(fitting, length)
                ids = torch.from_numpy(batch.ids).to(self.device)
                logits = self.logits(ids)[:, :-1].float()
                role = torch.from_numpy(batch.roles)[:, 1:].to(self.device)
                losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(role)
                loss += float(losses[role > 0].sum())
                tokens += int((role > 0).sum())
                # Only the last answer counts: the tokens of the model after the last prompt.
                positions = torch.arange(length - 1, device=self.device)
                last = torch.where(role == GIVEN, positions, -1).amax(1, keepdim=True)
                wrong = (logits.argmax(-1) != ids[:, 1:]) & (role == OWN) & (positions > last)
                right += int((~wrong.any(1)).sum())
            found[kind] = {"loss": round(loss / tokens, 4), "exact": round(right / len(rows), 4), "of": len(rows)}
        self._routers.clear()
        return found

    def save(self, folder: Path) -> None:
        """Write the checkpoint in the published format, bf16, in shards of at most 14 MB."""
        tensors = {name: weight.cpu().contiguous() for name, weight in self.optimizer.weights().items()}
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
    """Return the relative learning rate: a short rise, a plateau, and a decay to 0 over the last two thirds."""
    return min(1.0, progress / _WARM_UP, (1 - progress) / 0.65)


def _rounding(progress: float) -> float:
    return min(1.0, max(0.0, (progress - _ROUNDING_FROM) / (_ROUNDING_TO - _ROUNDING_FROM)))


def main() -> None:
    """Run the training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="duration of the training itself")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --minutes")
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json of an earlier run, instead of training a tokenizer"
    )
    parser.add_argument("--documents", type=int, default=544, help="documents per step")
    parser.add_argument("--workers", type=int, default=14, help="worker processes")
    parser.add_argument("--muon", type=float, default=0.02)
    parser.add_argument("--adam", type=float, default=0.004)
    parser.add_argument("--decay", type=float, default=0.03)
    parser.add_argument("--balance", type=float, default=0.0003)
    parser.add_argument(
        "--late-balance",
        type=float,
        default=0.00003,
        help="weight of the balance loss in the second half of the training",
    )
    parser.add_argument("--prompt-weight", type=float, default=0.05)
    parser.add_argument("--log-every", type=float, default=5.0, help="seconds between lines of the log")
    parser.add_argument("--examinations", type=int, default=8)
    parser.add_argument("--no-graphs", action="store_true", help="launch every kernel separately")
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
        held_out.setdefault(document.kind, []).append(encode_document(document, tokenizer))
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
            torch.cuda.synchronize()  # wait for the GPU before reading the clock
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
            trainer.save(arguments.out)  # so that an interrupted run leaves a checkpoint
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
