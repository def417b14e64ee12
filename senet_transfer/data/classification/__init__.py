"""Opening, sampling and loading of classification data."""
