"""Widths of the experts of a variant, for each projection in each layer, from the value of ``bits=``."""

import json
import re
from collections.abc import Mapping, Sequence

from flashmoe_mlx.errors import InputError
from flashmoe_mlx.formats.record import AFFINE, PROJECTIONS, QUANTIZED_BITS, LayerLayouts, MatrixFormat, RecordLayout

Width = int | str
"""The widths of a variant: a number of bits, ``PUBLISHED``, ``DEFAULT``, a key of ``RECIPES``, or a mapping as JSON."""
PUBLISHED = "published"
"""Experts as the checkpoint has them."""
DEFAULT = "default"
"""4 bits; ``PUBLISHED`` where the experts of the checkpoint have several formats or a float mode."""
RECIPES: Mapping[str, tuple[int, int]] = {
    "mixed_2_6": (2, 6),
    "mixed_3_4": (3, 4),
    "mixed_3_6": (3, 6),
    "mixed_4_6": (4, 6),
}
"""The low and the high width of recipes of ``mlx_lm.convert --quant-predicate``."""
_RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_Widths = tuple[int, int, int]


def parse_widths(bits: object) -> tuple[Width, ...]:
    """Check the value of ``bits=`` and return the widths of each variant.

    A variant is a number of bits, ``published``, the name of a recipe, or a mapping with ``gate``, ``up`` and ``down``
    and with ranges of layers, such as ``{gate: 3, up: 3, down: 4, 0-3: 6, 36-39: {down: 8}}``. Later ranges take
    precedence.

    Raises:
        InputError: the value has another form, or names another width (code "invalid_value").
    """
    if bits is None:
        return (DEFAULT,)
    several = bits if isinstance(bits, Sequence) and not isinstance(bits, str) else [bits]
    if not several:
        raise _invalid("bits=[]: name at least one width")
    return tuple(dict.fromkeys(_parsed(one) for one in several))


def target_layout(width: Width, source: LayerLayouts, group_size: int) -> LayerLayouts:
    """Return the layout of a variant made from experts with the layout ``source``.

    A projection that has the wanted width already keeps its format.

    Args:
        width: the widths of the variant.
        source: the layout of the experts to make it from.
        group_size: the number of weights that share a scale and a bias, where weights are quantized.

    Raises:
        InputError: a projection would get more bits than it has, ranges leave out layers or name layers that do not
            exist, or ``PUBLISHED`` experts are not quantized (code "invalid_value").
    """
    width = resolved(width, source)
    if width == PUBLISHED:
        if any(layout.is_native and form.bits is None for layout in source.distinct for form in layout.formats):
            raise _invalid("bits=[published]: the experts of the checkpoint are not quantized; name a width")
        return source
    wanted = layer_widths(width, len(source))
    return LayerLayouts.of(_narrowed(layout, own, group_size) for layout, own in zip(source, wanted, strict=True))


def resolved(width: Width, source: LayerLayouts) -> Width:
    """Return ``width``, or for ``DEFAULT`` its meaning for experts with the layout ``source``."""
    if width != DEFAULT:
        return width
    single = source.single_format
    return 4 if single is not None and single.mode == AFFINE else PUBLISHED


def layer_widths(width: Width, num_layers: int) -> list[_Widths]:
    """Return the widths of gate, up and down in each of ``num_layers`` layers; ``width`` states them.

    Raises:
        InputError: a layer has no width, or does not exist (code "invalid_value").
    """
    if isinstance(width, int):
        return [(width,) * 3] * num_layers
    if width in RECIPES:
        low, high = RECIPES[width]
        return [(low, low, high if _is_sensitive(layer, num_layers) else low) for layer in range(num_layers)]
    stated: Mapping[str, int | Mapping[str, int]] = json.loads(width)
    found: list[dict[str, int]] = [{} for _ in range(num_layers)]
    for key, value in stated.items():
        if key in PROJECTIONS:
            assert isinstance(value, int)
            first, last, own = 0, num_layers - 1, {key: value}
        else:
            first, last = _bounds(key)
            own = dict(value) if isinstance(value, Mapping) else dict.fromkeys(PROJECTIONS, value)
            if last >= num_layers:
                raise _invalid(f"bits: layer {last} does not exist; the model has layers 0 to {num_layers - 1}")
        for layer in range(first, last + 1):
            found[layer] |= own
    for layer, own in enumerate(found):
        for projection in PROJECTIONS:
            if projection not in own:
                raise _invalid(f"bits: no width for {projection} in layer {layer}; add {projection}:<bits>")
    return [(own["gate"], own["up"], own["down"]) for own in found]


def _is_sensitive(layer: int, num_layers: int) -> bool:
    """Return whether mlx_lm's recipes give ``layer`` more bits: the first and last eighth, and every third between."""
    eighth = num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def _narrowed(source: RecordLayout, wanted: _Widths, group_size: int) -> RecordLayout:
    formats: list[MatrixFormat] = []
    for projection, own, bits in zip(PROJECTIONS, source.formats, wanted, strict=True):
        if own.bits == bits and own.mode == AFFINE:
            formats.append(own)
            continue
        if own.bits is not None and own.bits < bits:
            part = "" if source.single_format is not None else f" in {projection}"
            raise _invalid(f"bits={bits}: the source has experts of {own.bits} bits{part}; more would add nothing")
        formats.append(MatrixFormat(bits, group_size, own.dtype if own.mode == AFFINE else "BF16"))
    return RecordLayout(source.hidden_size, source.intermediate_size, *formats)


def _parsed(value: object) -> Width:
    if isinstance(value, int) and not isinstance(value, bool):
        return _checked(value)
    if isinstance(value, str) and (value == PUBLISHED or value in RECIPES):
        return value
    if isinstance(value, Mapping) and value:
        return json.dumps({str(key): _entry(str(key), entry) for key, entry in value.items()})
    raise _invalid(
        f"bits={value}: give a number of bits, published, {', '.join(RECIPES)}, or a mapping such as "
        "{gate:3,up:3,down:4}"
    )


def _entry(key: str, value: object) -> int | dict[str, int]:
    """Check one entry of a mapping: a projection, or a range of layers."""
    if key not in PROJECTIONS:
        _bounds(key)
        if isinstance(value, Mapping) and value and set(value) <= set(PROJECTIONS):
            return {str(projection): _checked(bits) for projection, bits in value.items()}
    return _checked(value)


def _bounds(key: str) -> tuple[int, int]:
    """Return the first and the last layer of a range."""
    match = _RANGE.fullmatch(key)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise _invalid(f"bits: {key!r} is neither gate, up or down nor a range of layers such as 0-3")
    return int(match[1]), int(match[2] or match[1])


def _checked(bits: object) -> int:
    if type(bits) is not int or bits not in QUANTIZED_BITS:
        raise _invalid(f"bits={bits}: choose from {', '.join(map(str, QUANTIZED_BITS))}")
    return bits


def _invalid(message: str) -> InputError:
    return InputError(message, code="invalid_value")
