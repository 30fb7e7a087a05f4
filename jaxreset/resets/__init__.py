"""Resets: which step a failed attempt goes back to, what is drawn from there, and the groups of it all."""
