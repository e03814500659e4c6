"""The names and means under which validation metrics are logged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def validation_values(layers: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """Flatten `{layer: {domain: {metric: value}}}` to metric paths, with means over layers and over domains.

    Returns:
        `val/<metric>_<layer>/<domain>`, `val/<metric>/<domain>` (mean over layers) and `val/<metric>` (mean over
        domains), for the metrics cosine, baseline and skill.
    """
    values: dict[str, Tensor] = {}
    by_domain: dict[str, dict[str, list[Tensor]]] = {}
    for layer, domains in layers.items():
        for domain, metrics in domains.items():
            for metric, value in metrics.items():
                values[f"val/{metric}_{layer}/{domain}"] = value
                by_domain.setdefault(metric, {}).setdefault(domain, []).append(value)
    for metric, domains in by_domain.items():
        means = {domain: torch.stack(parts).mean() for domain, parts in domains.items()}
        values |= {f"val/{metric}/{domain}": mean for domain, mean in means.items()}
        values[f"val/{metric}"] = torch.stack(list(means.values())).mean()
    return values
