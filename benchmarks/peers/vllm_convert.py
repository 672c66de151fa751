"""A GGUF file as a Hugging Face folder in BF16, by transformers. Runs in an environment of vLLM's.

python vllm_convert.py FILE.gguf FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    part = target.with_name(target.name + ".part")
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(part)
    network = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    network.save_pretrained(part)
    part.rename(target)  # a folder with the right name is whole


if __name__ == "__main__":
    main()
