"""This file owns where a run goes on, or begins: from which checkpoint of its folder, or which weights, and what of it is taken over."""

from collections.abc import Mapping
from typing import Any

from softmoe_train.changes import changed_settings
from softmoe_train.checkpoint import CheckpointError, DamagedError
from softmoe_train.checkpoint.audit import Audit, layout_words
from softmoe_train.checkpoint.remote import Place
from softmoe_train.checkpoint.store import CheckpointStore
from softmoe_train.config import ConfigError, flat
from softmoe_train.data import ImageStream
from softmoe_train.faults.bad_steps import REMEDY, BadData, BadStepsError
from softmoe_train.loop import TrainState
from softmoe_train.settings import RunConfig
from softmoe_train.warm.start import Warmed, start_warm

LEFT_OUT = {  # by whether the checkpoint has averaged weights, where one side alone has
    True: "without its averaged weights",
    False: "the average of the weights starts here",
}


def resume(config: RunConfig, state: TrainState, store: CheckpointStore, stream: ImageStream) -> Audit | Warmed | None:
    """Fill `state`; None where it stays as it was. Precedence:

    1. the newest complete checkpoint of this run folder that is whole; damaged ones before it are named and set aside
    2. only where there never was one, the weights that `warm` names: step 0, a fresh optimizer, the first sample
    3. scratch: the weights that `initialize` derived from the seed
    """
    resumed = _newest(config, state, store, stream)
    if resumed is not None or config.warm is None:
        return resumed
    return start_warm(
        config.warm,
        config.model,
        state.engine,
        seed=config.seed,
        rank=store.rank,
        world=store.world,
        group=store.group,
    )


def _newest(config: RunConfig, state: TrainState, store: CheckpointStore, stream: ImageStream) -> Audit | None:
    """Fill `state` from the newest whole checkpoint of the run; None where there never was one."""
    passed_over: list[str] = []
    while (path := store.latest()) is not None:
        try:
            return _restore(path, config, state, store, stream)._replace(set_aside=passed_over)
        except DamagedError as error:
            store.set_aside(path, error.problems)
            passed_over.append(path.name)
        except CheckpointError as error:
            remedy = f"give the settings that it was saved with, or move {path} away to go on from the one before it"
            raise CheckpointError(error.what, [*error.problems, remedy]) from error
    damaged = store.folders_set_aside()
    if damaged:
        rule = "a run that has checkpoints does not start over by itself"
        remedy = f"repair one and give it its name back; to start from scratch, move them out of {store.folder} or give another run_dir"
        raise CheckpointError(
            "no checkpoint is left to resume from", [*(f"{p} is damaged" for p in damaged), f"{rule}: {remedy}"]
        )
    return None


def _restore(path: Place, config: RunConfig, state: TrainState, store: CheckpointStore, stream: ImageStream) -> Audit:
    """Fill `state` from the checkpoint `path`; what is damaged raises DamagedError before a weight is touched."""
    documents = store.read_documents(path)
    same_samples = documents["stream"] == stream.fingerprint()
    if not same_samples and not config.allow_changes:
        raise ConfigError([_other_samples(path, stream.fingerprint(), documents["stream"])])
    saved = documents["config"] if isinstance(documents["config"], dict) else {}
    averaged = saved.get("average") is not None
    # Where only one side has averaged weights they are left aside.
    kinds = ("",) if averaged == (config.average is not None) else ("model.", "optimizer.")
    tensors = {name: tensor for name, tensor in state.engine.state_dict().items() if name.startswith(kinds)}
    read = store.load(path, tensors, prefix=kinds)
    state.engine.load_state_dict(tensors)
    state.restore(documents["loop"])
    try:
        stream.seek(state.cursor)
    except ValueError as error:  # other streams, of which no batch begins there
        raise ConfigError([str(error)]) from None
    if state.best is not None and not store.holds(state.best.step):
        # It made way for a better one that was damaged, or somebody deleted it: keep the best of those that come.
        state.best = None
    changed = changed_settings(saved, config.as_saved())
    return Audit(
        path=path,
        before=_layout(saved, config, read.saved_by),
        now=_layout(config.as_saved(), config, store.world),
        read=read,
        position=state.cursor.position,
        loop=state.loop_document(),
        left_out="" if len(kinds) == 1 else LEFT_OUT[averaged],
        changed=changed if same_samples else [*changed, "data.train, which gives other samples"],
        set_aside=[],
    )


def _other_samples(path: Place, now: dict[str, object], then: object) -> str:
    """What a person is told of data that is not what the checkpoint was trained on: what differs, and both fingerprints."""
    old, new = flat(then if isinstance(then, dict) else {}), flat(now)
    apart = [
        f"{key}={new.get(key)} (was {old.get(key)})" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    return (
        f"data.train gives other samples than {path} was trained on: {', '.join(apart)}. The fingerprints are {now} now, {then} then; "
        f"give the same shards and settings, another run_dir, or allow_changes=true to go on with these from the same position"
    )


def _layout(settings: Mapping[str, Any], config: RunConfig, size: int) -> str:
    return layout_words(settings, num_experts=config.model.num_experts, size=size)


def go_back(
    data: BadData, config: RunConfig, state: TrainState, store: CheckpointStore, stream: ImageStream
) -> tuple[Audit, list[Place]]:
    """Fill `state` from the newest checkpoint from before `data`, which is passed over from there on.

    Returns where that was, and the later checkpoints, which are deleted. A kill at any instant: the next start comes to `data`
    again, and back to here. Raises BadStepsError where there is no such checkpoint.
    """
    passed_over = [*state.bad_steps.passed_over, data]
    gone = store.delete_from(data.first_step)
    resumed = _newest(config, state, store, stream)
    if resumed is None:
        what = f"every step from {data.first_step} to {data.last_step} was bad"
        raise BadStepsError(f"{what}, and there is no checkpoint from before them to go back to. {REMEDY}")
    assert state.step < data.first_step, (state.step, data)
    state.bad_steps = state.bad_steps.model_copy(update={"passed_over": passed_over})
    return resumed, gone
