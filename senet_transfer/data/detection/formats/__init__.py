"""Readers for other annotation formats, which are converted to COCO format."""
