"""What a template asks of the clock is answered with a stored day, as the clock would have done.

The reference is transformers' own rendering under a clock that is set to that day.
"""

from __future__ import annotations

import datetime as clock

import pytest
import transformers.utils.chat_template_utils as rendering
from families import FAMILIES, RECORDS, build, tokenizer
from transformers import AutoTokenizer

import probecache
from probecache import dates
from probecache.dates import choose_day, frozen, parse_date
from probecache.errors import MismatchError, UsageError

PLAIN = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
LLAMA = (  # as Llama 3: a default where nobody tells the date
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    '        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else %}\n'
    '        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif %}\n'
    "{{ bos_token }}Today Date: {{ date_string }}\n"
)
MISTRAL = '{% set today = strftime_now("%Y-%m-%d") %}{{ today.split("-")[0] }} of {{ today }}\n'
INNER = "{% macro day() %}{{ strftime_now('%-d. %B %y (%A, %j)') }}{% endmacro %}{{ day() }}\n"
AWKWARD = "{{ strftime_now('100%% of %Y, %H:%M:%S %p %e %') }}{{ strftime_now('') }}\n"
TEMPLATES = {"llama": LLAMA, "mistral": MISTRAL, "inner": INNER, "awkward": AWKWARD}
DAY, NEXT = "2026-03-05", "2026-03-06"


def set_clock(monkeypatch, day):
    """Let transformers and probecache believe that it is midnight of a day."""

    class Then(clock.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    class Day(clock.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    monkeypatch.setattr(rendering, "datetime", Then)
    monkeypatch.setattr(dates, "date", Day)


def render(one, **options):
    turns = [{"role": "user", "content": "Hi"}]
    return one.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)


@pytest.mark.parametrize("day", [DAY, "2000-02-29", "2031-12-31"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_day_is_told_as_the_clock_would_have_told_it(monkeypatch, name, day):
    one = tokenizer(FAMILIES["llama"])
    one.chat_template = TEMPLATES[name] + PLAIN
    set_clock(monkeypatch, day)
    expected = render(one)
    set_clock(monkeypatch, "1999-09-09")
    assert render(one) != expected
    assert render(one, **frozen(one.chat_template, day)) == expected


def test_of_several_templates_the_one_that_is_used_is_frozen(monkeypatch):
    one = tokenizer(FAMILIES["llama"])
    one.chat_template = {"default": MISTRAL + PLAIN, "tools": PLAIN}
    set_clock(monkeypatch, NEXT)
    assert DAY in render(one, **frozen(one.chat_template, DAY))


@pytest.mark.parametrize(
    "template", [None, PLAIN, {"default": PLAIN, "other": LLAMA}, {"a": LLAMA}]
)
def test_a_template_that_asks_for_no_date_is_told_none(template):
    assert choose_day(template, None, DAY) is None
    with pytest.raises(UsageError, match=f"--template-date {DAY}, got one that does not"):
        choose_day(template, DAY, None)


def test_what_was_asked_for_goes_before_what_is_stored_and_that_before_today(monkeypatch):
    set_clock(monkeypatch, NEXT)
    assert choose_day(LLAMA, "2020-01-01", DAY) == "2020-01-01"
    assert choose_day(LLAMA, None, DAY) == DAY
    assert choose_day(LLAMA, None, None) == NEXT


@pytest.mark.parametrize("text", ["5 March", "2026-02-30", "", "05.03.2026"])
def test_what_is_no_date_is_refused(text):
    with pytest.raises(UsageError, match="--template-date as YYYY-MM-DD"):
        parse_date(text)


# ---------------------------------------------------------------- from run to run


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    folder = build(FAMILIES["llama"], tmp_path_factory.mktemp("dated"), chat=True)
    one = AutoTokenizer.from_pretrained(folder)
    one.chat_template = "{{ bos_token }}" + MISTRAL + PLAIN.removeprefix("{{ bos_token }}")
    one.save_pretrained(folder)
    return folder


def extracted(model, output, **options):
    settings = {"data": RECORDS, "layers": [1], "quiet": True, "device": "cpu"}
    return probecache.extract(model=str(model), output=output, **settings | options)


def test_the_first_day_is_stored_and_later_runs_keep_it(dated, tmp_path, monkeypatch):
    set_clock(monkeypatch, DAY)
    cache = extracted(dated, tmp_path / "cache")
    once = extracted(dated, tmp_path / "once", layers=[1, 2])
    assert cache.identity.template_date == DAY
    set_clock(monkeypatch, NEXT)
    assert extracted(dated, cache.path).layers == (1,)
    grown = extracted(dated, cache.path, layers=[2])
    assert grown.identity == once.identity
    assert grown["testing", 2].equal(once["testing", 2])


def test_a_model_is_scored_with_the_day_of_the_vectors(dated, tmp_path, monkeypatch):
    set_clock(monkeypatch, DAY)
    cache = extracted(dated, tmp_path / "cache")
    vectors = probecache.train(cache=cache, output=tmp_path / "run")
    expected = probecache.validate(cache=cache, vectors=vectors, output=tmp_path / "a")
    set_clock(monkeypatch, NEXT)
    task = {"data": RECORDS, "vectors": vectors, "quiet": True, "device": "cpu"}
    found = probecache.validate(model=str(dated), output=tmp_path / "b", **task)
    assert found.layers[0].scores.tolist() == expected.layers[0].scores.tolist()


def test_caches_of_two_days_are_told_apart_and_an_option_makes_them_alike(
    dated, tmp_path, monkeypatch
):
    set_clock(monkeypatch, DAY)
    vectors = probecache.train(cache=extracted(dated, tmp_path / "one"), output=tmp_path / "run")
    set_clock(monkeypatch, NEXT)
    task = {"vectors": vectors, "output": tmp_path / "validation"}
    refused = rf"template_date: expected '{DAY}', got '{NEXT}'.*--template-date {DAY}"
    with pytest.raises(MismatchError, match=refused):
        probecache.validate(cache=extracted(dated, tmp_path / "two"), **task)
    alike = extracted(dated, tmp_path / "three", template_date=DAY)
    assert alike.identity.template_date == DAY
    assert probecache.validate(cache=alike, **task).path == tmp_path / "validation"


def test_another_day_than_the_stored_one_is_refused(dated, tmp_path):
    cache = extracted(dated, tmp_path / "cache", template_date=DAY)
    with pytest.raises(MismatchError, match=f"template_date: expected '{DAY}', got '{NEXT}'"):
        extracted(dated, cache.path, template_date=NEXT)


def test_raw_text_is_told_no_day(dated, tmp_path):
    assert extracted(dated, tmp_path / "c", chat_template=False).identity.template_date is None
    with pytest.raises(UsageError, match="--template-date"):
        extracted(dated, tmp_path / "d", chat_template=False, template_date=DAY)
    assert not (tmp_path / "d").exists()
