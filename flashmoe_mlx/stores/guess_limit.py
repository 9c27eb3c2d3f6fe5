"""The number of reads that a guess may begin without delaying the request that follows."""

_MOST = 4096
_STEP = 1 / 4
"""Growth by each request."""
_FIRST_STEP = 1 / 16
"""Growth by each request below one read. Where no read ends in time, one request in 16 meets such a read."""
_DECAY = 15 / 16
"""Factor of each request while few guesses are right."""
_LEAST_RIGHT = 1 / 5
"""The smallest share of right guesses that is worth the processor time and the memory traffic of all guesses."""
_MEMORY = 32
"""The number of requests over which the share of right guesses is averaged."""


class GuessLimit:
    """A limit that guesses approach slowly and leave at once (additive increase, multiplicative decrease).

    Storage that works on a wrong guess when a request comes delays the request, so the limit falls to the number of
    reads that had ended. It grows while it binds and all wrong reads end in time, and shrinks while few guesses are
    right. Reads of right guesses delay nothing: the request needs their bytes.
    """

    def __init__(self) -> None:
        self._reads = float(_MOST)
        self._right = 0.5
        """The moving average of the share of reads whose expert was requested."""

    @property
    def reads(self) -> int:
        """The number of reads that the next guess may begin."""
        return int(self._reads)

    def learn(self, right: int, wrong: int, ended: int, late: bool, bound: bool) -> None:
        """Adapt the limit to the reads of the guess before a request.

        Args:
            right: begun reads of requested experts.
            wrong: begun reads of other experts.
            ended: reads of either kind that had ended when the request came.
            late: whether a wrong read had not.
            bound: whether the limit kept further reads from beginning.
        """
        begun = right + wrong
        if begun:
            self._right += (right / begun - self._right) / _MEMORY
        if late:
            self._reads = float(ended)
        elif begun and self._right < _LEAST_RIGHT:
            self._reads = min(self._reads, begun) * _DECAY
        elif bound:
            self._reads = min(self._reads + (_STEP if self._reads >= 1 else _FIRST_STEP), _MOST)
