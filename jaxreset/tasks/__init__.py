"""What is learnt: problems, their prompts and the verifiers that score a response."""
