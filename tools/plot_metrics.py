"""Draw one or several runs from their metrics.jsonl, and what a classifier predicted, as PNG files.

    python tools/plot_metrics.py out                       → out/metrics.png, and out/predictions.png if there are any
    python tools/plot_metrics.py out_a out_b --output_path both.png

metrics.png has a panel for each of these that a run has: loss, reward, accuracy or error, share of time spent waiting
for data, memory. Evaluations are drawn as dots. predictions.png is a confusion matrix, or for regression a scatter for
each target. A run that is still going may be drawn, too.
"""

import argparse
import json
import sys
from pathlib import Path

try:
    import matplotlib
    import numpy as np
except ModuleNotFoundError as error:
    raise SystemExit(f"plot_metrics.py: no module {error.name!r} in this Python: source .venv/bin/activate") from None

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = [  # title, unit on the axis, keys of training rows, keys of evaluation rows
    ("loss", "loss", ["loss"], ["eval_loss"]),
    ("reward", "reward", ["reward", "rewards/chosen", "rewards/rejected", "rewards/margins"],
     ["eval_reward", "eval_rewards/margins"]),
    ("accuracy", "share", ["accuracy", "rewards/accuracies"],
     ["eval_accuracy", "eval_f1", "eval_auroc", "eval_rewards/accuracies"]),
    ("error", "the targets' own units", ["mae"], ["eval_mae", "eval_rmse"]),
    ("data wait", "share of the step's time", ["data_wait"], []),
    ("peak memory", "GB", ["max_memory_gb"], []),
]  # fmt: skip
STYLES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D"]


def read_jsonl(path: Path) -> list[dict]:
    """The rows of a file of JSON lines; a torn last one is left out.

    Raises:
        SystemExit: says what is wrong with the file.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; give the --output_dir of a run")
    lines, rows = path.read_text(encoding="utf-8").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise SystemExit(f"{path}: line {number} is not JSON ({error})") from None
    return rows


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` steps, the window shortened at both ends."""
    sums = np.convolve(values, np.ones(width), "same")
    return sums / np.convolve(np.ones(len(values)), np.ones(width), "same")


def draw_metrics(runs: dict[str, list[dict]], picture: Path):
    """A panel for each group of PANELS that any of the runs `{name: rows}` has."""
    for rows in runs.values():
        for row in rows:
            if row.get("step_seconds"):
                row["data_wait"] = row["data_wait_seconds"] / row["step_seconds"]
    present = {key for rows in runs.values() for row in rows for key, value in row.items() if value is not None}
    panels = [panel for panel in PANELS if present & {*panel[2], *panel[3]}]
    if not panels:
        raise SystemExit("nothing to draw: the runs have not finished a step")
    figure, all_axes = plt.subplots(-(-len(panels) // 2), 2, figsize=(12, 3.4 * -(-len(panels) // 2)),
                                    layout="constrained", squeeze=False)  # fmt: skip
    for axes, (title, unit, train_keys, eval_keys) in zip(all_axes.flat, panels):
        for k, (name, rows) in enumerate(runs.items()):
            for keys, styles, dots in ((train_keys, STYLES, False), (eval_keys, MARKERS, True)):
                for key, style in zip(keys, styles):
                    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                    if not points:
                        continue
                    steps, values = np.array(points).T
                    label = " ".join(word for word in (name if len(runs) > 1 else "", key) if word)
                    if dots:
                        # under the training line's colour, with a mark for each evaluation
                        axes.plot(
                            steps, values, style, color=f"C{k}", markersize=6, markeredgecolor="black", label=label
                        )
                        continue
                    width = 1 if title == "peak memory" else max(1, len(values) // 50)
                    if width > 1:
                        axes.plot(steps, values, color=f"C{k}", alpha=0.25, linewidth=0.8)
                        label += f" (mean of {width})"
                    axes.plot(steps, smoothed(values, width), style, color=f"C{k}", linewidth=1.5, label=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        if unit.startswith("share"):
            axes.set_ylim(-0.03, 1.03)
        elif title == "peak memory":
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in list(all_axes.flat)[len(panels) :]:
        axes.remove()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_matrix(axes, counts: np.ndarray, rows: list[str], columns: list[str]):
    """Counts [rows, columns] as numbers on shades, each row's shade its share of the row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = 10 if max(counts.shape) <= 12 else 6
    if max(counts.shape) <= 40:
        for i, j in np.ndindex(*counts.shape):
            axes.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=size,
                      color="white" if shares[i, j] > 0.5 else "black")  # fmt: skip
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=size)
    axes.set_yticks(range(len(rows)), rows, fontsize=size)


def draw_predictions(rows: list[dict], picture: Path):
    """What predictions.jsonl of train_cls.py holds: one class per record, several, or numbers."""
    first = rows[0]
    if "probabilities" in first:
        names = list(first["probabilities"])
        side = min(20, max(4.5, 0.45 * len(names) + 2))
        figure, axes = plt.subplots(figsize=(side + 0.5, side), layout="constrained")
        if isinstance(first["label"], str):
            counts = np.zeros((len(names), len(names)))
            for row in rows:
                counts[names.index(row["label"]), names.index(row["prediction"])] += 1
            draw_matrix(axes, counts, names, names)
            axes.set(xlabel="prediction", ylabel="label")
            axes.set_title(f"{len(rows)} records, {np.trace(counts) / len(rows):.1%} right")
        else:
            counts = np.array([
                [sum(name in row["label"] and name in row["prediction"] for row in rows),
                 sum(name in row["label"] and name not in row["prediction"] for row in rows),
                 sum(name not in row["label"] and name in row["prediction"] for row in rows),
                 sum(name not in row["label"] and name not in row["prediction"] for row in rows)]
                for name in names])  # fmt: skip
            draw_matrix(axes, counts, names, ["found", "missed", "false alarm", "rightly none"])
            right = sum(sorted(row["label"]) == sorted(row["prediction"]) for row in rows) / len(rows)
            axes.set(xlabel="", ylabel="label", aspect="auto")
            axes.set_title(f"{len(rows)} records, {right:.1%} all right")
    else:
        names = list(first["label"])
        figure, all_axes = plt.subplots(1, len(names), figsize=(4.8 * len(names), 4.8), layout="constrained",
                                        squeeze=False)  # fmt: skip
        for axes, name in zip(all_axes.flat, names):
            true = np.array([row["label"][name] for row in rows])
            said = np.array([row["prediction"][name] for row in rows])
            low, high = min(true.min(), said.min()), max(true.max(), said.max())
            margin = 0.05 * ((high - low) or 1)
            axes.plot([low - margin, high + margin], [low - margin, high + margin], color="grey", linewidth=1)
            axes.scatter(true, said, s=14, alpha=0.6)
            axes.set(xlabel=f"label: {name}", ylabel="prediction", aspect="equal",
                     title=f"{len(rows)} records, mean absolute error {np.abs(true - said).mean():.3g}")  # fmt: skip
            axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="folders that a trainer wrote to (--output_dir)")
    parser.add_argument("--output_path", help="the picture of the metrics (default: metrics.png in the first folder)")
    options = parser.parse_args()
    folders = [Path(run) for run in options.runs]
    runs = {str(folder): read_jsonl(folder / "metrics.jsonl") for folder in folders}
    picture = Path(options.output_path) if options.output_path else folders[0] / "metrics.png"
    draw_metrics(runs, picture)
    print(picture)
    for folder in folders:
        rows = read_jsonl(folder / "predictions.jsonl") if (folder / "predictions.jsonl").exists() else []
        if rows and {"label", "prediction"} <= rows[0].keys():
            draw_predictions(rows, folder / "predictions.png")
            print(folder / "predictions.png")


if __name__ == "__main__":
    sys.exit(main())
