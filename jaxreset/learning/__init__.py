"""From groups with rewards to optimizer steps."""
