"""Tar shards: writing, reading and verifying them, locally or remotely."""
