"""Draws the committed results and copies their table into docs/speed.md: python benchmarks/plot.py [name ...]"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mllm_squeeze.bench import results
from mllm_squeeze.bench.results import Results, Row

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "speed.md"
COLOURS = {"dense": "#8a8f98", "ours": "#1f6feb", "oracle": "#9ecbff", "naive": "#f0883e"}
PARTS = {"signal": "#1f6feb", "select": "#f0883e", "merge": "#2da44e", "shorten": "#8250df"}
HEADERS = (
    "method",
    "tokens per layer",
    "prefill s",
    "speed-up",
    "oracle's",
    "efficiency",
    "of fastest rounds",
    "1 - rule / ours",
    "rule ms",
    "rule / dense",
    "naive's",
)

RULES_HEADERS = (
    "method",
    "tokens per layer",
    "speed-up",
    "efficiency",
    "rule / dense",
    *(f"{part} ms" for part in PARTS),
)

GPU_HEADERS = (
    "method",
    "tokens per layer",
    "prefill ms",
    "speed-up",
    "oracle's",
    "efficiency",
    "rule ms",
    "decode ms",
    "peak MiB",
    "naive's",
)


def of_method(found: Results, kind: str) -> dict[str, Row]:
    """Return the rows of one kind by the name of the entry."""
    return {row.name.removeprefix("oracle of ").removeprefix("naive "): row for row in found.rows if row.kind == kind}


def draw_prefill(found: Results, path: Path) -> None:
    """Bars of the time to first token: dense, and for each method ours, its oracle, and the naive way."""
    ours = of_method(found, "ours")
    figure, axes = plt.subplots(figsize=(9, 4))
    dense = found.rows[0].prefill
    axes.axhline(dense.median, color=COLOURS["dense"], label="dense", linewidth=2)
    for shift, kind in ((-0.27, "oracle"), (0.0, "ours"), (0.27, "naive")):
        rows = of_method(found, kind)
        places = [(i + shift, rows[name].prefill) for i, name in enumerate(ours) if name in rows]
        if places:
            low = [max(p.median - p.low, 0) for _, p in places]
            high = [max(p.high - p.median, 0) for _, p in places]
            axes.bar(
                [x for x, _ in places],
                [p.median for _, p in places],
                width=0.25,
                yerr=[low, high],
                color=COLOURS[kind],
                label=kind,
                error_kw={"linewidth": 1, "ecolor": "#444"},
            )
    axes.set_xticks(range(len(ours)), list(ours))
    axes.set_ylabel("time to first token, s")
    axes.set_title(results.title(found), fontsize=9)
    axes.legend(frameon=False, ncols=4)
    _save(figure, axes, path)


def draw_rule(found: Results, path: Path) -> None:
    """Stacked bars of the rule's own work, as a share of the dense prefill."""
    ours = of_method(found, "ours")
    dense = found.rows[0].prefill.median
    figure, axes = plt.subplots(figsize=(9, 3.2))
    bottom = [0.0] * len(ours)
    for part, colour in PARTS.items():
        shares = [100 * row.rule[part] / dense for row in ours.values()]
        axes.bar(list(ours), shares, bottom=bottom, width=0.5, color=colour, label=part)
        bottom = [a + b for a, b in zip(bottom, shares, strict=True)]
    axes.axhline(2, color="#cf222e", linewidth=1, linestyle="--", label="bar: 2 %")
    axes.set_ylabel("rule's own work, % of dense prefill")
    axes.set_title(results.title(found), fontsize=9)
    axes.legend(frameon=False, ncols=5)
    _save(figure, axes, path)


def draw_sweep(found: Sequence[Results], path: Path) -> None:
    """Lines of the speed-up of the prefill over the number of visual tokens, one for each method."""
    figure, axes = plt.subplots(figsize=(9, 3.6))
    for name in of_method(found[0], "ours"):
        rows = [of_method(one, "ours")[name] for one in found]
        tokens = [one.setting["visual_tokens"] for one in found]
        axes.plot(tokens, [row.speedup.median for row in rows], marker="o", label=name)
    axes.axhline(1, color=COLOURS["dense"], linewidth=1, linestyle="--", label="dense")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("visual tokens")
    axes.set_ylabel("speed-up of the prefill")
    axes.set_title(results.title(found[0]).split(":")[0] + ", 75 % removed", fontsize=9)
    axes.legend(frameon=False, ncols=4)
    _save(figure, axes, path)


def sweep_table(found: Sequence[Results]) -> list[str]:
    """Return one line per number of visual tokens: the dense prefill, then the speed-up and the rule of each method."""
    names = list(of_method(found[0], "ours"))
    headers = ["visual tokens", "dense ms", *(f"{name}: speed-up (rule ms)" for name in names)]
    lines = ["| " + " | ".join(headers) + " |", "|" + " ---: |" * len(headers)]
    for one in found:
        rows = of_method(one, "ours")
        cells = [str(one.setting["visual_tokens"]), f"{1000 * one.rows[0].prefill.median:.0f}"]
        cells += [f"{rows[n].speedup.median:.2f} ({1000 * sum(rows[n].rule.values()):.1f})" for n in names]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def decode_table(found: Sequence[Results]) -> list[str]:
    """Return milliseconds per decoded token, one line per contestant, one column per kind of cache."""
    names = [row.name for row in found[-1].rows]
    lines = ["| ms per token | " + " | ".join(str(one.setting["cache"]) for one in found) + " |"]
    lines.append("| --- |" + " ---: |" * len(found))
    for name in names:
        rows = [next(row for row in one.rows if row.name == name) for one in found]
        lines.append(f"| {name} | " + " | ".join(f"{1000 * row.decode.median:.1f}" for row in rows) + " |")
    return lines


def _save(figure: plt.Figure, axes: plt.Axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(path.relative_to(ROOT))


def summary(found: Results) -> list[str]:
    """Return the table of docs/speed.md: one line per method."""
    ideals, naive = of_method(found, "oracle"), of_method(found, "naive")
    dense = found.rows[0]
    lines = ["| " + " | ".join(HEADERS) + " |", "| --- |" + " ---: |" * (len(HEADERS) - 1)]
    blank = ["-"] * 7
    lines.append(f"| dense | {_mean(dense)} | {dense.prefill.median:.2f} | 1.00 | " + " | ".join(blank) + " |")
    for name, row in of_method(found, "ours").items():
        cells = [
            name,
            _mean(row),
            f"{row.prefill.median:.2f}",
            f"{row.speedup.median:.2f}",
            f"{ideals[name].speedup.median:.2f}" if name in ideals else "-",
            f"{row.efficiency.median:.3f}" if row.efficiency is not None else "-",
            _fastest(row, ideals.get(name)),
            f"{1 - sum(row.rule.values()) / row.prefill.median:.3f}",
            f"{1000 * sum(row.rule.values()):.0f}",
            f"{100 * (row.rule_share or 0):.2f} %",
            f"{naive[name].speedup.median:.2f}" if name in naive else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def memory_table(found: Results) -> list[str]:
    """Return the peak memory of a prefill beyond weights and features, ours and the oracle's, one line per method."""
    ideals = of_method(found, "oracle")
    lines = ["| method | peak MiB | oracle's | ours / oracle's |", "| --- |" + " ---: |" * 3]
    lines.append(f"| dense | {_mib(found.rows[0]):.1f} | - | - |")
    for name, row in of_method(found, "ours").items():
        if name in ideals:
            ours, ideal = _mib(row), _mib(ideals[name])
            lines.append(f"| {name} | {ours:.1f} | {ideal:.1f} | {ours / ideal:.3f} |")
    return lines


def gpu_table(found: Results) -> list[str]:
    """Return what a run on a GPU gave: times in milliseconds, and the peak memory of a prefill."""
    ideals, naive = of_method(found, "oracle"), of_method(found, "naive")
    lines = ["| " + " | ".join(GPU_HEADERS) + " |", "| --- |" + " ---: |" * (len(GPU_HEADERS) - 1)]
    for row in (found.rows[0], *of_method(found, "ours").values()):
        ideal = ideals.get(row.name)
        cells = [
            row.name,
            _mean(row),
            f"{1000 * row.prefill.median:.0f}",
            f"{row.speedup.median:.2f}",
            f"{ideal.speedup.median:.2f}" if ideal else "-",
            f"{row.efficiency.median:.3f}" if row.efficiency is not None else "-",
            f"{1000 * sum(row.rule.values()):.1f}" if row.kind == "ours" else "-",
            f"{1000 * row.decode.median:.1f}",
            f"{_mib(row):.0f}",
            f"{naive[row.name].speedup.median:.2f}" if row.name in naive else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def rules_table(found: Results) -> list[str]:
    """Return what each method saves and what its rule costs, the dearest rule last."""
    ours = sorted(of_method(found, "ours").values(), key=lambda row: row.rule_share or 0)
    lines = ["| " + " | ".join(RULES_HEADERS) + " |", "| --- |" + " ---: |" * (len(RULES_HEADERS) - 1)]
    for row in ours:
        efficiency = "-" if row.efficiency is None else f"{row.efficiency.median:.3f}"
        parts = [f"{1000 * row.rule[part]:.1f}" for part in PARTS]
        share = f"{100 * (row.rule_share or 0):.2f} %"
        lines.append(
            "| " + " | ".join([row.name, _mean(row), f"{row.speedup.median:.2f}", efficiency, share, *parts]) + " |"
        )
    return lines


def kernel_table(path: Path) -> list[str]:
    """Return milliseconds of each kernel and of the torch op that it stands for, and how far the two are apart."""
    lines = ["| op | shapes | kernel ms | torch ms | apart |", "| --- | --- |" + " ---: |" * 3]
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        kernel, op = (case["contestants"][name]["median_ms"] for name in ("kernel", "torch"))
        lines.append(f"| {case['case']} | {case['shapes']} | {kernel:.2f} | {op:.2f} | {case['difference']:.1e} |")
    return lines


def _mib(row: Row) -> float:
    assert row.memory is not None, f"{row.name} was not weighed"
    return row.memory / 2**20


def _fastest(row: Row, ideal: Row | None) -> str:
    """Return the efficiency of the fastest rounds: other jobs can only make a round slower."""
    return "-" if ideal is None else f"{min(ideal.rounds['prefill']) / min(row.rounds['prefill']):.3f}"


def _mean(row: Row) -> str:
    return f"{sum(row.layers) / len(row.layers):.0f}"


def put_table(name: str, lines: list[str], page: Path) -> None:
    """Replace what stands between the marks of a table in a page."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if pattern.search(text):
        body = "\n".join(lines) + "\n"
        page.write_text(pattern.sub(lambda m: m[1] + body + m[2], text), encoding="utf-8")
        print(page.relative_to(ROOT))


def main(names: list[str]) -> None:
    """Draw the named results, or all of them."""
    folder = ROOT / "benchmarks" / "results"
    for path in sorted(folder.glob("*.json")):
        if names and path.stem not in names:
            continue
        found = Results.load(path)
        draw_prefill(found, ROOT / "docs" / "img" / f"speed-{path.stem}-prefill.png")
        draw_rule(found, ROOT / "docs" / "img" / f"speed-{path.stem}-rule.png")
        put_table(path.stem, summary(found), PAGE)
        put_table(f"memory {path.stem}", memory_table(found), PAGE)
    if names:
        return
    sweep = [Results.load(path) for path in (folder / "sweep").glob("*.json")]
    if sweep:
        sweep.sort(key=lambda one: one.setting["visual_tokens"])
        draw_sweep(sweep, ROOT / "docs" / "img" / "speed-sweep.png")
        put_table("sweep", sweep_table(sweep), PAGE)
    caches = [Results.load(folder / kind / "cpu-300m.json") for kind in ("dynamic", "static", "compiled")]
    put_table("decode", decode_table(caches), PAGE)
    put_table("rules", rules_table(Results.load(folder / "rules" / "cpu-300m.json")), PAGE)
    for path in sorted((folder / "gpu").glob("h100-*.json")):
        put_table(path.stem, gpu_table(Results.load(path)), PAGE)
    put_table("kernels", kernel_table(ROOT / "benchmarks" / "results_kernels" / "h100.json"), PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
