"""Saved validations made by hand, and their page as a browser would see it."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser

import numpy as np
from sklearn.metrics import roc_auc_score

COLUMNS = ["question_id", "question", "type", "mean_score", "max_score", "min_score", "std_score"]


def save(folder, layers=(2, 4), sizes=(12, 9), names=("deployment", "testing"), **options):
    """Write a validation folder; `scores` maps labels and a layer to scores."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.arange(sum(sizes)) < sizes[0]
    score = options.pop("scores", planted_scores)
    questions = options.pop("questions", ["What do you do next?"])
    rows = []
    for layer in layers:
        scores = score(labels, layer)
        save_scores(folder / f"probe_stats_layer{layer}.csv", scores, labels, names, questions)
        rows.append(summary_row(layer, scores, labels))
    summary = {
        "format": "probecache-validation",
        "format_version": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "positive_class": names[0],
        "negative_class": names[1],
        "positions": "all",
        "layer_convention": "residual stream after L blocks",
        "model": "models/tiny-llama",
        "dtype": "bfloat16",
        "data": "datasets/validation.json",
        "cache": None,
        "vectors": "run/normalized_vectors",
        "method": "difference of means",
        "num_examples": len(labels),
        "normalized": True,
        "classes": {names[1]: sizes[1], names[0]: sizes[0]},
        "best_layer": max(rows, key=lambda row: row["auroc"])["layer"],
        "warnings": [],
        "layers": rows,
    }
    (folder / "summary.json").write_text(json.dumps(summary | options), encoding="utf-8")
    return folder


def planted_scores(labels, layer):
    return np.random.default_rng(layer).normal(size=labels.size) + labels * (layer % 5) / 2


def summary_row(layer, scores, labels):
    area = float(roc_auc_score(labels, scores))
    return {
        "layer": layer,
        "auroc": area,
        "auroc_low": max(0.0, area - 0.1),
        "auroc_high": min(1.0, area + 0.1),
        "n_positive": int(labels.sum()),
        "n_negative": int((~labels).sum()),
        "threshold": float(np.median(scores)),
        "accuracy": 0.75,
        "mean_positive": float(scores[labels][0]),
        "mean_negative": float(scores[~labels][0]),
        "std_positive": None,
        "std_negative": None,
    }


def save_scores(path, scores, labels, names, questions):
    with path.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, "n_tokens"])
        for i, (score, positive) in enumerate(zip(scores, labels, strict=True)):
            name, value = names[0] if positive else names[1], repr(float(score))
            question = questions[i % len(questions)]
            writer.writerow([f"q{i}", question, name, value, value, value, "0.0", 7])


class Page(HTMLParser):
    """What a browser would see: tags with attributes, ids, text, rows of tables and of layers."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.words, self.rows, self.layers = [], [], [], []
        self.feed((folder / "report.html").read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
            if "data-layer" in dict(attrs):
                self.layers.append(self.rows[-1])

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.words.append(data)
        if self.rows and data.strip():
            self.rows[-1].append(data.strip())

    def attributes(self, *names):
        return [attrs[name] for _, attrs in self.tags for name in names if name in attrs]


def with_evidence(folder, tokens=True, **options):
    """A validation with every optional field; `options` are those of `save`."""
    save(folder, **options)
    path = folder / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    for row in summary["layers"]:
        row |= layer_evidence(is_best=row["layer"] == summary["best_layer"])
    summary |= run_evidence(summary)
    path.write_text(json.dumps(summary), encoding="utf-8")
    if tokens:
        record = token_record(summary)
        (folder / "token_scores.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def layer_evidence(is_best):
    gap = {"difference": -0.123, "low": -0.2, "high": -0.05, "p_value": 0.0123}
    return {
        "cv_auroc": 0.811,
        "cv_low": 0.702,
        "cv_high": 0.888,
        "below_best": None if is_best else gap,
        "tpr_at_1": {"tpr": 0.311, "low": 0.2, "high": 0.45},
        "tpr_at_5": {"tpr": 0.522, "low": 0.4, "high": 0.65},
        "brier": 0.147,
        "calibration_slope": 0.913,
        "calibration_intercept": -0.217,
        "ece": 0.061,
        "random_mean": 0.551,
        "random_high": 0.633,
    }


def run_evidence(summary):
    nested = {"auroc": 0.777, "low": 0.7, "high": 0.84}
    folds = {"folds": 5, "groups": 97, "best_layer": summary["best_layer"], "nested": nested}
    positive = summary["positive_class"]
    return {
        "aggregate": "mean",
        "interval": "bootstrap over 21 groups",
        "best_of_all": {
            "p_value": 0.004,
            "permutations": 2000,
            "null_median": 0.56,
            "null_95": 0.641,
        },
        "training": {"n_positive": 101, "n_negative": 99, "cross_validation": folds},
        "categories": [
            category("medicine", 6, 5, 0.871),
            category("one class alone", 6, 0, None),
        ],
        "calibration_bins": [
            {"low": 0.0, "high": 0.5, "n": 11, "predicted": 0.21, "observed": 0.18},
            {"low": 0.5, "high": 0.9, "n": 0, "predicted": None, "observed": None},
            {"low": 0.9, "high": 1.0, "n": 10, "predicted": 0.93, "observed": 1.0},
        ],
        "artefacts": {
            "baselines": [
                baseline("length", "prompt length", 0.58),
                baseline("words", "bag of words", 0.912),
                baseline("answer-letter", "answer letter", None),
                baseline("shuffled-labels", "shuffled labels", 0.511),
            ],
            "best_baseline": "words",
            "gain": -0.0345,
            "class_balance": {"positive": summary["classes"][positive], "negative": 9},
            "pair_agreement": 0.417,
            "outlier_dimensions": {"dimensions": [17, 203], "share_of_norm": 0.62},
            "first_token_share": 0.08,
            "rendered_alike": {"alike": False, "differences": ["Another system prompt."]},
        },
    }


def category(name, n_positive, n_negative, area):
    return {
        "category": name,
        "n_positive": n_positive,
        "n_negative": n_negative,
        "auroc": area,
        "auroc_low": None if area is None else area - 0.1,
        "auroc_high": None if area is None else area + 0.1,
        "accuracy": 0.8,
        "mean_score": 1.25,
    }


def baseline(name, title, area):
    bounds = (None, None) if area is None else (area - 0.05, area + 0.05)
    record = {"name": name, "title": title, "auroc": area, "low": bounds[0], "high": bounds[1]}
    return record | {"how": f"How {name} was made."}


def token_record(summary):
    names = list(summary["classes"])
    prompts = []
    for end, sign in (("highest", 1), ("lowest", -1)):
        pieces = [{"text": "<|user|>", "score": None}]
        pieces += [{"text": f"{end}{k} ", "score": sign * float(k)} for k in range(5)]
        record = {"id": end, "class": names[sign > 0], "score": 2.0 * sign, "end": end}
        prompts.append(record | {"pieces": pieces})
    return {"layer": summary["best_layer"], "low": -4.0, "high": 4.0, "prompts": prompts}
