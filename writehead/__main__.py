"""`python -m writehead` is `writehead`."""

from writehead.cli import main

main()
