"""Choosing the stitch point by measurements of a bundle on the user's own machine."""
