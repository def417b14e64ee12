"""Every config key of this project, and reading configs."""

from senet_transfer.config.defaults import (
    add_senet_config,
    config_items,
    config_value,
    get_senet_config,
)

__all__ = ["add_senet_config", "config_items", "config_value", "get_senet_config"]
