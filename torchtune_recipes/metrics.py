"""Metrics as JSON lines, one a logged step."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mamba_hybrid.errors import UserError


class JSONLLogger:
    """torchtune's metric-logger interface on a .jsonl file; a resumed run continues it.

    Args:
        path: the file.

    Raises:
        UserError: it cannot be written, now or later.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        with self._written():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(f"metric_loggers: {self.path} cannot be written: {e.strerror}") from e

    def rewind(self, step: int) -> None:
        """Forget steps after `step` (a resumed run repeats them), and a line that was cut off."""
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                break
            if row["step"] <= step:
                kept.append(line + "\n")
        work = self.path.with_suffix(".tmp")
        with self._written():
            work.write_text("".join(kept))
            work.replace(self.path)

    def log_config(self, config: DictConfig) -> None:
        """The run's configuration, beside the metrics."""
        with self._written():
            OmegaConf.save(config, self.path.with_suffix(".config.yaml"))

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        with self._written(), self.path.open("a") as f:
            f.write(json.dumps({"step": step, **payload}) + "\n")

    def close(self) -> None:
        """Nothing is held open."""
