"""docs/exam.md from the cells of the exam."""

from __future__ import annotations

from typing import Any

GREEN, YELLOW, RED = "🟩", "🟨", "🟥"

HEAD = """# The exam

Made by `python benchmarks/exam.py`; every number is measured, none is edited. Each sampler draws from posteriors that are
known (dense float64 algebra, a finite mixture, or quadrature), and its samples are compared with them:

- **mean error**: root mean square over the coordinates of (sample mean − mean)/sd, its Monte-Carlo part removed. 0 is exact.
- **sd ratio**: sample sd over sd, averaged over the coordinates. 1 is exact; below 1 is overconfident.
- **coverage**: the exact posterior mass of the sample 5–95 % interval. 0.90 is exact.
- **W, max W**: sliced and max-sliced Wasserstein distance to exact draws over that of exact draws to exact draws. 1 is exact.
- **eigenvalues** of the whitened sample covariance: 🟩 where all lie in the range that holds those of exact draws with 99.8 %.

🟩 mean error ≤ 0.05, sd ratio within 0.02 of 1 and coverage within 0.02 of 0.90; 🟨 mean error ≤ 0.2, sd ratio within 0.1 and
coverage within 0.05; 🟥 worse. Limits are compared with the measured value plus or minus two Monte-Carlo standard errors, in favour of
the solver. *Denoiser only* means that the solver saw the prior through its denoiser alone; the other rows use a closed form
and are there as a control. Network and operator calls are items per sample. Rows that refuse a paper say why.

"""

TITLES = {
    "gauss16": "16 correlated unknowns, 8 measurements",
    "field32": "Stationary Gaussian field with a mean, 32 × 32, 1000 samples",
    "field64": "Stationary Gaussian field with a mean, 64 × 64, 1000 samples",
    "mixture25": "25-component mixture in 8 dimensions (Cardoso et al. 2023), one seed",
    "curved": "Two unknowns, one curved datum: posterior by quadrature",
}


def colour(cell: dict[str, Any]) -> str:
    """Green, yellow or red; see the page's head."""
    error = cell["mean_error"] - 2 * cell["mean_error_mc"]
    ratio = max(0.0, abs(cell["sd_ratio"] - 1) - 2 * cell["sd_ratio_mc"])
    coverage = max(0.0, abs(cell["coverage"] - 0.9) - 2 * cell["coverage_mc"])
    if error <= 0.05 and ratio <= 0.02 and coverage <= 0.02:
        return GREEN
    return YELLOW if error <= 0.2 and ratio <= 0.1 and coverage <= 0.05 else RED


def eigen(cell: dict[str, Any]) -> str:
    if "eigen" not in cell:
        return "–"
    (low, high), (bottom, top) = cell["eigen"], cell["eigen_range"]
    mark = GREEN if bottom <= low and high <= top else RED
    return f"{mark} {low:.2f}–{high:.2f} ({bottom:.2f}–{top:.2f})"


def line(label: str, row: dict[str, Any], cell: dict[str, Any]) -> str:
    kind = "yes" if row["denoiser_only"] else "no"
    for key in ("refused", "failed", "skipped"):
        if key in cell:
            reason = cell[key].replace("|", "\\|")
            reason = reason if len(reason) < 110 else reason[:107] + "…"
            return f"| {label} | {kind} | {'⬜' if key != 'failed' else RED} {key}: {reason} | | | | | | | | |"
    return (
        f"| {label} | {kind} | {colour(cell)} {cell['mean_error']:.3f} ± {cell['mean_error_mc']:.3f} | "
        f"{cell['sd_ratio']:.3f} ± {cell['sd_ratio_mc']:.3f} | {cell['coverage']:.3f} ± {cell['coverage_mc']:.3f} | "
        f"{eigen(cell)} | {cell['sliced']:.2f} | {cell['max_sliced']:.2f} | {cell['seconds']:g} | {cell['network']:.0f} | "
        f"{cell['forward'] + cell['adjoint']:.0f} |"
    )


def page(table: dict[str, Any], papers: list[tuple[str, str]]) -> str:
    """The whole page."""
    out = [HEAD]
    for column in dict.fromkeys(c for c, _ in papers):
        out.append(f"## {TITLES.get(column, column)}\n")
        for name in (n for c, n in papers if c == column):
            out.append(f"### {name}\n")
            out.append(
                "| solver | denoiser only | mean error | sd ratio | coverage | eigenvalues (range) | W | max W | seconds | network calls | operator calls |"
            )
            out.append("|" + " --- |" * 11)
            key = f"{column}/{name}"
            found = [(label, row, row["cells"][key]) for label, row in table.items() if key in row["cells"]]
            found.sort(key=lambda f: (f[2].get("mean_error", 1e9 if "failed" in f[2] else 1e10), f[0]))
            out += [line(*f) for f in found]
            out.append("")
    out.append("## Settings\n")
    out += [f"- **{label}**: `{row['settings']}`" for label, row in table.items()]
    return "\n".join(out) + "\n"
