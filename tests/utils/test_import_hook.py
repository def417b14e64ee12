"""Tests that commands hide only those library warnings that users can't act on."""

import logging
import warnings

import torch

from senet_transfer.utils.import_hook import hide_library_warnings


def test_only_warnings_about_torchs_own_interfaces_are_hidden(caplog):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_library_warnings()
        torch.meshgrid(torch.zeros(2), torch.zeros(2))
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["another"]

    tracing = logging.getLogger("torch.fx._symbolic_trace")
    tracing.warning("is_fx_tracing will return true for both fx.symbolic_trace and torch.export.")
    tracing.warning("another")
    assert "another" in caplog.text
    assert "is_fx_tracing" not in caplog.text
