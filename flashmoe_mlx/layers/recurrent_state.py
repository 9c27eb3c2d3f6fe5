"""The state of a recurrence, which is a sum over all tokens of a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx


@dataclass(slots=True)
class RecurrentState:
    """The state of a GatedDeltaNet layer.

    Attributes:
        conv_state: the latest inputs of the convolution, [kernel - 1, channels].
        recurrent_state: f32 [1, heads, Dv, Dk].
        keep_at: numbers of tokens to come, ascending, after which the layer copies its state to ``kept``.
        kept: the copied states.
    """

    conv_state: mx.array | None = None
    recurrent_state: mx.array | None = None
    keep_at: Sequence[int] = ()
    kept: list["RecurrentState"] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The size in bytes, which does not depend on the number of tokens."""
        return sum(array.nbytes for array in self.arrays())

    @property
    def can_trim(self) -> bool:
        """False once there is a state: tokens cannot be removed from a sum."""
        return self.recurrent_state is None

    def arrays(self) -> list[mx.array]:
        """Return the states; none before the first token."""
        return [array for array in (self.conv_state, self.recurrent_state) if array is not None]

    def snapshot(self) -> "RecurrentState":
        """Return a copy."""
        if self.conv_state is None or self.recurrent_state is None:
            return RecurrentState()
        return RecurrentState(copied(self.conv_state), copied(self.recurrent_state))

    def restore(self, snapshot: "RecurrentState") -> None:
        """Return to the state of ``snapshot``."""
        copy = snapshot.snapshot()
        self.conv_state, self.recurrent_state = copy.conv_state, copy.recurrent_state

    def trim(self, length: int) -> None:
        """Do nothing: only an empty state can be trimmed."""

    def mark(self) -> tuple[mx.array | None, mx.array | None]:
        """Return both arrays."""
        return self.conv_state, self.recurrent_state

    def rewind(self, mark: tuple[mx.array | None, mx.array | None]) -> None:
        """Take the arrays of ``mark``; kernels for GPUs never write to a state that they were given."""
        self.conv_state, self.recurrent_state = mark

    def must_grow(self, tokens: int) -> bool:  # noqa: ARG002  # of the protocol
        """False, because the size is fixed."""
        return False

    @property
    def keeps_tokens(self) -> bool:
        """False, because the state is a sum over all tokens."""
        return False

    def part(self, start: int, end: int) -> "RecurrentState":
        """Refuse: a state has no parts."""
        raise NotImplementedError

    @classmethod
    def of_arrays(cls, arrays: Sequence[mx.array], length: int) -> "RecurrentState":  # noqa: ARG003  # of the protocol
        """Return the state of both arrays."""
        conv_state, recurrent_state = arrays
        return cls(conv_state, recurrent_state)

    def assemble(self, parts: Sequence["RecurrentState"]) -> None:
        """Return to the state of the last part."""
        self.restore(parts[-1])


def copied(array: mx.array) -> mx.array:
    """Return a contiguous copy in separate memory."""
    copy = lazy_copy(array)
    mx.eval(copy)
    return copy


def lazy_copy(array: mx.array) -> mx.array:
    """Return a contiguous copy, not computed yet; a selection is exact for every bit pattern."""
    return mx.where(mx.array(True), array, array)
