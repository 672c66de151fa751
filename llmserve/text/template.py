"""`ChatTemplate`: messages → prompt text by a checkpoint's jinja template.

Owns the reading of message contents (string, absent, list of text parts) and the defence against control tokens in
them: a look-alike inside a client's text is broken by `CONTROL_BREAK`, which `Tokenizer.encode_chat` drops again.
Templates come from checkpoints and operators, never from clients.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llmserve.checkpoints.text_assets import TextAssets
from llmserve.errors import CheckpointError, InvalidRequest
from llmserve.text.control import CONTROL_BREAK
from llmserve.text.tokenizer import Tokenizer

_RESERVED = frozenset({"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"})


class ChatTemplate:
    """A compiled template. Raises CheckpointError when the source is not a template."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], control_tokens: Sequence[str] = ()) -> None:
        """`special_tokens`: `bos_token`, … → text; `control_tokens`: texts that messages must not be able to spell."""
        from jinja2 import TemplateSyntaxError  # costs 50 ms, so not before a template is there

        from llmserve.text.jinja_env import new_environment

        try:
            self._template = new_environment().from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"chat template, line {error.lineno}: {_one_line(error)}") from error
        self.source = source
        self._special_tokens = dict(special_tokens)
        longest_first = sorted((token for token in control_tokens if len(token) > 1), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        /,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool,
        **kwargs: object,
    ) -> str:
        """The prompt, for `Tokenizer.encode_chat`; `display` makes it fit for people.

        `kwargs` are further names for the template. Raises InvalidRequest when a message part is not text, a name is
        taken or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if taken := _RESERVED & kwargs.keys():
            raise InvalidRequest(f"chat_template_kwargs must not set {min(taken)!r}", param="chat_template_kwargs")
        names = self._special_tokens | {name: self._defuse(value) for name, value in kwargs.items()}
        try:
            return self._template.render(
                names,
                messages=[self._message(index, message) for index, message in enumerate(messages)],
                tools=self._defuse(tools),
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise InvalidRequest(f"chat template: {_one_line(error)}", param="messages") from error
        except RecursionError as error:
            raise InvalidRequest("chat template: messages are nested too deeply", param="messages") from error

    @staticmethod
    def display(rendered: str) -> str:
        """A rendered prompt as a person should see it."""
        return rendered.replace(CONTROL_BREAK, "")

    def _message(self, index: int, message: Mapping[str, object]) -> object:
        content = _content_text(message.get("content"), param=f"messages[{index}].content")
        return self._defuse({**message, "content": content})

    def _defuse(self, value: object) -> object:
        """The value with every control-token look-alike in its strings broken after its first character."""
        if self._control is None:
            return value
        if isinstance(value, str):
            return self._control.sub(lambda match: match[0][0] + CONTROL_BREAK + match[0][1:], value)
        if isinstance(value, Mapping):
            return {self._defuse(key): self._defuse(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._defuse(item) for item in value]
        return value


def load_chat_template(assets: TextAssets, tokenizer: Tokenizer, *, source: str = "") -> ChatTemplate | None:
    """The checkpoint's template, or `source` instead; None when there is neither."""
    template = source or assets.chat_template
    if not template:
        return None
    return ChatTemplate(template, special_tokens=assets.special_tokens, control_tokens=tokenizer.control_tokens)


def _content_text(content: object, *, param: str) -> str:
    """A message's text: a string, nothing, or text parts, which are joined by line breaks."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        return "\n".join([_part_text(part, param=f"{param}[{index}]") for index, part in enumerate(content)])
    raise InvalidRequest(f"{param} must be a string or a list of parts", param=param)


def _part_text(part: object, *, param: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text":
        raise InvalidRequest(f"{param}: parts of type {kind!r} are not supported by this model", param=param)
    if not isinstance(text, str):
        raise InvalidRequest(f"{param}.text must be a string", param=param)
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
