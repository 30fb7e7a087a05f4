"""A run: a config made live, its loop, its folder, its checkpoints, and what is made of them."""
