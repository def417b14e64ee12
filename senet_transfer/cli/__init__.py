"""The commands that an installation has; those of the same kind in tools/ call them, too."""
