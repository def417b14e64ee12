"""Classification data: opening, sampling and loading it."""
