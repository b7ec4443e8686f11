"""Chat templates that attack the machine that renders them: each must end soon, in little memory, with an error."""

from __future__ import annotations

DOUBLE = "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"

HOSTILE = {
    "endless loop by macros": "{% macro f(n) %}{% for i in range(99) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "recursion of a macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "recursion of a loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "recursion in two": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
    "huge range": "{% for i in range(1000000000) %}a{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested ranges with text": "{% for i in range(99999) %}{% for j in range(99999) %}a{% endfor %}{% endfor %}",
    "text times a number": "{{ 'a' * 1000000000 }}",
    "list times a number": "{{ ([0] * 1000000000) | length }}",
    "text times a variable": "{% set n = messages | length * 1000000000 %}{{ 'a' * n }}",
    "power": "{{ (9 ** (9 ** 9)) % 7 }}",
    "power of a variable": "{% set n = messages | length + 8 %}{{ (n ** (n ** n)) % 7 }}",
    "long division": "{% set n = 7 ** 300000 %}{% for i in range(9999) %}{% set m = n // 3 %}{% endfor %}{{ n }}",
    "wide format": "{{ '%01000000000d' % 1 }}",
    "wide format filter": "{{ '%1000000000s' | format('a') }}",
    "wide format method": "{{ '{:1000000000}'.format(1) }}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{{ 'a'.zfill(1000000000) }}",
    "indent": "{{ '\\n\\n\\n' | indent(1000000000) }}",
    "replace": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "doubling": DOUBLE,
    "doubling lists": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
    "{{ ns.x }}",
    "doubling a block": "{% set x %}aaaaaaaaaa{% endset %}"
    + "".join(f"{{% set x %}}{'{{ x }}' * 10}{{% endset %}}" for _ in range(9))
    + "{{ x }}",
    "join": "{{ range(99999) | join('a' * 99999) }}",
    "sum of lists": "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    "batch": "{{ [1] | batch(1000000000, 'a') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "deep lists": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x | tojson }}",
    "deep lists in text": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "deep generators": "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x | map('string') %}{% endfor %}{{ ns.x | list }}",
    "many generators": "{{ range(99999) | map('string') | map('center', 99999) | list | length }}",
    "wide json": "{{ [1, 2] | tojson(indent=1000000000) }}",
    "lipsum": "{{ lipsum(n=99999, html=false) }}",
    "deep brackets": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "deep blocks": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "long chain": "{{ 1" + " + 1" * 100_000 + " }}",
    "many variables": "".join(f"{{% set a{i} = {i} %}}" for i in range(40_000)),
    "date": "{{ strftime_now('%Y' * 10000000) }}",
    "slow words": "{{ ('a ' * 9000000) | wordwrap(1) }}",
    "cycles": "{% set c = cycler(1, 2) %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% set a = c.next() %}{% endfor %}{% endfor %}",
    "includes itself": "{% include 'chat_template.jinja' %}",
    "extends itself": "{% extends 'chat_template.jinja' %}",
    "class of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by a filter": "{{ ('' | attr('__class__')).__mro__ }}",
    "class by map": "{{ ([''] | map(attribute='__class__') | first).mro() }}",
    "format method": "{{ '{0.__class__.__mro__}'.format('') }}",
    "globals of a macro": "{{ raise_exception.__globals__['os'].system('true') }}",
    "globals of a cycler": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "self": "{{ self.__init__.__globals__ }}",
    "a namespace of Python": "{{ namespace(__class__=1) }}",
    "changes the conversation": "{{ messages.append(1) }}",
    "changes the environment": "{{ dict.__init__.__globals__ }}",
    "refuses at length": "{{ raise_exception('no\\n\\x1b[31m' * 999) }}",
    "syntax": "{{ ",
    "unknown filter": "{{ 1 | nothing }}",
    "endless lookahead": "{% set x = 'a' * 4000 %}{{ (x ~ '!') | urlize | wordcount }}" + "{% for i in range(99999) %}"
    "{{ ('<' * 50000) | striptags | length }}{% endfor %}",
}
