"""Additional config keys, and loading and validation of configs."""

from senet_transfer.config.defaults import (
    META_ARCHITECTURE,
    add_senet_config,
    config_items,
    config_value,
    get_senet_config,
    is_classification,
)

__all__ = [
    "META_ARCHITECTURE",
    "add_senet_config",
    "config_items",
    "config_value",
    "get_senet_config",
    "is_classification",
]
