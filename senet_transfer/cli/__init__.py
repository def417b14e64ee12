"""Commands and argument parsers for the ``senet`` command and the scripts in tools/."""
