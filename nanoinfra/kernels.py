"""`nanoinfra.kernels.x` is the top-level folder `kernels/`; see there. A wheel puts it beside this file."""
from pathlib import Path

_here = Path(__file__).resolve().parent
__path__ = [str(_here / "kernels"), str(_here.parent / "kernels")]
