"""The policy network: a decoder-only transformer, its attention, and Hugging Face folders."""
