"""`python -m sparsec.cli` is `sparsec`."""

from sparsec.cli import main

main()
