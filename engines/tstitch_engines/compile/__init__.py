"""Compiling the networks of a bundle to engines, and choosing among those it has."""
