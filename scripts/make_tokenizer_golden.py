"""Writes `tests/data/tokenizer_golden.json`: what transformers makes of a fixed corpus with SmolLM2's tokenizer.

Run it in an environment with transformers and gguf: `python scripts/make_tokenizer_golden.py MODEL.gguf`.
transformers does not read `tokenizer.ggml.pre` from a GGUF file, so the pre-tokenizer of the model's published
`tokenizer.json` (single digits, then GPT-2's rule) is set here by hand; everything else is transformers' own reading.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parent.parent / "tests" / "data" / "tokenizer_golden.json"

CORPUS = [
    "",
    " ",
    "  ",
    "   leading and trailing   ",
    "\n",
    "\n\n\n",
    "\t\ttabs\tand\n newlines \r\n mixed \r x",
    " \n \n  \t \n",
    "a" * 70,
    " " * 70,
    "Hello world",
    "Hello, world! How's it going? I'll, we've, they'd, I'M, IT'S",
    "The quick brown fox jumps over the lazy dog.",
    "MixedCASE camelCase snake_case kebab-case SCREAMING_CASE",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "0",
    "1234567890",
    " 1  22   333    4444",
    "3.14159, 1,000,000 and -42e-10; 0x1F 0b1010 1/2",
    "v1.2.3-rc4 2024-02-29T23:59:59Z +49 (0) 170 1234567",
    "\u0663\u0664\u0665 \u0969\u096a \u00b2\u00b3 \u00bd \u2167 \uff11\uff12",
    "caf\u00e9 na\u00efve \u00fcber stra\u00dfe \u0141\u00f3d\u017a",
    "cafe\u0301 nai\u0308ve",
    "\u1e9e\u0130\u0131\u01c5",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3068\u30ab\u30ca",
    "\u4e2d\u6587\u5b57\u7b26\uff0c\u6807\u70b9\u3002",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd 123",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\U0001f600 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f8 \u2764\ufe0f",
    "x\U0001f680y\U0001f680\U0001f680",
    "\U00020000\U0001d518\U0001d7d8",
    "zero\u200bwidth\u00a0nbsp\u2003em\u3000ideographic\ufeffbom\u2028line",
    "\u0000\u0001\u001f\u007f\u0080\u009f",
    "\uffff\ufdd0\ufffd",
    "e\u0301\u0302\u0303\u0304\u0305\u0306",
    'def f(x: int) -> str:\n    """Doc."""\n    return f"{x!r:>10}"  # comment\n',
    "#include <vector>\nint main() { std::vector<int> v{1,2,3}; return v[0] ^ ~v[1]; }",
    "SELECT * FROM t WHERE a <> 'b''c' AND d >= 10;",
    '{"key": ["value", 1.5e3, null, true], "nested": {"a": {}}}',
    '<html><body class="x">&amp;</body></html>',
    "    if a:\n        if b:\n\t\treturn\n",
    "\\n \\t \\u00e9 \\\\ C:\\path\\to",
    "https://example.com/a?b=c&d=%20#frag user@example.com",
    "!!!???...,,,;;;:::---___***&&&%%%$$$###@@@~~~```",
    "\u2014 \u2026 \u201cquoted\u201d \u2018single\u2019 \u00ab\u00bb \u20ac\u00a3\u00a5",
    "\u00a9\u00ae\u2122 \u2190\u2192 \u2211\u222b\u221e\u2260",
    "$E = mc^2$ and $$\\sum_{i=0}^{n} x_i$$",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "- item\n  - nested\n1. one\n2. two\n\n> quote\n\n```py\nx\n```",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|endoftext|>",
    "x<|endoftext|>y <|im_end|> z<repo_name>",
    "<|im_end|",
    "<|im_end|>|>",
    "<<|im_end|>>",
    "< |im_end|> <|im_END|> <|not_a_token|> </s> [INST]",
    "<|im_start|><|im_start|><|im_end|>",
    "<empty_output><file_sep><jupyter_code>1",
    "The year 1999's 12 o'clock \u00e9t\u00e9 \u65e5 \U0001f600 <|im_end|> mix\n\n\n end ",
]

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hi\n"}],
    [
        {"role": "user", "content": "\u65e5\u672c\u8a9e?"},
        {"role": "assistant", "content": "Yes \U0001f600."},
        {"role": "user", "content": "  indented\n\n code 12 345"},
    ],
]


def load(path: Path) -> Any:
    """transformers' tokenizer with the pre-tokenizer of the published one."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def encodings(tokenizer: Any) -> list[dict[str, object]]:
    """Ids of every text, control tokens read as text (`plain`) and as such (`control`)."""
    rows = []
    for text in CORPUS:
        plain, control = (
            tokenizer.encode(text, add_special_tokens=False, split_special_tokens=as_text) for as_text in (True, False)
        )
        rows.append({"text": text, "plain": plain, "control": control})
    return rows


def decodings(tokenizer: Any) -> list[dict[str, object]]:
    """Texts of random ids, most of them not valid UTF-8."""
    rng = random.Random(7)
    rows = []
    for length in (1, 1, 2, 3, 5, 8, 13, 40, 100, 300):
        ids = [rng.choice([rng.randrange(17), rng.randrange(17, 300), rng.randrange(49152)]) for _ in range(length)]
        full, skipped = (tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True))
        rows.append({"ids": ids, "full": full, "skipped": skipped})
    return rows


def chats(tokenizer: Any) -> list[dict[str, object]]:
    """Conversations rendered by the model's own template."""
    rows = []
    for messages in CONVERSATIONS:
        for prompt in (True, False):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            ids = tokenizer.encode(text, add_special_tokens=False)
            rows.append({"messages": messages, "add_generation_prompt": prompt, "text": text, "ids": ids})
    return rows


def main() -> None:
    """Reads the model's path from the command line and writes the golden file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    tokenizer = load(parser.parse_args().model.resolve())
    golden = {"encode": encodings(tokenizer), "decode": decodings(tokenizer), "chat": chats(tokenizer)}
    with OUTPUT.open("w", encoding="ascii") as file:
        file.write("{\n")
        sections = []
        for name, rows in golden.items():
            lines = ",\n".join("  " + json.dumps(row, separators=(",", ":")) for row in rows)
            sections.append(f'"{name}": [\n{lines}\n]')
        file.write(",\n".join(sections) + "\n}\n")


if __name__ == "__main__":
    main()
