"""Detection datasets in COCO format: validation, registration, mapping and loading."""
