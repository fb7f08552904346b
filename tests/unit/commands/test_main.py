"""The program starts as quickly as its libraries let it."""

import subprocess
import sys
import textwrap


def test_the_program_imports_without_looking_for_garbage_and_looks_for_it_afterwards() -> None:
    program = """
        import gc
        began = []
        gc.callbacks.append(lambda phase, info: began.append(phase))
        import softmoe_train.__main__
        assert len(began) < 20, len(began)
        assert gc.isenabled() and gc.get_freeze_count() > 10_000
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
