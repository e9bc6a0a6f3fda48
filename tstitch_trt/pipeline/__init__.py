"""diffusers pipelines on compiled engines: ``accelerate``."""
