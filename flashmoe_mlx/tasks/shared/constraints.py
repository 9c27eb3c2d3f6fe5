"""Constraints of a configuration: files with a JSON schema or a grammar, a regular expression, or choices."""

from pathlib import Path

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.untrusted import parse_object, read_text
from flashmoe_mlx.generation.request import ConstraintOptions
from flashmoe_mlx.paths import expand_path
from flashmoe_mlx.tasks.shared.keys import GenerationConfig

_LARGEST = 2**20


def constraint_options(config: GenerationConfig) -> ConstraintOptions:
    """Return the options that constrain the answer.

    Raises:
        InputError: a file is missing or is not UTF-8, or the schema is not a JSON object (code "unsupported_schema").
    """
    schema = None
    if config.schema is not None:
        path = expand_path(config.schema)
        try:
            schema = parse_object(_text(path))
        except ValueError as error:
            raise InputError(f"{path}: {error}", code="unsupported_schema") from None
    grammar = None if config.grammar is None else _text(expand_path(config.grammar))
    return {"schema": schema, "grammar": grammar, "regex": config.regex, "choices": config.choices}


def _text(path: Path) -> str:
    text = read_text(path, _LARGEST)
    if text is None:
        raise InputError(f"{path}: no such file")
    return text
