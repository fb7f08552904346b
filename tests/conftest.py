"""Shapes that the annotations promise are checked at run time, in tests only."""

from jaxtyping import install_import_hook

install_import_hook(["softmoe_train.model", "softmoe_train.parallel.exchange"], "beartype.beartype")
