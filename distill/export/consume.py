"""The fresh process: loads an export as a stranger would and says what came out.

Run as `python -m distill.export.consume FORMAT DIRECTORY REQUEST RESPONSE`. It imports torch, safetensors and the
consumer (transformers or timm), but no model code of this project, so that what it sees is what a user will see.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.export.targets import find_target


def main(arguments: list[str]) -> None:
    """Read REQUEST (`pixel_values`, `image`, `photo`, `num_layers`), run the consumer, write RESPONSE.

    Args:
        arguments: format, export directory, request file, response file.
    """
    target, directory = find_target(arguments[0]), Path(arguments[1])
    request = load_file(arguments[2])
    num_layers = int(request["num_layers"])
    features = target.consumer_features(directory, request["pixel_values"], num_layers)
    response: dict[str, Tensor] = {
        name: target.consumer_pixels(directory, Image.fromarray(request[name].numpy())).contiguous()
        for name in ("image", "photo")
    }
    for position, (prefix, patches) in enumerate(features.layers):
        response[f"{position}.prefix"] = prefix.contiguous()
        response[f"{position}.patches"] = patches.contiguous()
    report = {"missing": features.missing, "unexpected": features.unexpected, "consumer": features.consumer}
    save_file(response, arguments[3], metadata={"report": json.dumps(report)})


if __name__ == "__main__":
    main(sys.argv[1:])
