"""The LightningModule of one stage: which parts learn, how fast, and which tensors a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distill.gradient_clipping import FusedClipping
from distill.optim import OptimConfig, build_optimizer, build_scheduler, split_by_decay
from distill.vlm.batch import IGNORED_LABEL, VLMBatch
from distill.vlm.recipe import StageConfig
from distill.vlm.runs import MODEL_PREFIX, PARTS, PARTS_KEY, check_parts, load_kept
from distill.vlm.trained import NORMS_PART, choose_trained, kept_names, rate_key


class VLMTask(FusedClipping):
    """Trains the parts of a small VLM that one stage names; the others stay as they are, in eval mode.

    A checkpoint holds the connector and whatever this stage or one before it has trained: a frozen encoder or language
    model is rebuilt from its own files, and recognised by its fingerprint.

    Args:
        model: the VLM, with the weights that the stage before left.
        stage: what is trained, and how.
        name: of the stage, for messages.
        tunable: names of the parameters that the parts' own `tune` leaves to be trained.
        kept: names of the model's tensors that earlier stages have trained.
        fingerprints: of the parts as their files hold them.

    Raises:
        ConfigError: the stage names a part that has nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: StageConfig,
        name: str,
        *,
        tunable: frozenset[str],
        kept: frozenset[str] = frozenset(),
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.fingerprints = dict(fingerprints or {})
        choose_trained(model, stage, name, tunable)
        self.kept = kept | kept_names(model, [stage], tunable)

    def train(self, mode: bool = True) -> VLMTask:
        """Set training mode; parts that the stage does not train stay in eval mode: nothing is dropped there."""
        super().train(mode)
        trained = {NORMS_PART if part == "norms" else part for part in self.stage.rates}
        for part in PARTS:
            if part not in trained:
                getattr(self.model, part).eval()
        return self

    def configure_optimizers(self) -> Any:
        """Return fused AdamW with a group for each part, and its per-step schedule."""
        stage = self.stage
        settings = OptimConfig(
            weight_decay=stage.weight_decay,
            betas=stage.betas,
            warmup_fraction=stage.warmup_fraction,
            final_fraction=stage.final_fraction,
        )
        optimizer = build_optimizer(parameter_groups(self.model, stage), settings)
        scheduler = build_scheduler(optimizer, int(self.trainer.estimated_stepping_batches), settings)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the labelled tokens; log it, and how many they are."""
        samples: VLMBatch = batch["batch"]
        loss: Tensor = self.model(samples)
        labelled = (samples.labels != IGNORED_LABEL).sum().float()
        values = {"loss/total": loss.detach(), "tokens/labelled": labelled, "tiles": float(len(samples.tiles))}
        self.log_dict(values, batch_size=len(samples.input_ids), prog_bar=False)
        return loss

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the tensors that some stage has trained so far, and the connector's."""
        full: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {key: value for key, value in full.items() if key.removeprefix(MODEL_PREFIX) in self.kept}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take back what `state_dict` returned.

        Raises:
            WeightsError: a tensor is missing, left over or of another shape.
        """
        state = {key.removeprefix(MODEL_PREFIX): value for key, value in state_dict.items()}
        load_kept(self.model, state, self.kept, "the checkpoint")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the fingerprints of the parts as their files hold them."""
        checkpoint[PARTS_KEY] = self.fingerprints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse an encoder or language model other than the checkpoint's.

        Raises:
            WeightsError: naming the part.
        """
        check_parts(checkpoint.get(PARTS_KEY, {}), self.fingerprints, "The checkpoint")


def parameter_groups(model: nn.Module, stage: StageConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: each trained part with its own rate, with and without weight decay."""
    groups: list[dict[str, Any]] = []
    for part, rate in stage.rates.items():
        decayed, plain = split_by_decay((key, p) for key, p in model.named_parameters() if rate_key(key, stage) == part)
        groups.append({"name": part, "params": decayed, "lr": rate, "weight_decay": stage.weight_decay})
        groups.append({"name": f"{part}_no_decay", "params": plain, "lr": rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
