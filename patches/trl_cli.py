"""TRL's command line starts its scripts with "flashmask" registered and the patches in place.

``trl dpo ...`` hands ``trl/scripts/dpo.py`` to ``accelerate launch``, which runs it in new Python processes, where
nothing of ours is imported. Here accelerate is given ``python -m hf_flashmask.trl_script dpo`` instead, which enables
the patches and runs that script. Read in TRL 1.16.0 (cli/accelerate_launcher.py); can go when TRL's command line takes
plugins.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .replacing import Replacement, check_parameters

_SCRIPT_MODULE = "hf_flashmask.trl_script"
_PARAMETERS = ("script_name", "launch_args", "training_script_args", "launch_command_fn", "launch_parser_fn")


def replacements() -> Iterator[Replacement]:
    """
    Raises:
        RuntimeError: the launcher has other parameters than expected.
    """
    module = importlib.import_module("trl.cli.accelerate_launcher")
    check_parameters(module.launch_training_script, _PARAMETERS)
    yield Replacement(module, "launch_training_script", _launching_ours(module))


def _launching_ours(module: Any) -> Callable[..., None]:
    stock, launch = module.launch_training_script, module.launch_command

    @functools.wraps(stock)
    def launch_training_script(script_name: str, launch_args: list[str], training_script_args: list[str]) -> None:
        def launch_ours(arguments: Any) -> None:
            arguments.module = True
            arguments.training_script = _SCRIPT_MODULE
            arguments.training_script_args = [Path(script_name).stem, *arguments.training_script_args]
            launch(arguments)

        stock(script_name, launch_args, training_script_args, launch_command_fn=launch_ours)

    return launch_training_script
