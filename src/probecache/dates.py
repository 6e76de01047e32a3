"""The date that a chat template is told: one that is stored, not that of the day.

Templates ask for it with `strftime_now` (Llama 3, Mistral, SmolLM3 ...), which transformers answers
with the clock. Here a macro of that name, put before the template, hides it: what is passed in as
an argument transformers turns into plain data, functions too. Guarantee: a rendering depends on the
stored day alone; the time of day is midnight.
"""

from __future__ import annotations

import string
from datetime import date, datetime, time
from typing import Any

from probecache.errors import UsageError

__all__ = ["choose_day", "frozen", "parse_date"]

_ASKS = "strftime_now"
# Walks through a format, whose directives are % and a letter, or %- and a letter.
_MACRO = (
    "{%- macro strftime_now(format) -%}{%- set state = namespace(code='', text='') -%}"
    "{%- for sign in format -%}{%- set state.code = state.code + sign -%}"
    "{%- if state.code not in ('%', '%-') -%}"
    "{%- set state.text = state.text + frozen_date.get(state.code, state.code) -%}"
    "{%- set state.code = '' -%}{%- endif -%}{%- endfor -%}"
    "{{- state.text + state.code -}}{%- endmacro -%}"
)


def parse_date(text: str) -> str:
    """A date as --template-date takes it, checked.

    Raises:
        UsageError: not YYYY-MM-DD.
    """
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise UsageError(
            f"expected --template-date as YYYY-MM-DD, such as 2026-01-31, got {text!r}"
        ) from None


def choose_day(chat_template: Any, asked: str | None, stored: str | None) -> str | None:
    """The day that prompts are rendered with; None where the template asks for none.

    Args:
        chat_template: the tokenizer's, or None where none is used.
        asked: what the user named.
        stored: the day of what the prompts are to go with; without it, today.

    Raises:
        UsageError: a day is asked for, but the template does not.
    """
    if _ASKS in str(_text_of(chat_template)):
        return asked or stored or date.today().isoformat()
    if asked is not None:
        raise UsageError(
            f"expected a chat template that asks for today's date for --template-date {asked}, got "
            "one that does not, or none; leave the option out"
        )
    return None


def frozen(chat_template: Any, day: str) -> dict[str, Any]:
    """Options for `apply_chat_template` that make it tell a template this day.

    Args:
        chat_template: the tokenizer's: a text, or texts by name, of which "default" is used.
        day: ISO date.
    """
    text = _text_of(chat_template)
    if _ASKS not in text:
        return {}
    moment = datetime.combine(date.fromisoformat(day), time())
    codes = [sign + letter for sign in ("%", "%-") for letter in string.ascii_letters] + ["%%"]
    answers = {code: moment.strftime(code) for code in codes}
    return {"chat_template": _MACRO + text, "frozen_date": answers}


def _text_of(chat_template: Any) -> str:
    """The template that renders a conversation; of several by name the default one."""
    text = chat_template.get("default") if isinstance(chat_template, dict) else chat_template
    return str(text or "")
