"""This file owns the settings of a run's evaluators: which there are, what they read, and what they measure."""

from softmoe_train.config import ConfigError, Record, parse
from softmoe_train.data import (
    DataConfig,
    SyntheticConfig,
    WebDatasetConfig,
    check_evaluated,
    check_labels,
    trained_and_tested,
)
from softmoe_train.evals.fewshot import FewshotConfig
from softmoe_train.evals.finetune import FinetuneEvalConfig
from softmoe_train.evals.knn import KnnConfig
from softmoe_train.evals.on_sets import feature_configs
from softmoe_train.evals.probe import ProbeConfig
from softmoe_train.evals.routing import RoutingConfig
from softmoe_train.evals.sets import SetsConfig, laid_over, of_set
from softmoe_train.evals.upstream import UpstreamConfig
from softmoe_train.model.records import ModelConfig
from softmoe_train.plain import the_first


class EvalsConfig(Record):
    """The evaluators of a run; null leaves one out."""

    upstream: UpstreamConfig | None
    finetune: FinetuneEvalConfig | None
    fewshot: FewshotConfig | None
    knn: KnnConfig | None
    probe: ProbeConfig | None
    routing: RoutingConfig | None

    @property
    def on_sets(self) -> dict[str, SetsConfig]:
        """Those that measure features on sets of their own, by source."""
        return feature_configs(self.fewshot, self.knn, self.probe)

    def reads_test(self, model: ModelConfig) -> bool:
        """Whether any of them reads `data.test`; a model without experts has no router to look at."""
        tuned = self.finetune is not None and self.finetune.test
        return self.upstream is not None or tuned or (self.routing is not None and model.has_experts)

    def reads_held_out(self, data: DataConfig) -> bool:
        """Whether any of them reads what `data` holds out of its training shards."""
        return self.finetune is not None and data.holdout is not None


def upstream_sets(evals: EvalsConfig, data: DataConfig) -> dict[str, DataConfig]:
    """What the upstream evaluator reads, by set: `data.test`, and whatever else it was given, with its own keys in place of the run's.

    Raises ConfigError with what is wrong in those.
    """
    if evals.upstream is None:
        return {}
    sets, problems = {"test": data}, list[str]()
    for name, own in evals.upstream.sets.items():
        key = f"evals.upstream.sets.{name}"
        if isinstance(data, SyntheticConfig):
            problems.append(f"{key}: data=synthetic has no shards to share settings with; choose a data set of shards")
            continue
        other, found = parse(WebDatasetConfig, laid_over(data.model_dump(), own))
        problems += [of_set(key, problem if problem.startswith("data.") else f"data.{problem}") for problem in found]
        sets |= {name: other} if other is not None else {}
    if problems:
        raise ConfigError(problems)
    return sets


def set_problems(evals: EvalsConfig, data: DataConfig, model: ModelConfig) -> list[str]:
    """What is wrong with the sets of evaluators that are not `data.test`."""
    try:
        others = {name: other for name, other in upstream_sets(evals, data).items() if name != "test"}
    except ConfigError as error:
        return error.problems
    problems = _finetune_problems(evals, data)
    for name, other in others.items():
        found = check_evaluated(other, image_size=model.image_size)
        found += check_labels(other, model.num_classes) if isinstance(other, WebDatasetConfig) else []
        problems += [of_set(f"evals.upstream.sets.{name}", problem) for problem in found]
    return problems


def _finetune_problems(evals: EvalsConfig, data: DataConfig) -> list[str]:
    """Why a fine-tuning would be measured by nothing, or by what it was trained on."""
    if evals.finetune is None:
        return []
    if not evals.finetune.test:
        return [
            "evals.finetune.test=false with data.holdout=null: it would measure nothing; hold out a share of the training images, as "
            "data.holdout=0.02"
        ] * (data.holdout is None)
    both = [] if isinstance(data, SyntheticConfig) else trained_and_tested(data)
    if not both:
        return []
    return [
        f"data.test: {the_first(both, 3)} is trained on too, and no test of a fine-tuning; name the parts apart, as "
        f"data.train='FOLDER/train-*.tar' data.test='FOLDER/test-*.tar'"
    ]
