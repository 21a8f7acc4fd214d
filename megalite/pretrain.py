"""Pretrain a LLaMA-family model from initial weights.

python -m megalite.pretrain                     one rank, the built-in corpus
python -m megalite.pretrain --tp 4 --pp 2       eight ranks on this machine
torchrun --nproc-per-node 8 -m megalite.pretrain --tp 4 --pp 2
srun --ntasks 16 python -m megalite.pretrain --tp 8 --dp 2 --data corpus
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
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
from megalite.config_file import to_toml
from megalite.effects import notes
from megalite.errors import ConfigError
from megalite.events import Events, environment, events_file, goodput, read_events
from megalite.exit_codes import ExitCode
from megalite.faults import banner
from megalite.parallel.environment import World
from megalite.pipeline.text import plan_text
from megalite.planning.choice import choose_by_estimate, has_choice, without_choice
from megalite.program import Program, checked
from megalite.run_plan import is_file, plan_facts, run_plan

if TYPE_CHECKING:
    import torch

    from megalite.data.mixture import Mixture
    from megalite.data.record import DataRecord
    from megalite.parallel.launch import Prepared, Rank
    from megalite.parallel.machine import Machine
    from megalite.trainer import Result, Trainer

PROMPT_TOKENS = 40
"""Length of the piece of validation text that the closing sample continues."""


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
    if config.run.name and folder.exists():
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
    told = notes(resolve_device(config, device), command.given)
    data = record_of(mixture, tokenizer.fingerprint)
    job = partial(_train, mixture=mixture, data=data, device_line=why, told=told)
    facts = {"corpus": mixture.fingerprint, "tokenizer": tokenizer.fingerprint}
    facts |= plan_facts(config)
    return Prepared(resolve_device(config, device), job, facts, _claim_folder)


def _claim_folder(config: Config) -> Config:
    """Create the run's folder and give the configuration its name.

    Raises:
        ConfigError: the folder exists, or cannot be made.
    """
    parallel = config.parallel
    layout = f"tp{parallel.tp}-pp{parallel.pp}-dp{parallel.dp}"
    base = config.run.name or f"{datetime.now():%Y%m%d-%H%M%S}-{config.model.model}-{layout}"
    name, attempt = base, 1
    folder = Path(config.run.runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            folder = Path(config.run.runs) / name
            try:
                folder.mkdir()
                return config.derive(name=name)
            except FileExistsError:
                if config.run.name:
                    raise ConfigError(_taken(name, folder)) from None
                attempt += 1
                name = f"{base}-{attempt}"
    except OSError as error:
        raise ConfigError(f"--runs {config.run.runs}: {folder}: {error.strerror}") from None


def _taken(name: str, folder: Path) -> str:
    return f"--name {name}: {folder} exists; choose another name or remove it"


def _train(
    rank: Rank, *, mixture: Mixture, data: DataRecord, device_line: str, told: tuple[str, ...]
) -> int:
    """One rank's whole run: train, sample, save, say how it went; returns its exit code."""
    from contextlib import nullcontext

    from megalite.data.splits import open_samples
    from megalite.layers.sdpa import fastest_attention
    from megalite.metrics import RunLog
    from megalite.planning.measured_choice import choose_by_measuring
    from megalite.trainer import Trainer

    config = without_choice(rank.config)
    folder = Path(config.run.runs) / config.run.name
    first = rank.groups.world_rank == 0
    samples = open_samples(config, mixture)
    costs, chosen = None, ""
    if has_choice(config):
        config, costs, chosen = choose_by_measuring(config, rank.groups, rank.device, samples)
    if first:
        data.write(folder)
        lines = filter(None, (mixture.describe(), samples[0].describe()))
        _open_run(config, "\n".join(lines), rank.device, device_line, told, folder)
        if injected := banner(os.environ, rank.attempt):
            print(f"{injected}\n", file=sys.stderr, flush=True)
        print(chosen, end="", flush=True)
    trainer = Trainer(config, samples, rank.groups, rank.device, costs, rank.stop, rank.faults)
    events = Events(events_file(config) if first else None, rank.attempt)
    events.write("start", step=0, device=device_line, **environment())
    record = RunLog(config, mixture, folder, rank.device) if first else nullcontext()
    with fastest_attention(rank.device), record as log:
        with rank.stop.listening():
            result = trainer.fit(log, events)
        if result.stopped:
            return _stop(rank, result, events)
        measured = _measured_memory(rank, trainer.config)
        sample = _sample(trainer)
        if config.run.save_weights:
            trainer.save(folder / "weights")
        if first:
            assert log is not None
            log.say(_closing(mixture, result, measured, sample, folder, trainer))
            events.write("end", step=result.steps)
            log.say(f"\n{goodput(read_events(events_file(config)))}")
    return ExitCode.DONE


def _stop(rank: Rank, result: Result, events: Events) -> int:
    """The end of a run that was asked to stop, once nothing is left to write but that."""
    by = rank.stop.by.name if rank.stop.by else "a signal to another rank"
    events.write("stop", step=result.steps, why=by, code=ExitCode.STOPPED)
    if rank.groups.world_rank == 0:
        steps = rank.config.train.steps
        print(f"megalite: stopped by {by} after step {result.steps} of {steps}", file=sys.stderr)
        print(goodput(read_events(events_file(rank.config))), flush=True)
    # The first rank to leave with a code of its own has the launcher end the others.
    rank.groups.activity.begin("the end")
    rank.groups.wait_for_all(rank.device)
    return ExitCode.STOPPED


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
    print(
        report.opening(
            config,
            version=megalite.__version__,
            device=device_line,
            back_ends=_back_ends(config, device),
            data=data,
            folder=str(folder),
            notes=told,
        )
        + "\n",
        flush=True,
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


def _measured_memory(rank: Rank, config: Config) -> str:
    """What training took beside what was predicted; all ranks call it. Nothing on a CPU, whose
    memory holds the program and its libraries too. The schedule is the one that was chosen."""
    import torch

    from megalite.metrics import peak_memory_bytes

    if rank.device.type != "cuda":
        return ""
    pp, peak = rank.groups.pp, peak_memory_bytes(rank.device)
    peaks = torch.zeros(pp.size, dtype=torch.float64, device=rank.device)
    peaks[pp.rank] = peak
    pp.all_reduce(peaks)
    for group in (rank.groups.tp, rank.groups.dp):
        group.all_reduce(peaks, maximum=True)
    return report.memory(config, [int(each) for each in peaks.tolist()])


def _sample(trainer: Trainer) -> tuple[str, str] | None:
    """(prompt, continuation) as text; None if none was asked for, or tokens have no known text."""
    from megalite.data.source import token_texts_known
    from megalite.sampling import generate
    from megalite.tokenizer.choose import open_tokenizer

    config = trainer.config
    count = config.run.sample_length
    if not count or not token_texts_known(config.data):
        return None
    tokenizer = open_tokenizer(config.data, config.model.vocab_size)
    prompt = trainer.loader.prompt(PROMPT_TOKENS)
    return tokenizer.decode(prompt), tokenizer.decode(generate(trainer, prompt, count))


def _closing(
    mixture: Mixture,
    result: Result,
    measured: str,
    sample: tuple[str, str] | None,
    folder: Path,
    trainer: Trainer,
) -> str:
    from megalite.checkpoint.weights import missing_files

    lines = [""]
    if sample is not None:
        lines += [f"sample, continuing {sample[0]!r}:", sample[1], ""]
    lines.append(f"final train loss {result.train_loss:.4f} nats per token")
    for which, loss in (("valid", result.valid_loss), ("test", result.test_loss)):
        if loss is not None:
            bits = mixture.bits_per_byte(loss, "test" if which == "test" else "valid")
            lines.append(
                f"final {which} loss {loss:.4f} nats per token"
                + (f" = {bits:.4f} bits per byte" if bits is not None else "")
            )
    if mixture.unigram_nats:
        known = f"for comparison   {mixture.unigram_nats:.4f} knowing token counts only"
        if mixture.bigram_nats:
            known += f", {mixture.bigram_nats:.4f} knowing pairs of neighbours"
        lines.append(known)
    if measured:
        lines.append(measured)
    written = ["metrics.jsonl", "events.jsonl", "config.json", "data.json"]
    if is_file(trainer.config.parallel.schedule):
        written.append("plan.txt")
    lines.append("")
    if trainer.config.run.save_weights:
        written.append("weights/")
        missing = missing_files(folder / "weights")
        if missing:
            lines.append(
                f"{missing} weight files are on the disks of other machines: gather them from "
                f"{folder}/weights there, or give --runs a shared folder"
            )
    if trainer.config.run.trace_steps:
        written.append("trace/")
    lines += [f"written to {folder}: {', '.join(written)}", "next:"]
    if trainer.config.run.trace_steps:
        lines.append(f"  {_python()} tools/draw_schedule.py --trace {folder}")
    command = f"  {_python()} -m megalite.pretrain"
    lines.append(f"{command} --config {folder}/config.json --name again")
    lines.append(f"{command} --tp 2 --pp 2 --data my.txt --steps 500")
    lines.append(f"{command} --model llama3-8b --tp 4 --pp 2 --dry-run")
    return "\n".join(lines)


def _python() -> str:
    """This interpreter as one types it here."""
    if shutil.which("python") == sys.executable:
        return "python"
    path = os.path.relpath(sys.executable)
    return sys.executable if path.startswith(os.pardir) else path


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
