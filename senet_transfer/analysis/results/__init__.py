"""Records of finished training runs, and result tables generated from the records."""
