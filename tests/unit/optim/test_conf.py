"""The optimizers and the average as a user names them, and what is said of a wrong combination."""

import pytest

from softmoe_train.config import ConfigError, compose
from softmoe_train.settings import RunConfig


def composed(*overrides: str) -> RunConfig:
    return compose(RunConfig, list(overrides), lambda _: [])


def test_adafactor_has_big_vision_s_numbers() -> None:
    optim = composed("optim=adafactor").optim
    numbers = (optim.beta1, optim.beta2, optim.beta2_decay, optim.eps, optim.min_dim_to_factor, optim.momentum)
    assert numbers == (0.9, 0.999, 0.8, 1e-30, 32, None)


def test_nothing_is_averaged_unless_asked() -> None:
    assert composed().average is None
    average = composed("average=ema", "average.decay=0.999").average
    assert average is not None
    assert (average.decay, average.warmup) == (0.999, False)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["optim.beta2_decay=0.8"], "optim.beta2_decay=0.8: optim.kind=adamw does not use it; set null"),
        (["optim=sgd", "optim.min_dim_to_factor=32"], "optim.min_dim_to_factor=32: optim.kind=sgd does not use it"),
        (["optim=adafactor", "optim.beta2_decay=null"], "optim.beta2_decay=null: optim.kind=adafactor needs a value"),
        (["optim=adafactor", "optim.momentum=0.9"], "optim.momentum=0.9: optim.kind=adafactor does not use it"),
        (["optim=adafactor", "optim.min_dim_to_factor=1"], "optim.min_dim_to_factor=1: input should be greater than"),
        (
            ["optim=adafactor", "optim.beta2_decay=1.5"],
            "optim.beta2_decay=1.5: input should be less than or equal to 1",
        ),
        (["average=ema", "average.decay=1.0"], "average.decay=1.0: input should be less than 1"),
        (["average=ema", "average.decay=0.0"], "average.decay=0.0: input should be greater than 0"),
        (["average=swa"], "average=swa: no such file under conf/average; use one of ema"),
        (["average.decay=0.9"], "there is no key average.decay"),
    ],
)
def test_a_wrong_combination_is_refused_in_plain_words(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    assert said in str(caught.value)
