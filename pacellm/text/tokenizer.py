"""Chat template and tokenizer, through transformers. Slow on long prompts: call it off the event loop."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pacellm.errors import (
    ConfigError,
    ContextLengthExceeded,
    ModelError,
    PaceError,
    RequestError,
    UnsupportedParameter,
)
from pacellm.gguf.check import check_gguf
from pacellm.text.detokenizer import Detokenizer, Vocabulary
from pacellm.text.dialect import Dialect, detect
from pacellm.text.literals import Literals, structure_of
from pacellm.text.pieces import PieceMemo, too_long
from pacellm.text.response_parser import CallParser

# what the template is given by other means; a request sets none of these as a variable
_RESERVED = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now", "bos_token",
     "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens")
)  # fmt: skip
_PROBE = "a text that a template shows"
COUNTED_TOKENS = 2**18  # that a text may have where more than the context is of use: cut to its end, or only counted
# that any text may have, and for each token; more is white space or a drawing. Encoding takes 90 bytes for each
_CHARACTERS, _PER_TOKEN = 2**21, 6
_ENVIRONMENT = Environment(extensions=["jinja2.ext.loopcontrols"])


def read_template(path: str | Path) -> str:
    """A Jinja chat template from a file.

    Raises:
        ConfigError: it cannot be read, or is no Jinja.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {path} cannot be read: {error}", param="chat_template") from error
    try:
        names = meta.find_undeclared_variables(_ENVIRONMENT.parse(text))
    except TemplateSyntaxError as error:
        if "unknown tag 'generation'" not in str(error):  # transformers' own tag
            raise ConfigError(
                f"chat template {path} is not valid Jinja, line {error.lineno}: {error.message}", param="chat_template"
            ) from error
        return text
    if "messages" not in names:
        raise ConfigError(f"chat template {path} does not use 'messages'", param="chat_template")
    return text


def _read(path: str | Path) -> PreTrainedTokenizerBase:
    header = check_gguf(path)
    if header is None:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    from pacellm.gguf.read import read_tokenizer  # needs an optional package

    return read_tokenizer(header)


class ChatTokenizer:
    """Messages to ids.

    Args:
        path: directory or hub name of the checkpoint, or a GGUF file.
        chat_template: a file with a Jinja template to use instead of the checkpoint's.

    Raises:
        ModelError: there is no fast tokenizer. ConfigError: a template that cannot be read.
    """

    def __init__(self, path: str | Path, chat_template: str | Path | None = None) -> None:
        try:
            tokenizer = _read(path)
        except PaceError:
            raise
        except Exception as error:  # a damaged tokenizer.json is a bare Exception
            raise ModelError(
                f"cannot load the tokenizer of {path}: {error}; the directory needs the tokenizer.json and "
                f"tokenizer_config.json that the model was trained with"
            ) from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ModelError(f"{path} has no fast tokenizer (tokenizer.json)")
        if chat_template is not None:
            tokenizer.chat_template = read_template(chat_template)
        self._tokenizer = tokenizer
        self.backend, self.vocabulary = backend, Vocabulary(backend)
        structure = structure_of(backend, tokenizer.all_special_tokens, self._template_source)
        self._memo = PieceMemo(backend, structure.values())
        self.literals = Literals(backend, structure, self._memo)
        self._longest = max((len(token) for token in backend.get_vocab()), default=1)

    @property
    def has_chat_template(self) -> bool:
        """Chat requests can be rendered."""
        return bool(self._tokenizer.chat_template)

    @property
    def _template_source(self) -> str:
        template = self._tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else template or ""

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """Names that the chat template reads and does not set itself."""
        template = self._tokenizer.chat_template
        sources = template.values() if isinstance(template, dict) else [template or ""]
        try:
            return frozenset().union(*(meta.find_undeclared_variables(_ENVIRONMENT.parse(text)) for text in sources))
        except TemplateError:  # tags of transformers' own
            return frozenset()

    @cached_property
    def dialect(self) -> Dialect:
        """How the model writes reasoning and calls."""
        return detect(
            self._template_source, self.template_variables, getattr(self._tokenizer, "response_template", None)
        )

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """Tokens that are left out of text, as they are written."""
        added = self.backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @property
    def end_text(self) -> str:
        """The end token as it is written; empty where there is none."""
        return self._tokenizer.eos_token or ""

    @cached_property
    def splits_answers(self) -> bool:
        """The chat template looks for the marks of reasoning in the content of earlier answers."""
        if self.dialect.think is None:
            return False
        said = "{} a {} b".format(*self.dialect.think)
        rendered = self._tried(("user", "c"), ("assistant", said), ("user", "d"))
        return rendered is not None and said not in rendered

    @cached_property
    def takes_system(self) -> bool:
        """The chat template shows a system message."""
        return _PROBE in (self._tried(("system", _PROBE), ("user", "a")) or "")

    @cached_property
    def takes_runs(self) -> bool:
        """The chat template lets a role speak twice in a row."""
        talk = [(role, f"{_PROBE}{number}") for number, role in enumerate(("user", "user", "assistant", "assistant"))]
        rendered = self._tried(*talk, ("user", "a")) or ""
        return all(text in rendered for _, text in talk)

    def _tried(self, *talk: tuple[str, str]) -> str | None:
        """A conversation as the template renders it; None where it refuses."""
        try:
            return self.render([{"role": role, "content": content} for role, content in talk])
        except RequestError:
            return None

    def response_parser(
        self, dialect: Dialect, prompt: str, tools: Sequence[dict[str, Any]], *, continues: bool
    ) -> Any:
        """transformers' parser of answers to a prompt, or None where everything is content.

        Args:
            prompt: rendered.
            tools: for the types of arguments that are not written in JSON.
            continues: the prompt ends within an answer.
        """
        if dialect.template is None:
            return None
        prefix = dialect.prefix(prompt, continues=continues)
        return CallParser(dict(dialect.template), prefix=prefix, tools=list(tools))

    @property
    def settable_variables(self) -> frozenset[str]:
        """Names that the chat template reads, and that say neither what the messages are nor what the tokenizer is."""
        return self.template_variables - _RESERVED

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation.

        Args:
            messages: dicts with ``role`` and ``content`` (a string).
            tools: for the template, in OpenAI's form.
            continue_final_message: leave the last message open.
            variables: for the template; only such as it reads.

        Raises:
            RequestError: the model's template refuses the messages, reads no such variable, or there is none.
        """
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE",
                param="messages",
            )
        for name in variables or ():
            if name not in self.settable_variables:
                raise UnsupportedParameter(
                    f"this model's chat template has no variable {name!r}", param=f"chat_template_kwargs.{name}"
                )
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}", param="messages") from error
        assert isinstance(rendered, str)
        return rendered

    def encode(
        self, text: str, *, limit: int | None = None, scope: str | None = None, add_special_tokens: bool = False
    ) -> list[int]:
        """Ids of a text, in which special tokens are what they look like. The interpreter is not held meanwhile.

        Args:
            limit: refuse before tokenising what has more tokens, or far too many characters.
            scope: whose texts these are, as a session's name; long pieces are remembered within it.
            add_special_tokens: add those that the tokenizer puts around a text.

        Raises:
            ContextLengthExceeded: the text has more than ``limit`` tokens, or is too long to count.
        """
        self.check_length(len(text), limit)
        if add_special_tokens:
            self._memo.check(text, limit)
            return self.backend.encode_batch_fast([text], add_special_tokens=True)[0].ids
        return self._memo.encode(text, scope, limit=limit)

    def encode_chat(
        self, rendered: str, *, limit: int | None = None, scope: str | None = None, logged: array[int] | None = None
    ) -> list[int]:
        """Ids of a conversation that was rendered from texts shielded by :attr:`literals`: special tokens in these are
        text, those that the template wrote are what they look like. The interpreter is not held meanwhile.

        Args:
            limit, scope: as for :meth:`encode`.
            logged: ids of the session that it goes on; special tokens in answers are again what they are there.

        Raises:
            ContextLengthExceeded: the text has more than ``limit`` tokens, or is too long to count.
            RequestError: the template wrote the texts so that they cannot be kept apart.
        """
        self.check_length(len(rendered), limit)
        return self.literals.encode(rendered, scope, logged, limit=limit)

    def check_length(self, characters: int, limit: int | None) -> None:
        """Refuse a text before anything is done with it.

        Args:
            characters: that it has.
            limit: tokens that it may have; None lets everything pass.

        Raises:
            ContextLengthExceeded: it has more for certain, or more than 6 characters for each (2,097,152 at least).
        """
        if limit is None:
            return
        if characters // self._longest > limit:
            raise too_long(characters // self._longest, limit)
        most = max(_CHARACTERS, _PER_TOKEN * limit)
        if characters > most:
            raise ContextLengthExceeded(
                f"the text has {characters:,} characters; {most:,} are the most that it may have here", param="messages"
            )

    def encode_behind(
        self, text: str, *, limit: int | None = None, scope: str | None = None, is_chat: bool = False
    ) -> list[int]:
        """Ids of a text that stands behind others: without what a tokenizer puts in front of a text's first word.

        Args:
            limit, scope: as for :meth:`encode`.
            is_chat: it is rendered as for :meth:`encode_chat`.

        Raises as :meth:`encode` and :meth:`encode_chat`.
        """
        encode = self.encode_chat if is_chat else self.encode
        if self._anchor is None:
            return encode(text, limit=limit, scope=scope)
        return encode(self._anchor + text, limit=limit, scope=scope)[1:]

    @cached_property
    def _anchor(self) -> str | None:
        """A special token that leaves the text around it alone."""
        for token in self.backend.get_added_tokens_decoder().values():
            plain = token.special and not (token.lstrip or token.rstrip or token.single_word)
            if plain and len(self.encode(token.content)) == 1:
                return token.content
        return None

    def forget(self, scope: str, *, below: bool = False) -> None:
        """Drop the pieces remembered for a scope; with ``below`` for every scope whose name begins so."""
        self._memo.forget(scope, below=below)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens included."""
        return self.vocabulary.decode(ids)

    def texts(self, ids: list[int]) -> list[str]:
        """What each of them adds to it: "" for a part of a character that a later one completes."""
        detokenizer = Detokenizer(self.vocabulary, skip_special=False)
        return [detokenizer.push(token, is_last=place == len(ids)).text for place, token in enumerate(ids, 1)]
