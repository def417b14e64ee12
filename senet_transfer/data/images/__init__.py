"""Images in folders and archives: listing, decoding, transforms."""
