"""The numbers of a run along the way, as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from hla.checkpoint import METRICS_FILE


class Metrics:
    """Numbers along the way: kept, appended to metrics.jsonl and written for TensorBoard.

    TensorBoard's own writer works in a thread of its own, where a full disk ends in a traceback; written here, its
    events fail like everything else.

    Args:
        folder: of the run; None keeps and writes nothing, for ranks that leave it to the first one.
    """

    def __init__(self, folder: Path | None) -> None:
        self.records: list[dict[str, Any]] = []
        self._folder = folder
        self._files = ExitStack()

    def open(self, step: int = 0, records: int = 0) -> None:
        """Open the files at this step of a run. Raises OSError.

        Args:
            records: how many there were when the run was at this step; later ones are forgotten.
        """
        if self._folder is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        path = self._folder / METRICS_FILE
        self.records = _read(path)[:records]
        draft = path.with_name(f".{path.name}")
        draft.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        os.replace(draft, path)
        board = self._folder / "tensorboard"
        board.mkdir(exist_ok=True)
        # Files of earlier processes of the run sort before; none is written twice.
        events = board / f"events.out.tfevents.{int(time.time())}.{len(list(board.iterdir())):04d}.hla"
        self._lines = self._files.enter_context(path.open("a", encoding="utf-8"))
        self._events = RecordWriter(self._files.enter_context(events.open("wb")))
        self._events.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if step:  # TensorBoard forgets what came after, too
            start = Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self._events.write(start.SerializeToString())

    def add(self, kind: str, record: dict[str, Any]) -> None:
        """Log a record with ``step`` and numbers; ``kind`` groups them in TensorBoard. Raises OSError."""
        if self._folder is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self.records.append(record)
        self._lines.write(json.dumps(record) + "\n")
        self._lines.flush()
        values = [
            Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in record.items() if name != "step"
        ]
        event = Event(wall_time=time.time(), step=record["step"], summary=Summary(value=values))
        self._events.write(event.SerializeToString())
        self._events.flush()

    def close(self) -> None:
        """Close the files; all that was added has been written or has failed before."""
        with suppress(OSError):
            self._files.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """The records in metrics.jsonl; a line that a kill cut off ends them."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
