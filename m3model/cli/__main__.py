"""`python -m m3model.cli`, the same as `m3`."""

from m3model.cli import main

main()
