"""A template ends, in little memory, whatever it does; and what it writes is the same on every machine and day."""

import pytest
from jinja2.exceptions import TemplateSyntaxError

from llmt_prep.chat.limits import STEPS_BASE, Meter
from llmt_prep.chat.sandbox import MARKS, MAX_SOURCE, Compiled, compile_template, render_text

LISTS = "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
STRINGS = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = %s %}{% endfor %}{{ n.x }}"

ENDLESS = {
    "one loop": "{% for a in range(10**9) %}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that writes": "{% for a in range(99999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}",
    "a loop with a test": "{% for a in range(99999) %}{% for b in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "a loop over filters": "{% for a in range(99999) %}{% set b = range(99999) | list | length %}{% endfor %}",
    "filters alone": "{{ range(99999) | map('replace', '', 'xxxxxxxxxxxxxxxx' * 999) | join | length }}",
    "a long string": "{{ 'x' * 10**10 }}",
    "a long list": "{% set x = [0] * 10**10 %}",
    "a large number": "{{ 10**(10**10) }}",
    "a doubled number": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "a doubled string by +": STRINGS.replace("%s", "n.x + n.x"),
    "a doubled string by ~": STRINGS.replace("%s", "n.x ~ n.x"),
    "a doubled string by join": STRINGS.replace("%s", "[n.x, n.x] | join"),
    "a doubled string by replace": STRINGS.replace("%s", "n.x.replace('b', 'abab')"),
    "a doubled string by a block": STRINGS.replace(
        "{% set n.x = %s %}", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"
    ),
    "a doubled string by a macro": "{% macro f(x) %}{{ f(x + x) }}{% endmacro %}{{ f('ab') }}",
    "a doubled list": STRINGS.replace("'ab'", "[0]").replace("%s", "n.x + n.x"),
    "lists in lists": LISTS + "{{ n.x }}",
    "lists in lists, compared": LISTS + LISTS.replace("n.", "m.").replace("n =", "m =") + "{{ n.x == m.x }}",
    "macros that call themselves twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "padding by a method": "{{ 'x'.ljust(10**10) }}",
    "padding by zeros": "{{ '1'.zfill(10**10) }}",
    "padding by a filter": "{{ 'x' | center(10000000000) }}",
    "padding by a format": "{{ '{:9999999999}'.format('x') }}",
    "padding by a given format": "{{ '{:{}}'.format('x', 10**10) }}",
    "padding by %": "{{ '%9999999999d' % 1 }}",
    "padding by a given %": "{{ '%*d' % (10**9, 1) }}",
    "padding by the format filter": "{{ '%9999999999d' | format(1) }}",
    "padding by a date": "{{ strftime_now('%9999999999d') }}",
    "indented JSON": "{{ {'a': 1} | tojson(indent=10000000) }}",
    "indented text": "{{ ('a\n' * 60000) | indent(60000) }}",
    "separators": "{{ ('x' * 60000).join(range(60000) | map('string') | list) }}",
    "separators by a filter": "{{ range(60000) | join('x' * 60000) }}",
    "replaced nothing": "{{ ('x' * 60000).replace('', 'x' * 60000) }}",
    "replaced nothing by a filter": "{{ ('x' * 60000) | replace('', 'x' * 60000) }}",
    "what is marked safe": "{% set x = 'x' * 60000 %}{% for i in range(99999) %}{{ x | safe }}{% endfor %}",
    "values in many fields": "{% set x = 'x' * 60000 %}{{ ('{0}' * 20000).format(x) }}",
    "values in many fields by %": "{% set x = 'x' * 60000 %}{{ ('%(x)s' * 12000) % {'x': x} }}",
    "values in many fields by a filter": "{% set x = 'x' * 60000 %}{{ ('%(x)s' * 12000) | format(x=x) }}",
    "separators of what is lazy": "{{ range(60000) | map('string') | join('x' * 60000) }}",
    "separators of what is lazy by a method": "{{ ('x' * 60000).join(range(60000) | map('string')) }}",
    "separators of what is reversed": "{{ range(60000) | map('string') | list | reverse | join('x' * 60000) }}",
    "tabs": "{{ ('\t' * 60000).expandtabs(60000) }}",
    "bytes of a number": "{{ (1).to_bytes(10**10, 'big') }}",
    "filled batches": "{{ [1] | batch(10**10, 0) | list }}",
    "empty slices": "{{ [1] | slice(10**10) | list }}",
    "steps asked back": "{% for a in range(99999) %}{{ [0] | map('spend ', -10**9) | list }}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
}

UNSAFE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ strftime_now.__closure__[0] }}",
    "{{ messages.append(1) }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '{0.__class__.__name__}'.format('') }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{% set n = namespace(_x=1) %}",
]


def compiled(source: str, date: str = "2024-07-26") -> Compiled:
    return compile_template(source, date, MARKS[0])


def text(source: str, **variables: object) -> str:
    return render_text(compiled(source), {"messages": [], **variables}, 100)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_ends_with_one_line(name):
    with pytest.raises(ValueError, match=r"^.*(it |limit|depth|Range too big|not offered).*$") as caught:
        text(ENDLESS[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200


def test_the_longest_text_is_bounded_by_the_input():
    source = "{% for i in range(n) %}{{ x }}{% endfor %}"
    variables = {"x": "a" * 100, "n": 672}  # 16 * 100 + 65 536 characters and no more
    assert len(text(source, **{**variables, "n": 671})) == 67_100
    with pytest.raises(ValueError, match="at most 67136 are allowed"):
        text(source, **variables)
    assert len(render_text(compiled(source), variables, 1000)) == 67_200


def test_what_a_rendering_spent_is_forgotten_by_the_next():
    source = "{% for i in range(30000) %}{{ 'ab' }}{% endfor %}"
    assert len({text(source) for _ in range(40)}) == 1


def test_a_meter_stops_at_the_same_step_each_time():
    meter = Meter()
    for _ in range(2):
        meter.start(0)
        meter.spend(STEPS_BASE)
        with pytest.raises(Exception, match="does not come to an end"):
            meter.spend(1)


@pytest.mark.parametrize("source", UNSAFE)
def test_nothing_leads_out_of_the_sandbox(source):
    with pytest.raises(ValueError, match=r"unsafe|undefined|underscore|has no attribute"):
        text(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% include 'x' %}", "{% import 'x' as y %}", "{% extends 'x' %}", "{% block a %}{% endblock %}",
        "{% for a in b recursive %}{{ loop(a) }}{% endfor %}", "{{ x | random }}", "{{ x | nothing }}", "{% if %}",
        "{% generation %}", "x" * (MAX_SOURCE + 1), "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
)  # fmt: skip
def test_what_is_not_offered_does_not_compile(source):
    with pytest.raises(TemplateSyntaxError):
        compiled(source)


@pytest.mark.parametrize("source", ["{{ lipsum() }}", "{{ range }}", "{{ namespace() }}", "{{ [1] | map('string') }}"])
def test_what_differs_between_runs_is_not_written(source):
    with pytest.raises(ValueError, match=r"undefined|has no text of its own"):
        text(source)


def test_today_is_the_date_that_is_given():
    assert render_text(compiled("{{ strftime_now('%d %b %Y') }}", "1999-12-31"), {}, 0) == "31 Dec 1999"


def test_an_exception_of_the_template_is_the_reason():
    with pytest.raises(ValueError, match=r"^roles must alternate$"):
        text("{{ raise_exception('roles must\nalternate') }}")


def test_an_error_of_the_template_says_what_it_was():
    with pytest.raises(ValueError, match=r"^ZeroDivisionError: division by zero$"):
        text("{{ 1 / 0 }}")
    with pytest.raises(ValueError, match=r"^'nothing' is undefined$"):
        text("{{ nothing.at.all }}")


def test_marks_stand_around_generation_blocks_of_the_output():
    begin, end = MARKS[0]
    source = "a{% for x in 'bc' %}{% generation %}{% set y = x %}{{ x }}{% endgeneration %}{{ y }}{% endfor %}"
    assert compiled(source).marks == (begin, end)
    assert text(source) == f"a{begin}b{end}{begin}c{end}"


@pytest.mark.parametrize(
    "source",
    [
        "{% set x %}{% generation %} b {% endgeneration %}{% endset %}{{ x | trim }}",
        "{% macro f() %}{% generation %}b{% endgeneration %}{% endmacro %}{{ f() }}",
        "{% filter trim %}{% generation %} b {% endgeneration %}{% endfilter %}",
    ],
)
def test_a_template_that_could_see_its_marks_has_none(source):
    assert compiled(source).marks is None
    assert text(source) == "b"
