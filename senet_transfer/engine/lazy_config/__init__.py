"""Training and evaluation with Detectron2's LazyConfigs, which are written in Python."""
