"""Writing, verification, and local or remote reading of tar shards."""
