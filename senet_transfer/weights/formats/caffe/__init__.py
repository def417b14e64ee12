"""Reader for Caffe files that does not require Caffe."""
