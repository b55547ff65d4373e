"""YAML as a recipe has it: plain values, nothing that one key or number can hide in another."""

from __future__ import annotations

from typing import Any

import yaml


class NotYamlError(ValueError):
    """A text that is not the YAML of a recipe, and why."""


class _Loader(yaml.SafeLoader):
    """Without aliases, a few of which can stand for more than the memory holds, or huge numbers."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise NotYamlError("aliases (*name) are not read in a recipe; write the value out")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        number = super().construct_yaml_int(node)
        if number.bit_length() > 63:
            line = node.start_mark.line + 1
            raise NotYamlError(f"line {line}: a number of more than 63 bits")
        return number

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Keys that are all different: PyYAML alone keeps the last of two and says nothing."""
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise NotYamlError(
                    f"line {key.start_mark.line + 1}: the key {key.value[:60]!r} is there twice; "
                    "put all that it holds in one place"
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def plain_yaml(text: str) -> Any:
    """The values of a text; NotYamlError where it is not one that a recipe may have."""
    try:
        return yaml.load(text, _Loader)
    except NotYamlError:
        raise
    # PyYAML's constructors raise whatever int(), float() and its own tables do.
    except Exception as error:
        raise NotYamlError(str(error) or type(error).__name__) from None
