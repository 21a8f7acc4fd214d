"""Pretrain a LLaMA-family model from initial weights.

python -m megalite.pretrain                     one rank, the built-in corpus
python -m megalite.pretrain --tp 4 --pp 2       eight ranks on this machine
torchrun --nproc-per-node 8 -m megalite.pretrain --tp 4 --pp 2
srun --ntasks 16 python -m megalite.pretrain --tp 8 --dp 2 --data corpus
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NoReturn

import megalite
from megalite import cli, report
from megalite.check import check
from megalite.check_memory import host_memory
from megalite.config import Config, resolve_device
from megalite.config_file import read_saved, to_toml
from megalite.effects import notes
from megalite.errors import ConfigError, RunError
from megalite.events import Events, environment, events_file, goodput, read_events
from megalite.exit_codes import ExitCode
from megalite.faults import banner
from megalite.output import say
from megalite.parallel.environment import World
from megalite.pipeline.text import plan_text
from megalite.planning.choice import choose_by_estimate, has_choice, without_choice
from megalite.program import Program, checked
from megalite.resume import changes, find
from megalite.resume import problems as not_the_same
from megalite.run_plan import is_file, plan_facts, run_plan

if TYPE_CHECKING:
    import torch

    from megalite.data.mixture import Mixture
    from megalite.data.record import DataRecord
    from megalite.parallel.launch import Prepared, Rank
    from megalite.parallel.machine import Machine


def _show(command: cli.Command, world: World | None) -> bool:
    """Describe the run or print its configuration, if that is what was asked for."""
    if not command.switches:
        return False
    if world is None or world.rank == 0:
        config = checked(command, world)
        if "--print-config" in command.switches:
            print(to_toml(config), end="")
        else:
            _describe(config, notes(config, command.given))
    return True


def _describe(config: Config, told: Sequence[str]) -> None:
    """The dry run: everything that follows from the configuration."""
    device = config.parallel.device
    if device != "auto":
        config = resolve_device(config, device)
    config = without_choice(config)
    if has_choice(config):
        told = (*told, "the schedule is chosen again at start, by measured costs")
        config = choose_by_estimate(config).config
    print(
        report.opening(
            config,
            version=megalite.__version__,
            device="chosen at start" if device == "auto" else f"{device}, as asked",
            back_ends=None,
            data=" ".join(config.data.train_data_path or config.data.data)
            or ("random" if config.data.mock_data else "standard library"),
            folder=str(Path(config.run.runs) / (config.run.name or "<date>-<model>-<layout>")),
            notes=told,
        )
    )
    for part in filter(None, (report.levels(config), report.timeline(config))):
        print("\n" + part)


def _machine(command: cli.Command) -> Machine:
    """This machine, once there is nothing wrong with flags and files."""
    config = checked(command, None)
    from megalite.parallel.devices import own_machine

    return own_machine(config)


def _prepare(command: cli.Command, world: World | None, machine: Machine) -> Prepared:
    """The configuration as it runs here, what each rank runs, and what ranks must agree on.

    Raises:
        ConfigError: all that is wrong with flags, files or devices.
    """
    config = checked(command, world)
    from megalite.checkpoint.hugging_face import open_init_from
    from megalite.data.mixture import prepare_mixture
    from megalite.data.record import record_of
    from megalite.data.splits import of_epochs, open_samples
    from megalite.parallel.devices import choose_device, require_kernels
    from megalite.parallel.launch import Prepared
    from megalite.parallel.machine import free_host_bytes
    from megalite.tokenizer.choose import open_tokenizer

    problems: list[str] = []
    device, why = config.parallel.device, ""
    try:
        device, why = choose_device(config, machine)
        require_kernels(device, [resolve_device(config, device).train.precision], machine)
    except ConfigError as error:
        problems += error.violations
    if device == "cuda":
        known = resolve_device(config, device)
        problems += host_memory(known, machine.local_size, free_host_bytes())
    folder = Path(config.run.runs) / config.run.name
    if config.run.name and folder.exists() and not _is_of(folder, config):
        problems.append(_taken(config.run.name, folder))
    try:
        tokenizer = open_tokenizer(config.data, config.model.vocab_size)
        mixture = prepare_mixture(config.data, tokenizer)
        config = of_epochs(config, mixture)
        check(config, world)
        open_samples(config, mixture)
    except ConfigError as error:
        problems += error.violations
    if problems:
        raise ConfigError(problems)
    facts = {"data": mixture.fingerprint, "tokenizer": tokenizer.fingerprint}
    found = find(config, world.attempt if world is not None else 0)
    if found.candidates:
        problems = not_the_same(config, facts, found.candidates[0])
    else:
        open_init_from(config)
    if problems:
        raise ConfigError(problems)
    told = notes(resolve_device(config, device), command.given)
    data = record_of(mixture, tokenizer.fingerprint)
    job = partial(_train, mixture=mixture, data=data, facts=facts, device_line=why, told=told)
    starts = {"start": [str(candidate.folder) for candidate in found.candidates]}
    told_to_all = {**facts, **plan_facts(config), **starts}
    return Prepared(resolve_device(config, device), job, told_to_all, _claim_folder)


def _claim_folder(config: Config) -> Config:
    """Create the run's folder and give the configuration its name.

    A folder that is there is taken again by the run that it is of: one with its checkpoints in the
    same place.

    Raises:
        ConfigError: the folder exists, or cannot be made.
    """
    parallel, model = config.parallel, Path(config.model.model).resolve().name
    layout = f"tp{parallel.tp}-pp{parallel.pp}-dp{parallel.dp}"
    base = config.run.name or f"{datetime.now():%Y%m%d-%H%M%S}-{model}-{layout}"
    name, attempt, folder = base, 1, Path(config.run.runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            folder = Path(config.run.runs) / name
            try:
                folder.mkdir()
                return config.derive(name=name)
            except FileExistsError:
                if config.run.name and _is_of(folder, config):
                    return config
                if config.run.name:
                    raise ConfigError(_taken(name, folder)) from None
                attempt += 1
                name = f"{base}-{attempt}"
    except OSError as error:
        raise ConfigError(f"--runs {config.run.runs}: {folder}: {error.strerror}") from None


def _is_of(folder: Path, config: Config) -> bool:
    """Whether a folder is of an earlier start of this run."""
    try:
        earlier = read_saved(folder / "config.json")
    except ConfigError:
        return False
    return bool(config.checkpoint.save) and earlier.checkpoint.save == config.checkpoint.save


def _taken(name: str, folder: Path) -> str:
    return f"--name {name}: {folder} exists; choose another name or remove it"


def _train(
    rank: Rank,
    *,
    mixture: Mixture,
    data: DataRecord,
    facts: Mapping[str, str],
    device_line: str,
    told: tuple[str, ...],
) -> int:
    """One rank's whole run: train, sample, save, say how it went; returns its exit code."""
    from contextlib import ExitStack

    import torch.distributed as dist

    from megalite.checkpoint.hugging_face import export_hf, init_from
    from megalite.checkpoint.reader import Checkpoint
    from megalite.closing import (
        closing,
        measured_memory,
        sample_text,
        starts_from,
        step_times,
        stop,
    )
    from megalite.data.splits import open_samples
    from megalite.layers.sdpa import fastest_attention
    from megalite.metrics import RunLog
    from megalite.planning.measured_choice import choose_by_measuring
    from megalite.saving import Saves, nothing, start_point
    from megalite.trainer import Trainer

    config, groups = without_choice(rank.config), rank.groups
    folder = Path(config.run.runs) / config.run.name
    first = groups.world_rank == 0
    events = Events(events_file(config) if first else None, rank.attempt)
    samples = open_samples(config, mixture)
    costs, chosen = None, ""
    if has_choice(config):
        config, costs, chosen = choose_by_measuring(config, groups, rank.device, samples)
    saving = partial(Saves, config=config, facts=facts, groups=groups, device=rank.device)
    with fastest_attention(rank.device), ExitStack() as held:
        groups.activity.begin("start: taking the folder of checkpoints", patient=True)
        saves = None
        if config.checkpoint.save:
            # Before anything else: who writes there may be about to save a newer one.
            store, path = dist.PrefixStore("saves", rank.store), Path(config.checkpoint.save)
            saves = saving(path, store=store, events=events, faults=rank.faults)
            held.callback(saves.close)
        if first:
            data.write(folder)
            lines = filter(None, (mixture.describe(), samples[0].describe()))
            _open_run(config, "\n".join(lines), rank.device, device_line, told, folder)
            if injected := banner(os.environ, rank.attempt):
                print(f"{injected}\n", file=sys.stderr, flush=True)
            say(chosen, end="")
        groups.activity.begin("start: looking for a checkpoint", patient=True)
        tell = say if first else nothing
        start = start_point(config, groups.world_rank, rank.store, rank.attempt, tell)
        groups.activity.begin("start: building the model")
        trainer = Trainer(config, samples, groups, rank.device, costs, rank.stop, rank.faults)
        first_step = 0
        if start is not None:
            checkpoint, first_step = Checkpoint(start.folder, start.manifest), start.step
            trainer.load(checkpoint, with_optimizer=start.with_optimizer)
            tell(starts_from(start))
        else:
            init_from(config, trainer.flat, trainer.optimizer, groups)
        changed = {} if start is None else changes(config, start)
        origin = "" if start is None else str(start.folder)
        where = {"device": device_line, "from": origin, "changed": changed}
        events.write("start", step=first_step, **where, **environment())
        log = RunLog(config, mixture, folder, rank.device) if first else None
        if log is not None:
            held.enter_context(log)
        if saves is not None:
            saves.tell = log.say if log is not None else nothing
            if start is not None:
                saves.goes_on(start, path)
        try:
            with rank.stop.listening():
                result = trainer.fit(log, events, first_step, saves)
        except RunError:
            if saves is not None:
                saves.finish()  # what was being written is good
            raise
        if result.stopped:
            return stop(rank, result, events)
        times = step_times(rank, events)
        measured = measured_memory(rank, trainer.config)
        sample = sample_text(trainer)
        if saves is None and config.run.save_weights:
            store = dist.PrefixStore("weights", rank.store)
            weights = saving(folder / "weights", store=store, weights_only=True)
            held.callback(weights.close)
            trainer.save(weights)
        exported = export_hf(config, trainer.flat, trainer.optimizer, groups)
        if log is not None:
            log.say(exported + closing(mixture, result, measured, sample, folder, trainer))
            events.write("end", step=result.steps)
            spent = str(goodput(read_events(events_file(config))))
            log.say("\n" + "\n\n".join(filter(None, (times, spent))))
    return ExitCode.DONE


def _open_run(
    config: Config,
    data: str,
    device: torch.device,
    device_line: str,
    told: Sequence[str],
    folder: Path,
) -> None:
    import json

    (folder / "config.json").write_text(json.dumps(config.to_saved(), indent=2), encoding="utf-8")
    if is_file(config.parallel.schedule):
        # The file may be edited later.
        (folder / "plan.txt").write_text(plan_text(run_plan(config)), encoding="utf-8")
    say(
        report.opening(
            config,
            version=megalite.__version__,
            device=device_line,
            back_ends=_back_ends(config, device),
            data=data,
            folder=str(folder),
            notes=told,
        )
        + "\n"
    )


def _back_ends(config: Config, device: torch.device) -> dict[str, str]:
    """Operation to what serves it, of the operations of this run."""
    from megalite.layers.dtypes import weights_dtype
    from megalite.layers.sdpa import attention_back_end, has_softmax
    from megalite_kernels import back_ends

    served = back_ends(device, weights_dtype(config))
    if not has_softmax(config):
        del served["softmax"]
    return {"attention": attention_back_end(config, device), **served}


PROGRAM = Program(
    name="python -m megalite.pretrain",
    description="Pretrain a LLaMA-family model, on one rank or on many.",
    switches=MappingProxyType(
        {
            "--dry-run": "Describe the run, its memory and its pipeline.",
            "--print-config": "Print the resolved values as TOML.",
        }
    ),
    show=_show,
    machine=_machine,
    prepare=_prepare,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in this process; returns its exit code."""
    return PROGRAM.main(argv)


def cli_main() -> NoReturn:
    """Entry point of the console script."""
    PROGRAM.exit()


if __name__ == "__main__":
    cli_main()
