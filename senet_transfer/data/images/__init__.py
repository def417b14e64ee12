"""Listing, decoding and transforms of images in folders and archives."""
