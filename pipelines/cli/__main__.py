"""`python -m pipelines.cli`, as launchers start it."""

from pipelines.cli import main

main()
