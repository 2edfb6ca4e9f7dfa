"""`python -m lesionkd_core` is the command `lesionkd`."""

from .cli import main

main(prog_name="lesionkd")
