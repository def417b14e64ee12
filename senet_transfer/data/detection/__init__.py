"""Detection data in COCO format: checks, registration, mapping and loading."""
