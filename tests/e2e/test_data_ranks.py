"""Two real processes share out each global batch, and a run goes on with another number of them."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

pytestmark = pytest.mark.slow

PROGRAM = textwrap.dedent(
    """
    import json, sys, warnings
    from pathlib import Path

    import torch
    from lightning import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from distill.data.datamodule import ShardDataModule

    warnings.simplefilter("ignore")
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(1)


    class Recorder(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)
            self.seen, self.val_rows = [], []

        def training_step(self, batch, batch_idx):
            self.seen.append([self.global_step, batch["index"].tolist(), batch["row"].tolist()])
            return self.layer(batch["images"].float().mean((2, 3)) / 255).square().mean()

        def validation_step(self, batch, batch_idx):
            self.val_rows += batch["row"].tolist()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)


    if __name__ == "__main__":
        folder = Path(settings["folder"])
        data = ShardDataModule(
            settings["shards"], val=settings["shards"], img_size_px=16, global_batch_size=8,
            num_workers=settings["workers"], worker_start_method=settings["start"], val_batch_size_per_device=4,
        )
        trainer = Trainer(
            default_root_dir=folder, accelerator="cpu", devices=settings["devices"], strategy="ddp",
            max_steps=settings["steps"], use_distributed_sampler=False, logger=False, enable_progress_bar=False,
            enable_model_summary=False, num_sanity_val_steps=0,
            callbacks=[ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)],
        )
        model = Recorder()
        trainer.fit(model, datamodule=data, ckpt_path=settings["ckpt"])
        result = {"seen": model.seen, "val": model.val_rows, "weight": model.layer.weight.tolist()}
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
    """
)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    folder = tmp_path / "shards"
    folder.mkdir()
    for domain, count in {"a": 20, "b": 13}.items():
        with wds.TarWriter(str(folder / f"{domain}-000000.tar")) as writer:
            for number in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (20, 16), (number * 9 % 256, 50, 90)).save(buffer, "JPEG")
                writer.write({"__key__": f"{number:06d}", "jpg": buffer.getvalue()})
    return str(folder)


def run(folder: Path, shards: str, devices: int, steps: int, ckpt: Path | None = None, **workers: object) -> dict:
    """Train in `devices` processes; return each step's global batch, and the validation rows."""
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    settings = {"folder": str(folder), "shards": shards, "devices": devices, "steps": steps}
    settings |= {"ckpt": ckpt and str(ckpt), "workers": 0, "start": None} | workers
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # RANK stays unset, as under Lightning's own launcher: loaders that look there give all ranks the same data.
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = kept | {"MASTER_PORT": str(port), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(program), json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]
    steps_seen: dict[int, list[tuple[int, int]]] = {}
    for rank in ranks:
        for step, positions, rows in rank["seen"]:
            steps_seen.setdefault(step, []).extend(zip(positions, rows, strict=True))
    batches = {step: sorted(pairs) for step, pairs in steps_seen.items()}
    return {"batches": batches, "val": [rank["val"] for rank in ranks], "weights": [rank["weight"] for rank in ranks]}


def test_two_ranks_share_each_global_batch_and_either_number_continues_the_other(tmp_path: Path, shards: str) -> None:
    one = run(tmp_path / "one", shards, 1, 6)
    two = run(tmp_path / "two", shards, 2, 6, workers=1, start="spawn")
    assert one["batches"] == two["batches"]
    assert [[position for position, _ in one["batches"][step]] for step in range(6)] == [
        list(range(8 * step, 8 * step + 8)) for step in range(6)
    ]
    assert two["weights"][0] == two["weights"][1]
    assert sorted(row for rank in two["val"] for row in rank) == list(range(33))
    later = run(tmp_path / "later", shards, 2, 6, ckpt=tmp_path / "one" / "step=3.ckpt")
    assert later["batches"] == {step: one["batches"][step] for step in (3, 4, 5)}
    back = run(tmp_path / "back", shards, 1, 6, ckpt=tmp_path / "two" / "step=2.ckpt")
    assert back["batches"] == {step: one["batches"][step] for step in (2, 3, 4, 5)}
