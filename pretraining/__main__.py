"""`python -m pretraining` and `torchrun -m pretraining` are `kaf-pretrain`."""

import sys

from pretraining.cli import main

if __name__ == "__main__":
    sys.exit(main())
