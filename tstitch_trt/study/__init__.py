"""Choosing the stitch point: what is measured of a bundle on the user's own machine, and what follows from it."""
