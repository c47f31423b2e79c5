"""`mamba-hybrid run`: the steps of a pipeline one after another, each a process of its own; a rerun goes on.

A pipeline is a YAML file:

    name: demo                                    # for messages
    output_dir: runs/${name}                      # pipeline.json, the record of what is done, comes here
    teacher: models/teacher                       # and any further variables
    steps:
      - name: convert                             # a command of mamba-hybrid
        command: convert ${teacher} ${output_dir}/start --calibrate text.jsonl --overwrite
      - name: distil                              # a recipe of `tune run`
        recipe: distill_hybrid
        config: configs/8b.yaml
        processes: 8
        overrides: {student: "${output_dir}/start", output_dir: "${output_dir}/distil", dataset.max_seq_len: 2048}

A command is split into words before variables are filled in, so that a path with blanks stays one word.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .errors import UserError, first_line
from .output import to_disk

RECORD = "pipeline.json"
KINDS = {"recipe": ("name", "recipe", "config", "processes", "overrides"), "command": ("name", "command")}
NO_STEPS = ("serve", "run")  # commands that do not end, or are pipelines themselves
PROGRAMS = {"mamba-hybrid": "mamba_hybrid.cli", "tune": "torchtune._cli.tune"}


@dataclass(frozen=True)
class Step:
    """One process of a pipeline.

    Args:
        name: unique in it.
        words: the command as a user types it.
        digest: of its definition; for a recipe this is the whole configuration, overrides included.
        output_dir: of a recipe, where its run is; None for a command.
    """

    name: str
    words: list[str]
    digest: str
    output_dir: Path | None


@dataclass(frozen=True)
class Pipeline:
    """What a pipeline's file says.

    Args:
        name: for messages.
        output_dir: where the record of its run is.
        steps: in their order, at least one.
    """

    name: str
    output_dir: Path
    steps: list[Step]

    def index(self, step: str) -> int:
        """Number of the step of this name.

        Raises:
            UserError: there is none.
        """
        names = [s.name for s in self.steps]
        if step not in names:
            raise UserError(f"--from {step}: {self.name} has the steps {', '.join(names)}")
        return names.index(step)


def load(path: str | Path, changes: list[str] | None = None) -> Pipeline:
    """Read a pipeline and check all of it: commands with their flags, configurations and keys of overrides.

    Args:
        path: the YAML file; paths in it are relative to the working directory, as on the command line.
        changes: key=value of its variables.

    Raises:
        UserError: whatever is wrong, with the step that it is in.
    """
    cfg = _read(path)
    for change in changes or []:
        key, _, value = change.partition("=")
        if not value or key == "steps" or key not in cfg:
            keys = ", ".join(str(k) for k in cfg if k != "steps")
            raise UserError(f"{change}: give key=value with a variable of {path}: {keys}")
        try:
            cfg.merge_with(OmegaConf.from_dotlist([change]))
        except (YAMLError, OmegaConfBaseException) as e:
            raise UserError(f"{change}: the value is no YAML: {' '.join(str(e).split())}") from e
    raw = OmegaConf.to_container(cfg)
    assert isinstance(raw, dict)
    missing = [key for key in ("name", "output_dir", "steps") if not raw.get(key)]
    if missing:
        raise UserError(f"pipeline {path} lacks {', '.join(missing)}")
    if not isinstance(raw["steps"], list) or not all(isinstance(step, dict) for step in raw["steps"]):
        raise UserError(f"steps of {path} must be a list of steps, each with a name")
    for step in raw["steps"]:
        if isinstance(command := step.get("command"), str):
            try:
                step["command"] = shlex.split(command)
            except ValueError as e:
                raise UserError(f"step {step.get('name')}: command {command!r}: {e}") from e
    try:
        plain = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except OmegaConfBaseException as e:
        raise UserError(f"{path}: {first_line(e)}") from e
    assert isinstance(plain, dict)
    out = Path(str(plain["output_dir"]))
    steps: list[Step] = []
    for number, node in enumerate(plain["steps"], 1):
        step = _step(number, node)
        for other in steps:
            if other.name == step.name:
                raise UserError(f"{path} has two steps of the name {step.name}")
            if step.output_dir is not None and step.output_dir == other.output_dir:
                raise UserError(f"steps {other.name} and {step.name} have one output_dir, {step.output_dir}")
        if step.output_dir is not None and out.resolve().is_relative_to(step.output_dir.resolve()):
            raise UserError(f"step {step.name}: output_dir {step.output_dir} holds that of the pipeline, {out}")
        steps.append(step)
    return Pipeline(str(plain["name"]), out, steps)


def _read(path: str | Path) -> DictConfig:
    try:
        cfg = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"{path} cannot be read: {' '.join(str(e).split())}") from e
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} is no mapping of keys")
    return cfg


def _step(number: int, node: Mapping[str, Any]) -> Step:
    name = node.get("name")
    if not isinstance(name, str) or not name:
        raise UserError(f"step {number} needs a name")
    kinds = [kind for kind in KINDS if kind in node]
    if len(kinds) != 1:
        raise UserError(f"step {name} needs recipe or command, one of them")
    odd = sorted(set(node) - set(KINDS[kinds[0]]))
    if odd:
        raise UserError(f"step {name} has the key {odd[0]}; a {kinds[0]} takes {', '.join(KINDS[kinds[0]])}")
    return _recipe(name, node) if kinds[0] == "recipe" else _command(name, node["command"])


def _command(name: str, words: Any) -> Step:
    from .cli import parse  # which imports this module's functions

    if not isinstance(words, list) or not words or words[0] in NO_STEPS:
        raise UserError(f"step {name}: command {words!r} must be one of mamba-hybrid's that end, with its arguments")
    words = [str(word) for word in words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parse(words)
    except SystemExit as e:
        raise UserError(f"step {name}: {said.getvalue().strip().splitlines()[-1]}") from e
    return Step(name, ["mamba-hybrid", *words], _digest(words), None)


def _recipe(name: str, node: Mapping[str, Any]) -> Step:
    recipe, file = node["recipe"], node.get("config")
    if not isinstance(recipe, str) or not _is_module(recipe):
        raise UserError(f"step {name}: there is no recipe {recipe!r}")
    if not isinstance(file, str):
        raise UserError(f"step {name} needs a config")
    processes = node.get("processes")
    if processes is not None and (not isinstance(processes, int) or processes < 1):
        raise UserError(f"step {name}: processes {processes!r} must be a whole number above 0")
    cfg = _read(file)
    words = ["tune", "run", *([] if processes is None else ["--nproc_per_node", str(processes)])]
    words += [recipe, "--config", file]
    overrides = node.get("overrides") or {}
    if not isinstance(overrides, Mapping):
        raise UserError(f"step {name}: overrides {overrides!r} must be keys with values")
    for key, value in overrides.items():
        if not _has(cfg, key):
            raise UserError(f"step {name}: {file} has no key {key}, so it cannot be overridden; write it there")
        words.append(f"{key}={_text(name, key, value)}")
        OmegaConf.update(cfg, key, value, merge=False)
    try:
        out = cfg.get("output_dir")
    except OmegaConfBaseException as e:
        raise UserError(f"step {name}: output_dir of {file}: {first_line(e)}") from e
    if not isinstance(out, str):
        raise UserError(f"step {name}: {file} has no output_dir")
    return Step(name, words, _digest([recipe, processes, OmegaConf.to_container(cfg)]), Path(out))


def _is_module(recipe: str) -> bool:
    """Whether `tune run` would find it: beside it, or in the environment."""
    try:
        return Path(f"{recipe}.py").is_file() or find_spec(recipe) is not None
    except (ImportError, ValueError):  # of packages that are not there, and odd names
        return False


def _has(cfg: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(cfg, DictConfig) or part not in cfg:
            return False
        cfg = cfg._get_node(part)
    return True


def _text(step: str, key: str, value: Any) -> str:
    """The value as the command line has it, from where it is read as YAML."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        same = OmegaConf.from_dotlist([f"value={text}"]).value == value
    except (YAMLError, OmegaConfBaseException):
        same = False
    if not same:
        text = json.dumps(value)
    if "=" in text or isinstance(value, dict):
        raise UserError(f"step {step}: override {key} {value!r} holds a '=' or keys, which torchtune does not take")
    return text


def _digest(definition: Any) -> str:
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Record:
    """What a pipeline has done, as its output_dir holds it.

    Args:
        file: pipeline.json.
        done: {"step", "digest", "seconds"} of each step that ended well, in their order.
        begun: the step that was started after these, if any.
    """

    file: Path
    done: list[dict[str, Any]] = field(default_factory=list)
    begun: str | None = None

    @classmethod
    def read(cls, directory: Path) -> Record:
        """The record of a directory, an empty one if it has none.

        Raises:
            UserError: it is damaged.
        """
        file = directory / RECORD
        if not file.exists():
            return cls(file)
        try:
            data = json.loads(file.read_text())
            return cls(file, [{key: row[key] for key in ("step", "digest", "seconds")} for row in data["done"]],
                       data["begun"])  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{file} cannot be read ({e}); remove it to do all steps anew") from e

    def write(self, name: str) -> None:
        """Put it on the disk.

        Raises:
            UserError: it cannot be written.
        """
        work = self.file.with_suffix(".tmp")
        try:
            work.write_text(json.dumps({"name": name, "done": self.done, "begun": self.begun}, indent=1))
            to_disk(work)
            work.replace(self.file)
        except OSError as e:
            raise UserError(f"{self.file} cannot be written: {e.strerror}") from e

    def forget(self, index: int, pipeline: Pipeline) -> None:
        """Take the pipeline's steps from this one on for not done.

        Raises:
            UserError: one before it is not done, or `check` raises.
        """
        step = pipeline.steps[index].name
        if index > len(self.done):
            raise UserError(f"--from {step}: step {pipeline.steps[len(self.done)].name} before it is not done")
        self.done, self.begun = self.done[:index], None
        self.check(pipeline)

    def check(self, pipeline: Pipeline) -> None:
        """What is done must be the pipeline's first steps as they are defined now.

        Raises:
            UserError: naming the first that is not.
        """
        for row, step in zip(self.done, pipeline.steps, strict=False):
            if row["step"] != step.name:
                raise UserError(
                    f"{self.file} has step {row['step']} done where {pipeline.name} has {step.name}; "
                    f"--from {step.name} runs it and all after it anew"
                )
            if row["digest"] != step.digest:
                raise UserError(
                    f"step {step.name} is done and its definition has changed; change it back, or --from {step.name} "
                    "runs it and all after it anew"
                )
        if len(self.done) > len(pipeline.steps):
            raise UserError(
                f"{self.file} has {len(self.done)} steps done, {pipeline.name} has {len(pipeline.steps)}; "
                "put them back, or give another output_dir"
            )


class Signals:
    """While it is open, signals that end a process go to the running step, and are remembered."""

    def __init__(self) -> None:
        self.child: subprocess.Popen | None = None
        self.seen = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: Any) -> None:
        # a recipe saves its state at SIGTERM, but knows no hang-up
        self.seen = signal.SIGTERM if number == signal.SIGHUP else number
        if self.child is not None:
            self.child.send_signal(self.seen)

    def run(self, words: list[str], lock: int) -> int:
        """Exit code of a step, negative if a signal ended it. It holds the lock too, should this process be killed."""
        program, *rest = words
        # the same Python as here; -P: as the programs themselves, which do not import from the working directory
        command = [sys.executable, "-P", "-m", PROGRAMS[program], *rest]
        self.child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONUNBUFFERED": "1"}, pass_fds=(lock,),
            process_group=0,  # a terminal's Ctrl-C reaches it once, from here
        )  # fmt: skip
        if self.seen:
            self.child.send_signal(self.seen)
        try:
            return self.child.wait()
        finally:
            self.child = None


def run(path: str | Path, changes: list[str] | None = None, *, start: str | None = None, dry_run: bool = False) -> int:
    """Run what a pipeline has not done yet.

    Args:
        path: its file.
        changes: key=value of its variables.
        start: do this step and all after it anew. What runs of recipes are there keep standing under another name.
        dry_run: only print the commands.

    Returns:
        0, 130 after a signal.

    Raises:
        UserError: as `load`, a done step whose definition has changed, a step that fails, or another process that
            runs this pipeline.
    """
    pipeline = load(path, changes)
    first = None if start is None else pipeline.index(start)
    if dry_run:
        record = Record.read(pipeline.output_dir)
        _settle(record, pipeline, first)
        for number, step in enumerate(pipeline.steps, 1):
            print(f"# {number} {step.name}{' (done)' if number <= len(record.done) else ''}\n{shlex.join(step.words)}")
        return 0
    with _locked(pipeline.output_dir) as lock:
        record = Record.read(pipeline.output_dir)
        _settle(record, pipeline, first)
        if first is not None:
            _set_aside(pipeline.steps[first:])
        return _run(pipeline, record, lock)


def _settle(record: Record, pipeline: Pipeline, first: int | None) -> None:
    if first is None:
        record.check(pipeline)
    else:
        record.forget(first, pipeline)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[int]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError as e:
        raise UserError(f"output_dir {directory} cannot be written: {e.strerror}") from e
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"{directory}: a step of this pipeline is running; wait for it or end it") from e
        except OSError as e:
            raise UserError(f"output_dir {directory} cannot be locked: {e.strerror}; put it on another disk") from e
        yield lock
    finally:
        os.close(lock)


def _set_aside(steps: list[Step]) -> None:
    for step in steps:
        if step.output_dir is None or not step.output_dir.exists():
            continue
        number = 1
        while (aside := step.output_dir.with_name(f"{step.output_dir.name}.{number}")).exists():
            number += 1
        step.output_dir.rename(aside)
        print(f"{step.output_dir} of before is now {aside}", flush=True)


def _run(pipeline: Pipeline, record: Record, lock: int) -> int:
    total = len(pipeline.steps)
    with Signals() as signals:
        for number, step in enumerate(pipeline.steps[len(record.done) :], len(record.done) + 1):
            where = f"step {step.name} ({number} of {total})"
            if signals.seen:
                print(f"stopped before {where}; run again to go on", flush=True)
                return 130
            if step.output_dir is not None and step.output_dir.exists() and record.begun != step.name:
                raise UserError(
                    f"{where}: output_dir {step.output_dir} exists and is not of this pipeline; move it, give another, "
                    f"or --from {step.name} sets it aside"
                )
            record.begun = step.name
            record.write(pipeline.name)
            print(f"== {where}: {shlex.join(step.words)}", flush=True)
            began = time.monotonic()
            code = signals.run(step.words, lock)
            if code and signals.seen:
                print(f"stopped in {where}; run again to go on", flush=True)
                return 130
            if code:
                end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise UserError(f"{where} {end}; run again to go on there")
            seconds = round(time.monotonic() - began, 1)
            record.done.append({"step": step.name, "digest": step.digest, "seconds": seconds})
            record.begun = None
            record.write(pipeline.name)
    print(f"finished {pipeline.name}: {total} steps, {record.file}", flush=True)
    return 0
