"""All nodes but node 0: they run the passes that node 0 orders."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import mlx.core as mx

from flashmoe_mlx.errors import FlashMoeError
from flashmoe_mlx.generation.ahead import StepAlone
from flashmoe_mlx.generation.request import Request
from flashmoe_mlx.generation.runner import Runner
from flashmoe_mlx.generation.sampling import ChosenSampling, SamplingOptions
from flashmoe_mlx.generation.sequence import Sequence
from flashmoe_mlx.layers.cache import SequenceCache
from flashmoe_mlx.moe.prefetch import Guesses
from flashmoe_mlx.nodes.errors import NodeLostError
from flashmoe_mlx.nodes.group import Nodes

_log = logging.getLogger(__name__)


class FollowedSequence(Sequence):
    """A sequence of node 0, whose tokens and end this node is told."""

    def accept(self, token: int) -> None:
        """Append a token that node 0 chose."""
        self.token_ids.append(token)

    def choose_on_device(self, logits: mx.array) -> tuple[mx.array, None]:
        """Return a number that stands for the choice of node 0, and is computed at the same place of the step."""
        return logits[:1].astype(mx.uint32), None


class Follower:
    """Copies of the sequences of node 0.

    Args:
        runner: runs the passes.
        nodes: the nodes.
    """

    def __init__(self, runner: Runner, nodes: Nodes) -> None:
        self._runner = runner
        self._nodes = nodes
        self._sequences: dict[int, FollowedSequence] = {}
        self._cache = SequenceCache()

    def run(self) -> None:
        """Run passes until node 0 ends.

        Raises:
            NodeLostError: another node is gone.
        """
        while True:
            order = self._nodes.message(None)
            self._forget(order)
            if order["do"] == "end":
                return
            if order["do"] != "nothing":
                with self._runner.exclusive():
                    self._obey(order)

    def _forget(self, order: Mapping[str, Any]) -> None:
        for number, reason, known, token_ids in order["ended"]:
            sequence = self._sequences[number]
            sequence.token_ids[known:] = token_ids
            self._keep_steps(sequence, len(sequence.request.prompt_ids) + len(sequence.token_ids) - 1, 0)
            sequence.finish(reason)
        for number in order["gone"]:
            self._sequences.pop(number, None)

    def _obey(self, order: Mapping[str, Any]) -> None:
        runner = self._runner
        runner.orders.lazy = order["lazy"]
        try:
            with self._nodes.waiting_for_pass() if order["lazy"] else nullcontext():
                self._run(order)
        except NodeLostError:
            raise
        except FlashMoeError as error:  # every node has ended the pass
            _log.warning("%s", error)

    def _run(self, order: Mapping[str, Any]) -> None:
        runner = self._runner
        if order["do"] == "logits":
            if order["new"]:
                self._cache = runner.model.new_cache()
            runner.logits(order["tokens"], self._cache, Guesses(), decoding=order["decoding"])
            return
        for new in order["new"]:
            self._begin(new)
        followed = [self._told(*listed) for listed in order["sequences"]]
        sequences: list[Sequence] = [*followed]
        if order["do"] == "prefill":
            runner.prefill_together(sequences, order["most_tokens"], resumes=order["resumes"])
        else:
            runner.decode_together(sequences, order["steps"])

    def _begin(self, new: Mapping[str, Any]) -> None:
        config = self._runner.model.config
        request = Request(new["prompt"], ChosenSampling(SamplingOptions()), max_tokens=config.max_context)
        self._sequences[new["id"]] = FollowedSequence(
            request,
            self._runner.model.new_cache(),
            config.max_context,
            new["chunk"],
            on_finish=self._runner.finished,
        )

    def _told(self, number: int, known: int, token_ids: list[int], length: int, ahead: int) -> FollowedSequence:
        """Return a sequence as it is on node 0: its tokens, the length of its cache, and the steps under way."""
        sequence = self._sequences[number]
        sequence.token_ids[known:] = token_ids
        self._keep_steps(sequence, length, ahead)
        return sequence

    def _keep_steps(self, sequence: FollowedSequence, length: int, ahead: int) -> None:
        """Keep the last ``ahead`` steps under way.

        Node 0 has taken all other steps, except for the steps after ``length`` tokens, which it has discarded.
        """
        steps = sequence.ahead
        sequence.ahead = steps[len(steps) - ahead :]
        for step in steps[: len(steps) - ahead]:
            if step.mark.length < length and isinstance(step, StepAlone):
                self._runner.ahead.count(step)
        if steps and length < sequence.cache.length:
            mx.eval(steps[-1].report)
            sequence.cache.rewind(next(step.mark for step in steps if step.mark.length == length))
