"""ControlNets for Stable Diffusion and SDXL."""
