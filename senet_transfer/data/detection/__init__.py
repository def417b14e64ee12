"""Detection data: COCO's format, its checks, loader and mapper."""
