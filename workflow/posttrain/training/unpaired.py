"""KTO with one reference point for a whole batch; TRL computes one for each micro-batch (TRL 1.16).

The reference point is z0 = max(0, mean of log pi(y'|x) - log pi_ref(y'|x)), where y' is the completion of another
prompt x' of the batch (arXiv 2402.01306, section 4.1). It is inside a sigmoid, so that another z0 changes the gradient.
"""

import contextlib
import random
import statistics
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset
from trl import KTOConfig, KTOTrainer
from trl.trainer.utils import use_adapter

from posttrain.ground.pinned import require
from posttrain.training import parallel

TRL = "1.16.0"


class Mismatched(Subset):
    """Rows in the order of their batches, each with the completion of the row before it in its batch.

    The first row of a batch gets the completion of the last.
    """

    def __init__(self, rows: Subset, batch_size: int):
        super().__init__(rows.dataset, rows.indices)
        self.batch_size = batch_size

    def __getitem__(self, number: int) -> dict:
        place = number % self.batch_size
        before = number - place + (place - 1) % self.batch_size
        return super().__getitem__(number) | {"KL_completion_ids": super().__getitem__(before)["completion_ids"]}

    def __getitems__(self, numbers: list[int]) -> list[dict]:
        return [self[number] for number in numbers]


class UnpairedTrainer(KTOTrainer):
    """TRL's KTOTrainer with z0 of the whole batch, whatever its micro-batches and processes; in an evaluation with z0
    of all held-out rows. Its rows bring `ref_logps`; `train_dataset` is in the order of the batches (`in_batches`)."""

    def __init__(self, args: KTOConfig, **options):
        require("trl", TRL, "how KTOTrainer pairs rows and keeps what it measures")
        # With this loss, the constructor pairs no rows and accepts a micro-batch of one row.
        loss, args.loss_type = args.loss_type, "apo_zero_unpaired"
        super().__init__(args=args, **options)
        self.loss_type, self.calculate_KL = loss, loss == "kto"
        self.precompute_ref_logps = True
        self.z0 = torch.zeros(())

    def train(self, *args, **options):
        """Train on rows with mismatched completions."""
        size = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * parallel.world()
        self.train_dataset: Any = Mismatched(self.train_dataset, size)
        return super().train(*args, **options)

    def get_batch_samples(self, *args, **options):
        """This process's micro-batches of one optimiser step; computes z0 over those of all processes first."""
        batches, items = super().get_batch_samples(*args, **options)
        self._measure(batches)
        return batches, items

    def compute_loss(self, model, inputs, *args, **options):
        """TRL's loss. Its metrics of wanted and unwanted answers become means over answers: a mean over forward passes
        would be wrong, as some have no answer of one kind."""
        loss = super().compute_loss(model, inputs, *args, **options)
        metrics = self._metrics["train" if self.model.training else "eval"]
        counts = parallel.summed(torch.stack([inputs["label"].sum(), (~inputs["label"]).sum()])).tolist()
        for kind, count in zip(("chosen", "rejected"), counts, strict=True):
            for key in (f"rewards/{kind}", f"logps/{kind}") if count else ():
                metrics[key] += metrics[key][-1:] * (count - 1)
        if metrics.keys() >= {"rewards/chosen", "rewards/rejected"}:
            chosen, rejected = (statistics.fmean(metrics[f"rewards/{kind}"]) for kind in ("chosen", "rejected"))
            metrics["rewards/margins"] = [chosen - rejected]
        return loss

    def evaluate(self, *args, **options) -> dict[str, float]:
        """The metrics of the held-out rows, computed by every process.

        Rows are mismatched in a random order by the seed, since neighbours may answer the same prompt.
        """
        count, size = len(self.eval_dataset), self.args.per_device_eval_batch_size
        order = random.Random(self.args.seed).sample(range(count), count)
        rows = Mismatched(Subset(self.eval_dataset, order), count)
        parts = (range(start, min(start + size, count)) for start in range(0, count, size))
        self._measure(self.data_collator([rows[number] for number in part]) for part in parts)
        return super().evaluate(*args, **options)

    @torch.no_grad()
    def _measure(self, batches: Iterable[dict[str, Tensor]]) -> None:
        """Compute z0, before it is clamped at 0, over the batches of all processes."""
        if not self.calculate_KL:
            return
        self.model.eval()  # without dropout, which would draw from the training's random stream
        frozen = self.accelerator.unwrap_model(self.model)
        total = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for batch in batches:
            batch = {key: value.to(total.device) for key, value in batch.items()}
            with self.compute_loss_context_manager():
                policy = super()._compute_kl_logps(self.model, batch)
                with use_adapter(frozen, "ref") if self.ref_model is None else contextlib.nullcontext():
                    reference = super()._compute_kl_logps(self.ref_model or self.model, batch)
            total[0] += (policy - reference).double().sum()
            total[1] += len(policy)
        summed, count = parallel.summed(total)
        self.z0 = summed / count

    def _compute_kl_logps(self, model, batch: dict[str, Tensor]) -> Tensor | None:
        """The whole batch's z0. TRL takes its mean, less `ref_KL_logps` (here 0), as the micro-batch's z0."""
        batch["ref_KL_logps"] = torch.zeros_like(batch["ref_logps"])
        return self.z0 + batch["ref_KL_logps"] if self.calculate_KL else None
