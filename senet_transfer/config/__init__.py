"""Additional config keys, and loading and validation of configs."""

from senet_transfer.config.defaults import (
    AUTO_KEYS,
    META_ARCHITECTURE,
    add_senet_config,
    config_items,
    config_value,
    get_senet_config,
    is_classification,
    set_config_value,
)

__all__ = [
    "AUTO_KEYS",
    "META_ARCHITECTURE",
    "add_senet_config",
    "config_items",
    "config_value",
    "get_senet_config",
    "is_classification",
    "set_config_value",
]
