"""CLIP's text encoders and their tokenizer."""
