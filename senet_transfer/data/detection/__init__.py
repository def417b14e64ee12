"""Detection data in COCO format: checks, registration, mapper and loader."""
