"""How close the bundles of stand-ins (``stand_in.py``) are to their originals, beside the first one.

    python tests/benchmarks/stand_in_curves.py LLAMA_BUNDLE BUNDLE ... [--json FILE]

Figures are those of each manifest's curve, which the export measured on held-back text.  A ratio is the bundle's
divergence over that of the first bundle at the same budget: 1 or less is at least as good.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from measured_on import measured_on

from mbq_runtime.bundle.manifest import Manifest, read
from mbq_runtime.tables import markdown


def rows(manifests: list[Manifest]) -> list[dict[str, Any]]:
    """One row a bundle and budget."""
    first = {point.asked_bits: point.kl_divergence for point in manifests[0].quality.curve}
    return [
        {
            "family": manifest.model.family,
            "million_weights": round(manifest.model.parameters / 1e6, 1),
            "float32_perplexity": round(manifest.quality.reference_perplexity, 2),
            "asked_bits": point.asked_bits,
            "used_bits": round(point.avg_bits_used, 2),
            "perplexity_ratio": round(point.perplexity / manifest.quality.reference_perplexity, 4),
            "kl_divergence": float(f"{point.kl_divergence:.3g}"),
            "same_top": round(point.same_top, 4),
            "kl_over_first": round(point.kl_divergence / first[point.asked_bits], 3),
        }
        for manifest in manifests
        for point in manifest.quality.curve
    ]


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the rows to this file.")
def main(bundles: tuple[Path, ...], output: Path | None) -> None:
    found = rows([read(bundle) for bundle in bundles])
    print(json.dumps(measured_on()))
    print(markdown(list(found[0]), ([str(value) for value in row.values()] for row in found), words=["family"]))
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
