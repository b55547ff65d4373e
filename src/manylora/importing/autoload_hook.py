"""Copied into a site directory by `manylora autoload enable`: PEFT's import registers manylora.

Python runs it at every start, so it imports nothing and only puts a finder in front of the others,
which looks at the name of each module that is imported and goes away when `peft` has been found.
"""

import sys


class PeftFinder:
    """Finds `peft` as the other finders do, and imports manylora once it is there."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "peft":
            return None
        sys.meta_path.remove(cls)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is None or spec.loader is None or find_spec("manylora") is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            execute(module)
            try:
                import manylora  # noqa: F401
            except Exception as error:  # PEFT itself must go on
                from warnings import warn

                why = f"{type(error).__name__}: {error}"
                warn(f"manylora did not register with PEFT ({why})", RuntimeWarning, stacklevel=2)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, PeftFinder)
