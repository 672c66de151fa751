"""Text ↔ tokens: tokenizer, chat templates, incremental detokenizer. The libraries behind it are imported when used."""

from __future__ import annotations

from llmserve.text.detokenizer import Detokenizer
from llmserve.text.template import ChatTemplate, load_chat_template
from llmserve.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer", "load_chat_template", "load_tokenizer"]
