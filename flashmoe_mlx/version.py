"""The version of the package, in a module that every other one may import."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__: str = version("flashmoe_mlx")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "0.0.0"
"""The version of the installed package; "0.0.0" in a checkout that is not installed."""
