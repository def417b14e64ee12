"""What is measured of models and runs."""
