"""File formats of weights: from bytes to named tensors, safely."""
