"""Real processes share out each global batch, bad images included, and bad domains end all.

Runs that go on with another number of processes are in test_topologies.py.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import forked_python
import pytest
import webdataset as wds
from PIL import Image

from distill import training_cli
from distill.data.datamodule import ShardDataModule
from distill.errors import DataError

pytestmark = pytest.mark.slow

PROGRAM = textwrap.dedent(
    """
    if __name__ == "__main__":  # a worker that imports this program anew needs nothing of it
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

        folder = Path(settings["folder"])
        data = ShardDataModule(
            settings["shards"], val=settings["val"], img_size_px=16, global_batch_size=8,
            num_workers=settings["workers"], worker_start_method=settings["start"], val_batch_size_per_device=4,
            max_bad_fraction=1.0,
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
        result["state"] = data.state_dict()
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))
    """
)


def write_shards(folder: Path, *, has_bad: bool) -> str:
    folder.mkdir()
    for domain, count in {"a": 20, "b": 13}.items():
        with wds.TarWriter(str(folder / f"{domain}-000000.tar")) as writer:
            for number in range(count):
                buffer = io.BytesIO()
                Image.new("RGB", (20, 16), (number * 9 % 256, 50, 90)).save(buffer, "JPEG")
                data = buffer.getvalue()[: -40 if has_bad and number % 6 == 5 else None]
                writer.write({"__key__": f"{number:06d}", "jpg": data})
    return str(folder)


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Return a folder of shards with some bad images; the folder `val` beside it has none."""
    write_shards(tmp_path / "val", has_bad=False)
    return write_shards(tmp_path / "shards", has_bad=True)


def run(folder: Path, shards: str, devices: int, steps: int, ckpt: Path | None = None, **workers: object) -> dict:
    """Train in `devices` processes; return each step's global batch, and the validation rows."""
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    settings = {"folder": str(folder), "shards": shards, "devices": devices, "steps": steps}
    settings["val"] = str(Path(shards).parent / "val")
    settings |= {"ckpt": ckpt and str(ckpt), "workers": 0, "start": None} | workers
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # RANK stays unset, as under Lightning's own launcher: loaders that look there give all ranks the same data.
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = kept | {"MASTER_PORT": str(port), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(program), json.dumps(settings)]
    done = forked_python.run(command, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(devices)]
    steps_seen: dict[int, list[tuple[int, int]]] = {}
    for rank in ranks:
        for step, positions, rows in rank["seen"]:
            steps_seen.setdefault(step, []).extend(zip(positions, rows, strict=True))
    batches = {step: sorted(pairs) for step, pairs in steps_seen.items()}
    return {
        "batches": batches,
        "val": [rank["val"] for rank in ranks],
        "weights": [rank["weight"] for rank in ranks],
        "states": [rank["state"] for rank in ranks],
        "summary": json.loads((folder / "ledger" / "summary.json").read_text()),
    }


def test_two_ranks_with_bad_images_share_each_global_batch_and_one_continues_them(tmp_path: Path, shards: str) -> None:
    one = run(tmp_path / "one", shards, 1, 6)
    two = run(tmp_path / "two", shards, 2, 6, workers=1, start="spawn")
    assert one["batches"] == two["batches"]
    assert [[position for position, _ in one["batches"][step]] for step in range(6)] == [
        list(range(8 * step, 8 * step + 8)) for step in range(6)
    ]
    assert two["weights"][0] == two["weights"][1]
    assert two["states"][0] == two["states"][1]
    assert two["summary"]["domains"] == one["summary"]["domains"]
    assert two["states"][0]["ledger"] == one["states"][0]["ledger"]
    assert (one["summary"]["planned"], one["summary"]["quarantined"] > 2) == (48, True)
    assert sorted(row for rank in two["val"] for row in rank) == list(range(33))
    back = run(tmp_path / "back", shards, 1, 6, ckpt=tmp_path / "two" / "step=2.ckpt")
    assert back["batches"] == {step: one["batches"][step] for step in (2, 3, 4, 5)}
    assert back["summary"]["domains"] == one["summary"]["domains"]


def test_forked_workers_of_two_ranks_never_read_the_same_sample(tmp_path: Path, shards: str) -> None:
    two = run(tmp_path / "two", shards, 2, 4, workers=2, start="fork")
    positions = [[position for position, _ in two["batches"][step]] for step in range(4)]
    assert positions == [list(range(8 * step, 8 * step + 8)) for step in range(4)]
    data = ShardDataModule(shards)
    data.setup("fit")
    trained = [pair for step in range(4) for pair in two["batches"][step]]
    differing = sum(data.plan[position] != row for position, row in trained)
    assert differing == two["summary"]["quarantined"]


def spoil(source: Path, target: Path, domain: str, every: int) -> None:
    """Copy shards, cutting off every n-th image of one domain."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".distill-index", f"{domain}-*"))
    for shard in source.glob(f"{domain}-*.tar"):
        with tarfile.open(shard) as old, tarfile.open(target / shard.name, "w", format=tarfile.USTAR_FORMAT) as new:
            images = 0
            for member in old:
                data = old.extractfile(member).read()
                if not member.name.endswith((".cls", ".json", ".txt")):
                    images += 1
                    data = data[: len(data) // 2] if images % every == 0 else data
                member.size = len(data)
                new.addfile(member, io.BytesIO(data))


@pytest.mark.filterwarnings("ignore:.*LightningCLI's args parameter.*")
@pytest.mark.filterwarnings(r"ignore:[\s\S]*(deprecat|JSONARGPARSE)")
def test_a_domain_without_a_usable_image_stops_distill_fit_with_its_name(demo_recipe: Any, tmp_path: Path) -> None:
    spoil(demo_recipe.images / "train", tmp_path / "bad", "chart", every=1)
    words = demo_recipe.words(tmp_path / "run", f"--data.train={tmp_path / 'bad'}", "--model.calibration_batches=0")
    with pytest.raises(DataError, match="The domain 'chart' has no usable image within 17 tries"):
        training_cli.run(words)
    assert not (tmp_path / "run" / "ledger" / "summary.json").exists()


def test_a_domain_with_too_many_bad_images_stops_both_ranks_with_its_name(demo_recipe: Any, tmp_path: Path) -> None:
    spoil(demo_recipe.images / "train", tmp_path / "bad", "chart", every=4)
    words = [
        f"--data.train={tmp_path / 'bad'}",
        "--data.weights={natural: 1, ocr: 1, chart: 30, multidisciplinary: 1}",
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.limit_val_batches=1",
    ]
    done = demo_recipe.run(tmp_path / "run", *words, timeout_s=540)
    assert done.returncode != 0
    assert "The domain 'chart' has" in done.stderr
    assert "data.max_bad_fraction = 0.01 allows" in done.stderr
    lines = (tmp_path / "run" / "ledger" / "rank-00000.jsonl").read_text().splitlines()
    assert {json.loads(line)["domain"] for line in lines} == {"chart"}
