"""The VAE between pictures and latents (diffusers' AutoencoderKL)."""
