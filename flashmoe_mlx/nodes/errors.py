"""Errors of nodes."""

from flashmoe_mlx.errors import FlashMoeError, InputError


class NodeLostError(FlashMoeError):
    """The loss of a node, after which the group cannot continue."""

    default_code = "node_lost"


class NodeFailedError(FlashMoeError):
    """A failure of another node in a pass. The pass cannot continue, the group can."""

    default_code = "node_failed"


class NodeMismatchError(InputError):
    """A node whose model, version or options differ from those of node 0."""

    default_code = "node_mismatch"


class StoppedError(Exception):
    """The end of a pass that node 0 cancelled; every node raises it in the same layer."""
