"""The licence of a published model: one that the hub knows, with its text."""

from __future__ import annotations

import datetime
from pathlib import Path

from ldm.config import UserError

# https://huggingface.co/docs/hub/repositories-licenses; "unknown" is no choice
_KNOWN = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m openrail++ afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr lppl-1.3c isc mpl-2.0 ms-pl ncsa odbl
odc-by ofl-1.1 osl-3.0 pddl postgresql unlicense zlib deepfloyd-if-license gemma llama2 other
"""
LICENSES = tuple(_KNOWN.split())
TEXTS = Path(__file__).parent / "shipped" / "licenses"


def require_license(name: str) -> None:
    """UserError unless the hub knows the licence."""
    if name not in LICENSES:
        raise UserError(
            f"--license is {name}, which is no licence that the hub knows; choose one of {', '.join(LICENSES)}"
        )


def license_text(name: str, file: Path | None, holder: str) -> str:
    """What goes into the repository as LICENSE.

    Args:
        file: the person's own copy of the text, which takes the place of ours.
        holder: whose work it is, for licences that say so in their first lines.

    Raises:
        UserError: it is none of the texts here, and no file is given, or not one of text.
    """
    here = TEXTS / f"{name}.txt"
    if file is None and not here.is_file():
        shipped = ", ".join(sorted(path.stem for path in TEXTS.iterdir()))
        raise UserError(
            f"The text of {name} isn't here (only of {shipped}), and should go with the model; "
            "give it with --license-file FILE."
        )
    try:
        text = (file or here).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"--license-file {file} can't be read as text: {problem}") from None
    if file is None:
        text = text.replace("<year>", str(datetime.date.today().year)).replace("<holder>", holder)
    return text
