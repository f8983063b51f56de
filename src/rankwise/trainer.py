"""Following adapters in transformers' Trainer, checkpoints included."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.checkpoint import load_tree, save_tree
from .core.following import Follower
from .following import follow

if TYPE_CHECKING:
    from transformers import TrainerCallback

FILE = "rankwise_follower.safetensors"


def trainer_callback(checkpoint: str | Path | None = None) -> "TrainerCallback":
    """Return a callback for ``transformers.Trainer`` that calls :func:`rankwise.follow` and keeps its state.

    The Trainer may make the optimiser itself. Each of its checkpoints gets a file of what the schedules remember,
    and a run that is taken up from a checkpoint reads it. ``callback.follower`` is what follows; after training
    it has stopped, with a warning if that ended before a budget was reached, and :func:`rankwise.finish` takes
    the schedules away.

    Args:
        checkpoint: the folder from which the run is taken up, for one that is not in ``output_dir``.

    Raises:
        ValueError: while training, as :func:`rankwise.follow` does, or if a checkpoint has no such file.
    """
    from transformers import TrainerCallback

    class Following(TrainerCallback):
        def __init__(self) -> None:
            self.follower: Follower | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.follower = follow(kwargs["model"], kwargs["optimizer"], steps=state.max_steps)
            if args.load_best_model_at_end and any(c.schedule.needed(c.steps) for c in self.follower.courses):
                self.follower.stop()
                raise ValueError(
                    "an adapter with a budget must train to its end: of an earlier checkpoint, which "
                    "load_best_model_at_end may take, the ranks are larger. Leave that out."
                )
            if state.global_step:
                self.follower.load_state_dict(load_tree(_resumed(checkpoint, args, state) / FILE))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.follower is not None and state.is_world_process_zero:
                save_tree(self.follower.state_dict(), _folder(args, state) / FILE)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.follower is not None:
                self.follower.warn_early()
                self.follower.stop()

    return Following()


def _resumed(checkpoint: str | Path | None, args: Any, state: Any) -> Path:
    """Return the checkpoint that is taken up: the given one if it is of this step, else that of ``output_dir``.

    Raises:
        ValueError: if there is none of this step.
    """
    own = _folder(args, state)
    if checkpoint is None:
        return own
    step = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if step == state.global_step:
        return Path(checkpoint)
    if not own.is_dir():
        raise ValueError(
            f"{checkpoint} is of step {step}, but training goes on at step {state.global_step}; give "
            "trainer_callback the folder that resume_from_checkpoint names."
        )
    return own


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
