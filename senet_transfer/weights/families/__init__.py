"""The families of pretrained weights: how each is detected, renamed and computed."""
