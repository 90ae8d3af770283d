"""Generation without a command line: load a generator, make a head, render it.

>>> from inference import load_generator, make_head, orbit_labels
>>> G = load_generator("init:debug")
>>> head = make_head(G, seed=0)
>>> images = [head.render(label)["image"] for label in orbit_labels(4)]  # each [1, 3, 128, 128]
"""

from inference.loading import load_generator
from inference.sampling import Head, Noise, Truncation, make_head, orbit_labels, to_uint8

__all__ = ["Head", "Noise", "Truncation", "load_generator", "make_head", "orbit_labels", "to_uint8"]
