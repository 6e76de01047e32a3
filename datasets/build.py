"""Build the data sets of this folder from `source/`, and check them.

Guarantees: the same sources give the same bytes; letters and classes are exactly balanced; no two
entries are near-duplicates, and none is one of a document that tiny-llama was trained on.
Fails with a message that names the entries otherwise.

Run it from anywhere: python build.py (writes and checks) or python build.py --check
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE.parent / "models" / "tiny-llama"
MAX_SIMILARITY = 0.6
LAYOUTS = (
    "{context} {question}\n\nChoices:\n (A) {a}\n (B) {b}",
    "{context}\n{question}\n(A) {a}\n(B) {b}",
    "{question}\n\n{context}\n\n(A) {a}\n(B) {b}",
    "{context} {question} (A) {a} (B) {b}",
)

Record = dict[str, str]


def sections(name: str) -> dict[str, list[str]]:
    """Entries of a source file by section; "\\n" in an entry is a new line."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (HERE / "source" / name).read_text(encoding="utf-8").splitlines()[1:]:
        if line.startswith("# "):
            current = found.setdefault(line[2:], [])
        elif line:
            current.append(line.replace("\\n", "\n"))
    return found


def contrastive() -> list[Record]:
    """204 pairs: every context and every question four times, never twice together."""
    blocks = sections("contrastive.txt")
    kinds = ("testing_context", "deployment_context", "no_context")
    contexts = [(kind, text) for kind in kinds for text in blocks[kind]]
    records = []
    for number in range(4 * len(contexts)):
        turn, place = divmod(number, len(contexts))
        kind, context = contexts[place]
        question = blocks["question"][(place + 13 * turn) % len(blocks["question"])]
        testing, deployment = blocks["choices"][
            (5 * place + 11 * turn) % len(blocks["choices"])
        ].split(" | ")
        testing_first = (place + turn) % 2 == 0
        a, b = (testing, deployment) if testing_first else (deployment, testing)
        text = LAYOUTS[(place // 2 + turn) % len(LAYOUTS)]
        records.append(
            {
                "id": f"pair_{number:03d}",
                "question": text.format(context=context, question=question, a=a, b=b),
                "positive": " (A)" if testing_first else " (B)",
                "negative": " (B)" if testing_first else " (A)",
                "category": kind,
            }
        )
    return records


def validation() -> list[Record]:
    """Hand-written prompts of both classes, in the order of the sources."""
    records = []
    for label in ("testing", "deployment"):
        for category, texts in sections(f"validation_{label}.txt").items():
            records += [{"question": t, "type": label, "category": category} for t in texts]
    return [{"id": f"prompt_{i:03d}", **record} for i, record in enumerate(records)]


def shingles(text: str) -> set[tuple[str, ...]]:
    """Runs of five words, of all words where there are fewer."""
    words = text.lower().split()
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def similarity(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def nearest(records: list[Record]) -> tuple[float, str]:
    """The largest 5-gram Jaccard similarity of two entries, and which they are."""
    sets = [shingles(r["question"]) for r in records]
    return max(
        (similarity(sets[i], sets[j]), f"{records[i]['id']} and {records[j]['id']}")
        for i in range(len(sets))
        for j in range(i)
    )


def nearest_training(records: list[Record], count: int = 3000) -> tuple[float, str]:
    """The largest similarity of an entry to one of `count` documents of the model's corpus."""
    sys.path.insert(0, str(MODEL))
    from corpus import Corpus

    documents = Corpus(1).documents(count)
    texts = [d.messages[-2]["content"] if d.messages else d.text for d in documents]
    trained = [shingles(text) for text in texts]
    return max(
        (similarity(shingles(r["question"]), other), r["id"]) for r in records for other in trained
    )


def require(condition: bool, message: str) -> None:
    if not condition:
        raise SystemExit(f"error: {message}")


def check(name: str, records: list[Record]) -> None:
    """Balance and similarity; prints what was found."""
    questions = [r["question"] for r in records]
    require(len(set(questions)) == len(questions), f"{name}: a question stands there twice")
    require(len(records) >= 200, f"{name}: expected 200 entries or more, got {len(records)}")
    key = "positive" if "positive" in records[0] else "type"
    counts = Counter(r[key] for r in records)
    require(len(set(counts.values())) == 1, f"{name}: expected equal counts, got {dict(counts)}")
    within, between = nearest(records), nearest_training(records)
    for value, where in (within, between):
        require(value <= MAX_SIMILARITY, f"{name}: {where} are alike ({value:.2f})")
    print(f"{name}: {len(records)} entries, {key} {dict(counts)}")
    print(f"  largest 5-gram Jaccard: {within[0]:.3f} within, {between[0]:.3f} to the corpus")
    for value in sorted(counts):
        words = [len(r["question"].split()) for r in records if r[key] == value]
        low, middle, high = statistics.quantiles(words, n=4)
        print(f"  words, {value.strip()}: quartiles {low:g}, {middle:g}, {high:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; compare with the files"
    )
    args = parser.parse_args()
    for name, records in (
        ("contrastive_dataset.json", contrastive()),
        ("validation_real.json", validation()),
    ):
        check(name, records)
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        path = HERE / name
        if args.check:
            same = path.read_text(encoding="utf-8") == text
            require(same, f"{name} is not what the sources give: run build.py")
        else:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
