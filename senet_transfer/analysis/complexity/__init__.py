"""What models cost: parameters, multiply-accumulates, activations."""
