"""Training and evaluation from Detectron2's LazyConfigs, which are written in Python."""
