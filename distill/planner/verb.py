"""The verb `distill plan`."""

from __future__ import annotations

import json as json_format
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console

from distill.accelerators import GIB, Accelerator, find_accelerator
from distill.data.pack.durable import durable_file
from distill.errors import ConfigError
from distill.planner.disk import ShardDisk, cache_bytes_per_image, run_checkpoint_bytes, shard_disk
from distill.planner.estimate import parameter_counts, plan_memory, planned_images, step_costs
from distill.planner.recipe import Recipe, read_recipe
from distill.planner.sharding import spread_teachers
from distill.planner.simulate import DeviceType, StepCost
from distill.planner.speed import STUDENT_FRACTION, TEACHER_FRACTION, Speed, measured_speed, sheet_speed
from distill.planner.table import print_plan
from distill.precision import choose_precision


def plan(
    recipe_file: Path,
    accelerator: str | None = None,
    measure: bool = False,
    memory_gib: float | None = None,
    price_per_hour: float | None = None,
    samples: int | None = None,
    teacher_fraction: float = TEACHER_FRACTION,
    student_fraction: float = STUDENT_FRACTION,
    json: Path | None = None,
    overrides: list[str] | None = None,
) -> None:
    """Print what a recipe needs and costs, before anything is spent: no weights are read, nothing is trained.

    Args:
        recipe_file: the recipe; further `--config FILE` and flags such as `--trainer.devices 1` win over it, as in
            `distill fit`.
        accelerator: what it is to run on, for example h200; its data sheet gives peak and memory.
        measure: take a few steps on this machine, with random weights, instead of assuming a speed.
        memory_gib: memory of one device; null means the accelerator's, or with `measure` this machine's.
        price_per_hour: of one device, in any currency.
        samples: images that training goes through in all; null means what recipe and shards say.
        teacher_fraction: share of the accelerator's peak that the teachers' forward pass is assumed to reach.
        student_fraction: share that everything else is assumed to reach.
        json: file for the whole plan as JSON.
        overrides: gathered from the recipe's own flags.

    Raises:
        ConfigError: the recipe or a flag has a value that cannot work.
    """
    check_flags(accelerator, measure, memory_gib, price_per_hour, samples, teacher_fraction, student_fraction)
    sheet = find_accelerator(accelerator) if accelerator else None
    console = Console(width=110)
    recipe = read_recipe(recipe_file, overrides or [])
    with console.status("stepping through the recipe without computing it"):
        result: dict[str, Any] = {"recipe": str(recipe_file), **plan_work(recipe, sheet, memory_gib, measure=measure)}
    costs = result.pop("costs")
    speed = None
    if sheet is not None:
        is_float32 = result["precision"].startswith("32")
        speed = sheet_speed(costs[0], sheet, teacher_fraction, student_fraction, is_float32=is_float32)
    elif measure:
        speed = _measure(recipe, costs[0], result["device"]["kind"], result["precision"])
    result["speed"] = speed and asdict(speed) | {"total_images_per_s": speed.images_per_s * recipe.world_size}
    images = planned_images(recipe, result["disk"]["shards"]["images"], samples)
    result |= _time_and_cost(recipe, speed, images, price_per_hour)
    print_plan(result, console)
    if json is not None:
        write_json(json, result)


def plan_work(recipe: Recipe, sheet: Accelerator | None, memory_gib: float | None, *, measure: bool) -> dict[str, Any]:
    """Return what follows from the recipe alone: parameters, operations, memory and disk, and the `costs` behind them.

    Args:
        recipe: its weights are replaced by fake ones.
        sheet: the accelerator, if one was named.
        memory_gib: memory of one device, if it was given.
        measure: whether this machine is planned for.
    """
    device, precision = _device_and_precision(recipe, sheet, measure=measure)
    parameters, teachers, shards = parameter_counts(recipe), _teacher_dtypes(recipe), shard_disk(recipe)
    costs = step_costs(recipe, device, precision)
    held = spread_teachers(recipe, costs, device)
    memory = plan_memory(recipe, held, memory_gib or _memory_gib(sheet, device, measure=measure), device)
    return {
        "device": {"kind": device, "accelerator": sheet and asdict(sheet), "count": recipe.world_size},
        "precision": precision,
        "parameters": parameters,
        "flops_per_image": flops_per_image(costs[0]),
        "memory": asdict(memory) | {"peak_bytes": memory.peak_bytes},
        "disk": disk_plan(recipe, costs[0], shards, teachers),
        "costs": costs,
    }


def check_flags(
    accelerator: str | None,
    measure: bool,
    memory_gib: float | None,
    price_per_hour: float | None,
    samples: int | None,
    teacher_fraction: float,
    student_fraction: float,
) -> None:
    """Refuse flags that contradict each other or have no meaning.

    Raises:
        ConfigError: naming the flag.
    """
    if accelerator and measure:
        raise ConfigError("--accelerator and --measure were both given; measure on this machine, or name another one.")
    positive = {"memory_gib": memory_gib, "samples": samples, "price_per_hour": price_per_hour}
    for name, value in positive.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} is {value}; it must be a number above 0.")
    for name, value in {"teacher_fraction": teacher_fraction, "student_fraction": student_fraction}.items():
        if not 0 < value <= 1:
            raise ConfigError(f"--{name} is {value}; it must be above 0 and at most 1.")


def flops_per_image(cost: StepCost) -> dict[str, dict[str, float]]:
    """Return operations an image by part and direction."""
    parts: dict[str, dict[str, float]] = {}
    for (part, direction), count in cost.flops.items():
        parts.setdefault(part, {})[direction] = count / cost.batch_size
    return parts


def disk_plan(
    recipe: Recipe, cost: StepCost, shards: ShardDisk, teachers: dict[str, tuple[torch.dtype, int]]
) -> dict[str, Any]:
    """Return bytes of checkpoints, cache and shards."""
    one = run_checkpoint_bytes(recipe)
    kept = recipe.kept_checkpoints
    dtypes, widths = ({name: both[place] for name, both in teachers.items()} for place in (0, 1))
    cache = cache_bytes_per_image(cost.target_bytes, cast(Any, dtypes), cast(Any, widths))
    return {
        "checkpoint_bytes": one,
        "checkpoints_kept": kept,
        "checkpoints_bytes": None if kept is None else one * kept,
        "cache_bytes_per_image": cache,
        "cache_bytes": None if shards.images is None else {name: size * shards.images for name, size in cache.items()},
        "shards": asdict(shards),
    }


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json_format.dumps(result, indent=2) + "\n"
    with durable_file(path) as file:
        file.write(text.encode())


def _device_and_precision(recipe: Recipe, sheet: Accelerator | None, *, measure: bool) -> tuple[DeviceType, str]:
    device: DeviceType = "cuda" if sheet else recipe.device
    if measure and not torch.cuda.is_available():
        device = "cpu"
    precision = recipe.trainer.get("precision")
    if precision is None:
        precision = "bf16-mixed" if device == "cuda" and not torch.cuda.is_available() else choose_precision(device)
    return device, str(precision)


def _teacher_dtypes(recipe: Recipe) -> dict[str, tuple[torch.dtype, int]]:
    teachers = {name: recipe.task.teachers[name] for name in recipe.task.teachers.names()}
    encoders = recipe.task.teachers
    return {
        name: (getattr(module, "dtype", torch.float32), encoders.encoder(name).embed_dim)
        for name, module in teachers.items()
    }


def _memory_gib(sheet: Accelerator | None, device: str, *, measure: bool) -> float | None:
    """Return the memory to plan with; None where neither a machine nor a size was named."""
    if sheet is not None:
        return sheet.memory_gib
    if not measure:
        return None
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / GIB
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.is_file() else []
    free = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return free[0] * 1024 / GIB if free else None


def _measure(recipe: Recipe, cost: StepCost, device: DeviceType, precision: str) -> Speed:
    free_bytes = int((_memory_gib(None, device, measure=True) or 0) * GIB)
    return measured_speed(
        recipe.task,
        cost,
        batch_size=recipe.batch_size_per_device,
        img_size_px=recipe.data.img_size_px,
        device=device,
        precision=precision,
        free_bytes=free_bytes,
    )


def _time_and_cost(
    recipe: Recipe, speed: Speed | None, images: int | None, price_per_hour: float | None
) -> dict[str, Any]:
    hours = None
    if speed is not None and images is not None:
        hours = images / (speed.images_per_s * recipe.world_size) / 3600
    device_hours = None if hours is None else hours * recipe.world_size
    cost = None if device_hours is None or price_per_hour is None else device_hours * price_per_hour
    return {"images": images, "hours": hours, "device_hours": device_hours, "cost": cost}
