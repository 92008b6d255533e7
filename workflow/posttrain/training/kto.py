"""TRL's KTOTrainer with its KL term taken once over each whole batch: micro-batches and processes then change nothing.

TRL 1.16 pairs prompts with other answers in blocks of a micro-batch, in the order of the data set, and takes the term
over each forward pass.
"""

from typing import Any

import torch
from trl import KTOTrainer
from trl.trainer.utils import use_adapter

from posttrain.training import parallel


class Mismatched(torch.utils.data.Dataset):
    """Rows in batches of `size`, each with the answer of the row before it in its batch, the first with that of the
    last: the mismatched y' of KTO's KL estimate (arXiv 2402.01306, section 4)."""

    def __init__(self, rows, size: int):
        self.rows, self.size = rows, size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        first = number - number % self.size
        last = min(first + self.size, len(self.rows)) - 1
        before = self.rows[number - 1 if number > first else last]
        return self.rows[number] | {"KL_completion_ids": before["completion_ids"], "ref_KL_logps": 0.0}


class WholeBatchKTO(KTOTrainer):
    """KTO against the adapter that the model begins with, of which TRL keeps a copy, `ref`.

    Rows bring the reference log-probability of their answer, `ref_logps` (`trainers.give_rows`). Each is paired with
    another row's answer: of its own batch in training, of all held-out rows in evaluation.
    """

    train_dataset: Any
    eval_dataset: Any

    def __init__(self, model, args, **options):
        # Made for a loss without a KL term, it pairs no rows itself and accepts micro-batches of one row.
        args.loss_type = "apo_zero_unpaired"
        super().__init__(model, args=args, **options)
        self.loss_type, self.calculate_KL, self.precompute_ref_logps = "kto", True, True

    def train(self, *arguments, **options):
        """Train on the given rows, paired within each batch of all processes."""
        of_a_process = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self.train_dataset = Mismatched(self.train_dataset, of_a_process * parallel.world())
        return super().train(*arguments, **options)

    def get_batch_samples(self, *arguments, **options):
        """The micro-batches of a step, before the first forward pass: their KL term is taken, over all processes."""
        batches, count = super().get_batch_samples(*arguments, **options)
        if batches:
            self.kl = mean_of(parallel.summed(self.sum_kl(batches)))
        return batches, count

    def evaluate(self, *arguments, **options):
        """Every process evaluates all held-out rows (`trainers.evaluate_in_every_process`), and takes their KL term."""
        if not isinstance(self.eval_dataset, Mismatched):
            self.eval_dataset = Mismatched(self.eval_dataset, len(self.eval_dataset))
        rows, size = self.eval_dataset, self.args.per_device_eval_batch_size
        parts = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        self.kl = mean_of(self.sum_kl(self.data_collator([rows[number] for number in part]) for part in parts))
        return super().evaluate(*arguments, **options)

    def sum_kl(self, batches) -> torch.Tensor:
        """Sum of log pi(y'|x) - log pi_ref(y'|x) over the rows of some batches in nats, and the number of rows.

        Without dropout, which would draw from the training's random stream.
        """
        sums, trains = torch.zeros(2, dtype=torch.float64, device=self.model.device), self.model.training
        self.model.eval()
        for batch in batches:
            batch = {key: value.to(self.model.device) for key, value in batch.items()}
            with torch.no_grad(), self.accelerator.autocast():
                policy = super()._compute_kl_logps(self.model, batch)
                with use_adapter(self.accelerator.unwrap_model(self.model), "ref"):
                    reference = super()._compute_kl_logps(self.model, batch)
            sums += torch.tensor([(policy - reference).double().sum().item(), len(policy)], device=sums.device)
        self.model.train(trains)
        return sums

    def _compute_kl_logps(self, model, batch):
        return self.kl.expand(len(batch["label"]))  # TRL takes their mean less that of `ref_KL_logps`, and 0 at least


def mean_of(sums: torch.Tensor) -> torch.Tensor:
    """Mean, from a sum and the number of what was summed."""
    return (sums[0] / sums[1]).float()
