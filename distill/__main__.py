"""`python -m distill` is the command `distill`."""

from distill.cli import main

main()
