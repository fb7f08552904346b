"""This file owns W&B: when a run goes there, what it is sent, and that none of it can stop or delay the training.

What W&B already has is read from W&B, never from a note of ours: wandb writes with a delay, and a trainer that is
killed takes the last seconds with it (measured with 0.31: what it had not flushed by then is gone).
"""

import contextlib
import io
import math
import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from urllib.parse import urlsplit

import PIL.Image

from softmoe_train.config import Record
from softmoe_train.observe.figures import Figure, Picture
from softmoe_train.observe.run_files import Line
from softmoe_train.redact import without_secrets

BLOCK = 32768  # bytes; a .wandb file is a LevelDB log: blocks of records with a header of checksum, length and type
HEADER = 7  # bytes, both of the file and of a record
FLUSH_SECONDS = 2.0  # how much of the W&B file a kill may take; what it takes is sent again from metrics.jsonl
INIT_SECONDS = 30.0
FINISH_SECONDS = (
    20.0  # a preempted run has little time; what is not uploaded by then stays in the folder for `wandb sync`
)


class WandbConfig(Record):
    """Where a run goes in W&B; `auto` is online when logged in, else offline."""

    mode: Literal["auto", "online", "offline", "disabled"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]


class WandbRun:
    """A W&B run that is fed one row per step, in order; its first failure is one warning, and its last act."""

    def __init__(
        self, library: ModuleType, run: Any, has_through: int, rows: "RowNumbers", warn: Callable[[str], None]
    ) -> None:
        self._library = library
        self._run = run
        self._has_through = has_through
        self._rows = rows
        self._warn = warn
        self._row: dict[str, Any] = {}

    def send(self, step: int, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Take a report; a step's row leaves when the next step's begins, so reports of one step share one row.

        Steps that W&B already has are passed over: after a resume they are the same numbers again.
        """
        if self._rows.number(step) <= self._has_through:
            return
        if self._row and step != self._row["step"]:
            self._flush()
        self._row |= {"step": step, "images_seen": images_seen, **metrics}

    def send_late(self, step: int, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Take what became known of a step after its row had left, as a row above all others."""
        self._flush()
        above = max(self._has_through, self._rows.number(step)) + 1
        if self._run is not None:
            row = {"step": step, "images_seen": images_seen, **metrics}
            self._attempt(lambda run: run.log(row, step=above, commit=True))

    def show(self, step: int, figures: Mapping[str, Figure]) -> None:
        """Take figures of a step; they share the row of its reports."""
        if self._run is not None and self._rows.number(step) > self._has_through:
            self._attempt(lambda run: self._row.update(self._shown(figures)))

    def _shown(self, figures: Mapping[str, Figure]) -> dict[str, Any]:
        def form(figure: Figure) -> Any:
            if isinstance(figure, Picture):
                return self._library.Image(PIL.Image.open(io.BytesIO(figure.png)), caption=figure.caption)
            return self._library.Histogram(np_histogram=(figure.counts, figure.edges))

        return {name: form(figure) for name, figure in figures.items()}

    def alert(self, title: str, text: str) -> None:
        """Have W&B tell people."""
        if self._run is not None:
            self._attempt(lambda run: run.alert(title=title, text=text))

    def close(self, *, failed: bool) -> None:
        """Send the last row and end the run, within a bounded time."""
        self._flush()
        if self._run is not None:
            self._attempt(lambda run: self._finish(run, failed))
            self._run = None

    def _finish(self, run: Any, failed: bool) -> None:
        run.finish(exit_code=1 if failed else 0)
        self._library.teardown()  # the file is whole only when the service has gone: finish() returns a moment before

    def _flush(self) -> None:
        row, self._row = self._row, {}
        if row and self._run is not None:
            self._attempt(lambda run: run.log(row, step=self._rows.number(int(row["step"])), commit=True))

    def _attempt(self, call: Callable[[Any], None]) -> None:
        try:
            call(self._run)
        except Exception as error:  # whatever W&B raises, the training is worth more
            self._run = None
            self._warn(
                f"W&B stopped taking metrics ({first_line(error)}); metrics.jsonl has them all, training goes on"
            )


class RowNumbers:
    """W&B's own number of the row of a step, which must grow for ever: the step, until a rollback.

    What a rollback takes back stays in W&B as it was, and the steps from there on come again in rows above it. All rows of
    one part of a run, from a rollback's first step to the next's, are equally far from their steps.
    """

    def __init__(self, taken_back: Sequence[tuple[int, int]]) -> None:
        self._parts = [(0, 0)]  # (first step, how far its rows are above the steps)
        highest = 0  # that W&B may have
        for first, last in taken_back:
            highest = max(highest, self.number(last))
            self._parts = [part for part in self._parts if part[0] < first] + [(first, highest + 1 - first)]

    def number(self, step: int) -> int:
        """The number of a step's row in the newest part that has it."""
        return step + next(above for first, above in reversed(self._parts) if first <= step)


def start_wandb(
    config: WandbConfig,
    run_dir: Path,
    *,
    wandb_id: str,
    name: str,
    run_config: Mapping[str, Any],
    written: list[Line],
    taken_back: Sequence[tuple[int, int]],
    warn: Callable[[str], None],
) -> WandbRun | None:
    """The W&B run of this folder, brought up to date with `written` (the lines that a resume kept), or None.

    It never prompts and never raises: without the library or a login, or with the service down, it warns once and falls
    back to offline, then to None.
    """
    if config.mode == "disabled":
        return None
    try:
        # Imported here because it costs 0.3 s, and only rank 0 of a run that wants W&B is to pay that.
        import wandb
        import wandb.proto.wandb_internal_pb2 as wandb_records

        wandb.setup(settings=wandb.Settings(silent=True))  # before it has credentials to announce
    except Exception as error:  # a broken installation raises more than ImportError
        warn(
            f"W&B is off: the library does not load ({first_line(error)}); "
            "`pip install wandb`, or observe.wandb.mode=disabled"
        )
        return None
    for mode in modes_to_try(wandb, config.mode, warn):
        try:
            has_offline, has_any = steps_on_disk(run_dir / "wandb", wandb_id, wandb_records)
            run = init_run(wandb, config, mode, run_dir, wandb_id, name, run_config)
        except Exception as error:  # init raises anything from usage to protocol errors
            warn(f"W&B {mode} did not start ({first_line(error)}); training goes on, metrics.jsonl has everything")
            with contextlib.suppress(Exception):
                wandb.teardown()  # its service still holds the run's id, and would refuse it to the next mode
            continue
        # The service knows what it has; offline pieces are for `wandb sync` to bring. Offline, all pieces count as had.
        has_through = max(has_offline, run.step - 1) if mode == "online" else has_any
        wandb_run = WandbRun(wandb, run, has_through, RowNumbers(taken_back), warn)
        for line in written:
            wandb_run.send(*unpack(line))
        return wandb_run
    return None


def modes_to_try(wandb: ModuleType, mode: str, warn: Callable[[str], None]) -> list[Literal["online", "offline"]]:
    """The modes to start W&B in, best first; online only with credentials, because W&B would prompt without them."""
    if mode == "offline":
        return ["offline"]
    logged_in = is_logged_in(wandb)
    if mode == "online" and not logged_in:
        warn(
            "observe.wandb.mode=online but W&B is not logged in: writing offline; "
            "`wandb login` now, and `wandb sync` the folder later"
        )
    if mode == "auto":
        match os.environ.get("WANDB_MODE"):
            case "disabled":
                return []
            case "offline" | "dryrun":
                return ["offline"]
    return ["online", "offline"] if logged_in else ["offline"]


def is_logged_in(wandb: ModuleType) -> bool:
    """Whether W&B would find credentials without asking: in the environment, its settings, or a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        settings = wandb.setup().settings
        if settings.api_key:
            return True
        host = urlsplit(settings.base_url).netloc
        places = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
        path = next((p for p in (Path(place).expanduser() for place in places) if p.exists()), None)
        return path is not None and bool(netrc.netrc(str(path)).authenticators(host))
    except Exception:  # an unreadable file is no login
        return False


def init_run(
    wandb: ModuleType,
    config: WandbConfig,
    mode: Literal["online", "offline"],
    run_dir: Path,
    wandb_id: str,
    name: str,
    run_config: Mapping[str, Any],
) -> Any:
    """Start or continue the W&B run `wandb_id`, with `step` as the axis of every metric."""
    wanted: dict[str, Any] = {
        "silent": True,
        "console": "off",  # our standard output stays ours: neither wrapped nor uploaded
        "disable_code": True,
        "x_transaction_log_flush_interval": FLUSH_SECONDS,
        "init_timeout": INIT_SECONDS,
        "login_timeout": INIT_SECONDS,
        "finish_timeout": FINISH_SECONDS,
    }
    # Older releases know fewer of these, and refuse what they do not know.
    settings = wandb.Settings(**{key: value for key, value in wanted.items() if key in wandb.Settings.model_fields})
    run = wandb.init(
        project=config.project,
        entity=config.entity,
        group=config.group,
        tags=config.tags,
        dir=str(run_dir),
        id=wandb_id,
        name=name,
        resume="allow",
        mode=mode,
        config=without_secrets(run_config),
        settings=settings,
        # The config of a resumed run may differ (steps, layout): W&B is to hold the newest.
        allow_val_change=True,
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def unpack(line: Line) -> tuple[int, int, dict[str, float]]:
    """A line of metrics.jsonl as the report it was, null read back as not a number."""
    metrics = {name: math.nan if value is None else float(value) for name, value in line.items()}
    return int(metrics.pop("step")), int(metrics.pop("images_seen")), metrics


def steps_on_disk(folder: Path, wandb_id: str, wandb_records: ModuleType) -> tuple[int, int]:
    """The highest row number in the offline pieces of a W&B run, and in all its pieces; -1 where there is none."""
    offline, online = -1, -1
    for path in sorted(folder.glob(f"*run-*-{wandb_id}*/run-{wandb_id}.wandb")):
        last = -1
        for raw in records_of(path.read_bytes()):
            record = wandb_records.Record.FromString(raw)
            if record.WhichOneof("record_type") == "history":
                last = max(last, record.history.step.num)
        if path.parent.name.startswith("offline-"):
            offline = max(offline, last)
        else:
            online = max(online, last)
    return offline, max(offline, online)


def records_of(content: bytes) -> Iterator[bytes]:
    """The whole records of a .wandb file (LevelDB log format), ending quietly where a kill tore it."""
    position, parts = HEADER, []
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # too short for a header: padding up to the next block
            position += BLOCK - position % BLOCK
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]  # 1 whole, 2 first, 3 middle, 4 last
        end = position + HEADER + length
        if kind not in (1, 2, 3, 4) or end > len(content):
            return
        parts.append(content[position + HEADER : end])
        position = end
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
