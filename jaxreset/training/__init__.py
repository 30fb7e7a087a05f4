"""Collecting groups, updating the policy, and the run around them."""
