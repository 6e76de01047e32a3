"""Texts from data, models and labels where people see them: terminal, page, drawings."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from synthetic import labelled, train, validate, write_cache

from probecache import cli, terminal
from probecache.report import write_report
from probecache.store.reader import open_cache
from probecache.store.vectors import load_vectors

PAYLOADS = {
    "a script": "</script><script>alert(1)</script>",
    "an attribute": '"><img src=x onerror=alert(1)>',
    "an attribute in single quotes": "'><svg onload=alert(1)>",
    "the end of a style": "</style></svg></bdi></title><style>*{display:none}</style>",
    "an entity": "&lt;b&gt; &amp; &#60;i&#62; & &copy",
    "a comment": "<!-- --><![CDATA[ ]]> <?xml ?>",
    "a template": "{{ 7 * 7 }}{% for x in y %}",
    "mathematics": "$\\frac$ $\\alpha$ $ $$ \\$",
    "a link": "javascript:alert(1)",
    "control characters": "a\x00\x07\x1b[31m\x9b0m\x7f",
    "turned text": "\u202eevil\u2066\u200f\u061c",
    "no text": "\ud800",
    "a colour of the page": 'fill: #20242b width="1" id="x" url(#a)',
}
LABELS = 10


def saved(folder, payload):
    """A validation in which the payload stands wherever a text may; planted scores are the same."""
    writable = payload.encode("utf-8", "replace").decode()
    positive, other = f"{writable} one", f"{writable} two"
    labels = [positive, other] * LABELS
    records = [{**r, "question": f"{writable} {n}"} for n, r in enumerate(labelled(*labels))]
    rows = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(1))
    cache = write_cache(folder / "cache", records, {0: rows, 3: rows * 2}, model=writable)
    vectors = train(cache, folder / "run", positive_class=positive)
    validate(cache, vectors, folder / "scores")
    path = folder / "scores" / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    texts = ["dtype", "data", "cache", "vectors", "method", "positions", "layer_convention"]
    summary |= dict.fromkeys([*texts, "created"], payload)
    summary |= {"warnings": [payload, "plain"], "negative_class": payload}
    path.write_text(json.dumps(summary), encoding="utf-8")
    return folder / "scores"


class Structure(HTMLParser):
    """Tags with their attributes, everything that is no text, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.others, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, [(n, v) for n, v in attrs if n not in ("d", "x", "y", "transform")]))

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.others.append(data)

    def handle_decl(self, decl):
        self.others.append(decl)

    def handle_pi(self, data):
        self.others.append(data)

    def unknown_decl(self, data):
        self.others.append(data)


def without_numbers(tags):
    """Ids and places depend on how long a text is drawn; names and kinds of attributes do not."""

    def kept(attributes):
        pairs = [(name, value or "") for name, value in attributes if name in ALLOWED]
        return [(name, re.sub(r"[\d.]+|[0-9a-f]{8,}", "", value)) for name, value in pairs]

    return [(tag, kept(attributes)) for tag, attributes in tags]


ALLOWED = {"class", "href", "src", "http-equiv", "content", "role", "name", "lang", "rel", "scope"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = saved(tmp_path_factory.mktemp("plain"), "harmless words")
    write_report(folder)
    return folder


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_tag_and_no_attribute_of_the_page_comes_from_a_text(tmp_path, plain, name):
    folder = saved(tmp_path, PAYLOADS[name])
    write_report(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    found = Structure(page)
    expected = Structure((plain / "report.html").read_text(encoding="utf-8"))
    assert without_numbers(found.tags) == without_numbers(expected.tags)
    assert found.others == expected.others
    names = {attribute for _, attributes in found.tags for attribute, _ in attributes}
    assert names <= {attribute for _, attributes in expected.tags for attribute, _ in attributes}
    policy = next(dict(a)["content"] for t, a in found.tags if dict(a).get("http-equiv"))
    known = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-"
    assert re.fullmatch(re.escape(known) + "[A-Za-z0-9+/]{43}='", policy)
    assert not set(page) & set("\0\x07\x1b\x9b\x7f\u202e\u2066")
    if name in ("a script", "an attribute", "an entity", "a template", "mathematics"):
        assert PAYLOADS[name] in " ".join(found.text.split())


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_element_of_a_drawing_comes_from_a_text(tmp_path, plain, name):
    folder = saved(tmp_path, PAYLOADS[name])
    write_report(folder)
    for path in (plain / "visualizations").glob("*.svg"):
        expected = list(ElementTree.parse(path).getroot().iter())
        found = list(ElementTree.parse(folder / "visualizations" / path.name).getroot().iter())
        assert [one.tag for one in found] == [one.tag for one in expected]
        assert [sorted(one.attrib) for one in found] == [sorted(one.attrib) for one in expected]


def test_a_label_of_a_megabyte_is_cut_where_it_is_shown(tmp_path):
    folder = saved(tmp_path, "<b>" * 350_000)
    write_report(folder)
    assert (folder / "report.html").stat().st_size < 400_000
    assert all(path.stat().st_size < 400_000 for path in (folder / "visualizations").iterdir())


# ---------------------------------------------------------------- terminal

COMMANDS = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\b\u202e\u2028"


def only_lines(text):
    """Whether a terminal would only show this."""
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.fixture
def evil(tmp_path):
    """A cache and a run whose every text commands a terminal."""
    labels = [f"one{COMMANDS}.", f"two{COMMANDS}."] * 5
    rows = torch.randn(len(labels), 4, generator=torch.Generator().manual_seed(1))
    names = {"model": f"m{COMMANDS}", "revision": COMMANDS, "system_prompt": COMMANDS}
    names |= {"architecture": COMMANDS, "adapter": COMMANDS, "versions": {COMMANDS: COMMANDS}}
    cache = write_cache(tmp_path / "cache", labelled(*labels), {0: rows}, **names)
    vectors = train(cache, tmp_path / "run", positive_class=labels[0])
    return cache, vectors


def test_no_command_reaches_the_terminal_through_what_is_printed(evil, tmp_path, capsys):
    cache, vectors = evil
    result = validate(cache, vectors, tmp_path / "scores")
    terminal.print_vectors(vectors)
    terminal.print_validation(result)
    for folder in (cache.path, vectors.path):
        with pytest.raises(SystemExit):
            cli.main(["info", str(folder)])
    printed = capsys.readouterr().out
    assert only_lines(printed)
    assert "one\\x1b[2J\\x1b]0;owned\\x07\\x9b31m" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", COMMANDS],
        [COMMANDS],
        ["train", "--cache", "{cache}", "--output", "{out}", "--positive-class", COMMANDS],
        ["train", "--cache", "{cache}", "--output", "{out}", "--layers", "7"],
        ["validate", "--cache", "{cache}", "--vectors", COMMANDS, "--output", "{out}"],
        [
            "validate",
            "--cache",
            "{cache}",
            "--vectors",
            "{run}",
            "--output",
            "{out}",
            "--data",
            "d",
        ],
        ["extract", "--model", COMMANDS, "--data", COMMANDS, "--layers", "1", "--output", "{out}"],
    ],
)
def test_no_command_reaches_the_terminal_through_a_refusal(evil, tmp_path, capsys, arguments):
    cache, vectors = evil
    places = {"{cache}": cache.path, "{run}": vectors.path, "{out}": tmp_path / "out"}
    with pytest.raises(SystemExit) as left:
        cli.main([str(places.get(word, word)) for word in arguments])
    printed = capsys.readouterr()
    assert left.value.code == 2
    assert printed.err.startswith("error: ")
    assert only_lines(printed.err + printed.out)
    assert printed.err.count("\n") == 1
    assert open_cache(cache.path).classes
    assert load_vectors(vectors.path).layers


def test_a_refusal_of_a_text_without_end_is_short(tmp_path, capsys):
    record = {"question": "q", "type": "x" * 5_000_000}
    (tmp_path / "data.json").write_text(json.dumps([record]))
    options = ["--model", "m", "--data", str(tmp_path / "data.json"), "--layers", "1"]
    with pytest.raises(SystemExit):
        cli.main(["plan", *options])
    refused = capsys.readouterr().err
    assert len(refused) < 2200
    assert refused.rstrip().endswith("add some")
