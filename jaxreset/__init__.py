"""jaxreset: post-train language models on multi-step reasoning by resets, in JAX."""

from __future__ import annotations

__version__ = "0.1.0"
