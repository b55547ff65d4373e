"""Are the tasks of a mixed corpus found again? Real tasks, drawn at random, in three readings.

    python benchmarks/discovery.py MULTITASK [--dolly FILE] [--draws 0-4]
        [--features tfidf|model] [--model M] [--rows N] [--processes N]

MULTITASK holds train/TASK.jsonl (task, instruction, input, output) and paraphrases.json. For 4, 8
and 16 tasks and each seed, `random.Random(seed).sample(sorted(tasks), n)` draws the tasks; all
their training rows are clustered with the defaults, told nothing about the tasks. Readings: as_is
(instruction and input), paraphrased (one of seven wordings of the instruction, chosen by a hash),
input_only. Beside it, `plain`: the words' TF-IDF, K-means and the SSE elbow alone, as the paper
has it, with the elbow's K and with the true one.

Writes DIR/discovery.parquet (one row a document: draw, reading, seed, task, cluster; -1 is none),
DIR/discovery_others.parquet (single tasks, and Dolly, in the same form) and DIR/discovery.json (for
each draw what was chosen and why).
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from here import about_here
from kneed import KneeLocator
from readings import READINGS, Row, as_read, load
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score

from manylora.base import DEFAULT_MODEL
from manylora.discovery.discover import Documents, Found, discover
from manylora.discovery.embeddings import embeddings
from manylora.discovery.options import DiscoveryOptions

SIZES = (4, 8, 16)
PLAIN_ROWS, PLAIN_K = 4000, 40


def main() -> None:
    arguments = _arguments()
    first, last = map(int, arguments.draws.split("-"))
    data = load(arguments.multitask)
    tasks = sorted(data)
    jobs = [
        (f"{n}-{seed}", random.Random(seed).sample(tasks, n), reading, seed)
        for n in SIZES
        for seed in range(first, last + 1)
        for reading in READINGS
    ]
    if arguments.rows is None:
        jobs += [(f"1-{task}", [task], reading, 0) for task in tasks for reading in READINGS]
    how = (arguments.features, arguments.model, arguments.rows)
    started = time.perf_counter()
    with ProcessPoolExecutor(arguments.processes) as pool:
        waiting = [pool.submit(one, {t: data[t] for t in job[1]}, *job, *how) for job in jobs]
        if arguments.dolly:
            waiting.append(pool.submit(dolly, arguments.dolly, arguments.features, arguments.model))
        done = [found.result() for found in waiting]
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.output, arguments.name, [rows for _, rows in done])
    result = {
        **about_here(),
        "features": arguments.features,
        "rows": arguments.rows,
        "seconds": round(time.perf_counter() - started),
        "processes": arguments.processes,
        "draws": [summary for summary, _ in done],
    }
    path = arguments.output / f"{arguments.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result["draws"]))


def write_rows(folder: Path, name: str, tables: list[pa.Table]) -> None:
    """NAME.parquet: the draws of several tasks; NAME_others.parquet: single tasks and Dolly."""
    rows = pa.concat_tables(tables)
    drawn = pc.match_substring_regex(rows["draw"], r"^\d+-\d+$")
    pq.write_table(rows.filter(drawn), folder / f"{name}.parquet", compression="zstd")
    others = rows.filter(pc.invert(drawn))
    if others.num_rows:
        pq.write_table(others, folder / f"{name}_others.parquet", compression="zstd")


def one(
    data: dict[str, list[Row]],
    draw: str,
    tasks: list[str],
    reading: str,
    seed: int,
    features: str,
    model: str,
    rows: int | None,
) -> tuple[dict[str, Any], pa.Table]:
    """One draw in one reading: what was found, in short and for every document."""
    documents = [row for task in tasks for row in data[task]]
    if rows is not None:
        documents = random.Random(seed).sample(documents, min(rows, len(documents)))
    texts = [text(row, reading) for row in documents]
    owners = [row["task"] for row in documents]
    found = _discover(texts, owners, seed, features, model)
    several = {"plain": plain(texts, owners, seed)} if len(tasks) > 1 else {}
    return summary(draw, reading, len(tasks), found) | several, columns(
        draw, reading, seed, owners, found
    )


def dolly(path: Path, features: str, model: str) -> tuple[dict[str, Any], pa.Table]:
    """Dolly-15k with its category as the task; the paper finds three clusters in it."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [f"{row['instruction']}\n{row['context']}".strip() for row in rows]
    owners = [row["category"] for row in rows]
    found = _discover(texts, owners, 0, features, model)
    said = summary("dolly", "as_is", 3, found) | {"plain": plain(texts, owners, 0)}
    return said, columns("dolly", "as_is", 0, owners, found)


def _discover(texts: list[str], owners: list[str], seed: int, features: str, model: str) -> Found:
    warnings.filterwarnings("ignore")
    sources = [str(number) for number in range(len(texts))]
    options = DiscoveryOptions(features=features)
    make = embeddings(options, model, seed, lambda said: None)
    return discover(Documents(texts, owners, sources), options, seed, make)


def plain(texts: list[str], owners: list[str], seed: int) -> dict[str, Any]:
    """TF-IDF of words, K-means, elbow: nothing else, on some of the rows."""
    picked = random.Random(seed).sample(range(len(texts)), min(PLAIN_ROWS, len(texts)))
    truth = [owners[place] for place in picked]
    rows = TfidfVectorizer(stop_words="english", min_df=2).fit_transform(
        [texts[place] for place in picked]
    )
    sses, aris = [], []
    for k in range(1, PLAIN_K + 1):
        means = KMeans(k, n_init=1, random_state=seed).fit(rows)
        sses.append(float(means.inertia_))
        aris.append(float(adjusted_rand_score(truth, means.labels_)))
    knee = KneeLocator(range(1, PLAIN_K + 1), sses, curve="convex", direction="decreasing").knee
    k = int(knee or 1)
    return {"k": k, "ari": aris[k - 1], "ari_at_true_k": aris[len(set(owners)) - 1]}


def summary(draw: str, reading: str, true_k: int, found: Found) -> dict[str, Any]:
    said = found.discovery
    return {
        "draw": draw,
        "reading": reading,
        "true_k": true_k,
        "documents": said.documents,
        "k": said.k,
        "chosen_by": said.chosen_by,
        "ari": None if said.agreement is None else said.agreement.ari,
        "nmi": None if said.agreement is None else said.agreement.nmi,
        "criteria": {criterion.name: criterion.k for criterion in said.criteria},
        "notes": {criterion.name: criterion.note for criterion in said.criteria},
        "share": said.heterogeneity.share,
        "apart": said.heterogeneity.silhouette,
        "control": said.heterogeneity.control,
        "several": said.heterogeneity.several,
        "seconds": said.seconds,
    }


def columns(draw: str, reading: str, seed: int, owners: list[str], found: Found) -> pa.Table:
    size = len(owners)
    return pa.table(
        {
            "draw": pa.array([draw] * size),
            "reading": pa.array([reading] * size),
            "seed": pa.array(np.full(size, seed)),
            "task": pa.array(owners),
            "cluster": pa.array(found.labels.astype(np.int64)),
        }
    )


def text(row: Row, reading: str) -> str:
    """A row as one document."""
    return "\n".join(as_read(row, reading)).strip()


def markdown(draws: list[dict[str, Any]]) -> str:
    """Mean ARI, and how often K is within one, by number of tasks and reading."""
    lines = [
        "| tasks | reading | ARI | K within one | K | plain, its elbow | plain, true K |",
        "|---|---|---|---|---|---|---|",
    ]
    for n in SIZES:
        for reading in READINGS:
            rows = [d for d in draws if d["draw"].startswith(f"{n}-") and d["reading"] == reading]
            ks = [d["k"] for d in rows]
            near = sum(abs(k - n) <= 1 for k in ks)
            ari = np.mean([d["ari"] for d in rows])
            elbow = np.mean([d["plain"]["ari"] for d in rows])
            true = np.mean([d["plain"]["ari_at_true_k"] for d in rows])
            lines.append(
                f"| {n} | {reading} | {ari:.2f} | {near} of {len(rows)} "
                f"| {', '.join(map(str, ks))} | {elbow:.2f} | {true:.2f} |"
            )
    mixed = [d for d in draws if not d["draw"].startswith("1-") and d["draw"] != "dolly"]
    single = [d for d in draws if d["draw"].startswith("1-")]
    said = f"{sum(d['several'] for d in mixed)} of {len(mixed)} mixtures"
    if single:
        called = sum(d["several"] for d in single)
        said += f" and in {called} of {len(single)} readings of single tasks"
    lines += ["", f"Several branches are called worth a try in {said}."]
    for d in draws:
        if d["draw"] == "dolly":
            said = ", ".join(f"{name} {k or 'none'}" for name, k in d["criteria"].items())
            lines += [
                "",
                f"Dolly-15k: K = {d['k']} by {d['chosen_by']}, ARI {d['ari']:.2f} ({said}).",
            ]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("multitask", type=Path)
    parser.add_argument("--dolly", type=Path)
    parser.add_argument("--draws", default="0-4")
    parser.add_argument("--features", choices=["tfidf", "model"], default="tfidf")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rows", type=int, help="documents of a draw; default all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--name", default="discovery")
    return parser.parse_args()


if __name__ == "__main__":
    main()
