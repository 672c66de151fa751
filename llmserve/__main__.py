"""`python -m llmserve` is the `llmserve` command."""

from __future__ import annotations

import sys

from llmserve.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
