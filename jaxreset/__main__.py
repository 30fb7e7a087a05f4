"""`python -m jaxreset` is the command `jaxreset`."""

from jaxreset.cli import main

main()
