"""Tar shards: writing, verification, and reading from local or remote storage."""
