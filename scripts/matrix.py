"""Every technique with every other: gradients in float64 against one rank's, and bytes sent on each axis.

    python scripts/matrix.py             all pairs and a spread of triples, on up to 8 ranks: `make matrix`

A row is one configuration; its number is the largest error of any parameter's gradient, as the design
measures it: ||got - want|| / max(||want||, 1e-6 ||all gradients||), a rank's part against the whole. What
does not exist is grey, with the reason that its technique gives (train/refusals/techniques.py). Writes
matrix.json and matrix.png; exits 1 where one is past 1e-10.
"""
import argparse
import itertools
import json
import random
import sys
import textwrap
from math import log10
from pathlib import Path

from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from nanoinfra.config import ModelConfig
from nanoinfra.distributed.pool.rank_pool import RankPool
from nanoinfra.lab import draw
from nanoinfra.lab.instruments.gradient_parity import largest_gradient_error as error
from nanoinfra.lab.instruments.gradient_parity import run_gradient_step
from nanoinfra.train.config import TrainFlags, make_train_flags, refused_combinations

TECHNIQUES = {                               # flags; two that set one flag differently exclude each other
    "dp": {"dp": 2}, "ZeRO-1": {"dp": 2, "zero": 1}, "ZeRO-2": {"dp": 2, "zero": 2},
    "ZeRO-3": {"dp": 2, "zero": 3}, "tp": {"tp": 2}, "sp": {"tp": 2, "sp": True},
    "sp, kept": {"tp": 2, "sp": True, "sp_save_gathered": True}, "gpipe": {"pp": 2, "schedule": "gpipe"},
    "1f1b": {"pp": 2, "schedule": "1f1b"}, "zb-h1": {"pp": 2, "schedule": "zb-h1"},
    "interleaved": {"pp": 2, "schedule": "interleaved", "virtual_stages": 2},
    "recompute": {"recompute": "full"},
    "selective": {"recompute": "selective", "attention": "naive"}, "accumulation": {"micro_batch": 1},
    "untied head": {"untied": True}}
TOLERANCE = 1e-10
G, T, V = 16, 11, 61                         # sequences of a step, tokens of one, vocabulary


def flags_of(names: tuple[str, ...]) -> TrainFlags:
    """The flags of a configuration, whether it exists or not."""
    given = {"dtype": "float64", "micro_batch": 2, "global_batch": G, "dp": 1}
    given |= {flag: value for name in names for flag, value in TECHNIQUES[name].items()}
    return make_train_flags(**given)


def world(flags: TrainFlags) -> int:
    return flags.axes.dp * flags.axes.pp * flags.axes.tp


def distinct(a: str, b: str) -> bool:
    """Are `a` and `b` two techniques, neither a part of the other nor in its place?"""
    one, two = TECHNIQUES[a], TECHNIQUES[b]
    return all(one[flag] == two[flag] for flag in one.keys() & two.keys()) and not (
        one.items() <= two.items() or two.items() <= one.items())


def configurations(triples: int) -> list[tuple[str, ...]]:
    """Each technique, all pairs, and `triples` triples."""
    found = [[names for names in itertools.combinations(TECHNIQUES, n)
              if all(distinct(*pair) for pair in itertools.combinations(names, 2))] for n in (1, 2, 3)]
    return [*found[0], *found[1], *random.Random(0).sample(found[2], triples)]


def step(flags: TrainFlags) -> dict:
    """One rank's part of a step: its gradients with their places, and what it sent."""
    return run_gradient_step(ModelConfig(V, 16, 8, 4, 2, 4, 24, T, not flags.model.untied), flags, T)


def sent(rows: list) -> dict[str, int]:
    """{axis: payload bytes} of a rank's ledger."""
    found = {}
    for row in rows:
        found[row.axis_name] = found.get(row.axis_name, 0) + row.payload_bytes * (row.op != "recv")
    return found


def measure(configs: list[tuple[str, ...]]) -> list[dict]:
    """A row for each configuration."""
    rows, pools = [], {n: RankPool(n) for n in (1, 2, 4, 8)}
    alone = {untied: pools[1].run(step, flags_of(("untied head",) * untied))[0] for untied in (0, 1)}
    for names in configs:
        flags = flags_of(names)
        if reason := next(refused_combinations(flags, world(flags)), None):
            rows.append({"techniques": names, "refused": reason})
            continue
        runs = pools[world(flags)].run(step, flags)
        want = {name: grad for name, (_, grad) in alone[flags.model.untied]["grads"].items()}
        each = [sent(run["rows"]) for run in runs]
        most = {axis: max(one.get(axis, 0) for one in each) for axis in sorted({*itertools.chain(*each)})}
        worst = error([run["grads"] for run in runs], want)
        rows.append({"techniques": names, "ranks": world(flags), "error": worst, "bytes": most})
    for pool in pools.values():
        pool.close()
    return rows


def picture(rows: list[dict]) -> draw.Picture:
    """The pairs as a triangle, each technique alone on its long side; why what is grey is refused, beside."""
    names, title = list(TECHNIQUES), "largest gradient error against one rank, float64"
    canvas, axes = draw.new_figure(9.5, 6.6, f"every technique with every other: {title}")
    rows = [row for row in rows if len(row["techniques"]) < 3]
    reasons = list(dict.fromkeys(row["refused"] for row in rows if "refused" in row))
    for row in rows:
        x, y = sorted((names.index(row["techniques"][0]), names.index(row["techniques"][-1])))
        worst = row.get("error")
        colour = "#eeeeee" if worst is None else "#d5e8d4" if worst < TOLERANCE else draw.RED
        said = (f"refused\n({reasons.index(row['refused']) + 1})" if worst is None
                else "0" if worst == 0 else f"$10^{{{log10(worst):.0f}}}$")
        axes.add_patch(Rectangle((x, y), 0.94, 0.9, color=colour))
        axes.text(x + 0.47, y + 0.45, said, ha="center", va="center", fontsize=7 if worst is None else 9)
    notes = [textwrap.fill(f"({k}) {reason}", 68, break_on_hyphens=False)
             for k, reason in enumerate(reasons, 1)]
    axes.text(7.4, 0.1, "\n".join(notes), va="top", fontsize=7.5)
    axes.set(xlim=(0, len(names)), ylim=(len(names), 0))
    axes.set_xticks([k + 0.5 for k in range(len(names))], names, rotation=35, ha="right")
    axes.set_yticks([k + 0.5 for k in range(len(names))], names)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return canvas


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--triples", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("lessons/results"))
    options = parser.parse_args()
    rows = measure(configurations(options.triples))
    table = Table("configuration", "ranks", "error", "bytes a rank sends, by axis: the most of any")
    for row in rows:
        said = row.get("refused") or ", ".join(f"{axis} {n:,}" for axis, n in row["bytes"].items())
        table.add_row(" + ".join(row["techniques"]), str(row.get("ranks", "")),
                      f"{row['error']:.1e}" if "error" in row else "refused", said)
    Console(width=150).print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "matrix.json").write_text(json.dumps(rows, indent=1) + "\n")
    picture(rows).save(options.out / "matrix.png")
    errors = [row["error"] for row in rows if "error" in row]
    print(f"{len(errors)} configurations, {len(rows) - len(errors)} refused; largest error {max(errors):.1e}")
    return max(errors) > TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
