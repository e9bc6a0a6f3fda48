"""Engines compared with references on the same inputs."""
