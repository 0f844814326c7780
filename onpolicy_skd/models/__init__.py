"""Models: loading, backbone and LM head, LoRA adapters, batches."""
