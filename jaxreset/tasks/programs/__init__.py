"""Programs that a model writes: their tests, and how they are run without harm."""
