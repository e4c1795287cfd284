"""What both stages train with. A `Run` never calls your code: your loop calls it.

run = Run(config.run, recipe=config)
network, optimizer = run.prepare(network, optimizer)
run.resume(network=network, ema=ema, optimizer=optimizer)
for batch in run.batches(dataset, order):
    with run.accelerator.accumulate(network):
        loss = ...
        run.update(loss, optimizer, config.optimizer)
    if run.accelerator.sync_gradients: ...
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from autoencoder.files import write_text
from autoencoder.layers import enable_checkpointing
from ldm import checkpoint, random, trackers
from ldm.config import UserError, differences, plain, to_yaml
from ldm.data import Source, Stream, to_tensor
from ldm.optim import OptimizerConfig
from ldm.run_config import RunConfig, chosen_precision
from ldm.signals import StopSignals

IMMATERIAL = (
    "run.out",
    "run.save_every",
    "run.log_every",
    "run.keep",
    "run.tracker",
    "run.gradient_checkpointing",
    "run.compile",
    "show",
    "workers",
    "autoencoder",
)
"""Settings that may change between two starts of one run without changing what it learns."""

LOST_STEPS_IN_A_ROW = 20
"""Steps without a finite gradient after which a run stops."""


Module = TypeVar("Module", bound=nn.Module)


class Run:
    """A training run in a folder: processes and precision, data order, randomness, checkpoints, logs.

    Attributes:
        step: optimizer steps done.
        accelerator: of `accelerate`; `run.device` and `run.main` are its device and whether this process is the first.
    """

    def __init__(self, config: RunConfig, recipe: Any) -> None:
        precision = chosen_precision(config.precision)
        tracker = trackers.chosen_tracker(config.tracker)
        self.config, self.recipe, self.out = config, recipe, Path(config.out)
        self.accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.accumulate,
            log_with=tracker,
            project_dir=self.out,
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        shares = self.accelerator.num_processes * config.accumulate
        if config.batch_size % shares:
            raise UserError(
                f"run.batch_size {config.batch_size} can't be shared by {self.accelerator.num_processes} processes "
                f"with run.accumulate {config.accumulate}; make it a multiple of {shares}."
            )
        self.batch = config.batch_size // shares
        self.step, self.lost = 0, 0
        self._parts: dict[str, checkpoint.Stateful] = {}
        self._sums: dict[str, tuple[Tensor | float, int]] = {}
        self._remarks: dict[str, float] = {}
        self._logged_loss: tuple[Tensor | float, int] = (math.nan, 1)
        self._earlier, self._began = 0.0, psutil.Process().create_time()
        self._signals = StopSignals(self.say)
        set_seed(config.seed)
        self._open_folder(tracker)
        self.say(f"precision {precision}, {self.accelerator.num_processes} process(es) on {self.device}")

    def _open_folder(self, tracker: str | None) -> None:
        if self.main:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise UserError(
                    f"The run folder {self.out} can't be made: {problem.strerror}; set run.out."
                ) from None
            self._refuse_another_recipe()
            write_text(self.out / "config.yaml", to_yaml(self.recipe))
        if tracker:
            trackers.start(self.accelerator, tracker, self.recipe, self.out)

    def _refuse_another_recipe(self) -> None:
        saved = self.out / "config.yaml"
        begun = any((self.out / "checkpoints").glob("step-*")) or (self.out / "result.json").exists()
        if not saved.exists() or not begun:
            return
        changed = [
            change
            for change in differences(yaml.safe_load(saved.read_text()), plain(self.recipe))
            if not change.startswith(IMMATERIAL)
        ]
        if changed:
            raise UserError(
                f"{self.out} holds a run with other settings: {'; '.join(changed)}. "
                "Set them back to go on with it, or choose another run.out."
            )

    def say(self, text: str) -> None:
        """Print on the first process, above the progress bar."""
        if self.main:
            tqdm.write(text, file=sys.stderr)

    # --- weights -----------------------------------------------------------------------------------------------

    def prepare(self, *objects: Any) -> Any:
        """Modules and optimizers, wrapped by Accelerate for this process; modules compiled if the recipe says so."""
        for module in objects:
            if isinstance(module, nn.Module) and self.config.compile != "no":
                module.compile(backend=self.config.compile)  # in place: weights keep their names
        return self.accelerator.prepare(*objects)

    def place(self, module: Module) -> Module:
        """A module on the run's device, its weights laid out channels-last, which convolutions prefer."""
        if self.config.gradient_checkpointing:
            enable_checkpointing(module)
        return module.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def unwrap(self, module: nn.Module) -> Any:
        """The module itself, without Accelerate's wrapping: for saving, never for training."""
        return self.accelerator.unwrap_model(module)

    def resume(self, **parts: checkpoint.Stateful) -> None:
        """Name what checkpoints consist of, and go on from the newest sound one in the run folder, if any."""
        unwrapped = {n: self.unwrap(p) if isinstance(p, nn.Module) else p for n, p in parts.items()}
        self._parts = unwrapped | {"run": self}
        if self.accelerator.scaler:
            self._parts["scaler"] = self.accelerator.scaler
        found = checkpoint.newest(self.out / "checkpoints")
        if found:
            checkpoint.restore(found, self._parts)
            self.say(f"going on from {found}")
        self._forget_later_metrics()

    def _forget_later_metrics(self) -> None:
        """Lines of steps that were lost with a crash, and are done again, leave metrics.jsonl; so does a torn one."""

        def kept(line: str) -> bool:
            try:
                return json.loads(line)["step"] <= self.step
            except ValueError:
                return False

        metrics = self.out / "metrics.jsonl"
        if self.main and metrics.exists():
            write_text(metrics, "".join(filter(kept, metrics.read_text().splitlines(keepends=True))))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "samples": self.samples, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self._earlier = state["step"], state["seconds"]

    def save(self) -> None:
        """Write checkpoints/step-XXXXXXXX."""
        self.accelerator.wait_for_everyone()
        if self.main:
            folder = self.out / "checkpoints" / f"step-{self.step:08d}"
            checkpoint.save(folder, self._parts, {"config.yaml": to_yaml(self.recipe)}, self.config.keep)
        self.accelerator.wait_for_everyone()

    # --- the loop ----------------------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Samples seen, over all processes."""
        return self.step * self.config.batch_size

    @property
    def seconds(self) -> float:
        """Time spent on this run, from the start of the process, and by earlier starts up to their last checkpoint."""
        return self._earlier + time.time() - self._began

    @property
    def fresh(self) -> bool:
        """Whether nothing has been trained yet: the time to try what would else fail for the first time hours later."""
        return self.step == 0

    def due(self, every: int) -> bool:
        """Whether something that happens each `every` steps, and at the end, happens now."""
        finished = self.accelerator.sync_gradients
        return finished and (self.step % every == 0 or self.step == self.config.steps)

    def part_of(self, source: Source) -> Source:
        """What is cached of a source before training: all; of a dry run a part."""
        return source

    def batches(self, dataset: Any, order: np.ndarray, workers: int = 0) -> Iterator[dict[str, Tensor]]:
        """This process's batches from where the run stands to its end, with a progress bar.

        Args:
            dataset: answers `__getitems__([(position, index), ...])` with a dict of tensors [B,...].
            order: [M] the indices of one epoch.
            workers: processes that prepare batches beside this one; 0: this one does.
        """
        total = self.config.steps * self.config.batch_size
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        stream = Stream(
            order,
            seed=self.config.seed,
            batch=self.batch,
            start=self.samples,
            stop=total,
            rank=rank,
            ranks=ranks,
        )
        loader = DataLoader(dataset, batch_sampler=stream, num_workers=workers, collate_fn=as_is)
        bar = tqdm(
            total=total,
            initial=self.samples,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            disable=not self.main,
        )
        with bar, self._signals:
            for batch in loader:
                torch.manual_seed(self._dropout_seed(batch))
                positions = {"position": batch.pop("position")}  # read on the CPU, by `normal` and `uniform`
                yield positions | {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
                bar.update(self.samples - bar.n)
                bar.set_postfix(self._latest(), refresh=False)
                if self.accelerator.sync_gradients and (number := self._asked_to_stop()):
                    self.save()
                    self.say(f"stopped after step {self.step}, saved; to go on, run the same command again")
                    raise SystemExit(128 + number)

    def _dropout_seed(self, batch: dict[str, Tensor]) -> int:
        """For what draws from PyTorch's own generator: another one on each process and in each step."""
        return int(random.stream(self.config.seed, "dropout", int(batch["position"][0])).integers(2**63))

    def _asked_to_stop(self) -> int:
        """The signal that any process has received, or 0: all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self._signals.received
        asked = torch.tensor([self._signals.received], device=self.device)
        return int(self.accelerator.gather(asked).max())

    def update(self, loss: Tensor, optimizer: Any, rates: OptimizerConfig) -> None:
        """Backward, clip, step. A gradient that is not finite skips the step on all processes together."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_norm)
            for group in optimizer.param_groups:
                group["lr"] = rates.rate(self.step, self.config.steps)
            finite = bool(torch.isfinite(norm))
            if finite or self.accelerator.scaler:  # the scaler of fp16 skips by itself, and learns from it
                optimizer.step()
            if not finite:
                self._lose_step(float(norm))
            self.lost *= not finite
            self.step += 1
            self.note(gradient_norm=norm, learning_rate=optimizer.param_groups[0]["lr"])
        optimizer.zero_grad(set_to_none=True)
        self.note(loss=loss.detach())

    def _lose_step(self, norm: float) -> None:
        self.lost += 1
        self.say(f"step {self.step}: the gradient's norm is {norm}; step skipped ({self.lost} in a row)")
        if self.lost >= LOST_STEPS_IN_A_ROW:
            raise UserError(
                f"{self.lost} steps in a row had no finite gradient; the last checkpoint is good. "
                "Lower optimizer.lr, or set run.precision to no."
            )

    # --- randomness --------------------------------------------------------------------------------------------

    def normal(self, purpose: str, batch: dict[str, Tensor], shape: Sequence[int]) -> Tensor:
        """Noise [B, *shape] for the samples of a batch: a function of seed, purpose and position."""
        return random.normal(self.config.seed, purpose, batch["position"], shape).to(self.device)

    def uniform(self, purpose: str, batch: dict[str, Tensor]) -> Tensor:
        """Uniform numbers [B] in (0, 1), float64, on the CPU, likewise."""
        return random.uniform(self.config.seed, purpose, batch["position"])

    # --- what the person sees ----------------------------------------------------------------------------------

    def picture(self, sheet: Image.Image, name: str) -> None:
        """Save a picture as samples/NAME-STEP.png."""
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        file = folder / f"{name}-{self.step:08d}.png"
        with checkpoint.writing(file):
            sheet.save(file)
        for tracker in self.accelerator.trackers:
            if not trackers.log_picture(tracker, name, sheet, self.step) and self.fresh:
                self.say(f"{tracker.name} takes no pictures from Accelerate; they are in {folder}")

    def note(self, **values: Tensor | float) -> None:
        """Add to the running means that `log` writes; called by all processes alike."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def remark(self, **values: float) -> None:
        """Values for the next `log` that the first process alone knows; nothing is logged of a fresh run."""
        if not self.fresh:
            self._remarks |= values

    def _latest(self) -> dict[str, str]:
        total, count = self._sums.get("loss", self._logged_loss)
        return {"step": f"{self.step}/{self.config.steps}", "loss": f"{float(total) / count:.4f}"}

    def log(self) -> None:
        """Write the means since the last call, over all processes, and the remarks, to files and the tracker."""
        names = sorted(self._sums)
        sums = torch.tensor([float(total) / count for total, count in (self._sums[name] for name in names)])
        means = self.accelerator.reduce(sums.to(self.device), "mean").tolist()
        values = dict(zip(names, means, strict=True)) | self._remarks
        self._logged_loss = (values.get("loss", math.nan), 1)
        self._sums, self._remarks = {}, {}
        if self.main:
            metrics = self.out / "metrics.jsonl"
            with checkpoint.writing(metrics), metrics.open("a") as file:
                file.write(json.dumps({"step": self.step, "time": round(time.time(), 2)} | values) + "\n")
        self.accelerator.log(values, step=self.step)

    def finished(self) -> bool:
        """Whether this run has been trained to its last step and its result lies in the folder; says so."""
        try:
            done = json.loads((self.out / "result.json").read_text())["step"] == self.config.steps
        except (OSError, ValueError, KeyError):
            return False
        if done:
            self.say(f"{self.out} is finished; its model is in {self.out}/model")
        return done

    def shares(self, source: Source, size: int, what: str) -> Iterator[Tensor]:
        """All pictures of a source once, [B,3,size,size] in [-1, 1], shared out among the processes."""
        mine = range(self.accelerator.process_index, len(source), self.accelerator.num_processes)
        with tqdm(total=len(mine), unit="img", desc=what, disable=not self.main) as bar:
            for first in range(0, len(mine), 32):
                indices = mine[first : first + 32]
                pixels = torch.stack([to_tensor(source.picture(i, size)) for i in indices]).to(self.device)
                with self.accelerator.autocast():
                    yield pixels.contiguous(memory_format=torch.channels_last)
                bar.update(len(indices))

    def end(self, **result: float | str) -> None:
        """Write result.json, which marks the run as finished, and close the trackers."""
        if self.main:
            about = {"step": self.step, "seconds": round(self.seconds, 1)}
            write_text(self.out / "result.json", json.dumps(about | result, indent=1) + "\n")
        self.accelerator.end_training()


def as_is(batch: Any) -> Any:
    """Data sets make whole batches: nothing is left to collate."""
    return batch
