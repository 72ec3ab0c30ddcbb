"""Which template turns a conversation into text: the tokenizer's own, a built-in one, a file, or one written out."""

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateSyntaxError
from jinja2.meta import find_undeclared_variables

from llmt_prep.chat.sandbox import MARKS, Compiled, compile_template
from llmt_prep.tokenizer import LoadedTokenizer
from llmt_shared.errors import ConfigError

BUILT_IN = (
    "chatml", "gemma", "llama-2", "llama-3", "llama-3.1", "llama-3.2", "mistral", "phi-3", "phi-4", "qwen2.5", "qwen3",
    "tulu",
)  # fmt: skip
"""Names of the templates that come with llmt; each marks what the model writes."""

DATE = "2024-07-26"
"""What templates take for today: the date that the Llama 3 family's own templates fall back to."""

_SAME_FILE = {"llama-3.2": "llama-3.1"}  # they differ only in the date, which is a setting here
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Template:
    """A template and what it is told beside the conversation; plain data, compiled where it is used."""

    name: str
    """What messages call it."""
    source: str
    special_tokens: Mapping[str, str]
    """`bos_token`, `eos_token` and so on, as far as the tokenizer has them."""
    control_tokens: tuple[str, ...]
    """All strings that become control tokens; one of them ends a turn."""
    date: str
    """What `strftime_now` takes for today."""
    has_generation_marks: bool
    """It says itself what the model writes: `{% generation %}` blocks whose text goes straight to the output."""
    for_tools: "Template | None" = None
    """The template for conversations that describe tools, where the tokenizer has one of its own for them."""

    def compiled(self, text: str = "") -> Compiled:
        """Return the template compiled for this process, with marks that are not in the text it is to write."""
        taken = text if self.has_generation_marks else ""
        for marks in MARKS:
            if not any(mark in taken or mark in self.source for mark in marks):
                return compile_template(self.source, self.date, marks)
        raise ValueError("the text holds all noncharacters from U+FDD0 to U+FDEF, and none is left to mark turns with")


def load_template(said: str, tokenizer: LoadedTokenizer, date: str = DATE) -> Template:
    """Load a template.

    Args:
        said: ``auto`` for the tokenizer's own, the name of a built-in one, the path of a file, or Jinja itself.
        tokenizer: the tokenizer whose special tokens the template writes.
        date: what the template is told when it asks for today, as 2024-07-26: the text depends on no clock.

    Raises:
        ConfigError: there is no such template, or it cannot be read or compiled.
    """
    tokens = _special_tokens(tokenizer.files)
    name, sources = _sources(said, tokenizer)
    for_tools = None
    if "tool_use" in sources:
        for_tools = _template(f"{name} for tools", sources["tool_use"], tokens, tokenizer, date)
    template = _template(name, sources["default"], tokens, tokenizer, date, for_tools)
    if said in BUILT_IN:
        _require_eos(template)
    return template


def _template(
    name: str,
    source: str,
    tokens: Mapping[str, str],
    tokenizer: LoadedTokenizer,
    date: str,
    for_tools: Template | None = None,
) -> Template:
    unmarked = Template(name, source, tokens, tokenizer.control_tokens, date, False, for_tools)
    try:
        compiled = unmarked.compiled()
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat template {name}, line {error.lineno}: {error.message}; mend the template") from None
    except ValueError as error:
        raise ConfigError(
            f"chat template {name}: {error}; wanted a date as 2024-07-26 and a template of text"
        ) from None
    return Template(name, source, tokens, tokenizer.control_tokens, date, compiled.marks is not None, for_tools)


def _sources(said: str, tokenizer: LoadedTokenizer) -> tuple[str, dict[str, str]]:
    """What messages call the template, and its source as `default`, perhaps with one for `tool_use`."""
    if said == "auto":
        return "of the tokenizer", _own_sources(tokenizer.files)
    if said in BUILT_IN:
        file = files("llmt_prep.chat") / "templates" / f"{_SAME_FILE.get(said, said)}.jinja"
        return said, {"default": file.read_text("utf-8")}
    if "{{" in said or "{%" in said:
        return "of the mix", {"default": said}
    path = Path(os.path.expanduser(said))
    if said.endswith(".jinja") or os.path.exists(path):  # which is False of what can be no path
        return said, {"default": _read(path)}
    near = difflib.get_close_matches(said, BUILT_IN, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"chat template {said!r}: no such template; {hint}wanted auto, {', '.join(BUILT_IN)}, the path of a file, "
        f"or Jinja"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"chat template {path}: cannot be read: {reason}; mend the path or the file") from None


def _own_sources(contents: Mapping[str, bytes]) -> dict[str, str]:
    """The tokenizer's own templates by name; files of their own win, as in transformers."""
    if "chat_template.jinja" in contents:
        paths = {Path(name).stem: name for name in contents if name.startswith("additional_chat_templates/")}
        paths["default"] = "chat_template.jinja"
        return {name: _decoded(path, contents[path]) for name, path in paths.items()}
    for name in ("tokenizer_config.json", "chat_template.json"):
        found = json.loads(contents.get(name, b"{}")).get("chat_template")
        sources = {"default": found} if isinstance(found, str) else _named(name, found)
        if "default" in sources:
            return sources
        if sources:
            raise ConfigError(
                f"chat template auto: {name} has only templates named {', '.join(sources)}, and none named default; "
                f"write the one that you want to a file, and name the file"
            )
    raise ConfigError(
        f"chat template auto: the tokenizer's files have none; name a built-in one ({', '.join(BUILT_IN)}), "
        f"or the path of a file"
    )


def _named(name: str, found: Any) -> dict[str, str]:
    if found is None:
        return {}
    try:
        return {str(each["name"]): str(each["template"]) for each in found}
    except (TypeError, KeyError):
        raise ConfigError(
            f"chat template auto: in {name}, `chat_template` is neither a string nor a list of names and templates; "
            f"mend the file, or name a template"
        ) from None


def _decoded(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"chat template auto: {name} of the tokenizer is not UTF-8; mend the file") from None


def _special_tokens(contents: Mapping[str, bytes]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second wins, as for the tokenizer's ids
        config = json.loads(contents.get(name, b"{}"))
        for role in _SPECIAL_TOKENS:
            token = config.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[role] = token
    return tokens


def _require_eos(template: Template) -> None:
    """Without the token that ends its turns, a model would never learn to stop."""
    tree = template.compiled().template.environment.parse(template.source)
    if "eos_token" in find_undeclared_variables(tree) and "eos_token" not in template.special_tokens:
        raise ConfigError(
            f"chat template {template.name}: it ends turns with the EOS token, and the tokenizer names none; "
            f"set `eos_token`"
        )
