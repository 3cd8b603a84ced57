"""What a family of checkpoint formats provides, and how it reads the values of a config.json."""

from collections.abc import Mapping
from typing import Any, Protocol

from ..config import TransformerConfig

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
KINDS |= {dict: "an object"}


class Family(Protocol):
    """Formats that share the names of their tensors. A module with these functions is a family."""

    def layout(self, config: TransformerConfig) -> dict[str, tuple[str, Any]]:
        """For each tensor of a file, a parameter's name and the index of the part it fills."""

    def read_config(self, settings: Mapping[str, Any]) -> TransformerConfig:
        """The model that a config.json describes; ValueError if `Transformer` can't be it."""

    def write_config(self, config: TransformerConfig) -> dict[str, Any]:
        """The config.json of a model; `save` reads it back and refuses the model if it changed."""


def read(settings: Mapping[str, Any], key: str, kind: type, *default: Any) -> Any:
    """A value of a config.json.

    Args:
        settings: what the file holds.
        key: the name of the value.
        kind: its type; float takes whole numbers too.
        default: stands in for a missing value or null; without one, the value must be there.

    Raises:
        ValueError: if the value is missing or of another type.

    Example:
        >>> read({"hidden_size": "64"}, "hidden_size", int)
        Traceback (most recent call last):
        ValueError: hidden_size='64' must be a whole number
    """
    value = settings.get(key)
    if value is None and default:
        return default[0]
    if key not in settings:
        raise ValueError(f"{key} is missing")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # isinstance would take true for a whole number
        raise ValueError(f"{key}={value!r} must be {KINDS[kind]}")
    return value
