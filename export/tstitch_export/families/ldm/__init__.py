"""The class-conditional latent-diffusion UNet (arXiv 2112.10752)."""
