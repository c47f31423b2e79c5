"""With this folder on PYTHONPATH, vLLM takes Triton for usable on a CPU and picks Model Runner V2, the GPU's default.

Triton's interpreter runs the kernels (TRITON_INTERPRET=1); what vLLM looks for is an active backend, which is given
here.
"""

import torch
import triton.backends
from triton.backends.compiler import GPUTarget


class CpuDriver:
    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu


Backend = type(triton.backends.backends["nvidia"])
triton.backends.backends["cpu"] = Backend(compiler=None, driver=CpuDriver)
triton.runtime.driver.set_active(CpuDriver())
