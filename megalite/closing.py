"""What a run says where it begins from a checkpoint, and at its end."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from megalite import report
from megalite.config import Config
from megalite.data.mixture import Mixture
from megalite.data.source import token_texts_known
from megalite.events import Events, events_file, goodput, read_events
from megalite.exit_codes import ExitCode
from megalite.figures import Result
from megalite.metrics import peak_memory_bytes
from megalite.output import say
from megalite.parallel.launch import Rank
from megalite.parallel.step_times import table
from megalite.resume import Candidate
from megalite.run_plan import is_file
from megalite.sampling import generate
from megalite.tokenizer.choose import open_tokenizer
from megalite.trainer import Trainer

PROMPT_TOKENS = 40
"""Length of the piece of validation text that the closing sample continues."""


def starts_from(start: Candidate) -> str:
    """What it goes on from, a line."""
    manifest = start.manifest
    if start.anew:
        return f"starting from the weights of {start.folder} (step {manifest.step})\n"
    states = "" if start.with_optimizer else ", with a new optimizer"
    return f"going on from {start.folder}: step {manifest.step}, {manifest.tokens} tokens{states}\n"


def step_times(rank: Rank, events: Events) -> str:
    """Where the time of each rank's steps went; all ranks call it.

    Returns:
        On world rank 0 a table, also recorded as `times`; empty if too little was seen. Nothing on
        the others.
    """
    groups, activity = rank.groups, rank.groups.activity
    topology, size = groups.topology, groups.topology.world_size
    if size == 1:
        return ""
    activity.begin("gathering where the time of steps went")
    step_s = activity.samples.mean_step_s
    rank.store.set(f"times/{groups.world_rank}", json.dumps(activity.samples.ever()))
    if groups.world_rank > 0:
        return ""
    places = [topology.coordinates(other) for other in range(size)]
    shares = {
        f"{other} (tp {at.tp}, pp {at.pp}, dp {at.dp})": json.loads(
            rank.store.get(f"times/{other}")
        )
        for other, at in enumerate(places)
    }
    told = table(shares, step_s)
    if told:
        events.write("times", step_s=round(step_s, 6), ranks=list(shares.values()))
        told = f"where the time of a step goes [ms of {1e3 * step_s:.1f}]\n{told}"
    return told


def stop(rank: Rank, result: Result, events: Events) -> int:
    """The end of a run that was asked to stop, once nothing is left to write but that."""
    times = step_times(rank, events)
    if rank.stop.at_once():
        return ExitCode.STOPPED
    by = rank.stop.by.name if rank.stop.by else "a signal to another rank"
    events.write("stop", step=result.steps, why=by, code=ExitCode.STOPPED)
    if rank.groups.world_rank == 0:
        steps = rank.config.train.steps
        print(f"megalite: stopped by {by} after step {result.steps} of {steps}", file=sys.stderr)
        saved = rank.config.checkpoint.save
        say(
            f"checkpoint in {saved}; the same command goes on from it"
            if saved
            else "nothing is saved without --save: the run would begin anew"
        )
        spent = str(goodput(read_events(events_file(rank.config))))
        say("\n".join(filter(None, (times, spent))))
    # The first rank to leave with a code of its own has the launcher end the others.
    rank.groups.activity.begin("the end")
    rank.groups.wait_for_all(rank.device)
    return ExitCode.STOPPED


def measured_memory(rank: Rank, config: Config) -> str:
    """What training took beside what was predicted; all ranks call it. Nothing on a CPU, whose
    memory holds the program and its libraries too. The schedule is the one that was chosen."""
    if rank.device.type != "cuda":
        return ""
    pp, peak = rank.groups.pp, peak_memory_bytes(rank.device)
    peaks = torch.zeros(pp.size, dtype=torch.float64, device=rank.device)
    peaks[pp.rank] = peak
    pp.all_reduce(peaks)
    for group in (rank.groups.tp, rank.groups.dp):
        group.all_reduce(peaks, maximum=True)
    return report.memory(config, [int(each) for each in peaks.tolist()])


def sample_text(trainer: Trainer) -> tuple[str, str] | None:
    """(prompt, continuation) as text; None if none was asked for, or tokens have no known text."""
    config = trainer.config
    count = config.run.sample_length
    if not count or not token_texts_known(config.data):
        return None
    tokenizer = open_tokenizer(config.data, config.model.vocab_size)
    prompt = trainer.loader.prompt(PROMPT_TOKENS)
    return tokenizer.decode(prompt), tokenizer.decode(generate(trainer, prompt, count))


def closing(
    mixture: Mixture,
    result: Result,
    measured: str,
    sample: tuple[str, str] | None,
    folder: Path,
    trainer: Trainer,
) -> str:
    """The end of a run that is done, and what may come next.

    Args:
        mixture: what it read.
        result: how it ended.
        measured: line on memory, or empty.
        sample: prompt and continuation; None: there is none.
        folder: of the run.
        trainer: of it.
    """
    lines = [""]
    if sample is not None:
        lines += [f"sample, continuing {sample[0]!r}:", sample[1], ""]
    if result.train_loss is not None:
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
    save = trainer.config.checkpoint.save
    written = ["metrics.jsonl", "config.json", "data.json"]
    if not save:
        written.append("events.jsonl")
    if is_file(trainer.config.parallel.schedule):
        written.append("plan.txt")
    lines.append("")
    if trainer.config.run.save_weights and not save:
        written.append("weights/")
    if trainer.config.run.trace_steps:
        written.append("trace/")
    lines.append(f"written to {folder}: {', '.join(written)}")
    if save:
        lines.append(f"checkpoints and events.jsonl in {save}; the same command goes on from them")
    lines.append("next:")
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
