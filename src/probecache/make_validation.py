"""A labelled validation file from test questions and everyday instructions.

Takes what the common sets hold: `question` (GSM8K), or `instruction` with `input` or
`instances[0].input` (Alpaca and its seed tasks). Guarantee: the same sources and seed give the same
bytes; both classes have the same count and share no prompt; nothing is appended to a prompt.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from probecache.atomic import disk_errors_named, write_bytes
from probecache.errors import DataError, OutputError, UsageError, one_line
from probecache.foreign import parse_json, read_text_bytes, require_sane_density
from probecache.store.seal import encode_json

__all__ = ["make_validation"]

# Data sets of these names need a configuration and have a split that models were not trained on.
_HUB = {"openai/gsm8k": ("main", "test"), "tatsu-lab/alpaca": (None, "train")}


def make_validation(
    testing: str, deployment: str, output: str | Path, *, count: int = 150, seed: int = 0
) -> int:
    """Draw prompts of both classes and write them as labelled records.

    Args:
        testing: a local .jsonl or .json file of test questions, or a data set's name on the hub.
        deployment: the same of instructions.
        output: the .json file to write; must not exist.
        count: prompts of each class.
        seed: which prompts are drawn, and their order.

    Returns:
        Number of prompts written.

    Raises:
        DataError: a source cannot be read or holds too few prompts.
        OutputError: `output` exists or cannot be written.
    """
    output = Path(output)
    if output.suffix != ".json":
        raise UsageError(f"expected --output to end in .json, got {output.name!r}")
    if output.exists():
        raise OutputError(f"expected --output {output} to be free; choose another name")
    if count < 1:
        raise UsageError(f"expected --count of at least 1, got {count}")
    generator = random.Random(seed)
    records = []
    seen: set[str] = set()  # a prompt that both sources hold would be of both classes
    for label, source in (("testing", testing), ("deployment", deployment)):
        prompts = [text for text in _distinct(_prompts(source)) if text not in seen]
        seen.update(prompts)
        if len(prompts) < count:
            raise DataError(
                f"expected at least {count} different prompts in {source}, got {len(prompts)}"
                f"{' that --testing does not hold' if label == 'deployment' else ''}; "
                "pass a smaller --count, or name a larger source"
            )
        for text in generator.sample(prompts, count):
            records.append({"question": text, "type": label, "category": Path(source).stem})
    generator.shuffle(records)
    content = encode_json([{"id": str(i), **r} for i, r in enumerate(records)])
    with disk_errors_named(output, len(content)):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(output, content)
    return len(records)


def _prompts(source: str) -> list[str]:
    rows = _local_rows(Path(source)) if Path(source).is_file() else _hub_rows(source)
    prompts = []
    for number, row in enumerate(rows, start=1):
        prompts.append(_prompt_of(row, f"{source}, row {number}"))
        if any("\ud800" <= character <= "\udfff" for character in prompts[-1]):
            raise DataError(f"{source}, row {number}: expected Unicode, got a lone surrogate")
    return prompts


def _distinct(prompts: list[str]) -> list[str]:
    return list(dict.fromkeys(prompts))


def _prompt_of(row: Any, where: str) -> str:
    if isinstance(row, dict):
        if isinstance(row.get("question"), str) and row["question"].strip():
            return str(row["question"]).strip()
        if isinstance(row.get("instruction"), str) and row["instruction"].strip():
            return "\n\n".join(filter(None, (row["instruction"].strip(), _input_of(row).strip())))
    raise DataError(f"{where}: expected a question or an instruction, got neither")


def _input_of(row: dict[str, Any]) -> str:
    instances = row.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        return str(instances[0].get("input") or "")
    return str(row.get("input") or "")


def _local_rows(path: Path) -> list[Any]:
    try:
        content = read_text_bytes(path)
        require_sane_density(content)
        text = content.decode("utf-8-sig")
        if path.suffix == ".jsonl":
            return [parse_json(line) for line in text.split("\n") if line.strip()]
        rows = parse_json(text)
    except (OSError, ValueError) as error:
        raise DataError(f"expected JSON records in {path}, got: {one_line(error)}") from error
    if not isinstance(rows, list):
        raise DataError(f"expected a JSON array in {path}, got {type(rows).__name__}")
    return rows


def _hub_rows(name: str) -> list[Any]:
    if name.startswith((".", "/", "~")) or name.endswith((".json", ".jsonl")):
        raise DataError(f"expected a file at {name}, got nothing there; check the path")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"expected the package datasets to fetch {name} from the hub, got none; install it "
            "with: pip install 'probecache[hub]', or name local files"
        ) from error
    configuration, split = _HUB.get(name, (None, "train"))
    try:
        return list(load_dataset(name, configuration, split=split))
    except Exception as error:  # the client raises many kinds
        raise DataError(
            f"expected the data set {name} on the hub, got: {one_line(error)}; "
            "name local files with --testing and --deployment"
        ) from error
