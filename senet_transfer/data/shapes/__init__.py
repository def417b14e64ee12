"""The demo's rendered data."""
