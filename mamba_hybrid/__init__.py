"""Turn a pretrained Llama-family Transformer into an attention-SSM hybrid, distil it, serve it.

Importing this package registers `model_type: "mamba_hybrid"` with transformers' Auto classes.
"""

from .config import HybridMambaConfig
from .model import HybridMambaForCausalLM, HybridMambaModel
from .version import __version__

__all__ = ["HybridMambaConfig", "HybridMambaForCausalLM", "HybridMambaModel", "__version__"]
