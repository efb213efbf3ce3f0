"""Conversations as texts, by a checkpoint's chat template: Jinja in the sandbox that transformers has for them."""

from __future__ import annotations

import datetime
import functools
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from modernbert.errors import InputError, listed, printable, shown
from modernbert.io.hub import Source

_FILE, _FOLDER = "chat_template.jinja", "additional_chat_templates"
_MARK = secrets.token_hex(8)  # around what `{% generation %}` encloses; no text of a conversation holds it
_END = secrets.token_hex(8)  # after the field that is to be continued


def chosen(templates: Any, given: str | None, with_tools: bool) -> str:
    """The template that a call means: given as text or by its name, or the tokenizer's own.

    Raises:
        InputError: there is none, or there are several and none is the default.
    """
    if isinstance(templates, Mapping):
        name = given or ("tool_use" if with_tools and "tool_use" in templates else "default")
        if given is None and name not in templates:
            raise InputError(f"chat_template is not given; the tokenizer has {listed(templates)}")
        return templates.get(name, name)
    if given is None and not templates:
        raise InputError("this tokenizer has no chat template; give chat_template= or set tokenizer.chat_template")
    return templates if given is None else given


def rendered(
    template: str, messages: Sequence[Any], variables: Mapping[str, Any], continued: str | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and the characters of it that `{% generation %}` encloses.

    Args:
        template: the template.
        messages: the conversation; what is None in a message counts as missing.
        variables: more for the template.
        continued: the field of the last message that the text ends with.

    Raises:
        InputError: the conversation is empty, or the template is malformed or refuses it; or jinja2 is not installed.
    """
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise InputError(f"conversation is {shown(messages)}; give a list of messages, such as [{{'role': ..., ...}}]")
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    if continued is not None:
        if not isinstance(value := given[-1].get(continued), str):
            raise InputError(f"continue_final_message is {continued!r}, and the last message has no such text")
        given[-1][continued] = f"{value}{_END} "
    try:
        text = _compiled(template).render(messages=given, **variables)
    except ImportError as error:
        raise InputError("chat templates need jinja2: pip install jinja2") from error
    except Exception as error:  # of a template, whatever it does
        raise InputError(f"the chat template fails: {printable(str(error), limit=200)}") from None
    if continued is not None:
        text, found, after = text.rpartition(_END)
        if not found:
            raise InputError(f"continue_final_message is {continued!r}, and the template leaves that out")
        text = text if after.startswith(" ") else text.rstrip()  # which the template does, too
        text = text.replace(f"{_END} ", "").replace(_END, "")  # where the template shows the field more than once
    parts = text.split(_MARK)
    ends = [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]
    return "".join(parts), [(ends[i], ends[i + 1]) for i in range(1, len(parts), 2)]


def read_templates(source: Source) -> Any:
    """The template, or templates by their names, that a checkpoint has as files of their own; None if it has none."""
    found = {"default": source.find(_FILE)}
    if (folder := source.folder) is not None:
        found |= {path.name.removesuffix(".jinja"): path for path in sorted((folder / _FOLDER).glob("*.jinja"))}
    elif found["default"] is not None:  # of the others only this one is ever taken without being asked for
        found["tool_use"] = source.find(f"{_FOLDER}/tool_use.jinja")
    texts = {name: path.read_text(encoding="utf-8") for name, path in found.items() if path is not None}
    return texts["default"] if texts.keys() == {"default"} else texts or None


def files_of(templates: Any, prefix: str) -> dict[str, str]:
    """What `read_templates` reads: the texts of files by their names.

    Raises:
        InputError: a template's name is no name of a file.
    """
    by_name = templates if isinstance(templates, Mapping) else {"default": templates} if templates else {}
    for name in by_name:
        if not isinstance(name, str) or not name.isprintable() or set(name) & set("/\\") or name in ("", ".", ".."):
            raise InputError(f"a chat template's name is {shown(name)}; no file can have it")
    return {(f"{prefix}{_FILE}" if n == "default" else f"{prefix}{_FOLDER}/{n}.jinja"): t for n, t in by_name.items()}


def before_end_of(last: Mapping[str, Any], text: str) -> str:
    """A conversation's text up to the end of its last message's content, which is to be continued."""
    content = last.get("content")
    if isinstance(content, list | tuple) and content and isinstance(content[-1], Mapping):
        content = content[-1].get("text")
    if not isinstance(content, str) or (start := text.rfind(content.strip())) < 0:
        raise InputError("continue_final_message is given, and the template leaves out or changes the last message")
    whole = content.lstrip()
    return text[: start + len(whole if text.startswith(whole, start) else content.strip())]


@functools.lru_cache(16)
def _compiled(template: str) -> Any:
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012 (as its base has it)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return f"{_MARK}{caller()}{_MARK}"

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    # Jinja's own filter escapes what HTML reads.
    environment.filters["tojson"] = lambda value, ensure_ascii=False, **how: json.dumps(
        value, ensure_ascii=ensure_ascii, **how
    )
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def named(templates: Any) -> Any:
    """A template, or templates by their names, as files hold them: a list of {"name", "template"} for several."""
    if isinstance(templates, list) and all(
        isinstance(t, Mapping) and {"name", "template"} <= t.keys() for t in templates
    ):
        templates = {t["name"]: t["template"] for t in templates}
    several = templates.values() if isinstance(templates, Mapping) else [templates]
    if templates is not None and not all(isinstance(template, str) for template in several):
        raise InputError(f"chat_template is {shown(templates)}; give a text, or texts by their names")
    return templates
