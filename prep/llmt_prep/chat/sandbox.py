"""Jinja as chat templates want it, in a sandbox: what transformers offers them, without what has no end.

Templates see the names, filters, tests and block rules of transformers' `apply_chat_template` (5.23), with differences
that keep a text the same on every machine and day: `strftime_now` gives a fixed date, and what is random (`random`,
`lipsum`) or writes an object's address is refused. Nothing can be loaded: no include, import, extends or block.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import date as Date
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llmt_prep.chat.growth import (
    CALL_STEPS,
    check_method,
    check_operands,
    checked_format,
    metered_filter,
    require_narrow,
    whole,
)
from llmt_prep.chat.limits import LimitError, Meter

MAX_SOURCE = 262_144
"""Characters of a template."""

MARKS = tuple((chr(code), chr(code + 1)) for code in range(0xFDD0, 0xFDF0, 2))
"""Pairs of noncharacters that can stand for the begin and end of a generation block."""

_UNKNOWN_FILTERS = ("filesizeformat", "pprint", "random", "sum", "urlize", "wordwrap", "xmlattr")
_GROWING = (
    nodes.Add, nodes.Concat, nodes.Mul, nodes.Mod, nodes.Pow, nodes.List, nodes.Dict, nodes.Tuple, nodes.Call,
    nodes.Filter,
)  # fmt: skip
_LOADING = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends, nodes.Block)
_CAPTURING = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
_DICT_ATTRIBUTES = frozenset(dir(dict))
_STR_METHODS = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))
_PRINTABLE = (str, int, float, list, tuple, dict, Undefined)
_LOOP_STEPS = 5  # of an iteration, beside those of its body
_SPEND, _WEIGH = "spend ", "weigh "  # names that no template can say, but to `map`


class Compiled(NamedTuple):
    """A template ready to render, in this process and by one thread at a time."""

    template: jinja2.Template
    meter: Meter
    names: Mapping[str, Any]
    """What every rendering sees beside its variables."""
    marks: tuple[str, str] | None
    """What stands before and behind each generation block in the text; None where the template has none."""


@lru_cache(maxsize=64)
def compile_template(source: str, date: str, marks: tuple[str, str]) -> Compiled:
    """Compile a template.

    Args:
        source: the template.
        date: what `strftime_now` takes for today, as 2024-07-26.
        marks: begin and end of a generation block, in the text; not in the source.

    Raises:
        TemplateSyntaxError: no Jinja, or Jinja that is not offered here.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateSyntaxError(f"it has {len(source)} characters; at most {MAX_SOURCE} are allowed", 1)
    environment = _Environment(Date.fromisoformat(date), marks)
    try:
        template = environment.from_string(source)
    except RecursionError:
        raise TemplateSyntaxError("it is nested too deeply", 1) from None
    return Compiled(template, environment.meter, dict(environment.globals), marks if environment.has_marks else None)


def render_text(compiled: Compiled, variables: Mapping[str, Any], input_size: int) -> str:
    """Return the text.

    Args:
        compiled: the template.
        variables: what the template sees.
        input_size: characters of all strings in the variables.

    Raises:
        ValueError: the template refuses the variables, fails, or exceeds a limit; one line.
    """
    template = compiled.template
    compiled.meter.start(input_size)
    try:
        context = template.new_context({**compiled.names, **variables}, shared=True)
        text = "".join(template.root_render_func(context))
        compiled.meter.require_size(len(text))
    except Exception as error:  # of the template: any at all
        raise ValueError(_reason(error)) from None
    return text


def _reason(error: Exception) -> str:
    reason = " ".join(str(error).split())
    if not isinstance(error, TemplateError) or not reason:
        reason = f"{type(error).__name__}: {reason}"
    return reason if len(reason) <= 200 else f"{reason[:197]}..."


class _Generation(Extension):
    """`{% generation %}`: the body between the two marks, with variables of its own as in transformers."""

    tags = {"generation"}  # noqa: RUF012  as Jinja wants it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in self.environment.marks)  # type: ignore[attr-defined]
        return nodes.Scope([begin, *body, end]).set_lineno(line, override=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, date: Date, marks: tuple[str, str]) -> None:
        self.meter = Meter()
        self.marks = marks
        self.has_marks = False
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, LoopControlExtension],
            finalize=self._written,
        )
        self.filters = {name: metered_filter(self.meter, name, function) for name, function in FILTERS.items()}
        for name in _UNKNOWN_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = metered_filter(self.meter, "tojson", _tojson)
        self.filters[_SPEND] = _context_filter(self._spent)
        self.filters[_WEIGH] = _context_filter(self.meter.require_weight)
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _clock(date)
        self.globals["dict"] = _PlainDict()
        self.globals["namespace"] = _PlainNamespace

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _refuse_loading(tree)
        self.has_marks = _keep_marks(tree, self.marks)
        _count_steps(tree)
        return tree

    def _spent(self, _: None, steps: int) -> bool:
        self.meter.spend(max(1, steps))  # a template may find this filter through `map`, and ask for steps back
        return True

    def _written(self, value: Any) -> Any:
        """What an output writes of a value; called for each."""
        if isinstance(value, str):
            self.meter.spend(0, len(value))
            return value
        if value is not None and not isinstance(value, _PRINTABLE):
            raise LimitError(f"it writes a {type(value).__name__}, which has no text of its own")
        return self.meter.require_weight(value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """As Jinja's own, without its detours for what conversations are: dicts and strings."""
        if type(obj) is dict and attribute not in _DICT_ATTRIBUTES:
            try:
                return obj[attribute]
            except KeyError:
                return self.undefined(obj=obj, name=attribute)
        if type(obj) is str and attribute in _STR_METHODS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Look at the operands first: the result may not fit into memory."""
        check_operands(self.meter, operator, left, right)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, str):
            self.meter.spend(1, len(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """As Jinja's own, within limits."""
        formatting = super().wrap_str_format(value)
        return None if formatting is None else checked_format(self.meter, value.__self__, formatting)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        for variables in ("_loop_vars", "_block_vars"):  # which Jinja adds for functions that want the context
            kwargs.pop(variables, None)
        for value in (*args, *kwargs.values()):
            __self.meter.require_weight(value)
        owner = getattr(__obj, "__self__", None)
        args = tuple(map(whole, args))
        if isinstance(owner, (str, bytes, list, tuple, dict, int)):
            check_method(__self.meter, owner, __obj.__name__, args)
        if type(owner) is str:
            result = __obj(*args, **kwargs)  # such a method cannot be unsafe, nor want the context
        else:
            result = ImmutableSandboxedEnvironment.call(__self, __context, __obj, *args, **kwargs)
        if isinstance(result, str):
            __self.meter.spend(1, len(result))
        return result


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _clock(date: Date) -> Callable[[str], str]:
    def strftime_now(pattern: str) -> str:
        require_narrow(pattern)
        return date.strftime(pattern)

    return strftime_now


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    wide = indent if isinstance(indent, int) else len(indent or "")
    if wide > 16 or len("".join(separators or ())) > 16:
        raise LimitError("it writes JSON with an indent or separators of more than 16 characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _PlainDict:
    """`dict(...)` without the type, whose attributes lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """`namespace(...)` that keeps no name with an underscore first."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # not in the signature: a template may keep a variable of that name
        values = dict(*rest, **kwargs)
        for name in values:
            _require_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_public(name)
        super().__setitem__(name, value)


def _require_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace keeps no name with an underscore first, such as {name!r}")


def _refuse_loading(tree: nodes.Template) -> None:
    for node in tree.find_all(_LOADING):
        raise TemplateSyntaxError("a chat template is one file: no include, import, extends or block", node.lineno)
    for loop in tree.find_all(nodes.For):
        if loop.recursive:
            raise TemplateSyntaxError("recursive loops are not offered to chat templates", loop.lineno)


def _keep_marks(tree: nodes.Template, marks: tuple[str, str]) -> bool:
    """Return whether there are marks; where a template could see one in a value of its own, drop them all."""
    is_seen = any(_marks(node, marks) for node in tree.find_all(_CAPTURING))
    found = _marks(tree, marks)
    if is_seen:
        for data in found:
            data.data = ""
    return bool(found) and not is_seen


def _marks(node: nodes.Node, marks: tuple[str, str]) -> list[nodes.TemplateData]:
    return [data for data in node.find_all(nodes.TemplateData) if data.data in marks]


def _count_steps(tree: nodes.Template) -> None:
    """Make loops and macros count their steps, and variables that may grow be weighed."""
    node: Any
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        steps = _steps(node) + (_LOOP_STEPS if isinstance(node, nodes.For) else CALL_STEPS)
        node.body.insert(0, nodes.ExprStmt(_spend(steps, node.lineno), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_spend(steps, node.lineno), node.test, lineno=node.lineno)
    for assign in tree.find_all(nodes.Assign):
        assign.node = _weighed(assign.node)
    for with_ in tree.find_all(nodes.With):
        with_.values = [_weighed(value) for value in with_.values]


def _steps(node: nodes.Node) -> int:
    """The parts of a body, and its text by 8 characters."""
    texts: Iterator[Any] = (part.data for part in node.find_all(nodes.TemplateData))
    constants = (part.value for part in node.find_all(nodes.Const) if isinstance(part.value, str))
    characters = sum(map(len, (*texts, *constants)))
    return sum(1 for _ in node.find_all(nodes.Node)) + characters // 8


def _spend(steps: int, line: int) -> nodes.Filter:
    return _filter(nodes.Const(None, lineno=line), _SPEND, [nodes.Const(steps, lineno=line)])


def _weighed(value: Any) -> nodes.Expr:
    if isinstance(value, _GROWING) or any(True for _ in value.find_all(_GROWING)):
        return _filter(value, _WEIGH, [])
    return value  # type: ignore[no-any-return]


def _filter(value: nodes.Expr, name: str, args: list[nodes.Expr]) -> nodes.Filter:
    return nodes.Filter(value, name, args, [], None, None, lineno=value.lineno)


def _context_filter(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that Jinja does not evaluate when it compiles, because it wants the context."""

    @jinja2.pass_context
    def filter_(context: Context, *args: Any) -> Any:
        return function(*args)

    return filter_
