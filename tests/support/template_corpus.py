"""Chat templates made of what public ones use, one construct or habit each. Loops and blanks are theirs too."""

from __future__ import annotations

from typing import Any

_PLAIN = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
_OPEN = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"

TEMPLATES: dict[str, str] = {
    "plain": _PLAIN + _OPEN,
    "dots": "{%- for message in messages %}{{- message.role }}: {{ message.content }}\n{%- endfor %}{{ bos_token }}",
    "blanks kept": "  {% for m in messages %}\n  * {{ m.content }}  \n  {% endfor %}\n  end",
    "blanks taken": "  {%- for m in messages -%}\n  * {{- m.content -}}  \n  {%- endfor -%}\n  end",
    "loop": "{% for m in messages %}{{ loop.index0 }}/{{ loop.index }}/{{ loop.revindex0 }}/{{ loop.length }}"
    "{% if loop.first %}F{% elif loop.last %}L{% endif %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "neighbours": "{% for m in messages %}{% if loop.previtem is defined and loop.previtem.role == m.role "
    "%}={% endif %}"
    "{% if loop.nextitem is undefined %}$${% endif %}{{ m.content | length }}{% endfor %}",
    "changed": "{% for m in messages %}{% if loop.changed(m.role) %}[{{ m.role }}]{% endif %}{{ m.content "
    "}}{% endfor %}",
    "system apart": "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if loop.index0 == 0 and system != '' %}<<SYS>>{{ system | trim }}<</SYS>>{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(found=false, last='') %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.found = true %}{% set ns.last = m.content %}{% endif %}{% endfor %}{{ ns.found }} {{ ns.last }}",
    "counted down": "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% set index = "
    "(messages | length - 1) - loop.index0 %}{% if ns.last < 0 and m.role == 'user' %}{% set ns.last = index %}"
    "{% endif %}{% endfor %}{{ ns.last }}{{ messages[ns.last].content }}",
    "macro": "{% macro turn(role, text='-') -%}<|{{ role }}|>{{ text | trim }}{{ caller() if caller }}{%- "
    "endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}{{ turn(role='assistant') }}",
    "call": "{% macro box() %}[{{ caller('x') }}]{% endmacro %}{% call(y) box() %}{{ y }}{{ messages[0].content }}"
    "{% endcall %}",
    "json": "{{ messages | tojson }}",
    "json, indented": "{{ {'b': messages[0], 'ä': [1, 2.5, none, true], '<&>': '\\'\"'} | tojson(indent=2) }}",
    "json, arguments": "{{ {'b': 'ü', 'a': [1, {}]} | tojson(ensure_ascii=true, separators=(',', ':'), "
    "sort_keys=true) }}",
    "json, positions": "{{ {'b': 'ü'} | tojson(true, 4) }}",
    "now": "{{ strftime_now('%Y') | length }}{% if strftime_now is defined %}{{ 'dated' }}{% endif %}",
    "date": "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}",
    "raised": "{{ raise_exception('roles must alternate: ' + messages[0].role) }}",
    "raised sometimes": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}",
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content "
    "}}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ "
    "eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation, tight": "{%- for m in messages -%}{%- generation -%} {{- m.content -}} {%- endgeneration "
    "-%}{%- endfor -%}",
    "tools": "{% if tools is not none %}TOOLS{% for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}"
    "{% if documents is none %}no documents{% endif %}{% if tools %}!{% endif %}" + _PLAIN,
    "tools, defined": "{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools is none }}{{ tools }}"
    "{{ documents is defined }}{{ xyz is defined }}",
    "strings": "{% set c = messages[-1].content %}{{ c.split(' ')[-1] }}|{{ c.strip() }}|{{ c.startswith('W') }}|"
    "{{ c.replace('a', 'o') }}|{{ c.upper() }}|{{ c.lstrip('W').rstrip('?') }}|{{ c.find('a') }}|{{ c.title() }}",
    "thoughts": "{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ c }}{% endfor %}",
    "reasoning": "{% for m in messages %}{% if m.reasoning_content is string %}<think>{{ "
    "m.reasoning_content }}</think>"
    "{% elif m.thinking is defined %}{{ m.thinking }}{% endif %}{{ m.content }}{% endfor %}",
    "ternary": "{{ 'many' if messages | length > 1 else 'one' }}{{ 'x' if false }}{{ (messages[0].name) or 'nobody' }}",
    "block": "{% set text %}{% for m in messages %}{{ m.content }} {% endfor %}{% endset %}{{ text | trim | upper }}",
    "with": "{% with role = messages[0].role, n = 2 %}{{ role * n }}{% endwith %}{% filter upper %}{{ "
    "bos_token }}{% endfilter %}",
    "items": "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{% for k, v in messages[0] | dictsort %}{{ k }};{% endfor %}{{ messages[0].keys() | list | join(',') }}",
    "items filter": "{% for key, value in messages[-1] | items %}{{ key }}{% endfor %}",
    "tests": "{% set c = messages[0].content %}{{ c is string }}{{ c is mapping }}{{ c is iterable }}{{ c "
    "is sequence }}"
    "{{ c is none }}{{ messages[0] is mapping }}{{ 3 is number }}{{ 3 is odd }}{{ true is boolean }}{{ c is "
    "in ['x'] }}",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ messages[0]['nothing'] }}{{ nothing | default('d') }}"
    "{{ messages[0].get('name', 'anon') }}{% if nothing %}x{% endif %}{{ nothing is undefined }}",
    "undefined used": "{{ nothing.attribute }}",
    "out of range": "{{ messages[99].content }}",
    "arithmetic": "{{ messages | length * 2 // 3 }}{{ 7 % 3 }}{{ 2 ** 5 }}{{ 1 / 4 }}{{ -messages | length "
    "}}{{ 1.50 }}",
    "filters": "{{ messages | map(attribute='role') | join('+') }}{{ messages | selectattr('role', "
    "'equalto', 'user') | list "
    "| length }}{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | first }}"
    "{{ messages | map(attribute='content') | map('trim') | list | last }}{{ [3, 1, 2] | sort | join }}{{ "
    "'a<b' | e }}"
    "{{ 'x' | indent(4, true) }}{{ '%s-%d' | format('a', 3) }}{{ messages | groupby('role') | length }}",
    "safe": "{{ '<b>' | safe }}{{ '<b>' | escape }}{{ ('a' ~ 1 ~ none) }}{{ 'abc' | replace('b', '<') }}",
    "lists": "{% set found = [] %}{% for m in messages %}{% set found = found + [m.role] %}{% endfor %}{{ found }}"
    "{{ dict(a=1, b='x') }}{{ range(3) | list }}{{ [1, 2][::-1] }}{{ (1, 2) | length }}{{ {'a': 1}.a }}",
    "appended": "{% set found = [] %}{{ found.append(1) }}",
    "unsafe": "{{ messages.__class__ }}",
    "namespace, hidden": "{% set ns = namespace(_x=1) %}{{ ns._x }}",
    "dict, keys": "{{ dict.fromkeys(['a', 'b']) }}{{ dict([('a', 1)]) | tojson }}",
    "lines": "{%- set nl = '\\n' -%}\n{# a comment #}\n{% raw %}{{ raw }}{% endraw %}\n{{ nl }}{{- '\\t' + nl -}}\n\n",
    "developer": "{% for m in messages %}{% if m.role in ['system', 'developer'] %}S{% endif %}{{ m.content "
    "}}{% endfor %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}{{ mask_token }}",
    "escapes": "{{ 'tab\\t' }}{{ \"quote\\\"\" }}{{ 'ü🙂' }}{{ '\\u00e9' }}",
}

# Each beside how it treats a message of several text parts: as parts, or as lines.
PARTS: dict[str, tuple[str, bool]] = {
    "printed": ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
    "added": ("{% for m in messages %}{{ '<' + m['content'] + '>' }}{% endfor %}", False),
    "trimmed": ("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", False),
    "stripped": ("{% for m in messages %}{{ m.content.strip() }}{% endfor %}", False),
    "split": ("{% for m in messages %}{{ m.content.split('o')[0] }}{% endfor %}", False),
    "strings only": (
        "{% for m in messages %}{% if m.content is not string %}{{ raise_exception('text only') }}{% endif %}"
        "{{ m.content }}{% endfor %}",
        False,
    ),
    "asked, not taken": (
        "{% for m in messages %}{% if m.content is iterable %}{{ m.content }}{% endif %}{% endfor %}",
        False,
    ),
    "by loop": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}",
        True,
    ),
    "by keys": (
        "{% for m in messages %}{% if m['content'] is iterable and m['content'] is not string %}{% for p in "
        "m['content'] %}"
        "<{{ p['text'] }}>{% endfor %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
        True,
    ),
    "by macro": (
        "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for item in content %}"
        "{% if 'text' in item %}{{ item.text }};{% endif %}{% endfor %}{% endif %}{% endmacro %}"
        "{% for m in messages %}{{ show(m.content) }}{% endfor %}",
        True,
    ),
    "by set": (
        "{% for m in messages %}{% set content = m.content %}{% if content is sequence and content is not string %}"
        "{% for c in content %}{{ loop.index }}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}",
        True,
    ),
    "by filter": (
        "{% for m in messages %}{{ m.content if m.content is string else m.content | map(attribute='text') "
        "| join('|') }}"
        "{% endfor %}",
        True,
    ),
    "by selection": (
        "{% for m in messages %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text "
        "}}/{% endfor %}"
        "{% endfor %}",
        True,
    ),
    "by place": ("{% for m in messages %}{{ m.content[0]['text'] }}{{ m.content[-1].text }}{% endfor %}", True),
    "backwards": (
        "{% for m in messages %}{% for p in m.content | reverse %}{{ p.text }}{% endfor %}{% endfor %}",
        True,
    ),
}

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is up?"}],
    [
        {"role": "system", "content": " Be \n brief. "},
        {"role": "user", "content": "<script>'ü' & \"q\"</script>"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nWell.", "reasoning_content": "so"},
        {"role": "user", "content": "What a day? "},
    ],
    [
        {"role": "user", "content": "a", "name": "me"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "{{ 1 + 1 }}{% raise %}🙂"},
    ],
]
IN_PARTS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
]
