"""What a run may not change under way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.config import UserError


class Contract:
    """Hashes by name: with other pictures, latents, words or classes, the weights of a run mean something else.

    They are part of every checkpoint, and lie in OUT/contract.json, which is read before anything is computed.
    """

    def __init__(self, terms: Mapping[str, str]) -> None:
        self.terms = dict(terms)

    def keep(self, run: Any) -> None:
        """Write OUT/contract.json if nothing has been trained yet, else compare with it.

        Raises:
            UserError: the run was begun with something else.
        """
        home = getattr(run, "home", run.out)  # of a dry run, the folder of the run that it rehearses
        file = home / "contract.json"
        if begun(home):
            if file.exists():
                self.load_state_dict(json.loads(file.read_text()))
        elif run.main:
            run.write("contract.json", json.dumps(self.terms, indent=1) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return self.terms

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for term, begun_with in state.items():
            if begun_with != self.terms.get(term):
                raise UserError(
                    f"This run was begun with another {term} (sha256 {begun_with[:12]}, now "
                    f"{self.terms.get(term, 'none')[:12]}); bring that one back, or choose another run.out."
                )


def begun(out: Path) -> bool:
    """Whether a run folder holds anything that was trained."""
    return any((out / "checkpoints").glob("step-*")) or (out / "result.json").exists()
