"""Vision transformers in Flax Linen, and the import of published checkpoints."""
