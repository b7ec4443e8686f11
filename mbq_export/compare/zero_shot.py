"""Zero-shot tasks of lm-eval on any side: the library asks for log-likelihoods, and a side gives logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from mbq_runtime.errors import UsageError

from .harness import Forward


class SideModel(TemplateLM):  # type: ignore[misc]
    """A side as lm-eval sees it.  It scores given continuations and does not generate.

    Args:
        forward: runs the side.
        tokenizer: transformers' tokenizer of the model.
        opening: tokens that are put before each text.
        context: most tokens in a text.
    """

    def __init__(self, forward: Forward, tokenizer: Any, opening: Sequence[int], context: int) -> None:
        super().__init__()
        self._forward, self.tokenizer, self._opening, self._context = forward, tokenizer, list(opening), context

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        """The tokens of a text.

        Args:
            string: the text.
        """
        return list(self.tokenizer(string, add_special_tokens=False)["input_ids"])

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        answers = []
        for _, before, continuation in requests:
            tokens = [*self._opening, *before, *continuation][-self._context :]
            logits = torch.from_numpy(self._forward(tokens[:-1]).logits[-len(continuation) :])
            likely = torch.log_softmax(logits, dim=-1).double()
            picked = likely.gather(1, torch.tensor(continuation)[:, None]).sum()
            answers.append((float(picked), bool((likely.argmax(dim=1).numpy() == np.array(continuation)).all())))
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Refuse tasks of rolling perplexity.

        Args:
            requests: not used.
            disable_tqdm: not used.

        Raises:
            UsageError: always.
        """
        raise UsageError("tasks of rolling perplexity are not run; the comparison measures perplexity itself")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Refuse tasks that generate.

        Args:
            requests: not used.
            disable_tqdm: not used.

        Raises:
            UsageError: always.
        """
        raise UsageError("tasks that generate are not run; choose tasks of multiple choice or log-likelihood")


def evaluate(model: SideModel, tasks: Sequence[str], limit: int | None, include_path: str | None) -> dict[str, float]:
    """Run tasks.

    Args:
        model: the side.
        tasks: lm-eval's names.
        limit: examples of each task, or None for all.
        include_path: a folder of more task files, or None.

    Returns:
        lm-eval's figures by "task metric".

    Raises:
        UsageError: a task does not exist, or its data cannot be read.
    """
    try:
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            limit=limit,
            task_manager=TaskManager(include_path=include_path),
            bootstrap_iters=0,
            verbosity="ERROR",
        )
    except UsageError:
        raise
    except Exception as error:  # whatever a loader of data, a hub or a task raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--lm-eval {','.join(tasks)}: {reason}; check the names and the network") from error
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if "," in metric and "stderr" not in metric  # others are facts of the task, such as its name and size
    }
