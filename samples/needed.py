"""What the samples need beside a framework: imported before it, this says what to install."""

from importlib.util import find_spec

missing = [name for name in ("matplotlib", "sklearn", "tqdm") if find_spec(name) is None]
if missing:
    raise ImportError(
        f"the samples need {', '.join(missing)}, not installed here. Install what they need with: "
        'python -m pip install "overconv[samples]"'
    )
