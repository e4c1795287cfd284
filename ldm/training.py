"""What both stages train with. A `Run` never calls your code: your loop calls it.

run = Run(config.run, recipe=config)
network, optimizer = run.prepare(network, optimizer)
run.resume(model, network=network, ema=ema, optimizer=optimizer)
for batch in run.batches(dataset, order):
    with run.accelerator.accumulate(network):
        loss = ...
        run.update(loss, optimizer, config.optimizer)
    if run.accelerator.sync_gradients: ...
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import psutil
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, set_seed
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder.layers import enable_checkpointing
from ldm import checkpoint, random, trackers
from ldm.buckets import Buckets
from ldm.config import UserError, to_yaml
from ldm.data import Source
from ldm.faults import GO_ON, Watchdog, let_exchanges_end
from ldm.memory import keep_freed
from ldm.optim import OptimizerConfig
from ldm.run_config import RunConfig, chosen_precision
from ldm.run_folder import environment, is_finished, open_folder, require_one_folder
from ldm.run_log import RunLog
from ldm.sampling import Stills, Stream, cores, groups, read
from ldm.sharding import shard, whole
from ldm.signals import StopSignals

LOST_STEPS_IN_A_ROW = 20
"""Steps without a finite gradient after which a run stops."""


Module = TypeVar("Module", bound=nn.Module)


class Run(RunLog):
    """A training run in a folder: processes and precision, data order, randomness, checkpoints, logs.

    Attributes:
        step: optimizer steps done.
        accelerator: of `accelerate`; `run.device` and `run.main` are its device and whether this process is the first.
        signals: open around the training.
        placed: the networks; `parts` is what checkpoints consist of.
    """

    def __init__(self, config: RunConfig, recipe: Any) -> None:
        precision = chosen_precision(config.precision)
        tracker = trackers.chosen_tracker(config.tracker)
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.accumulate,
            log_with=tracker,
            project_dir=config.out,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout))],
        )
        super().__init__(Path(config.out), accelerator)
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != accelerator.num_processes:
            raise UserError(
                f"{started} processes were started, but Accelerate sees {accelerator.num_processes}; "
                "without GPUs, set ACCELERATE_USE_CPU=true."
            )
        if started > 1:
            let_exchanges_end()
        if self.device.type == "cpu":
            keep_freed()
        self.config, self.recipe = config, recipe
        shares = accelerator.num_processes * config.accumulate
        if config.batch_size % shares:
            raise UserError(
                f"run.batch_size {config.batch_size} can't be shared by {accelerator.num_processes} processes "
                f"with run.accumulate {config.accumulate}; make it a multiple of {shares}."
            )
        if accelerator.distributed_type.value in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise UserError(
                "To share out the weights, launch without --use_fsdp and the like, and set run.shard."
            )
        if config.shard and precision == "fp16":
            raise UserError("run.shard works with run.precision bf16 and no, not with fp16.")
        self.sharded = config.shard and accelerator.num_processes > 1
        self.batch = config.batch_size // shares
        self.lost: dict[str, int] = {}
        self.skipped = 0
        self.placed: list[nn.Module] = []
        self.parts: dict[str, checkpoint.Stateful] = {}
        self._model: checkpoint.Model | None = None
        self._published: Path | None = None
        self._order: np.ndarray | Buckets = np.arange(0)
        self._saved = -1
        self._owner: IO[str] | None = None  # keeps the folder as long as it is open
        self._earlier, self._began = 0.0, psutil.Process().create_time()
        self.signals = StopSignals(self.say)
        self._watchdog, self._writer = Watchdog(config.timeout), checkpoint.Writer()
        set_seed(config.seed)
        self._changed = self._open_folder()
        if tracker:
            trackers.start(accelerator, tracker, recipe, self.out)
        self.say(f"precision {precision}, {accelerator.num_processes} process(es) on {self.device}")

    def _open_folder(self) -> list[str]:
        changed: list[str] = []
        if self.main:
            self._owner, changed = open_folder(self.out, self.recipe)
        require_one_folder(self.out, self._owner)
        return changed

    # --- weights -----------------------------------------------------------------------------------------------

    def prepare(self, *objects: Any) -> Any:
        """Modules and optimizers, wrapped by Accelerate, compiled and shared out as the recipe says."""
        for module in objects:
            if isinstance(module, nn.Module) and self.config.compile != "no":
                module.compile(backend=self.config.compile)  # in place: weights keep their names
        if not self.sharded:
            return self.accelerator.prepare(*objects)
        modules = [o for o in objects if isinstance(o, nn.Module)]
        shard(modules, [o for o in objects if not isinstance(o, nn.Module)])
        # As for evaluation: with autocast, but without the gradient exchange of DDP, which sharding does itself.
        return tuple(
            self.accelerator.prepare_model(o, evaluation_mode=True)
            if isinstance(o, nn.Module)
            else self.accelerator.prepare(o)
            for o in objects
        )

    def place(self, module: Module) -> Module:
        """A module on the run's device, its weights laid out channels-last, which convolutions prefer."""
        if self.config.gradient_checkpointing:
            enable_checkpointing(module)
        self.placed.append(module)
        return module.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def unwrap(self, module: nn.Module) -> Any:
        """The module itself, without Accelerate's wrapping: for saving, never for training."""
        return self.accelerator.unwrap_model(module)

    def resume(self, model: checkpoint.Model, *, publish: bool = False, **parts: checkpoint.Stateful) -> None:
        """Name what checkpoints consist of, and go on from the newest sound one in the run folder, if any.

        Args:
            model: lies in each checkpoint as the stock folder model/.
            publish: OUT/model is the newest of those, sharing its files.
            parts: everything that training changes, and checks of what it must not change.
        """
        self._model, self._published = model, self.out / "model" if publish else None
        self.parts = {n: self.unwrap(p) if isinstance(p, nn.Module) else p for n, p in parts.items()}
        self.parts["run"] = self
        if self.accelerator.scaler:
            self.parts["scaler"] = self.accelerator.scaler
        found = [checkpoint.newest(self.out / "checkpoints")] if self.main else [None]
        (folder,) = broadcast_object_list(found)
        if folder:
            checkpoint.restore(folder, self.parts)
            self._saved = self.step
            self.say(f"going on from {folder}")
        self.forget_later_metrics()
        self._record_start()

    def _record_start(self) -> None:
        self.append(
            "history.jsonl",
            step=self.step,
            processes=self.accelerator.num_processes,
            **environment(self.device),
            changed=self._changed,
        )
        if self.main:
            self.write("config.yaml", to_yaml(self.recipe))
            for change in self._changed:
                self.say(f"changed since the last start: {change}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples": self.samples,
            "seconds": self.seconds,
            "lost": self.lost,
            "skipped": self.skipped,
            "notes": self.notes(),
            "remarks": self._remarks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self._earlier = state["step"], state["seconds"]
        self.lost, self.skipped, self._remarks = state["lost"], state["skipped"], dict(state["remarks"])
        self.take_up_notes(state["notes"])

    def save(self) -> None:
        """Write checkpoints/step-XXXXXXXX beside the training, which goes on once everything is copied to the CPU."""
        self._writer.wait()
        state = checkpoint.Snapshot(self.parts, self._model, keep=self.main)
        self._saved = self.step
        if self.main:
            folder = self.out / "checkpoints" / f"step-{self.step:08d}"
            recipe = {"config.yaml": to_yaml(self.recipe)}
            self._writer.start(
                partial(checkpoint.write, folder, state, recipe, self.config.keep, self._published)
            )

    # --- the loop ----------------------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Samples seen, over all processes."""
        return self.step * self.config.batch_size

    @property
    def seconds(self) -> float:
        """Time spent on this run, from the start of the process, and by earlier starts up to their last checkpoint."""
        return self._earlier + time.time() - self._began

    def due(self, every: int) -> bool:
        """Whether something that happens each `every` steps, and at the end, happens now."""
        finished = self.accelerator.sync_gradients
        return finished and (self.step % every == 0 or self.step == self.config.steps)

    def part_of(self, source: Source) -> Source:
        """What is cached of a source before training: all; of a dry run a part."""
        return source

    def batches(
        self, dataset: Any, order: np.ndarray | Buckets, workers: int = 0
    ) -> Iterator[dict[str, Tensor]]:
        """This process's batches from where the run stands to its end, with a progress bar.

        Args:
            dataset: answers `__getitems__([(position, index), ...])` with a dict of tensors [B,...].
            order: [M] the indices of one epoch, or `Buckets` of batches of `run.batch_size`.
            workers: processes that prepare batches beside this one; 0: this one does.
        """
        total, self._order = self.config.steps * self.config.batch_size, order
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        stream = self._stream(self.batch, total, rank, ranks)
        bar = tqdm(
            total=total,
            initial=self.samples,
            unit="img",
            unit_scale=True,
            smoothing=0.05,
            disable=not self.main,
        )
        try:
            with bar, self.signals.kept(), self._watchdog:
                for batch in read(dataset, stream, workers, self.config.timeout):
                    self._watchdog.beat()
                    self._writer.check()
                    random.seed_torch(self._dropout_seed(batch), self.device)
                    positions = {
                        "position": batch.pop("position")
                    }  # read on the CPU, by `normal` and `uniform`
                    yield positions | {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
                    self._show_progress(bar)
                    if self.accelerator.sync_gradients and (number := self._asked_to_stop()):
                        self._stop(number)
        except BaseException:  # also of the loop's body: what failed first is what ends the run
            if problem := self._writer.ended():
                self.say(str(problem))
            raise
        self._writer.wait()

    def _stream(self, batch: int, stop: int, rank: int = 0, ranks: int = 1) -> Stream:
        """Batches from where the run stands to the position `stop`."""
        start, seed = self.samples, self.config.seed
        return Stream(self._order, seed=seed, batch=batch, start=start, stop=stop, rank=rank, ranks=ranks)

    def _show_progress(self, bar: tqdm) -> None:
        if (
            self.main and time.time() - bar.last_print_t >= bar.mininterval
        ):  # asking for the loss waits for the device
            losses = self._notes.get("loss")
            loss = {"loss": f"{float(losses[-1]):.4f}"} if losses else {}
            bar.set_postfix({"step": f"{self.step}/{self.config.steps}"} | loss, refresh=False)
        bar.update(self.samples - bar.n)

    def _stop(self, number: int) -> None:
        if self._saved != self.step:
            self.save()
        self._writer.wait()
        self.accelerator.wait_for_everyone()  # a process that leaves early has the launcher end the others
        self.say(f"stopped after step {self.step}, saved; to go on, run the same command again")
        raise SystemExit(128 + number)

    def _dropout_seed(self, batch: dict[str, Tensor]) -> int:
        """For what draws from PyTorch's own generator: another one on each process and in each step."""
        return int(random.stream(self.config.seed, "dropout", int(batch["position"][0])).integers(2**63))

    def _asked_to_stop(self) -> int:
        """The signal that any process has received, or 0: all stop after the same step."""
        if self.accelerator.num_processes == 1:
            return self.signals.received
        asked = torch.tensor([self.signals.received], device=self.device)
        return int(self.accelerator.gather(asked).max())

    def update(self, loss: Tensor, optimizer: Any, rates: OptimizerConfig, beside: str = "") -> None:
        """Backward, clip, step. A loss or gradient that is not finite skips the step on all processes together.

        A network that learns beside another, such as a discriminator, is updated after it, named by `beside`, and
        noted under its name; the update without a name counts the step.
        """
        # A loss of infinity can have a finite gradient; times NaN it has none, and none after the exchange.
        self.accelerator.backward(loss * torch.where(loss.detach().isfinite(), 1.0, math.nan))
        prefix = f"{beside}_" if beside else ""
        if self.accelerator.sync_gradients:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            norm = whole(self.accelerator.clip_grad_norm_(parameters, self.config.max_norm))
            for group in optimizer.param_groups:
                group["lr"] = rates.rate(self.step - bool(beside), self.config.steps)
            finite = bool(torch.isfinite(norm))
            if finite or self.accelerator.scaler:  # the scaler of fp16 skips by itself, and learns from it
                optimizer.step()
            self.lost[beside] = 0 if finite else self.lost.get(beside, 0) + 1
            if not finite:
                self._lose_step(float(norm), beside)
            self.step += not beside
            rate = optimizer.param_groups[0]["lr"]
            self.note(**{f"{prefix}gradient_norm": norm, f"{prefix}learning_rate": rate})
        optimizer.zero_grad(set_to_none=True)
        self.note(**{f"{prefix}loss": loss.detach()})

    def _lose_step(self, norm: float, beside: str) -> None:
        whose, lost = f"the {beside}'s gradient" if beside else "the gradient", self.lost[beside]
        self.skipped += 1
        samples = next(iter(self._stream(self.config.batch_size, self.samples + 1)))
        self.append("skipped.jsonl", step=self.step, norm=str(norm), indices=[i for _, i in samples])
        self.say(
            f"step {self.step}: {whose} has the norm {norm}; step skipped ({lost} in a row, {self.skipped} in all); "
            "skipped.jsonl has the indices of its samples"
        )
        if lost >= LOST_STEPS_IN_A_ROW:
            raise UserError(
                f"{lost} steps in a row had no finite gradient; the last checkpoint is good. "
                f"Look at the samples in {self.out}/skipped.jsonl, lower optimizer.lr, or set run.precision to "
                f"no; {GO_ON}."
            )

    # --- randomness --------------------------------------------------------------------------------------------

    def seed(self, purpose: str) -> None:
        """Make what PyTorch draws next, such as initial weights, the same on all processes, whatever it drew before."""
        random.seed_torch(int(random.stream(self.config.seed, purpose, 0).integers(2**63)), self.device)

    def normal(self, purpose: str, batch: dict[str, Tensor], shape: Sequence[int]) -> Tensor:
        """Noise [B, *shape] for the samples of a batch: a function of seed, purpose and position."""
        return random.normal(self.config.seed, purpose, batch["position"], shape).to(self.device)

    def uniform(self, purpose: str, batch: dict[str, Tensor]) -> Tensor:
        """Uniform numbers [B] in (0, 1), float64, on the CPU, likewise."""
        return random.uniform(self.config.seed, purpose, batch["position"])

    # --- the end -------------------------------------------------------------------------------------------

    def finished(self) -> bool:
        """Whether this run has been trained to its last step and its result lies in the folder; says so."""
        done = is_finished(self.out, self.config.steps)
        if done:
            self.say(f"{self.out} is finished; its model is in {self.out}/model")
        return done

    def shares(self, source: Source, what: str) -> Iterator[Tensor]:
        """All pictures of a source once, [B,3,H,W] in [-1, 1], shared out among the processes."""
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        batches = groups(source, 32, share)
        with tqdm(total=sum(map(len, batches)), unit="img", desc=what, disable=not self.main) as bar:
            for pixels in read(Stills(source), batches, cores(len(source))):
                with self.accelerator.autocast():
                    yield pixels.to(self.device).contiguous(memory_format=torch.channels_last)
                bar.update(len(pixels))

    def end(self, **result: float | str) -> None:
        """Write result.json, which marks the run as finished, and close the trackers."""
        if self.main:
            about = {"step": self.step, "seconds": round(self.seconds, 1)}
            self.write("result.json", json.dumps(about | result, indent=1) + "\n")
        self.accelerator.end_training()
