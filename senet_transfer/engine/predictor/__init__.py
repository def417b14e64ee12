"""Inference on images and videos, with trained, published and exported models."""
