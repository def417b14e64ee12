"""Analysis of the SE gates of a trained network (paper, section 7.2, Figures 6 and 7)."""
