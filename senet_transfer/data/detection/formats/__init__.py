"""Readers of annotation formats, whose content is converted to COCO's format."""
