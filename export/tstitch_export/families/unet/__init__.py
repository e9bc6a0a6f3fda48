"""The UNets of Stable Diffusion and SDXL."""
