"""Reading checkpoints: single files, sharded files, folders and pipelines, and telling what they hold."""
