"""Training recipes chosen for a user's data and machine, as used by ``senet train --data``."""
