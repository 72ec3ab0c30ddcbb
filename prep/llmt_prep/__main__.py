"""`python -m llmt_prep` is `llmt-prep`."""

from llmt_prep.cli import main

main()
