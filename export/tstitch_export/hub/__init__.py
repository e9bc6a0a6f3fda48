"""Models named by their Hugging Face repository."""
