"""A warning for public functions and classes that a later version removes; the policy is in ``docs/api/index.md``."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def deprecated(instead: str, removal: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator whose function warns and then calls the decorated function or class.

    Args:
        instead: the replacement, for example "use Engine.generate".
        removal: the version without the name, for example "0.3".
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        name = f"{function.__module__}.{function.__qualname__}"

        @functools.wraps(function)
        def warning(*args: P.args, **kwargs: P.kwargs) -> R:
            message = f"{name} is deprecated and will be removed in version {removal}; {instead}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return function(*args, **kwargs)

        return warning

    return decorate
