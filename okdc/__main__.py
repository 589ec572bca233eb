"""`python -m okdc` is the command `okdc`."""

from okdc.cli import main

main()
