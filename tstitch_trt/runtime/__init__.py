"""Loaded engines that walk trajectories over one device arena."""
