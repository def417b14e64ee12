"""What the gates of a trained network do (paper, section 7.2, Figures 6 and 7)."""
