"""A probe of projectors: a frozen encoder, a projector, and a small reader of packed tokens.

contract        what a set of pictures and an encoder must offer, and where both are found by name
letters         pictures of 48 letters and digits in fonts of this machine
photo_scenes    scenes of photographed things: which, where, how many, in frames of which color
encoders        CRAFT's VGG16, and the whitened features of all pictures, kept in files
own_vit         a small ViT that learned without labels on training pictures of the probe
probe_plan      the runs of a probe
reading         one run: projector and reader learn, and are tested
probing         features, all runs that have no row yet, and the report
probe_figures   accuracy over tokens, and over steps
probe_report    rows -> probe.json, probe.md, figures, and the tables in documents
"""
