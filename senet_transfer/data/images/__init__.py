"""Functions for listing, decoding and transforming images in folders and archives."""
