"""Readers that convert other annotation formats to COCO format."""
