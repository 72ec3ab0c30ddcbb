"""`python -m llmt_train` is `llmt-train`."""

from llmt_train.cli import main

main()
