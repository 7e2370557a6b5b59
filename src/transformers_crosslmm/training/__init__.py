"""From records on disk to a trained checkpoint: data, the trainer, LoRA and the recipes."""
