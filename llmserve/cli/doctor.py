"""`llmserve doctor`: the report of `checkup`, as a table for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Final

import typer

from llmserve.cli import options
from llmserve.cli.checkup import Finding, check_installation, check_model
from llmserve.cli.progress import ProgressDisplay

HELP: Final = """Look whether this machine can serve, and with MODEL whether it can serve that.

MODEL is fetched if need be, loaded, and one token is computed. Exit code 1 if something is wrong; the report says what
to do.

Examples:

    llmserve doctor

    llmserve doctor smollm2 --kv-cache-memory 2GiB
"""

MaybeModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", show_default=False, help="A model as for `serve`.")
]


def command(
    model: MaybeModel = None,
    max_model_len: options.MaxModelLen = 0,
    max_num_seqs: options.MaxNumSeqs = 0,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 0,
    kv_cache_memory: options.KVCacheMemory = "",
    threads: options.Threads = 0,
    exact: options.Exact = False,
    packed_cache: options.PackedCache = True,
) -> int:
    """Run the command; see `HELP`."""
    findings = list(check_installation())
    if model is not None and not any(finding.remedy for finding in findings if finding.topic == "extension"):
        from llmserve.checkpoints import pull

        with ProgressDisplay() as display:
            path = pull.resolve(model, progress=display)
        config = options.engine_config(
            path,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            threads=threads,
            exact=exact,
            packed_cache=packed_cache,
        )
        findings += check_model(config)
    _print_table(findings)
    return 1 if any(finding.remedy for finding in findings) else 0


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark = Text("wrong", style="bold red") if finding.remedy else Text("ok", style="green")
        table.add_row(mark, Text(finding.topic, style="bold"), Text("\n".join(_lines(finding))))
    # A pipe has no width: lines are left whole for whoever reads them.
    Console(width=None if sys.stdout.isatty() else 1000, soft_wrap=not sys.stdout.isatty()).print(table)


def _lines(finding: Finding) -> Iterator[str]:
    yield finding.text
    if finding.remedy:
        yield f"→ {finding.remedy}"
