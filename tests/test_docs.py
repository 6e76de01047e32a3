"""Documentation that goes stale fails here: commands, options, links, snippets and figures."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.main import get_command

from probecache import errors
from probecache.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
COMMANDS = get_command(app).commands


def blocks(text, language):
    """Fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def options_of(name):
    parameters = COMMANDS[name].params
    return {option for one in parameters for option in (*one.opts, *one.secondary_opts)}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_and_every_option_is_in_the_guide(name):
    assert f"probecache {name}" in GUIDE
    missing = [o for o in options_of(name) if o.startswith("--") and f"`{o}" not in GUIDE
               and f" {o}" not in GUIDE and f"[{o}" not in GUIDE]  # fmt: skip
    assert set(missing) <= {"--help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_is_documented_exists(page):
    text = page.read_text(encoding="utf-8")
    known = {option for parameter in get_command(app).params for option in parameter.opts}
    known = known.union({"--help"}, *map(options_of, COMMANDS))
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
        assert option in known, option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        place = (page.parent / path) if path else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, target


def test_the_readme_tells_a_newcomer_in_this_order():
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert headings == [
        *("Two commands", "The workflow", "What a cache looks like", "Which workflow when"),
        *("Troubleshooting", "More"),
    ]


def test_the_architecture_page_maps_every_module_once():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("```")[1].split("\nscripts/")[0]
    modules = (path.name for path in (ROOT / "src" / "probecache").rglob("*.py"))
    assert Counter(re.findall(r"\b[a-z_0-9]+\.py\b", tree)) == Counter(
        name for name in modules if not name.startswith("__")
    )


# What a validation says that is no module's: fields whose names stand on the page of methods.
EXPLAINED = ("interval", "best_of_all", "aggregate", "categories", "calibration_bins", "warnings")


def test_the_page_of_methods_explains_every_figure_of_a_validation(followed):
    folder, _ = followed
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    summary = json.loads((folder / "validation_experiment1" / "summary.json").read_text())
    plain = {"layer", "n_positive", "n_negative"}
    plain |= {f"{what}_{side}" for what in ("mean", "std") for side in ("positive", "negative")}
    fields = {*EXPLAINED, *summary["artefacts"], *summary["layers"][0]} - plain
    fields |= {one["name"] for one in summary["artefacts"]["baselines"]}
    (trained,) = folder.glob("run_experiment1_*/normalized_vectors/vectors.json")
    layers = json.loads(trained.read_text())["layers"]
    fields |= set(layers["10"]) - plain - {"file"}
    named = set(re.findall(r"`([a-z0-9_-]+)(?:\.[a-z]+)?`", page))
    missing = {name for name in fields if name not in named}
    assert missing <= {"baselines", "cv_low", "cv_high"}


def test_the_page_of_methods_explains_every_warning():
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    table = page.split("## Warnings")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!it says|---)(.+?) \|", table, re.MULTILINE)
    written = ("controls/cautions.py", "workflow/validate.py")
    sources = [(ROOT / "src" / "probecache" / path).read_text("utf-8") for path in written]
    # Sentences are written over several lines, with figures in between.
    text = re.sub(r'"\s*f?"', "", " ".join(sources))
    assert len(rows) > 15
    for row in rows:
        for words in filter(None, (part.strip() for part in row.split("…"))):
            assert words in text, words


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A copy of the checkout's parts in which the README's commands were run, in order."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "datasets", "models"):
        shutil.copytree(ROOT / name, folder / name)
    printed = ""
    for line in "".join(blocks(README, "bash")).splitlines():
        if not line.startswith("python scripts/"):
            continue
        words = shlex.split(line)
        for place, word in enumerate(words):
            if "TIMESTAMP" in word:
                (run,) = folder.glob(word.split("TIMESTAMP")[0] + "*")
                words[place] = f"{run.name}/normalized_vectors"
        words[0] = sys.executable
        ran = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        printed += ran.stdout
    return folder, printed


def shown(text, name):
    return re.findall(rf"<!-- {name} output -->\n```\n(.*?)```\n<!-- end -->", text, re.DOTALL)[0]


def figures(text):
    """Layer to AUROC, from lines such as `    10   0.910  [0.865, 0.941]`."""
    rows = re.findall(r"^ +(\d+) +([01]\.\d{3})  \[", text, re.MULTILINE)
    return {int(layer): float(area) for layer, area in rows}


def test_the_readmes_output_is_what_its_commands_print(followed):
    _, printed = followed
    found, told = figures(printed), figures(shown(README, "step 3"))
    assert set(told) == {10, 20, 23}
    # Another processor rounds bfloat16 otherwise.
    assert told == pytest.approx(found, abs=0.01)
    for number in ("1", "2", "3"):
        for line in shown(README, f"step {number}").splitlines():
            opening = re.match(r"[A-Za-z :]{8,}", line)
            assert opening is None or opening[0] in printed, line


def test_the_readmes_python_runs(followed):
    folder, _ = followed
    (snippet,) = blocks(README, "python")
    code = snippet + "\nassert rows.shape == (204, 80) and direction.shape == (80,)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def test_the_guides_analysis_runs(followed):
    folder, _ = followed
    ran = subprocess.run(
        [sys.executable, "-c", blocks(GUIDE, "python")[1]],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "[10, 20, 23] 204" in ran.stdout


def test_the_guides_plan_is_what_plan_prints(followed):
    folder, _ = followed
    words = ["plan", "--model", "models/tiny-llama", "--layers", "10,20,23"]
    ran = subprocess.run(
        [sys.executable, "-m", "probecache", *words, "--data", "datasets/validation_real.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    unlike = ("disk free",)
    told, printed = (
        [line for line in text.splitlines() if not line.startswith(unlike)]
        for text in (shown(GUIDE, "plan"), ran.stdout)
    )
    assert told == printed


def test_the_guides_comparison_is_what_compare_prints(followed):
    folder, _ = followed
    section = GUIDE.split("## Compare\n")[1].split("\n## ")[0]
    printed = ""
    for line in blocks(section, "bash")[1].splitlines():
        words = shlex.split(line)
        for place, word in enumerate(words):
            if word.endswith("_TIMESTAMP"):
                (run,) = folder.glob(word.removesuffix("TIMESTAMP") + "*")
                words[place] = run.name
        ran = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=True
        )
        printed = ran.stdout
    told = shown(GUIDE, "compare")
    # Another processor rounds bfloat16 otherwise.
    number = r"[-+]?\d+\.\d+(?:e-?\d+)?"
    assert re.sub(number, "0", told).split() == re.sub(number, "0", printed).split()
    found, shown_areas = ([float(n) for n in re.findall(r"0\.\d{3}", x)] for x in (printed, told))
    assert shown_areas == pytest.approx(found, abs=0.01)


def test_the_demos_figures_in_the_readme_are_the_demos(followed):
    told = shown(README, "demo")
    best = float(re.findall(r"Best layer \d+: AUROC ([\d.]+)", told)[0])
    assert figures(told)
    assert best == max(figures(told).values())


def test_every_file_of_a_cache_that_the_readme_draws_is_there(followed):
    folder, _ = followed
    tree = README.split("## What a cache looks like")[1].split("```")[1]
    names = re.findall(r"─ (\S+)", tree)
    assert len(names) == 8
    caches = [folder / "activations_cache" / name for name in ("contrastive", "validation")]
    for name in names:
        found = [cache for cache in caches if list(cache.rglob(name.rstrip("/")))]
        assert found, name
    info = json.loads((caches[0] / "layer_info.json").read_text())
    for field in re.findall(r"layer_info.json +(.*)$", tree, re.MULTILINE)[0].split(", "):
        key = {"layer convention": "layer_convention", "sha256 per file": "files"}.get(field, field)
        assert key in info, field


def test_the_tree_of_errors_is_the_one_that_is_drawn():
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)
    assert sorted([*drawn, "ProbecacheError"]) == sorted(
        set(errors.__all__) - {"one_line", "printable"}
    )
