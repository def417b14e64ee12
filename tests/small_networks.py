"""Config overrides for small networks, shared by tests in several folders."""

# This network has fewer than a million parameters, which keeps checkpoints small.
SE_RESNEXT50 = {
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RESNETS.DEPTH": "50",
    "MODEL.RESNETS.NUM_GROUPS": "32",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "1",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "32",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "32",
    "MODEL.SE.ENABLED": "True",
}
