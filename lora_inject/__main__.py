"""Lets `python -m lora_inject` do what `lora-inject` does."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
