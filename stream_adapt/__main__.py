"""`python -m stream_adapt`."""

from stream_adapt.cli import main

main()
